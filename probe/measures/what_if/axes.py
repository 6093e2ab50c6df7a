"""One axis of a map: an intervention with many values. No torch here: the options are checked with it."""

from __future__ import annotations

from dataclasses import dataclass

from rc_probe.hooks.errors import RcProbeError
from rc_probe.interventions.grammar import parse_intervention, parts
from rc_probe.interventions.intervention import Intervention, span

OWN = "own"  # of an intervention no value of which is the model's own


@dataclass(frozen=True)
class Point:
    """A value as text, and the intervention with it; none where it is what the model has."""

    value: str
    intervention: Intervention | None


@dataclass(frozen=True)
class Axis:
    """name: the intervention without its value. text: what the user wrote. The model's own point is among the points."""

    name: str
    text: str
    points: tuple[Point, ...]


def parse_axis(text: str) -> Axis:
    """`temperature`, `skip@3-5`, `temperature@all=0.5,1,2`.

    Raises RcProbeError for what is no intervention, or has no value that could be another.

    >>> [point.value for point in parse_axis("temperature=0.5,2").points]
    ['0.5', '1', '2']
    """
    where = f"--map {text}"
    head, _, values = text.partition("=")
    kind = parts().get(head.partition("@")[0].strip())
    named = [value.strip() for value in values.split(",") if value.strip()] or (kind.sweep if kind else ())
    try:
        given = [parse_intervention(f"{head}={value}" if value else head) for value in named or ("",)]
    except RcProbeError as error:
        raise RcProbeError(error.what, where=where, todo=error.todo) from error
    if any(len(one.interventions) > 1 for one in given):
        raise RcProbeError("an axis is one intervention", where=where, todo="Give temperature, or skip@3-5")
    each = [one.interventions[0] for one in given]
    points = [
        Point(value, None if one.value == one.own else one) for value, one in zip(named, each, strict=True)
    ]
    first = each[0]
    heads = f":{span(first.heads)}" if first.heads else ""
    return Axis(f"{first.part}@{span(first.blocks)}{heads}", text, tuple(_with_own(points, first)))


def _with_own(points: list[Point], one: Intervention) -> list[Point]:
    """Each value once, the model's own at its place among numbers, else in front."""
    points = list({point.value: point for point in points}.values())
    if any(point.intervention is None for point in points):
        return points
    if isinstance(one.own, float):
        return sorted([*points, Point(f"{one.own:g}", None)], key=lambda point: float(point.value))
    return [Point(OWN if one.own is None else str(one.own), None), *points]
