"""Several processes for the tests, as `srun` starts them: no launcher watches over them.

    python many.py one FAULT ARGUMENTS...    a process, `rc-probe ARGUMENTS`, that somebody else has started
    python many.py serve ARGUMENTS...        `rc-probe ARGUMENTS`; then requests from standard input, see `Request`

The server runs the command first, so that all is imported when the processes fork.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, this file sees its own folder alone

import rc_probe
from rc_probe import api  # noqa: F401 - imported before the fork
from rc_probe.hooks.edits.passes import Passes
from rc_probe.hooks.errors import RcProbeError
from rc_probe.processes import heartbeat as pulse
from rc_probe.processes.world import World


def inject(fault: str) -> None:
    """Let something go wrong in the second edited pass of the process RANK."""
    kind, _, rank = fault.partition("@")
    if os.environ.get("RANK", "0") != rank:
        return
    plain, edited, passes = Passes.plain, Passes.edited, []

    def spoilt(self: Passes, *others: Any, **how: Any) -> Any:
        if kind == "nan":
            with torch.no_grad():
                next(self.structure.model.parameters()).fill_(torch.nan)
        return plain(self, *others, **how)

    def broken(self: Passes, *others: Any, **how: Any) -> Any:
        if sys._getframe(1).f_globals["__name__"] == "rc_probe.engine":  # not those that prove shortcuts
            passes.append(1)
        if len(passes) == 2:
            if kind == "error":
                raise RcProbeError("cannot be read", where="some file")
            if kind == "bug":
                raise TypeError("a bug")
            if kind == "memory":
                raise RuntimeError("CUDA out of memory. Tried to allocate")
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if kind == "interrupt":
                os.killpg(os.getpgid(0), signal.SIGINT)
                time.sleep(20)
        return edited(self, *others, **how)

    Passes.plain, Passes.edited = spoilt, broken

    from rc_probe.paths import effectiveness

    class Fails(effectiveness._Run):
        def exact(self) -> None:
            raise RuntimeError("can't allocate memory") if kind == "pathmemory" else RcProbeError("no parts")

    if kind.startswith("path"):
        effectiveness._Run = Fails  # type: ignore[misc]


def command(*arguments: str) -> None:
    from rc_probe.__main__ import main

    sys.argv = ["rc-probe", *arguments]
    main()


# ---- calls


def together() -> dict[str, Any]:
    """Every way in which a World puts things together."""
    with World.join(cpu=True) as world:
        mine = world.share(range(7))
        first = world.once(lambda: f"from {world.rank}")
        total = world.sum(torch.tensor([sum(mine), len(mine)]))
        return {
            "rank": world.rank, "mine": list(mine), "gathered": world.gather(world.rank**2), "first": first,
            "sum": total.tolist(), "dtype": str(total.dtype),
        }  # fmt: skip


def different(kind: str) -> None:
    with World.join(cpu=True) as world:
        if kind == "facts":
            world.same({"samples": 3 if world.rank else 4, "batches": 1})
        world.gather(0, f"way {world.rank}")


def attached(folder: str) -> Any:
    """A loop of the user's own in a group of the user's own, sharded so that process 2 has nothing."""
    import transformers

    torch.distributed.init_process_group("gloo")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    ids = torch.randint(4, 32, (10, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), rc_probe.attach(model) as probe:
        for row in (
            ids.split(2)[torch.distributed.get_rank() :: 2] if torch.distributed.get_rank() < 2 else ()
        ):
            model(input_ids=row, attention_mask=torch.ones_like(row))
    return probe.frame(gather=True).to_dict("list")


def short_and_full(folder: str) -> Any:
    """Variants of a process's share of the batches, by passes that begin at their edits and by full ones."""
    import transformers

    from rc_probe import engine
    from rc_probe.data.batches import Batch
    from rc_probe.hooks.attach import find_structure
    from rc_probe.interventions.grammar import parse_intervention
    from rc_probe.interventions.paper import paper_variants
    from rc_probe.measures.variant_passes import measure_variants

    with World.join(cpu=True) as world:
        model = transformers.AutoModel.from_pretrained(folder).eval()
        ids = torch.randint(4, 32, (8, 9), generator=torch.Generator().manual_seed(0))
        mask = torch.ones(2, 9, dtype=torch.bool)
        shares = world.share(range(4))
        made = [
            Batch({"input_ids": ids[2 * i : 2 * i + 2], "attention_mask": mask.long()}, mask, 2 * i)
            for i in shares
        ]
        structure = find_structure(model, made[0].inputs)
        variants = [*paper_variants(structure), parse_intervention("mlp@2"), parse_intervention("head@2:1")]
        both = []
        for proof in (engine.shortcut_problem, lambda *_: "as a test"):
            engine.shortcut_problem = proof
            curves, notes = measure_variants(structure, made, variants, ["residual", "cosine"])
            both.append({name: repr(each.rows()) for name, each in curves.items()})
        return {
            "rank": world.rank,
            "batches": len(made),
            "same": both[0] == both[1],
            "notes": notes,
            "count": len(both[0]),
        }


def probed(folder: str) -> Any:
    """The Python API."""
    from support.tiny import words

    with World.join(cpu=True) as world:
        texts = [words(3 + i, i + 1) for i in range(5)]
        found = rc_probe.probe(folder, texts, batch_size=2, init=False, recursion=False, world=world)
        return found.tables["residuals"].to_dict("list") | {"processes": found.settings["processes"]}


# ---- processes


@dataclass
class Request:
    """`words`: a function of this file and its arguments, in each of `size` processes; the answer is a JSON line."""

    size: int
    words: list[str]
    folder: str
    fault: str = ""
    lost: float = pulse.LOST


def child(rank: int, given: Request, port: int, answer: Path) -> int:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(given.size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        inject(given.fault)
        pulse.LOST, pulse.LAST = given.lost, 3.0
        found = globals()[given.words[0]](*given.words[1:])
        answer.write_text(json.dumps(found))
    except SystemExit as end:
        return int(end.code or 0)
    except RcProbeError as error:
        answer.write_text(json.dumps(str(error)))
        return 3
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def start(rank: int, group: int, given: Request, port: int, answer: Path, errors: Path) -> int:
    """The id of a new process in the process group (0: one of its own)."""
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, group)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with errors.open("a") as log, open(os.devnull, "w") as nowhere:
        os.dup2(log.fileno(), 2)
        os.dup2(nowhere.fileno(), 1)
    code = child(rank, given, port, answer)
    sys.stderr.flush()
    os._exit(code)


def serve(given: Request) -> dict[str, Any]:
    os.chdir(given.folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers, errors = [Path(f"answer-{rank}.json") for rank in range(given.size)], Path("errors.txt")
    for path in (*answers, errors):
        path.unlink(missing_ok=True)
    began, pids = time.monotonic(), list[int]()
    for rank, answer in enumerate(answers):
        pids.append(start(rank, pids[0] if pids else 0, given, port, answer, errors))
    codes: dict[int, int] = {}
    while len(codes) < given.size:
        pid, status = os.waitpid(-1, os.WUNTRACED)
        if not os.WIFSTOPPED(status):  # one that is stopped counts as dead to the others
            codes[pid] = os.waitstatus_to_exitcode(status)
        left = [pid for pid in pids if pid not in codes]
        if given.fault.startswith("stop") and len(left) == 1:
            os.kill(left[0], signal.SIGKILL)
    return {
        "codes": [codes[pid] for pid in pids], "seconds": time.monotonic() - began, "errors": errors.read_text(),
        "found": [json.loads(path.read_text()) if path.exists() else None for path in answers],
    }  # fmt: skip


def main() -> None:
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # for `support`
    if sys.argv[1] == "one":
        inject(sys.argv[2])
        return command(*sys.argv[3:])
    import accelerate  # noqa: F401

    from rc_probe.difference.result import DiffResult

    for kind in (rc_probe.ProbeResult, DiffResult):
        kind.to_html = lambda *_, **__: ""  # type: ignore[attr-defined]  # costs more than the rest
    command_or_exit(*sys.argv[2:])
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(Request(**json.loads(line)))), flush=True)


def command_or_exit(*arguments: str) -> None:
    try:
        command(*arguments)
    except SystemExit as end:
        if end.code:
            raise


if __name__ == "__main__":
    main()
