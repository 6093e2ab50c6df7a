"""Masks, norms and maps: every cell against the model run with its spec, scored and measured by plain NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from support import tiny
from support.loops import numpy_residual
from typer.testing import CliRunner

import rc_probe
from rc_probe import RcProbeError
from rc_probe.cli.app import app
from rc_probe.comparison import Comparison
from rc_probe.measures.what_if.axes import parse_axis
from rc_probe.reports.sections.compared.what_if import WhatIf as CompareSection
from rc_probe.reports.sections.view import ComparedView
from rc_probe.reports.table_cells import cell
from rc_probe.result import ProbeResult
from rc_probe.results.protocols import Run

TEXTS = [tiny.words(6 + i % 5, i + 1) for i in range(4)]
LESS: dict[str, Any] = {"init": False, "recursion": False, "paths": False, "metrics": ("residual_bulk",)}
NETS = ["SAN − norm", "SAN", "SAN+skip", "transformer", "transformer − norm", "transformer − skip"]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(**tiny.GPT2_SIZES, initializer_range=0.3)
    return transformers.GPT2LMHeadModel(config).double().eval()


@pytest.fixture(scope="module")
def found(model: Any) -> ProbeResult:
    return rc_probe.probe(
        model, TEXTS, processor=tokenizer(), masks=True, norms=True, map=("temperature=0.5,2", "skip@2=0.5"), batch_size=3, **LESS,
    )  # fmt: skip


def tokenizer() -> Any:
    return tiny.tokenizer(special=False)


def by_hand(model: Any, spec: str) -> tuple[list[np.ndarray], float]:
    """The streams of each text after each layer, and the loss by token, text by text without padding."""
    streams, losses = [], []
    for text in TEXTS:
        inputs = tokenizer()(text, return_tensors="pt")
        given = {"input_ids": inputs["input_ids"]}
        with torch.no_grad():
            if spec == "transformer":
                out = model(**given, output_hidden_states=True)
            else:
                with rc_probe.ablate(model, spec):
                    out = model(**given, output_hidden_states=True)
        logp = out.logits[0, :-1].log_softmax(-1)
        losses += (-logp[range(len(logp)), given["input_ids"][0, 1:]]).tolist()
        streams.append([h[0].numpy() for h in out.hidden_states[:-1]])
    return streams, float(np.mean(losses))


def frobenius(X: np.ndarray) -> tuple[float, float]:
    R = X - X.mean(0)
    return float(np.linalg.norm(R) / np.linalg.norm(X)), float(np.linalg.norm(R))


def value(frame: pd.DataFrame, spec: str, layer: int, metric: str, column: str = "value") -> float:
    rows = frame[(frame["spec"] == spec) & (frame["metric"] == metric)]
    return float(rows[rows["layer"] == layer][column].iloc[0] if "layer" in rows else rows[column].iloc[0])


def test_every_cell_is_the_model_run_with_its_spec(model: Any, found: ProbeResult) -> None:
    masks, norms = found.tables["masks"], found.tables["norms"]
    specs = set(masks["spec"]) | set(norms["spec"])
    assert (
        len(specs) == 6 * 6 + 6 * 3 - 5
    )  # three networks with all their own, and two without norms, are in both
    plain = by_hand(model, "transformer")[1]
    for spec in sorted(specs):
        frame = masks if spec in set(masks["spec"]) else norms
        streams, loss = by_hand(model, spec)
        for layer in (0, 1):  # GPT-2 hands the stream after its last block out behind its final norm alone
            pairs = [frobenius(stream[layer]) for stream in streams]
            assert value(frame, spec, layer, "residual_frobenius") == pytest.approx(
                np.mean([p[0] for p in pairs]), rel=1e-9
            )
            wanted = np.mean([p[1] for p in pairs])
            assert value(frame, spec, layer, "residual_frobenius_absolute") == pytest.approx(wanted, rel=1e-9)
            bulk = value(frame, spec, layer, "residual_bulk")  # no token is massive here
            assert bulk == pytest.approx(np.mean([numpy_residual(s[layer]) for s in streams]), rel=1e-9)
        if "complete" in spec:
            assert frame[(frame["spec"] == spec) & (frame["metric"] == "loss")].empty
        else:
            assert value(frame, spec, 2, "loss") == pytest.approx(loss, rel=1e-9), spec
            assert value(frame, spec, 2, "loss", "baseline") == pytest.approx(plain, rel=1e-9)
    assert any("complete mask a causal model reads" in note for note in found.model["notes"])


def test_the_tables_have_every_mask_norm_and_network(found: ProbeResult) -> None:
    masks, norms = found.tables["masks"], found.tables["norms"]
    assert list(dict.fromkeys(masks["network"])) == NETS
    assert list(dict.fromkeys(masks["mask"])) == [
        "own",
        "complete",
        "left:32",
        "left:8",
        "left:1",
        "sink:4,left:8",
    ]
    assert list(dict.fromkeys(norms["norm"])) == ["own", "identity", "frozen", "no-affine", "center", "scale"]
    own = masks[(masks["mask"] == "own") & (masks["network"] == "transformer")]
    assert (own["change"] == 0).all() and set(own["spec"]) == {"transformer"}
    ranks = masks[masks["metric"].isin(["effective_rank", "cosine_absolute"])]
    assert set(ranks["layer"]) == {2}
    frozen = norms[
        (norms["norm"] == "frozen")
        & (norms["network"] == "transformer")
        & (norms["metric"] == "residual_frobenius")
    ]
    assert frozen["change"].abs().max() < 1e-12


def test_the_map_has_every_pair_and_what_the_model_has(model: Any, found: ProbeResult) -> None:
    phase = found.tables["phase"]
    assert list(dict.fromkeys(phase["x_value"])) == ["0.5", "1", "2"] and list(
        dict.fromkeys(phase["y_value"])
    ) == ["0.5", "1"]
    assert set(phase[phase["x_own"]]["x_value"]) == {"1"} and set(phase[phase["y_own"]]["y_value"]) == {"1"}
    assert len(phase[phase["metric"] == "loss"]) == 6
    for spec in set(phase["spec"]):
        assert value(phase, spec, 2, "loss") == pytest.approx(by_hand(model, spec)[1], rel=1e-9)
    both = phase[(phase["x_value"] == "2") & (phase["y_value"] == "0.5")]
    assert set(both["spec"]) == {"temperature@all=2.0+skip@2=0.5"}


def test_a_map_of_ranks_by_the_data(model: Any) -> None:
    """The subspaces are those of all samples, as `--ablate` chooses them."""
    options: dict[str, Any] = {"processor": tokenizer(), "batch_size": 3, "importance": "none", **LESS}
    found = rc_probe.probe(model, TEXTS, map=("rank@1=0:data,1:data", "skip@2=0.5"), **options)
    specs = ("rank@1=1:data", "rank@1=1:data+skip@2=0.5")
    wanted = rc_probe.probe(model, TEXTS, ablate=specs, **options).tables["residuals"]
    for spec in specs:
        curve = wanted[(wanted["variant"] == spec) & (wanted["metric"] == "residual_bulk")]
        last = float(curve.set_index("layer")["mean"][2])
        assert value(found.tables["phase"], spec, 2, "residual_bulk") == pytest.approx(last, rel=1e-9)
    assert not [note for note in found.model["notes"] if "Not tried" in note]


def test_what_is_said_and_drawn(found: ProbeResult, tmp_path: Any) -> None:
    said = found.verdict["what_if"]
    sentences = " ".join([said["sentence"], *said["reasons"]])
    masks = found.tables["masks"]
    pure = masks[
        (masks["network"] == "SAN − norm") & (masks["metric"] == "residual_bulk") & (masks["layer"] == 2)
    ]
    most = str(pure.loc[pure["value"].idxmax(), "mask"])
    assert f"most of the residual of its bulk with the mask {most}," in said["sentence"]
    assert "Without its norms the residual of the whole model" in sentences and "On the map" in sentences
    page = found.to_html()
    for name in ("masks", "norms", "sweeps", "phase"):
        assert f'id="figure-{name}"' in page
    assert "temperature@all=2, skip@2=0.5: " in page  # a cell to hover on
    view = ComparedView(Comparison([Run("a", found), Run("b", found)]))
    shown = CompareSection().show(view)
    assert shown is not None and [table.name for table in shown.tables] == ["masks", "norms"]
    row = next(r for r in shown.tables[0].rows if [r[0].text, r[1].text] == ["SAN", "left:1"])
    spec = "attention.skip@all+mlp.sublayer@all+mask@all=left:1"
    assert row[2] == row[3] == cell(value(masks, spec, 2, "residual_bulk"))


def test_a_check_names_a_cell_by_its_spec(found: ProbeResult) -> None:
    masks = found.tables["masks"]
    last = value(masks, "mask@all=left:1", 2, "residual_bulk")
    (outcome,) = found.fail_if(f"residual_bulk@last:mask@all=left:1<{last - 0.01}")
    assert outcome.value == last and outcome.passed
    with pytest.raises(AssertionError, match="layer 2"):
        found.fail_if(f"residual_bulk@last:mask@all=left:1<{last + 0.01}")
    with pytest.raises(RcProbeError, match="was not measured"):
        found.fail_if("residual_bulk@last:mask@all=left:3<0.5")


def test_what_a_model_cannot_do_is_a_note() -> None:
    config = transformers.MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2)
    torch.manual_seed(0)
    found = rc_probe.probe(
        transformers.MambaForCausalLM(config).eval(), TEXTS[:2], processor=tokenizer(), what_if=True, **LESS
    )
    notes = " ".join(found.model["notes"])
    assert "masks" not in found.tables and "phase" not in found.tables
    assert (
        "Not tried: mask@all=complete, mask@all=left:32, " in notes
        and "temperature@all=8.0: MambaForCausalLM, block 1" in notes
    )
    assert set(found.tables["norms"]["norm"]) == {"own", "identity", "frozen", "no-affine", "center", "scale"}
    assert "Without its norms" in found.verdict["what_if"]["sentence"]


@pytest.mark.parametrize(
    ("text", "name", "values"),
    [
        ("temperature", "temperature@all", ["0.125", "0.25", "0.5", "1", "2", "4", "8"]),
        ("skip@3-5=2,0.5", "skip@3-5", ["0.5", "1", "2"]),
        ("mask=causal,window:3", "mask@all", ["own", "causal", "window:3"]),
        ("pattern=sharpened:1", "pattern@all", ["sharpened:0", "sharpened:1"]),
        ("head@2:1=1,0,0", "head@2:1", ["1", "0"]),
    ],
)
def test_axes(text: str, name: str, values: list[str]) -> None:
    axis = parse_axis(text)
    assert axis.name == name and [point.value for point in axis.points] == values
    assert sum(point.intervention is None for point in axis.points) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["--map", "temperatur", "skip"],
            "--map temperatur: there is no part 'temperatur'; did you mean 'temperature'?",
        ),
        (["--map", "skip", "skip@all=0.5"], "--map: skip@all is there twice"),
        (["--map", "temperature=0", "skip"], "the temperature '0' is not above 0"),
        (["--map", "mlp@1+mlp@2", "skip"], "an axis is one intervention"),
        (["--what-if-samples", "4"], "--what-if-samples: it changes nothing"),
        (["--fail-if", "residual@last:mask@all=causal<0.1"], "is measured"),
    ],
)
def test_wrong_options_are_one_line(options: list[str], says: str) -> None:
    done = CliRunner().invoke(app, ["demo", *options], env={"COLUMNS": "400"})
    assert done.exit_code != 0 and says in " ".join(done.output.split()), done.output


def test_maps_from_python_are_two(model: Any) -> None:
    with pytest.raises(RcProbeError, match="1 interventions are no map"):
        rc_probe.probe(model, TEXTS, processor=tokenizer(), map=("skip",), **LESS)
