"""What the tables say of paths: series by length, levels, and the one sentence that a person can repeat.

A path's length is the number of heads on it. The sentence names the smallest k for which the model with paths
of length ≤ k only (exact, biases always there) agrees with the whole model in at least ENOUGH of what it says.
"""

import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pandas as pd

from .protocols import Declaring, Result
from .words import THINGS, many, number, power_of_ten

LENGTH = "path length (heads on it)"  # along x
ENOUGH = 0.95  # of the predictions: what counts as reproducing them
WIDE = 0.1  # an interval wider than this is told in the sentence

ALONE, UP_TO, ALL_BUT = "alone", "up_to", "all_but"
FULL, BASELINE, NONE = "full", "baseline", "none"  # scopes without a length


@dataclass(frozen=True)
class Series:
    """One metric by length, with the 95 % interval of each mean (NaN where there are too few values)."""

    lengths: list[int]
    means: list[float]
    lows: list[float]
    highs: list[float]

    def at(self, length: int) -> float:
        """The mean at a length, NaN where there is none."""
        return dict(zip(self.lengths, self.means, strict=True)).get(length, math.nan)


def texts_of(name: str, one: Series) -> list[str]:
    """What each value is called when it is pointed at."""
    texts = []
    for length, mean, low, high in zip(one.lengths, one.means, one.lows, one.highs, strict=True):
        text = f"{name[0].upper()}{name[1:]}, k = {length}: {number(mean, 3)}"
        texts.append(text + (f" ({number(low, 3)} to {number(high, 3)})" if math.isfinite(low) else ""))
    return texts


def ends_of(name: str, one: Series, unit: str = "length") -> str:
    """Where a series begins and ends, in words."""
    text = f"{name} {number(one.means[0])} at {unit} {one.lengths[0]}"
    last = f", {number(one.means[-1])} at {unit} {one.lengths[-1]}"
    return text + last if len(one.lengths) > 1 else text


def rows_of(result: Declaring, **fixed: Any) -> pd.DataFrame:
    """The rows of the table `paths` that have a mean and these values."""
    frame = result.declared["paths"].read(result.tables)
    kept = frame["mean"].notna()
    for column, value in fixed.items():
        kept &= frame[column] == value
    rows = frame[kept]
    return rows.assign(
        **{name: rows[name].astype(float) for name in ("length", "drawn", "mean", "low", "high")}
    )


def series(
    result: Declaring, metric: str, scope: str = ALONE, *, estimator: str = "exact", drawn: int | None = None
) -> Series | None:
    """`metric` by length; `drawn`: of estimates from this many paths. None where it was not measured."""
    rows = rows_of(result, metric=metric, scope=scope, estimator=estimator)
    rows = rows[rows["length"].notna()].sort_values("length")
    rows = rows if drawn is None else rows[rows["drawn"] == drawn]
    if rows.empty:
        return None
    values = (rows[name].tolist() for name in ("mean", "low", "high"))
    return Series(rows["length"].astype(int).tolist(), *values)


def level(result: Declaring, metric: str, scope: str) -> float | None:
    """The one value of a scope without length: `full`, `baseline` or `none` (biases alone)."""
    rows = rows_of(result, metric=metric, scope=scope)
    return float(rows["mean"].iloc[0]) if len(rows) else None


def draws(result: Declaring, metric: str) -> list[tuple[str, int]]:
    """(estimator, paths drawn) of the estimates of single lengths, in the order of the table."""
    rows = rows_of(result, metric=metric, scope=ALONE)
    rows = rows[rows["drawn"].notna() & rows["estimator"].isin(["sampled", "live"])]
    pairs = rows[["estimator", "drawn"]].drop_duplicates().to_numpy().tolist()
    return [(str(estimator), int(drawn)) for estimator, drawn in pairs]


def quality(result: Declaring) -> str | None:
    """The best metric there is of what paths are worth: accuracy against what is right, else agreement."""
    return next((metric for metric in ("accuracy", "agreement") if series(result, metric)), None)


def laws(result: Result) -> dict[str, pd.DataFrame]:
    """Rows `length, count, share` of each model of `path_counts` by its name, the model at hand first."""
    frame = _counts(result)
    names = frame["model"].unique()
    groups = dict(iter(frame.sort_values("length").groupby("model", sort=False)))
    return {str(name): groups[name] for name in names}


def distribution(result: Result) -> pd.DataFrame:
    """Rows `length, count, share` of the model at hand; none where they are not known."""
    frame = _counts(result)
    return frame[frame["model"] == frame["model"].iloc[0]].sort_values("length") if len(frame) else frame


def _counts(result: Result) -> pd.DataFrame:
    frame = result.declared["path_counts"].read(result.tables)
    return frame[frame["share"].notna()].astype({"length": int, "share": float})


def told(result: Result) -> dict[str, Any]:
    """The entry `paths` of the model: task, samples, …"""
    found = result.model.get("paths")
    return found if isinstance(found, dict) else {}


def percent(share: float) -> str:
    """`98 %`; never rounded up to all, down to nothing, or up to ENOUGH."""
    share = min(1.0, max(0.0, share))
    text = f"{100 * share:.0f}"
    if text == "100" and share < 1:
        return "over 99.9 %" if share > 0.999 else f"{math.floor(1000 * share) / 10} %"
    if text == "0" and share > 0:
        return "under 0.1 %" if share < 0.001 else f"{100 * share:.1f} %"
    return f"{math.floor(1000 * share) / 10} %" if share < ENOUGH <= float(text) / 100 else f"{text} %"


def short(count: str | int) -> str:
    """A count of any size in a few characters: `9,504`, `8.9×10¹²`."""
    value = Decimal(count)
    if value < 10_000:
        return f"{int(value):,}"
    mantissa, power = f"{value:.1e}".split("e")
    return f"{mantissa}×{power_of_ten(int(power))}"


def things(result: Result, count: int) -> str:
    """`32 texts`."""
    return many(count, THINGS.get(str(result.settings.get("modality")), "texts"))


def judge_paths(result: Result) -> dict[str, Any] | None:
    """The finding: `sentence`, `reasons` (further sentences) and the numbers they use; None without paths.

    `length` and `value`: paths up to this length, and the share of the predictions that they reproduce (without
    a task: of the norm that paths carry). `enough` says whether that is at least ENOUGH.
    """
    agreement, shares = series(result, "agreement", UP_TO), series(result, "norm_share")
    if agreement is not None:
        found: dict[str, Any] | None = _by_agreement(result, agreement)
    else:
        found = _by_norm(shares) if shares is not None else None
    return found and found | {"reasons": [*found["reasons"], *_kept_by_skips(result)]}


def _kept_by_skips(result: Result) -> list[str]:
    """Claim 3.1 of Dong et al. 2021 as a measured statement."""
    kept = series(result, "residual_share")
    if kept is None or kept.lengths[0] != 0:
        return []
    share = kept.means[0]
    more = "no less than" if share <= 1 else "less than"
    return [
        f"The whole model’s output has {more} the residual that skips alone carry past every head: that of paths of length 0 "
        f"is {number(share)} times the output’s."
    ]


def _by_norm(shares: Series) -> dict[str, Any] | None:
    total = sum(shares.means)
    if not total > 0:
        return None
    carried = [sum(shares.means[: i + 1]) / total for i in range(len(shares.means))]
    place = next(i for i, value in enumerate(carried) if value >= ENOUGH or i == len(carried) - 1)
    sentence = (
        f"{_those(shares.lengths[place])} carry {percent(carried[place])} of the norm of all paths; "
        "what the model makes of them was not scored."
    )
    return {
        "sentence": sentence, "reasons": [], "metric": "norm_share", "task": None, "enough": carried[place] >= ENOUGH,
        "length": shares.lengths[place], "value": carried[place], "low": None, "high": None,
    }  # fmt: skip


def _by_agreement(result: Result, up_to: Series) -> dict[str, Any]:
    last = len(up_to.lengths) - 1
    place = next((i for i, value in enumerate(up_to.means) if value >= ENOUGH), None)
    enough = place is not None
    if place is None:
        place = max(range(last + 1), key=lambda i: up_to.means[i])
    length, value = up_to.lengths[place], up_to.means[place]
    counts = distribution(result)
    every = enough and 0 < place == last and (counts.empty or length == int(counts["length"].max()))
    verb = _verb(result)
    if every:  # all of the paths are the whole model: what is told is what falls short
        most = max(range(last), key=lambda i: up_to.means[i])
        finding = (
            f"It takes paths of every length, up to {length}, to {verb(percent(ENOUGH))}; "
            f"those of length ≤ {up_to.lengths[most]} {_short_verb(result)} {percent(up_to.means[most])}"
        )
    elif enough:
        finding = f"{_those(length)} {verb(percent(value))}"
    else:
        finding = (
            f"Paths up to length {up_to.lengths[-1]} do not {verb(percent(ENOUGH))}; "
            f"the most is {percent(value)}, with length ≤ {length}"
        )
    return {
        "sentence": f"{finding} ({_aside(result, up_to, place)}){_but(result, value)}.",
        "reasons": _reasons(result, up_to, place, enough=enough, every=every),
        "metric": "agreement",
        "task": told(result).get("task"),
        "samples": told(result).get("samples"),
        "enough": enough,
        "length": length,
        "value": value,
        "low": up_to.lows[place],
        "high": up_to.highs[place],
    }


def _those(length: int) -> str:
    return f"Paths of length ≤ {length}" if length else "Paths of length 0, with no head on them,"


def _embeds(result: Result) -> bool:
    return told(result).get("task") == "retrieval"


def _verb(result: Result) -> Any:
    """What a share of the agreement means, as words around it."""
    if _embeds(result):
        kind = things(result, 2).split()[1]
        return lambda share: (
            f"find the nearest neighbour that the whole model finds for {share} of the {kind}"
        )
    return lambda share: f"reproduce {share} of the model’s predictions"


def _short_verb(result: Result) -> str:
    return "find" if _embeds(result) else "reproduce"


def _aside(result: Result, up_to: Series, place: int) -> str:
    """What it was measured on, and how well it is known."""
    entry = told(result)
    count = entry.get("samples")
    parts = [str(entry["task"])] if entry.get("task") else []
    parts += [things(result, int(count))] if count else []
    low, high = up_to.lows[place], up_to.highs[place]
    if not math.isfinite(high - low):
        known = "one value, so no interval" if count == 1 else "too few for an interval"
    elif (
        low == high and count and 3 / count > WIDE
    ):  # the rule of three: what no spread among few leaves open
        known = "the same in all, so no interval"
    else:
        known = f"95 % interval {percent(low)[:-2]} to {percent(high)}" if high - low > WIDE else ""
    return "; ".join(filter(None, [", ".join(parts), known])) or "exact"


def _but(result: Result, value: float) -> str:
    """A clause for what is trivial, where that alone gives at least half as much."""
    biases, constant = level(result, "agreement", NONE), level(result, "agreement", BASELINE)
    clauses = []
    if biases is not None and biases >= value / 2:
        clauses.append(f"biases alone, without any path, already give {percent(biases)}")
    if constant is not None and constant >= value / 2:
        clauses.append(f"always the commonest answer would give {percent(constant)}")
    return f", but {' and '.join(clauses)}" if clauses else ""


def _reasons(result: Result, up_to: Series, place: int, *, enough: bool, every: bool) -> list[str]:
    reasons = []
    length = up_to.lengths[place]
    dips = [i for i in range(place + 1, len(up_to.means)) if up_to.means[i] < ENOUGH] if enough else []
    if dips:
        worst = min(dips, key=lambda i: up_to.means[i])
        reasons.append(
            f"More paths are not always better: length ≤ {up_to.lengths[worst]} gives "
            f"{percent(up_to.means[worst])}."
        )
    alone = series(result, "agreement")
    if alone is not None:
        best = max(range(len(alone.means)), key=lambda i: alone.means[i])
        clauses = [f"Of single lengths, {alone.lengths[best]} alone gives most, {percent(alone.means[best])}"]
        biases, constant = level(result, "agreement", NONE), level(result, "agreement", BASELINE)
        clauses += [f"biases alone give {percent(biases)}"] if biases is not None else []
        clauses += [f"always the commonest answer {percent(constant)}"] if constant is not None else []
        reasons.append(_listed(clauses) + ".")
    scored = series(result, "accuracy", UP_TO)
    full, chance = level(result, "accuracy", FULL), level(result, "accuracy", BASELINE)
    if scored is not None and full is not None and not every:
        text = f"Accuracy with paths of length ≤ {length} is {number(scored.at(length))}, of the whole model {number(full)}"
        reasons.append(
            text + (f", of the best constant answer {number(chance)}." if chance is not None else ".")
        )
    return reasons + ([] if every else _longer(result, length))


def _longer(result: Result, length: int) -> list[str]:
    """How many of all paths are longer than `length`, and what they carry: the paper's contrast."""
    counts, shares = distribution(result), series(result, "norm_share")
    longer = counts[counts["length"].astype(float) > length]
    if longer.empty:
        return []
    text = f"Longer paths are {percent(float(longer['share'].sum()))} of all {short(sum(map(int, counts['count'])))} paths"
    if shares is None or max(shares.lengths) < longer["length"].max():
        return [text + "."]
    norm = sum(mean for k, mean in zip(shares.lengths, shares.means, strict=True) if k > length)
    return [f"{text} and carry {percent(norm)} of the norm."]


def _listed(clauses: list[str]) -> str:
    return f"{clauses[0]}; {', '.join(clauses[1:])}" if len(clauses) > 1 else clauses[0]
