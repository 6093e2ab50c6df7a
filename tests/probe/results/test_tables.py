"""Tables: their columns stand in one place, and everything else follows."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from rc_probe.comparison import STACKED, tables_page
from rc_probe.hooks.errors import RcProbeError
from rc_probe.measures import TABLES
from rc_probe.result import ProbeResult
from rc_probe.results.tables import COMPARED, FRAMES, TYPES, Column, Table

ROOT = Path(__file__).parents[3]
SMALL = Table(
    "small",
    "Of every type",
    tuple(Column(dtype.lower() + str(n), dtype, "", "") for n, dtype in enumerate(TYPES)),
)


def test_the_page_says_what_is_declared() -> None:
    assert (ROOT / "docs" / "tables.md").read_text("utf8") == tables_page(), (
        "run: python -m rc_probe.comparison > docs/tables.md"
    )


def test_every_column_is_declared_in_full_and_once() -> None:
    for table in (*TABLES.values(), *COMPARED.values(), *STACKED.values(), *FRAMES.values()):
        assert table.title and len(set(table.names)) == len(table.names)
        for column in table.columns:
            assert column.dtype in TYPES and column.meaning and "|" not in column.meaning


def test_empty_columns_have_the_type_that_is_declared(tmp_path: Path) -> None:
    rows = [dict.fromkeys(SMALL.names), dict.fromkeys(SMALL.names)]
    for row in rows:
        row["bool3"] = True
    frame = SMALL.frame(rows)
    found = dict(zip(TYPES, frame.dtypes.astype(str), strict=True))
    text = str(pd.Series(["text"]).dtype)
    assert found == {dtype: dtype for dtype in TYPES} | {"str": text, "int64": "float64"}
    ProbeResult({}, {}, {}, {"small": frame}).save(tmp_path)
    pd.testing.assert_frame_equal(ProbeResult.load(tmp_path).tables["small"], frame)


@pytest.mark.parametrize("change", [{"more": 1}, {"layer": None}])
def test_a_row_of_other_columns_is_refused(change: dict[str, int | None]) -> None:
    row = dict.fromkeys(TABLES["residuals"].names, 0)
    for name, value in change.items():
        if value is None:
            row.pop(name)
        else:
            row[name] = value
    with pytest.raises(RcProbeError, match=f"table residuals: a row has other columns: {next(iter(change))}"):
        TABLES["residuals"].frame([row])


def test_the_columns_are_read_without_torch_and_pandas() -> None:
    script = "import sys, rc_probe.settings; print({'torch', 'pandas', 'numpy'} & {*map(str, sys.modules)})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
