"""The protocol of measurements: one class and one entry of a list bring options, tables, notes and findings."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

import rc_probe
from rc_probe import RcProbeError, api
from rc_probe.cli.generated import chosen_options, with_options
from rc_probe.measures import MEASUREMENTS, TABLES
from rc_probe.measures.context import Context
from rc_probe.measures.measurement import Found, Measurement, settings_type
from rc_probe.models.load import Loaded
from rc_probe.options import Options, option
from rc_probe.results.tables import LAYER, Column, Table

SHAPES = Table("shapes", "Shapes of the stream", (LAYER, Column("times", "int64", "dim × factor")))
TEXTS = ["one cat runs far", "two dogs sleep in the sun"]
FAST: dict[str, Any] = {"metrics": ("residual",), "init": False, "recursion": False, "paths": False}


@dataclass(frozen=True)
class ShapeOptions(Options):
    factor: int = option(2, "What the width is multiplied by.", least=1)


class Shapes(Measurement):
    name, subject = "shapes", "Shapes were"
    options = ShapeOptions
    tables = (SHAPES,)

    def run(self, context: Context) -> Found:
        if context.settings.factor == 13:
            raise RcProbeError("thirteen brings bad luck", where="shapes")
        width = context.structure.dim * context.settings.factor
        rows = [{"layer": layer, "times": width} for layer in range(context.structure.depth + 1)]
        return Found({"shapes": rows}, ["a note"], {"seen": len(context.found["curves"].tables["residuals"])})

    def entries(self, settings: Any, samples: int) -> dict[str, Any]:
        return {"factor": settings.factor}

    def findings(self, result: Any) -> dict[str, Any] | None:
        frame = result.tables.get("shapes")
        return None if frame is None else {"sentence": f"{len(frame)} layers.", "reasons": []}


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> type[Options]:
    every = (*MEASUREMENTS, Shapes())
    made = settings_type(*every)
    monkeypatch.setattr(api, "MEASUREMENTS", every)
    monkeypatch.setattr("rc_probe.run.MEASUREMENTS", every)
    monkeypatch.setattr(api, "Settings", made)
    monkeypatch.setattr("rc_probe.measures.MEASUREMENTS", every)
    monkeypatch.setitem(TABLES, "shapes", SHAPES)
    return made


def test_a_new_measurement_is_one_class(listed: type[Options], demo: Loaded) -> None:
    plain = rc_probe.probe(demo.model, TEXTS, processor=demo.processor, **FAST)
    more = rc_probe.probe(demo.model, TEXTS, processor=demo.processor, factor=3, **FAST)
    assert more.tables["shapes"]["times"].tolist() == [3 * 384] * 7
    assert plain.tables["shapes"]["times"].tolist() == [2 * 384] * 7
    assert more.settings["factor"] == 3 and " --factor 3" in more.settings["command"]
    assert more.model["shapes"] == {"seen": 7 * 4} and "a note" in more.model["notes"]
    assert more.verdict["shapes"] == {"sentence": "7 layers.", "reasons": []}
    with pytest.raises(RcProbeError, match="factor: 0 is too small"):
        rc_probe.probe(demo.model, TEXTS, processor=demo.processor, factor=0, **FAST)


def test_one_that_fails_is_a_note_and_the_others_go_on(listed: type[Options], demo: Loaded) -> None:
    good = rc_probe.probe(demo.model, TEXTS, processor=demo.processor, **FAST)
    bad = rc_probe.probe(demo.model, TEXTS, processor=demo.processor, factor=13, **FAST)
    assert "Shapes were not measured: shapes: thirteen brings bad luck" in bad.model["notes"]
    assert "shapes" not in bad.tables
    pd.testing.assert_frame_equal(bad.residuals, good.residuals, check_exact=True)


def test_its_options_are_the_commands(listed: type[Options]) -> None:
    seen = {}
    app = typer.Typer()

    @app.command()
    @with_options(listed)
    def command(ctx: typer.Context, model: str, **chosen: Any) -> None:
        seen.update(ctx.params)

    done = CliRunner().invoke(app, ["m", "--factor", "5"])
    assert done.exit_code == 0, done.output
    assert chosen_options(listed, seen) == listed(factor=5)  # type: ignore[call-arg]
    said = CliRunner().invoke(app, ["--help"], terminal_width=200).output
    assert "--factor" in said and "What the width is" in said


def test_options_have_one_owner_and_measurements_one_name() -> None:
    names = [each.name for each in fields(settings_type(*MEASUREMENTS))]
    assert len(names) == len(set(names))
    assert len({each.name for each in MEASUREMENTS}) == len(MEASUREMENTS)
    tables = [table.name for each in MEASUREMENTS for table in each.tables]
    assert len(tables) == len(set(tables))
