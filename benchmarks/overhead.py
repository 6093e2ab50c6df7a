"""What measuring costs, against the plain forward pass, in one process.

    python benchmarks/overhead.py [--rounds 9] [--part taps|narrow|massive|narrow-massive|attach|memory] [--mode 'residual'] [--allocator command|yours]

BERT-base shape (narrow: 384 wide, 6 blocks), 8 × 128 tokens, float32, 2 threads. massive: a GPT-2 of that shape whose
first position is a massive token in every sample and at every layer. Modes alternate within each round, in turned order every
other round; reported is the median of the paired ratios of process CPU time, with the quartiles. Memory is the
peak resident set of a process of its own for each mode. --allocator: plain pass and taps alike in a process that keeps freed memory,
as that of the command `rc-probe` does (see rc_probe.processes.allocator), or in one that is left as it is, as yours.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from timing import quartiles

from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.edits.edits import Edits
from rc_probe.measures.variant_passes import stream_pass
from rc_probe.metrics.layer_curves import Curves
from rc_probe.processes.allocator import keep_freed_memory
from rc_probe.registry import METRICS, select

CHEAP = [name for name in select() if METRICS[name].cost == "cheap"]
Mode = Callable[[], object]


def bert(**sizes: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**sizes)).eval()
    ids = torch.randint(1000, 30000, (8, 128))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def gpt2(**sizes: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = transformers.GPT2Model(transformers.GPT2Config(use_cache=False, **sizes)).eval()
    with torch.no_grad():
        model.wpe.weight[0] += 100.0
    ids = torch.randint(1000, 30000, (8, 128))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def taps() -> dict[str, Mode]:
    return tapped_modes(*bert())


def narrow() -> dict[str, Mode]:
    return tapped_modes(*bert(hidden_size=384, num_hidden_layers=6, intermediate_size=1536))


def massive() -> dict[str, Mode]:
    return tapped_modes(*gpt2())


def narrow_massive() -> dict[str, Mode]:
    return tapped_modes(*gpt2(n_embd=384, n_layer=6))


def tapped_modes(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, Mode]:
    """The plain pass, and the same with taps at every layer, for three sets of metrics and none."""
    structure = find_structure(model, inputs)

    def tapped(metrics: list[str]) -> Mode:
        curves = Curves(metrics)  # of all passes, as in a run
        return lambda: stream_pass(structure, inputs, Edits(), curves.on_stream)

    return {
        "plain": lambda: model(**inputs),
        "residual": tapped(["residual"]),
        "residual, and of the bulk": tapped(["residual", "residual_bulk"]),
        "all cheap metrics": tapped(CHEAP),
        "no metric": tapped([]),
    }


def attaching() -> dict[str, Mode]:
    """A plain pass of the small probe batch, and attaching with it."""
    from rc_probe.hooks import attach as prove
    from rc_probe.hooks.structure.example_inputs import example_inputs

    model, _ = bert()
    inputs = example_inputs(model)

    def attach() -> None:
        prove._known.clear()
        find_structure(model, inputs)

    return {"plain, 2 × 16 tokens": lambda: model(**inputs), "attach": attach}


def ratios(modes: dict[str, Mode], rounds: int) -> None:
    names = list(modes)
    times: dict[str, list[float]] = {name: [] for name in names}
    with torch.no_grad():
        for name in names:
            modes[name]()
        for turn in range(rounds):
            for name in names[:: 1 if turn % 2 == 0 else -1]:
                start = time.process_time()
                modes[name]()
                times[name].append(time.process_time() - start)
    base = times[names[0]]
    print(f"{names[0]}: {statistics.median(base):.3f} s CPU, {rounds} rounds")
    for name in names[1:]:
        paired = [t / b for t, b in zip(times[name], base, strict=True)]
        low, middle, high = quartiles(paired)
        print(f"{name}: × {middle:.3f}  [{low:.3f} – {high:.3f}]")


def peak(mode: str, passes: int, allocator: str) -> float:
    """Peak resident MiB of a fresh process that runs `mode` so many times."""
    command = [sys.executable, __file__, "--one", mode, "--rounds", str(passes), "--allocator", allocator]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def memory(rounds: int, allocator: str) -> None:
    def middle(mode: str, passes: int) -> float:
        return statistics.median(peak(mode, passes, allocator) for _ in range(rounds))

    for samples in (16, 96):
        base = middle("plain", samples // 8)
        print(f"plain, {samples} samples: {base:.0f} MiB, median of {rounds} processes")
        for mode in ("residual", "all cheap metrics"):
            print(f"{mode}: {middle(mode, samples // 8) - base:+.0f} MiB")


PARTS: dict[str, Callable[[], dict[str, Mode]]] = {
    "taps": taps, "narrow": narrow, "massive": massive, "narrow-massive": narrow_massive, "attach": attaching,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--part", choices=[*PARTS, "memory"], action="append")
    parser.add_argument("--mode", action="append", help="Of a part, such as 'residual'. (default: all)")
    parser.add_argument("--allocator", choices=["command", "yours"], default="command")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(2)
    if given.allocator == "command" and not keep_freed_memory():
        print("the allocator is left as it is")
    if given.one:
        modes = taps()  # they share one model, which the plain mode holds
        mode = modes[given.one]
        with torch.no_grad():
            for _ in range(given.rounds):
                mode()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    for part in given.part or [*PARTS, "memory"]:
        print(f"\n{part}")
        if part == "memory":
            memory(min(given.rounds, 3), given.allocator)
        else:
            modes = PARTS[part]()
            plain, *others = modes
            wanted = [name for name in others if name in (given.mode or others)]
            if wanted:
                ratios({name: modes[name] for name in (plain, *wanted)}, given.rounds)
            else:
                print(f"has none of these modes, but {', '.join(map(repr, others))}")


if __name__ == "__main__":
    main()
