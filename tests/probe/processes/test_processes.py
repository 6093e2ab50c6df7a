"""One run in several processes: the same tables, one clear line when something goes wrong, and never a hang."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from support import tiny
from support.places import TESTS
from support.two_models import perturbed

import rc_probe
from rc_probe.data.batches import batches
from rc_probe.data.samples import load_samples
from rc_probe.hooks.errors import RcProbeError
from rc_probe.metrics.moments import Moments, pack, unpack
from rc_probe.models.load import load_model
from rc_probe.processes.world import World

MANY = TESTS / "support" / "processes.py"
FAST = ("--no-init", "--no-recursion", "--no-paths", "--quiet")
FULL = ("--init-seeds", "2", "--ablate", "mlp@1", "--ablate", "head@2:1", "--svd-samples", "3", "--importance", "parts", "--drop", "1", "--paths", "3", "--repeats", "2", "--masks", "--map", "temperature=2", "norm=frozen", "--quiet")  # fmt: skip
HANGS = (
    120  # seconds, on however busy a machine; who waits for a lost process without being told waits for long
)
LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION")
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "-m", "rc_probe"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m", "rc_probe"],
    "rc-probe": ["rc_probe", "--num-processes", "2"],
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and seven texts, four batches of two."""
    folder = tmp_path_factory.mktemp("processes")
    torch.manual_seed(0)
    tiny.saved(folder / "model", tiny.bert(), tiny.tokenizer())
    texts = [tiny.words(3 + i % 5, i + 1) for i in range(7)]
    (folder / "texts.txt").write_text("\n".join(texts) + "\n")
    return folder


def arguments(out: str, *options: str) -> list[str]:
    return ["model", "--data", "texts.txt", "--batch-size", "2", "--out", out, *options]


def run(here: Path, *words: str, seconds: float = 120, **extra: str) -> subprocess.CompletedProcess[str]:
    """Python with these words, in a session of its own, one thread each, without traces of other launchers."""
    env = {key: value for key, value in os.environ.items() if key not in LAUNCHED}
    env |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **extra}
    return subprocess.run(
        [sys.executable, *words], cwd=here, env=env, timeout=seconds, capture_output=True, text=True,
        check=False, start_new_session=True,
    )  # fmt: skip


Many = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def many(here: Path) -> Iterator[Many]:
    """many(size, function, arguments…, fault=, lost=): what `size` processes of many.py did.

    In `here`, the folder `one` is what one process makes of the texts.
    """
    env = {key: value for key, value in os.environ.items() if key not in LAUNCHED}
    server = subprocess.Popen(
        [sys.executable, str(MANY), "serve", *arguments("one", *FULL)], cwd=here,
        env=env | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1,
    )  # fmt: skip
    assert server.stdin and server.stdout
    assert server.stdout.readline() == "ready\n"

    def ask(size: int, *words: str, **options: Any) -> dict[str, Any]:
        print(json.dumps({"size": size, "words": words, "folder": str(here), **options}), file=server.stdin)
        answer: dict[str, Any] = json.loads(server.stdout.readline())
        return answer

    yield ask
    server.stdin.close()
    server.wait(30)


def said(error: str) -> list[str]:
    return [line for line in error.splitlines() if line.startswith("rc-probe: ")]


def same_tables(one: Path, other: Path) -> None:
    files = sorted(path.name for path in one.glob("*.csv"))
    assert files == sorted(path.name for path in other.glob("*.csv"))
    assert "residuals.csv" in files
    for name in files:
        wanted, found = (pd.read_csv(folder / name, float_precision="round_trip") for folder in (one, other))
        pd.testing.assert_frame_equal(found, wanted, rtol=1e-12, atol=1e-12)


# ---- the same numbers


@pytest.mark.parametrize("size", [2, 3, 6])
def test_any_number_of_processes_gives_the_same_tables(here: Path, many: Many, size: int) -> None:
    """Seven texts in four batches: shares differ in size, and of six processes two have no sample."""
    found = many(size, "command", *arguments(f"by-{size}", *FULL))
    assert found["codes"] == [0] * size, found["errors"]
    assert said(found["errors"]) == []
    same_tables(here / "one", here / f"by-{size}")
    one, other = (json.loads((here / name / "results.json").read_text()) for name in ("one", f"by-{size}"))
    assert (one["settings"].pop("processes"), other["settings"].pop("processes")) == (1, size)
    notes, idle = other["settings"].pop("notes"), "2 of 6 processes had no batch"
    assert (notes[-1].startswith(idle)) == (size == 6)
    assert notes[:1] == one["settings"].pop("notes")
    for results in (one, other):
        del results["settings"]["command"]
    assert other["settings"] == one["settings"]
    assert other["model"] == one["model"]
    table = pd.read_csv(here / f"by-{size}" / "residuals.csv").query("weights == 'pretrained'")
    counts = table.groupby("metric")["count"].unique().map(list).to_dict()
    assert counts["residual"] == [7]
    assert counts["effective_rank"] == [3]  # two of the first batch, one of the second, which others have


def test_two_models_in_any_number_of_processes(here: Path, many: Many) -> None:
    """Seven texts in three batches, halves of texts cut across batches: of four processes one has nothing."""
    torch.manual_seed(0)
    tiny.saved(
        here / "other", perturbed(tiny.bert(), "encoder.layer.1.output.dense.weight", 0.3), tiny.tokenizer()
    )
    given = ("diff", "model", "other", "--data", "texts.txt", "--batch-size", "3", "--cka", "--quiet")
    for size in (1, 2, 4):
        found = many(size, "command", *given, "--out", f"diff-{size}", "--fail-if", "sensitivity@2<1e-5")
        assert found["codes"] == [0] * size, found["errors"]
    one, *others = (json.loads((here / f"diff-{size}" / "results.json").read_text()) for size in (1, 2, 4))
    table, *tables = (pd.read_csv(here / f"diff-{size}" / "differences.csv") for size in (1, 2, 4))
    assert {"cka", "difference", "sensitivity", "agreement", "embedding_distance"} <= set(table["metric"])
    for size, other, its in zip((2, 4), others, tables, strict=True):
        pd.testing.assert_frame_equal(its, table, rtol=1e-9, atol=1e-12)
        assert other["settings"].pop("processes") == size
        assert other["settings"]["predictions"] == one["settings"]["predictions"]


def test_passes_that_begin_at_their_edits_are_the_full_ones_in_each_process(many: Many) -> None:
    found = many(2, "short_and_full", "model")
    assert found["codes"] == [0, 0], found["errors"]
    assert found["found"] == [
        {
            "rank": rank,
            "batches": 2,
            "same": True,
            "notes": ["Every pass was a full one: as a test."],
            "count": 6,
        }
        for rank in (0, 1)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers(here: Path, many: Many, launcher: str) -> None:
    out = f"by-{launcher}"
    done = run(here, "-m", *LAUNCHERS[launcher], *arguments(out, *FAST, "--svd-samples", "3"), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["settings"]["processes"] == 2  # printed once
    one, two = (
        pd.read_csv(here / name / "residuals.csv", float_precision="round_trip") for name in ("one", out)
    )
    one = one[(one.weights == "pretrained") & one.variant.isin(two.variant)].reset_index(drop=True)
    pd.testing.assert_frame_equal(two, one, rtol=1e-12, atol=1e-12)


def test_whole_batches_are_shared_since_a_batchs_shape_rounds_differently(here: Path) -> None:
    """What the design rests on: a batch knows its place, and is made as one process would make it."""
    made = batches(
        load_samples(str(here / "texts.txt"), modality="text"), load_model(str(here / "model")), batch_size=2
    )
    alone = list(made)
    assert [batch.start for batch in alone] == [0, 2, 4, 6]
    for first in range(3):
        numbers = range(first, 4, 3)
        for number, batch in zip(numbers, made.of(numbers), strict=True):
            assert batch.start == alone[number].start
            for key, value in batch.inputs.items():
                assert torch.equal(value, alone[number].inputs[key])


def test_packed_moments_merge_to_those_of_all_numbers() -> None:
    numbers = [np.random.default_rng(seed).normal(3, 1e-3, size=seed) for seed in (5, 1, 8)]
    packs = []
    for part in [*numbers, []]:
        moments = Moments()
        moments.add(torch.tensor(np.array(part)))
        packs.append(pack({(1, "residual"): moments} if len(part) else {}))
    found = unpack(packs)[1, "residual"]
    whole = np.concatenate(numbers)
    assert float(found.mean) == pytest.approx(whole.mean(), rel=1e-15)
    assert float(found.std) == pytest.approx(whole.std(ddof=1), rel=1e-12)
    assert int(found.count) == 14
    assert unpack([pack({})]) == {}


# ---- what a World does


def test_world_of_one() -> None:
    with World() as world:
        assert world.share([1, 2, 3]) == [1, 2, 3]
        assert world.gather("x") == ["x"]
        assert world.once(lambda: 5) == 5
        assert torch.equal(world.sum(torch.tensor([1, 2])), torch.tensor([1.0, 2.0], dtype=torch.float64))
        world.same({"a": 1})
        world.check()
        with world.local_first():
            pass
        assert world.post(ValueError())


def test_world_of_three(many: Many) -> None:
    found = many(3, "together")
    assert found["codes"] == [0, 0, 0], found["errors"]
    for rank, answer in enumerate(found["found"]):
        assert answer == {
            "rank": rank, "mine": list(range(rank, 7, 3)), "gathered": [0, 1, 4], "first": "from 0",
            "sum": [21.0, 7.0], "dtype": "torch.float64",
        }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "says"), [("facts", "process 1: it has other samples"), ("ways", "way 0, way 1")]
)
def test_processes_that_measure_different_things(many: Many, kind: str, says: str) -> None:
    found = many(2, "different", kind)
    assert found["codes"] == [3, 3]
    assert all(says in answer for answer in found["found"])


def test_python_interface(here: Path, many: Many) -> None:
    found = many(2, "probed", "model")
    assert found["codes"] == [0, 0], found["errors"]
    first, second = found["found"]
    assert first == second
    assert first["processes"] == 2
    texts = [tiny.words(3 + i, i + 1) for i in range(5)]
    alone = rc_probe.probe(str(here / "model"), texts, batch_size=2, init=False, recursion=False)
    assert np.allclose(
        first["mean"], alone.tables["residuals"]["mean"].to_numpy(float), rtol=1e-12, atol=1e-12
    )


def test_attached_in_a_loop_of_ones_own(here: Path, many: Many) -> None:
    """Two processes share ten samples, a third has none; all get the frame that one process gets."""
    found = many(3, "attached", "model")
    assert found["codes"] == [0, 0, 0], found["errors"]
    model = transformers.AutoModel.from_pretrained(here / "model").eval()
    ids = torch.randint(4, 32, (10, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), rc_probe.attach(model) as probe:
        for row in ids.split(2):
            model(input_ids=row, attention_mask=torch.ones_like(row))
    wanted = probe.frame()
    assert wanted["count"].eq(10).all()
    for answer in found["found"]:
        pd.testing.assert_frame_equal(pd.DataFrame(answer), wanted, rtol=1e-12, atol=1e-12)
    pd.testing.assert_frame_equal(probe.frame(gather=True), wanted)  # without a group, this process alone


# ---- what goes wrong


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("error@1", "some file: cannot be read"),
        ("error@0", "some file: cannot be read"),
        ("nan@1", "layer 0 holds NaN or infinity"),
        ("memory@2", "out of memory"),
        ("interrupt@1", "interrupted"),
    ],
)
def test_an_error_in_one_process_ends_all_with_one_line(
    here: Path, many: Many, fault: str, says: str
) -> None:
    found = many(3, "command", *arguments("broken", *FAST), fault=fault)
    error = found["errors"]
    codes = [130] * 3 if fault == "interrupt@1" else [2] * 3
    assert found["codes"] == codes, error
    assert len(said(error)) == 1, error
    assert re.search(says, said(error)[0])
    assert "Traceback" not in error
    assert not (here / "broken").exists()
    assert found["seconds"] < HANGS


@pytest.mark.parametrize(
    ("fault", "says"), [("path@1", "no parts"), ("pathmemory@1", "process 1 has no memory left")]
)
def test_paths_that_fail_in_one_process_are_a_note_of_all(
    here: Path, many: Many, fault: str, says: str
) -> None:
    out = f"noted-{fault}"
    found = many(
        2,
        "command",
        *arguments(out, "--no-init", "--no-recursion", "--importance", "none", "--quiet"),
        fault=fault,
    )
    assert found["codes"] == [0, 0], found["errors"]
    notes = json.loads((here / out / "results.json").read_text())["model"]["notes"]
    assert sum(note.startswith("Paths were not measured") and says in note for note in notes) == 1
    assert (here / out / "residuals.csv").exists() and not (here / out / "paths.csv").exists()


@pytest.mark.parametrize("fault", ["kill@1", "kill@0", "stop@2"])
def test_a_process_that_dies_ends_the_others(here: Path, many: Many, fault: str) -> None:
    """Nobody watches over these processes: they find out by themselves. Process 0 holds the store."""
    found = many(3, "command", *arguments("broken", *FAST), fault=fault, lost=4)
    dead, error = int(fault[-1]), found["errors"]
    assert [found["codes"][rank] for rank in range(3)] == [-9 if rank == dead else 2 for rank in range(3)]
    assert len(said(error)) == 1, error
    assert re.search(
        "is gone" if dead == 0 else f"process {dead} died or hangs|a process of the run died", error
    )
    assert not (here / "broken").exists()
    assert found["seconds"] < HANGS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        ("kill@1", 2, "process 1 of 2 was killed .SIGKILL.*Nothing was written"),
        ("error@1", 2, "some file"),
        ("bug@1", 2, ""),
    ],
)
def test_num_processes_reports_what_ended_them(here: Path, fault: str, code: int, says: str) -> None:
    words = [str(MANY), "one", fault, *arguments("broken", *FAST)]
    start = (
        "import sys\nfrom rc_probe.cli.errors import one_line_errors\n"
        "from rc_probe.processes.launch import start\nwith one_line_errors():\n"
        f"    raise SystemExit(start(2, [sys.executable, *{words!r}]))"
    )
    done = run(here, "-c", start)
    assert done.returncode == code
    assert len(said(done.stderr)) == bool(says), done.stderr
    assert re.search(says, done.stderr)
    assert done.stderr.count("TypeError: a bug") == (fault == "bug@1")
    assert not (here / "broken").exists()


# ---- launchers that start fewer processes than they say


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, and this process has no number .*--num-processes"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS is 4.*same work.*torchrun"),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"},
            "started one.*--multi_gpu, without --cpu",
        ),
    ],
)
def test_a_launcher_that_starts_single_processes(
    clean: pytest.MonkeyPatch, env: dict[str, str], says: str
) -> None:
    for name, value in env.items():
        clean.setenv(name, value)
    with pytest.raises(RcProbeError, match=says):
        World.join(cpu=True)
    with pytest.raises(RcProbeError, match=says):
        World.given()


def test_processes_that_believe_to_be_alone(clean: pytest.MonkeyPatch) -> None:
    """Accelerate without a GPU, not told so: each process of torchrun is one of one."""
    from accelerate import PartialState

    clean.setenv("WORLD_SIZE", "2")
    clean.setenv("RANK", "1")
    PartialState._reset_state()
    PartialState()
    try:
        with pytest.raises(RcProbeError, match="2 processes were meant, and this one sees 1"):
            World.join(cpu=True)
    finally:
        PartialState._reset_state()
    with pytest.raises(RcProbeError, match=r"2 processes were started, and they form no group.*PartialState"):
        World.given()


def test_accelerate_launch_for_the_cpu(here: Path) -> None:
    words = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "rc_probe"]
    done = run(here, "-m", *words, *arguments("alone", *FAST))
    assert done.returncode != 0
    assert len(said(done.stderr)) == 1
    assert "accelerate was told to start several processes, and started one" in done.stderr
    assert not (here / "alone").exists()


def test_options_that_do_not_go_together(here: Path) -> None:
    done = run(
        here, "-m", "rc_probe", *arguments("no", *FAST), "--num-processes", "3", WORLD_SIZE="2", RANK="0"
    )
    assert done.returncode == 2
    assert said(done.stderr) == [
        "rc-probe: --num-processes: 3 processes are wanted, and a launcher has started 2. Leave --num-processes out "
        "under torchrun or accelerate launch"
    ]
    done = run(
        here, "-m", "rc_probe", *arguments("no", *FAST), "--num-processes", "2", "--device-map", "auto"
    )
    assert done.returncode == 2
    assert (
        "--device-map, --num-processes: each of 2 processes would spread a whole model"
        in said(done.stderr)[0]
    )
    assert not (here / "no").exists()
    model, two = str(here / "model"), World(0, 2)
    with pytest.raises(RcProbeError, match=r"device_map: each of the 2 processes.*one process"):
        rc_probe.probe(model, ["w1 w2"], device_map="auto", world=two)
    with pytest.raises(RcProbeError, match="device: 2 processes cannot share cuda:1"):
        rc_probe.probe(model, ["w1 w2"], device="cuda:1", world=two)
