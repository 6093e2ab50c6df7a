"""Results: saved and loaded without loss, never half-written, and with clear errors."""

import errno
import gzip
import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support.made_results import ABLATIONS, make_result

from rc_probe.hooks.errors import RcProbeError
from rc_probe.result import ProbeResult

pytestmark = pytest.mark.usefixtures("no_figures")


def bits(value: Any) -> Any:
    return struct.pack("<d", value) if isinstance(value, float) else value


def odd_result() -> ProbeResult:
    """Every kind of value that a table or a setting can hold."""
    frame = pd.DataFrame({
        "layer": np.array([0, 1, 2], dtype="int64"),
        "mean": [0.1 + 0.2, 5e-324, -0.0],
        "std": [math.nan, 1 / 3, math.inf],
        "single": np.array([0.1, 2.5, np.nan], dtype="float32"),
        "vacuous": [True, False, True],
        "name": ["<script>", None, "ünï,\n\"quoted\""],
        "nothing": [None, None, None],
        "maybe": [True, None, False],
        "head": pd.array([1, None, 3], dtype="Int64"),
    })  # fmt: skip
    empty = frame.iloc[:0].rename(columns={"name": "reason"})
    model = {"id": "m", "path": Path("/x"), "heads": np.int64(12), "loss": math.nan, "shape": (1, 2)}
    return ProbeResult(model, {"ablate": []}, {"seconds": np.float32(1.5)}, {"zeta": frame, "alpha": empty})


def full_result() -> ProbeResult:
    return make_result(blocks=2, ablations=ABLATIONS)


@pytest.mark.parametrize("make", [odd_result, full_result], ids=["odd", "full"])
@pytest.mark.parametrize("by", ["folder", "json", "gz"])
def test_load_gives_back_what_was_saved_bit_for_bit(make: Any, by: str, tmp_path: Path) -> None:
    result = make()
    folder = result.save(tmp_path / "a" / "b")
    source = {"folder": folder, "json": folder / "results.json", "gz": tmp_path / "results.json.gz"}[by]
    if by == "gz":
        source.write_bytes(gzip.compress((folder / "results.json").read_bytes()))
    loaded = ProbeResult.load(source)
    assert (loaded.model, loaded.settings, loaded.environment) == (
        result.model,
        result.settings,
        result.environment,
    )
    assert list(loaded.tables) == list(result.tables)
    for name, frame in result.tables.items():
        pd.testing.assert_frame_equal(loaded.tables[name], frame, check_exact=True)
        for column in frame.select_dtypes("float64"):
            kept = frame[column].notna()
            assert [bits(v) for v in loaded.tables[name][column][kept]] == [
                bits(v) for v in frame[column][kept]
            ]
    assert loaded.verdict == result.verdict
    assert loaded.to_json() == result.to_json()


def test_no_nan_or_infinity_is_ever_written(tmp_path: Path) -> None:
    result = odd_result()
    assert result.tables["zeta"]["std"].tolist()[2] is not math.inf and math.isnan(
        result.tables["zeta"]["std"][2]
    )
    text = (result.save(tmp_path) / "results.json").read_text()
    saved = json.loads(text, parse_constant=lambda token: pytest.fail(f"{token} in the file"))
    assert [row["std"] for row in saved["tables"]["zeta"]] == [None, 1 / 3, None]
    assert saved["model"]["loss"] is None
    assert saved["schema"] == 1 and list(saved["tables"]) == ["zeta", "alpha"]


def test_csv_has_the_rows_of_the_tables_at_full_precision(tmp_path: Path) -> None:
    result = full_result()
    result.save(tmp_path)
    for name, frame in result.tables.items():
        read = pd.read_csv(tmp_path / f"{name}.csv", float_precision="round_trip")
        for column in frame.select_dtypes("number"):
            np.testing.assert_array_equal(read[column].to_numpy(), frame[column].to_numpy())
        assert len(read) == len(frame) and list(read) == list(frame)


def test_save_writes_these_files_and_no_more(tmp_path: Path) -> None:
    make_result(blocks=2, deep=True).save(tmp_path)
    (tmp_path / "mine.csv").write_text("kept")
    make_result(blocks=1, deep=False, paths=False).save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    tables = {"residuals.csv", "ablations.csv", "structure.csv"}
    assert names == {"results.json", "report.html", "mine.csv"} | tables, "the earlier bounds.csv is gone"


def test_a_full_disk_leaves_the_earlier_result_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_result().save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if "results.json" in self.name:
            real(self, data[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RcProbeError, match=r"No space left on device.*--out"):
        make_result(blocks=2).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_who_reads_the_earlier_result_meanwhile_reads_it_whole(tmp_path: Path) -> None:
    full_result().save(tmp_path)
    with (tmp_path / "results.json").open() as reader:
        make_result(blocks=1).save(tmp_path)
        found, wanted = json.loads(reader.read()), json.loads(full_result().to_json())
        assert found.pop("files").keys() >= {"report.html", "residuals.csv"}
        assert found == wanted


def test_an_interrupt_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Path, data: bytes) -> int:
        self.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", stop)
    with pytest.raises(KeyboardInterrupt):
        make_result(blocks=1, init=False).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "out" / "report.html").mkdir(parents=True)
    result = make_result(blocks=1, init=False)
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "out", Path("/proc/rc-probe")):
        with pytest.raises(RcProbeError, match=r"cannot write the results|did not write it") as caught:
            result.save(folder)
        assert str(folder).split("/below")[0] in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]


BROKEN = {
    "empty": ("", "not a file of results"),
    "text": ("hello", "not a file of results"),
    "nan": ('{"schema": 1, "x": NaN}', "NaN is not JSON"),
    "list": ("[]", "schema None"),
    "newer": ('{"schema": 2}', "schema 2, and this version reads schema 1"),
    "no tables": ('{"schema": 1, "model": {}, "settings": {}, "environment": {}}', "damaged"),
    "odd table": (
        '{"schema": 1, "model": {}, "settings": {}, "environment": {}, "tables": {"../x": []}}',
        "damaged",
    ),
    "odd dtype": (
        '{"schema": 1, "model": {}, "settings": {}, "environment": {}, "columns": {"t": {"a": "no"}},'
        ' "tables": {"t": [{"a": 1}]}}',
        "damaged",
    ),
    "lacking": (
        '{"schema": 1, "model": {}, "settings": {}, "environment": {}, "columns": {"t": {"a": "int64"}},'
        ' "tables": {"t": [{"b": 1}]}}',
        "damaged",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_clear_line(case: str, tmp_path: Path) -> None:
    text, message = BROKEN[case]
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(RcProbeError, match=message) as caught:
        ProbeResult.load(tmp_path)
    assert "\n" not in str(caught.value) and "results.json" in str(caught.value)


@pytest.mark.parametrize("content", [b"\x1f\x8bnot gzip at all", b"\xff\xfe\x00", b"[" * 100_000])
def test_broken_bytes_are_one_clear_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(RcProbeError, match=r"results\.json"):
        ProbeResult.load(path)


def test_a_missing_result_is_named(tmp_path: Path) -> None:
    with pytest.raises(RcProbeError, match=r"cannot read the results.*Give a folder that rc-probe wrote"):
        ProbeResult.load(tmp_path / "none")


def test_rows_without_dtypes_load_too(tmp_path: Path) -> None:
    path = make_result(blocks=1).save(tmp_path) / "results.json"
    saved = json.loads(path.read_text())
    del saved["columns"]
    path.write_text(json.dumps(saved))
    assert (
        ProbeResult.load(path).residuals["mean"].tolist() == make_result(blocks=1).residuals["mean"].tolist()
    )


def test_a_table_is_reached_by_its_name() -> None:
    result = make_result()
    assert result.residuals is result.tables["residuals"] and result.bounds is result.tables["bounds"]
    with pytest.raises(RcProbeError, match="no table 'walks' in this result"):
        result.table("walks")
    with pytest.raises(RcProbeError, match="cannot name a table"):
        ProbeResult({}, {}, {}, {"../evil": pd.DataFrame({"a": [1]})})


def test_the_frames_that_were_given_are_not_changed() -> None:
    frame = pd.DataFrame({"a": [math.inf, 1.0]}, index=[5, 7])
    held = ProbeResult({}, {}, {}, {"t": frame}).tables["t"]
    assert frame["a"].tolist() == [math.inf, 1.0] and frame.index.tolist() == [5, 7]
    assert held.index.tolist() == [0, 1] and math.isnan(held["a"][0])


def test_repr_is_short_and_says_the_finding() -> None:
    assert repr(make_result()).startswith("<ProbeResult: 0.76 relative residual at layer 12 of 12")
    assert len(repr(make_result())) < 400


def test_results_and_reports_need_no_torch() -> None:
    code = (
        "import sys, rc_probe.result, rc_probe.reports.pages.run\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr
