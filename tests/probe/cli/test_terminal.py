"""The summary in a terminal: numbers are whole at any width, what is cut is the sparkline and long names."""

import re
from pathlib import Path

import pytest
from support.made_results import ABLATED, make_result, with_bulk

from rc_probe.cli.terminal import sparkline, summary
from rc_probe.result import ProbeResult

LONG = "attention.skip@3-5+mlp@7"


def shown(
    result: ProbeResult, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """The lines of the table."""
    monkeypatch.setenv("COLUMNS", str(width))
    summary(result, Path("out"))
    lines = capsys.readouterr().out.splitlines()
    end = next(i for i, line in enumerate(lines) if line.startswith("*"))
    return [line.rstrip() for line in lines[1:end]]


def deep(*ablations: str) -> ProbeResult:
    return with_bulk(make_result(blocks=30, paths=False, deep=False, ablations=ablations), massive=True)


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("ablations", [(), (LONG,)])
def test_no_number_is_cut(
    width: int,
    ablations: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(ABLATED, LONG, 0.9)
    head, *rows = shown(deep(*ablations), width, monkeypatch, capsys)
    assert max(map(len, [head, *rows])) <= width
    assert re.search(r"0 … 30 +layer 0 +lowest +layer 30$", head)
    numbers = [re.search(r"[▁-█ ]  +(\S+) +(\S+) +(\S+)$", row) for row in rows]
    found = [number.groups() for number in numbers if number]
    assert found[:4] == [
        ("0.841", "1.8e-07*", "1.8e-07*"), ("0.840", "4.8e-04", "4.8e-04"), ("0.840", "0.180", "0.180"),
        ("0.839", "0.615", "0.619"),
    ]  # fmt: skip
    assert len(found) == len(rows) == 8 + len(ablations)


def test_what_is_cut(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(ABLATED, LONG, 0.9)
    heads, rows = {}, {}
    for width in (60, 80, 120):
        heads[width], *lines = shown(deep(LONG), width, monkeypatch, capsys)
        rows[width] = [line.split()[:3] for line in lines]
    assert [row[:2] for row in rows[60][3:6]] == [
        ["pre", "transformer"], ["pre", "attenti…5+mlp@7"], ["init", "SAN"],
    ]  # fmt: skip
    assert rows[80][4][:2] == rows[120][4][:2] == ["pretrained", LONG]
    assert [len(rows[width][3][2]) for width in (60, 80, 120)] == [8, 13, 31]
    assert [head.partition("0 …")[0].split() for head in heads.values()] == [
        ["variant"], ["weights", "variant", "layers"], ["weights", "variant", "layers"],
    ]  # fmt: skip


def test_a_short_sparkline_keeps_both_ends_and_shows_the_lowest() -> None:
    values = [1.0, 0.9, 0.9, 0.1, 0.9, 0.9, 0.9, 0.9, 0.5]
    assert sparkline(values) == "██" + "█▁████" + "▅"
    assert (
        sparkline(values, 5) == "█" + "█▁█" + "▅"
    )  # layers 1 and 2, 3 to 5 (a half rounds to even), 6 and 7
    assert sparkline(values, 3) == "█▁▅"
    assert sparkline(values, 9) == sparkline(values, 20) == sparkline(values)
    assert sparkline([1.0, None, None, None, None, 0.2], 4) == "█  ▂"
    assert sparkline([0.4]) == "▄" and sparkline([2.0, 1.0], 3) == "█▅"
