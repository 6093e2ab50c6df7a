"""What the tables `masks`, `norms` and `phase` say: which mask keeps the tokens apart, what norms hold, where the loss is least."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rc_probe.registry import WHOLE
from rc_probe.results.curves import BULK, Curve
from rc_probe.results.protocols import Result
from rc_probe.results.words import number

from .importance_words import SUBJECTS, UNITS, criterion

if TYPE_CHECKING:
    import pandas as pd

RELATIVE, ABSOLUTE = BULK, "residual_frobenius_absolute"
OWN, NO_NORM = "own", f"{WHOLE} − norm"
PURE = ("SAN − norm", "SAN")  # the network that masks are judged in: the first that there is


def curve_of(rows: pd.DataFrame, metric: str) -> Curve | None:
    """The curve of a metric among the rows of one cell; None where it has no value."""
    own = rows[(rows["metric"] == metric) & rows["value"].notna()].sort_values("layer")
    if own.empty:
        return None
    columns = (own[name].astype(float).tolist() for name in ("value", "std", "floor"))
    return Curve(own["layer"].astype(int).tolist(), *columns)


def slopes(curve: Curve) -> dict[int, float]:
    """ln of the value at each layer minus ln of that at the layer before, where neither is noise."""
    found = {}
    for i in range(1, len(curve.layers)):
        if not (curve.at_floor(i) or curve.at_floor(i - 1)):
            found[curve.layers[i]] = math.log(curve.means[i] / curve.means[i - 1])
    return found


def tried(result: Result, metric: str, spec: str) -> pd.DataFrame:
    """The curve of a cell of `masks` or `norms`, with the columns of the table `residuals`; no rows where there is none."""
    for name in ("masks", "norms"):
        frame = result.declared[name].read(result.tables).rename(columns={"value": "mean"})
        rows = frame[(frame["spec"] == spec) & (frame["metric"] == metric)].drop_duplicates("layer")
        if len(rows):
            break
    return rows


def judge_what_if(result: Result) -> dict[str, Any] | None:
    """A sentence, and more of them as reasons; None where nothing was tried."""
    masks, norms, phase = (result.declared[name].read(result.tables) for name in ("masks", "norms", "phase"))
    sentences = [*_of_masks(masks), *_of_norms(norms, masks), *_of_map(phase)]
    return {"sentence": sentences[0], "reasons": sentences[1:]} if sentences else None


def _of_masks(frame: pd.DataFrame) -> list[str]:
    net = next((name for name in PURE if name in set(frame["network"])), None)
    if net is None:
        return []
    rows = frame[frame["network"] == net]
    names = dict.fromkeys(map(str, rows["mask"]))
    found = {name: curve for name in names if (curve := curve_of(rows[rows["mask"] == name], RELATIVE))}
    if len(found) < 2:
        return []
    ends = {name: curve.means[-1] for name, curve in found.items()}
    most, least = max(ends, key=lambda name: ends[name]), min(ends, key=lambda name: ends[name])
    last = found[most].layers[-1]
    sentence = (
        f"As attention alone ({net}) it keeps most of the residual of its bulk with the mask {_mask(most)}, {number(ends[most])} at layer "
        f"{last}; with {_mask(least)} it {found[least].ending}."
    )
    return [sentence, *_cost_of_masks(frame)]


def _mask(name: str) -> str:
    return "its own mask" if name == OWN else name


def _cost_of_masks(frame: pd.DataFrame) -> list[str]:
    """Of the whole model: the mask that costs least and most by what it predicts."""
    rows = frame[(frame["network"] == WHOLE) & (frame["mask"] != OWN) & frame["floor"].isna()]
    metric = criterion(rows)
    own = rows[(rows["metric"] == metric) & rows["change"].notna()]
    if metric is None or len(own) < 2:
        return []
    least, most = (own.iloc[int(place)] for place in (own["change"].argmin(), own["change"].argmax()))
    unit = UNITS.get(metric, "")
    return [
        f"Put into the whole model, {least['mask']} costs least ({SUBJECTS[metric]} {_moved(least['change'], unit)}), {most['mask']} "
        f"most ({_moved(most['change'], unit)})."
    ]


def _moved(change: float, unit: str) -> str:
    return f"{'+' if change >= 0 else '−'}{number(abs(float(change)))}{unit}"


def _of_norms(norms: pd.DataFrame, masks: pd.DataFrame) -> list[str]:
    """What the whole model is without norms, and which form of a norm costs least."""
    plain = norms[(norms["network"] == WHOLE) & (norms["norm"] == OWN)]
    bare = norms[(norms["network"] == WHOLE) & (norms["norm"] == "identity")]
    if bare.empty:
        plain, bare = (masks[(masks["mask"] == OWN) & (masks["network"] == net)] for net in (WHOLE, NO_NORM))
    ends = [[curve_of(rows, metric) for rows in (plain, bare)] for metric in (RELATIVE, ABSOLUTE)]
    if any(curve is None for pair in ends for curve in pair):
        return []
    (own, left), (size, grown) = ([float(c.means[-1]) for c in pair if c] for pair in ends)
    return [
        f"Without its norms the residual of the whole model’s bulk at the last layer is {number(left)} instead of {number(own)}, and its "
        f"absolute residual {number(grown)} instead of {number(size)}."
    ]


def _of_map(frame: pd.DataFrame) -> list[str]:
    """Where the residual is least, and where the loss is."""
    rows = frame[(frame["metric"] == BULK) & frame["value"].notna()]
    if rows.empty:
        return []
    low, high = (rows.iloc[int(place)] for place in (rows["value"].argmin(), rows["value"].argmax()))
    found = [
        f"On the map the residual of the bulk at the last layer goes from {number(float(low['value']))} ({_place(low)}) to "
        f"{number(float(high['value']))} ({_place(high)}); the model as it is has {number(float(low['baseline']))}."
    ]
    metric = criterion(frame)
    scored = frame[(frame["metric"] == metric) & frame["change"].notna()]
    if metric in (None, BULK) or scored.empty:
        return found
    best = scored.iloc[int(scored["change"].argmin())]
    at = "where the model is" if best["x_own"] and best["y_own"] else f"at {_place(best)}"
    own = "" if best["change"] == 0 else f" ({_moved(best['change'], UNITS.get(str(metric), ''))})"
    return [*found, f"On it {SUBJECTS[str(metric)]} is least {at}{own}."]


def _place(row: Any) -> str:
    return f"{row['x']}={row['x_value']}, {row['y']}={row['y_value']}"
