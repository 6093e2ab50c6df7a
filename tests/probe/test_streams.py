"""Models whose blocks hand on several streams side by side: each is measured; nothing in them is ablated."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from census.build import build
from support.command import Run, fails
from support.nets import Net
from support.odd_models import Plain
from support.tiny import saved, tokenizer, words
from torch import Tensor, nn

import rc_probe
from rc_probe.data.batches import Batch
from rc_probe.hooks.attach import find_structure
from rc_probe.integrations.monitor import Monitor
from rc_probe.measures.below_floor.below_float_floor import below_the_floor
from rc_probe.models.load import load_model
from rc_probe.paths import decompose
from rc_probe.processes.world import World
from rc_probe.result import ProbeResult

LENGTHS = (7, 4, 1, 6)  # real tokens of each row; a row of one is no sample


def padded(seed: int = 0, words: int = 20) -> dict[str, Tensor]:
    ids = torch.randint(5, words, (4, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    return {"input_ids": ids.where(mask, 0), "attention_mask": mask.long()}


def by_hand(x: np.ndarray) -> dict[str, float]:
    """The metrics of one sample (tokens, dim), in float64."""
    res = x - x.mean(0)

    def composite(y: np.ndarray) -> float:
        return float(np.sqrt(np.abs(y).sum(0).max() * np.abs(y).sum(1).max()))

    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    n = len(x)
    return {
        "residual": composite(res) / composite(x),
        "residual_frobenius": float(np.linalg.norm(res) / np.linalg.norm(x)),
        "cosine": float(((unit @ unit.T).sum() - n) / (n * (n - 1))),
    }


def handed_on(blocks: Sequence[nn.Module], run: Callable[[], Any], order: Sequence[int]) -> list[np.ndarray]:
    """What enters block 1 and what leaves each, (samples, tokens, streams, dim), by plain hooks of the test."""
    found: list[Tensor] = []
    with torch.no_grad():
        handles = [blocks[0].register_forward_pre_hook(lambda m, args: found.append(args[0].clone()))]
        handles += [
            block.register_forward_hook(lambda m, a, out: found.append(out.clone())) for block in blocks
        ]
        run()
        for handle in handles:
            handle.remove()
    return [x.permute(*order).double().numpy() for x in found]


def compare(
    rows: Any, layers: list[np.ndarray], of: Callable[[np.ndarray], np.ndarray], within: float
) -> None:
    """Rows of one frame against numbers by hand; of: what is taken of a sample (tokens, streams, dim)."""
    for layer, x in enumerate(layers):
        here = rows[rows["layer"] == layer]
        samples = [by_hand(of(row[:n])) for row, n in zip(x, LENGTHS, strict=True) if n > 1]
        for metric in samples[0]:
            row = here[here["metric"] == metric].iloc[0]
            values = [one[metric] for one in samples]
            assert row["count"] == 3
            assert row["mean"] == pytest.approx(np.mean(values), rel=within)
            assert row["std"] == pytest.approx(np.std(values, ddof=1), rel=100 * within)


@pytest.mark.parametrize(
    ("model_type", "order"), [("deepseek_v4", (0, 1, 2, 3)), ("gemma3n_text", (1, 2, 0, 3))]
)
def test_attach_measures_each_stream(model_type: str, order: tuple[int, ...]) -> None:
    model, inputs = build(model_type, dtype=torch.float64), padded()
    layers = handed_on(model.layers, lambda: model(**inputs), order)
    plain = model(**inputs)[0]
    with torch.no_grad(), rc_probe.attach(model, inputs=inputs) as probe:
        assert torch.equal(model(**inputs)[0], plain)
    assert probe.structure.signature == "4 streams" and layers[0].shape == (4, 7, 4, 64)
    whole, each = probe.frame(), probe.streams_frame()
    assert list(each.columns) == ["stream", *whole.columns]
    assert each["stream"].unique().tolist() == [1, 2, 3, 4]
    compare(whole, layers, lambda x: x.reshape(len(x), -1), 1e-10)
    for stream in range(4):
        compare(each[each["stream"] == stream + 1], layers, lambda x, s=stream: x[:, s], 1e-10)  # type: ignore[misc]


# ---- blocks of a test's own


class Mixed(Plain):
    """Streams along `axis` are mixed, read as one, and written to each with a weight of its own."""

    def __init__(self, axis: int, streams: int, *, mixes: bool) -> None:
        super().__init__("plain")
        self.axis, self.mixes = axis, mixes
        self.mix, self.write = (
            nn.Linear(streams, streams, bias=False),
            nn.Parameter(torch.rand(2, streams) + 0.5),
        )

    def written(self, y: Tensor, number: int) -> Tensor:
        shape = [1, 1, 1, 1]
        shape[self.axis] = -1
        return y.unsqueeze(self.axis) * self.write[number].reshape(shape)

    def kept(self, x: Tensor) -> Tensor:
        return self.mix(x.movedim(self.axis, -1)).movedim(-1, self.axis) if self.mixes else x

    def forward(self, x: Tensor) -> Tensor:
        x = self.kept(x) + self.written(self.attention(self.norm1(x.mean(self.axis))), 0)
        read = self.norm2(x.mean(self.axis))
        return self.kept(x) + self.written(self.down(self.up(read).relu()), 1)


class Streams(Net):
    def __init__(self, axis: int, streams: int, *, mixes: bool = True) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__(*(Mixed(axis, streams, mixes=mixes) for _ in range(3)))
        self.axis, self.streams, self.between = axis, streams, 1.0
        self.double().eval()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.stack([self.embed(input_ids) * (n + 1) for n in range(self.streams)], self.axis)
        for block in self.blocks:
            x = block(x if self.between == 1 else x * self.between)
        return x.mean(self.axis)


IDS = {"input_ids": padded()["input_ids"][:, :5]}
ORDERS = {0: (1, 2, 0, 3), 1: (0, 2, 1, 3), 2: (0, 1, 2, 3)}


@pytest.mark.parametrize("mixes", [True, False])
@pytest.mark.parametrize(("axis", "streams"), [(0, 3), (1, 3), (2, 3), (0, 2), (2, 5)])
def test_wherever_the_streams_lie(axis: int, streams: int, mixes: bool) -> None:
    """As many streams as samples (2), and as tokens (5), too: then other inputs tell."""
    model = Streams(axis, streams, mixes=mixes)
    layers = handed_on(list(model.blocks), lambda: model(**IDS), ORDERS[axis])
    with torch.no_grad(), rc_probe.attach(model, mask=None, inputs=IDS) as probe:
        model(**IDS)
    assert probe.structure.mixed is mixes and probe.structure.streams == streams
    assert probe.structure.signature == (f"{streams} streams" if mixes else "A|M")
    each = probe.streams_frame().query("metric == 'residual' and layer == 3")["mean"].tolist()
    wanted = [np.mean([by_hand(x[:, n])["residual"] for x in layers[3]]) for n in range(streams)]
    assert each == pytest.approx(wanted, rel=1e-10)


def test_streams_that_are_sums_of_branches_are_ablated_too() -> None:
    model = Streams(2, 3, mixes=False)
    with torch.no_grad():
        with rc_probe.ablate(model, "mlp@2", inputs=IDS):
            ablated = model(**IDS)
        model.blocks[1].write[1] = 0.0
        assert torch.equal(model(**IDS), ablated)


def test_a_model_with_one_stream_has_a_frame_of_that_one() -> None:
    model = Net(*(Plain("plain") for _ in range(2))).eval()
    with torch.no_grad(), rc_probe.attach(model, mask=None, inputs=IDS) as probe:
        model(**IDS)
    each = probe.streams_frame()
    assert each.pop("stream").unique().tolist() == [1]
    assert each.equals(probe.frame())


SAYS = "its blocks hand on 3 streams side by side and mix them, and no skip carries one of them as it is. rc-probe measures"


def test_what_changes_a_model_or_follows_its_branches_is_refused() -> None:
    model = Streams(0, 3)
    with torch.no_grad(), rc_probe.attach(model, mask=None, inputs=IDS):
        model(**IDS)  # once known as measurable it is refused all the same
    for use in (
        lambda: rc_probe.ablate(model, "mlp@1", inputs=IDS),
        lambda: decompose(model, IDS),
        lambda: find_structure(model, IDS),
    ):
        with pytest.raises(rc_probe.RcProbeError, match=SAYS) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_pure_attention_is_that_of_one_stream() -> None:
    model = Streams(2, 3, mixes=False)
    below = below_the_floor(find_structure(model, IDS), Batch(IDS, None), "init")
    assert below.recursion == [] and "3 streams side by side, and it is about one" in below.notes[0]


def test_streams_that_change_between_blocks_are_refused() -> None:
    model = Streams(0, 3)
    model.between = 2.0
    with pytest.raises(rc_probe.RcProbeError, match=r"enters blocks\.1 is not what blocks\.0 returned"):
        rc_probe.attach(model, inputs=IDS)


class Idle(Mixed):
    """Its last stream is a copy of the first: what enters there is never read."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[:2], x[:1]])
        return super().forward(x)


def test_what_is_read_by_no_block_is_no_stream() -> None:
    model = Streams(0, 3)
    model.blocks[1].__class__ = Idle
    with pytest.raises(rc_probe.RcProbeError, match=r"block 2 .*does not depend on its stream 3"):
        rc_probe.attach(model, inputs=IDS)


def test_a_monitor_measures_all_together() -> None:
    model = Streams(0, 3)
    one = {"input_ids": IDS["input_ids"][:1]}
    last = handed_on(list(model.blocks), lambda: model(**one), ORDERS[0])[3][0]
    found = Monitor(model, [one]).measure()
    assert found["residual_last"] == pytest.approx(by_hand(last.reshape(5, -1))["residual"], rel=1e-10)


# ---- the command


class Twice(World):
    """As if a second process had measured the same."""

    def gather(self, value: Any, what: str = "") -> list[Any]:
        return [value, value]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("streams")
    saved(place / "model", build("gemma3n_text"), tokenizer())
    (place / "texts.txt").write_text("\n".join(words(n, step) for n, step in [(9, 1), (5, 3), (12, 5)]))
    return place


def test_a_run_has_a_table_and_a_section_of_them(folder: Path, run: Run) -> None:
    out = folder / "out"
    words = [
        str(folder / "model"),
        "--data",
        str(folder / "texts.txt"),
        "--init-seeds",
        "2",
        "--out",
        str(out),
    ]
    code, _, said = run(*words)
    assert code == 0, said
    result = ProbeResult.load(out)
    table = result.tables["streams"]
    assert set(table["weights"]) == {"pretrained", "init"} and set(table["stream"]) == {1, 2, 3, 4}
    assert set(table.query("weights == 'init'")["count"]) == {6} and set(table["layer"]) == {0, 1, 2, 3}
    assert set(result.tables["residuals"]["variant"]) == {"transformer"}
    model = result.model
    assert model["signature"] == "4 streams" and model["norm"] is None
    missing = list(result.settings["missing"])
    assert {"importance", "floor", "paths", "chains"} <= set(missing)
    notes = " ".join(model["notes"])
    assert "hand on 4 streams side by side. The curves are of all of them together" in notes
    assert f"Not measured: {', '.join(missing)}. Gemma3nTextModel: its blocks hand on 4" in notes
    page = (out / "report.html").read_text("utf-8")
    last = table.query("weights == 'pretrained' and metric == 'residual_bulk' and layer == 3")[
        "mean"
    ].tolist()
    assert "<h2>Stream by stream</h2>" in page
    assert f"At layer 3 the relative residual of the bulk is {last[0]:.2f} in stream 1," in page


def test_the_numbers_of_a_run_are_those_of_attach(folder: Path) -> None:
    loaded = load_model(str(folder / "model"))
    texts = (folder / "texts.txt").read_text().splitlines()
    ways: list[dict[str, Any]] = [{"batch_size": 1}, {"batch_size": 3, "world": Twice()}]
    tables = [
        rc_probe.probe(loaded.model, texts, processor=loaded.processor, init=False, **way).tables["streams"]
        for way in ways
    ]
    inputs = loaded.processor(texts, padding=True, return_tensors="pt")
    with torch.no_grad(), rc_probe.attach(loaded.model, inputs=dict(inputs)) as probe:
        loaded.model(**inputs)
    for row in probe.streams_frame().itertuples():
        for table in tables:
            mine = table.query(
                "stream == @row.stream and layer == @row.layer and metric == @row.metric"
            ).iloc[0]
            assert mine["mean"] == pytest.approx(row.mean, rel=1e-5)
            assert mine["count"] == (3 if table is tables[0] else 6)


def test_an_ablation_of_one_ends_the_command_in_one_line(folder: Path, run: Run) -> None:
    words = [str(folder / "model"), "--data", str(folder / "texts.txt"), "--ablate", "mlp@1"]
    fails(run, "hand on 4 streams side by side", *words)
