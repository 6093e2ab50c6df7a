"""The finding in one sentence with its number first, what holds it up, and a level. All from the tables.

The levels. The yardsticks are the model's own, measured in the same run: the relative residual that entered
block 1 on the same samples, and the rounding floor of the metric at each layer. Only two shares are fixed:

- `collapsed`: the last layer's residual is at its rounding floor, or below a TENTH of what entered block 1.
  A tenth is one decade; for tokens of equal norm a residual r means a mean cosine of about 1 - r², so 0.1
  is a mean cosine of 0.99.
- `watch`: below HALF of what entered, or below a tenth of it at some layer on the way, or the tokens'
  directions say so: with mean cosine c, √(1 - c) is the residual that tokens of equal norm would have, and
  it is below half of its value at layer 0. A few tokens of very large norm hide this from the residual.
- `healthy`: none of these.

A value up to the rounding floor counts as at the floor, here as everywhere.
"""

import math
from typing import Any

from rc_probe.registry import MASSIVE, PAPER, WHOLE

from .curves import BULK, HALF, RESIDUAL, TENTH, Curve, curves_by_metric, headline
from .protocols import Result
from .words import name_of, number

LEVELS = {
    "healthy": "the last layer keeps at least half of the residual that entered block 1, every layer on the "
    "way at least a tenth, and the tokens’ directions do not contradict it",
    "watch": "below half at the last layer, or below a tenth on the way, or √(1 − mean cosine) below half of "
    "what it was at layer 0",
    "collapsed": "the last layer is at its rounding floor, or below a tenth of what entered block 1",
}
_WITHIN = "as far as this arithmetic can tell"


def subject(found: dict[tuple[str, str], Curve]) -> tuple[str, str] | None:
    """Whose curve the verdict is about: pretrained before init, the transformer before other variants."""
    if not found:
        return None
    return min(found, key=lambda key: (key[0] != "pretrained", key[1] != WHOLE))


def judge(result: Result) -> dict[str, Any]:
    """The verdict: `sentence`, `reasons` (further sentences), `level` and the numbers that they use.

    `level` and `value` are None where the residual was not measured. Measurements add findings of their own.
    """
    measured = curves_by_metric(result)
    metric = headline(measured)
    found = measured.get(metric, {})
    key = subject(found)
    if key is None:
        sentence = f"No relative residual was measured on {name_of(result)}."
        nothing = dict.fromkeys(("level", "rule", "value", "layer"))
        return {"sentence": sentence, "reasons": [], "metric": metric, **nothing}
    curve = found[key]
    cosine = next((c for name in ("cosine_bulk", "cosine") if (c := measured.get(name, {}).get(key))), None)
    paper = measured.get(RESIDUAL, {}).get(key)
    apart = metric == BULK and paper is not None and paper.means != curve.means
    name = "relative residual of the bulk" if apart else "relative residual"
    turned = _turned(cosine)
    level, finding = _level(curve, turned is not None)
    low = min(range(len(curve.layers)), key=lambda i: curve.means[i])
    layers = max(int(result.model.get("blocks") or 0), curve.layers[-1])
    aside = f"{number(curve.means[0])} at layer {curve.layers[0]}" if len(curve.layers) > 1 else ""
    ends = {number(curve.means[0]), number(curve.means[-1])}
    if 0 < low < len(curve.layers) - 1 and number(curve.means[low]) not in ends:
        aside += f", lowest {number(curve.means[low])} at layer {curve.layers[low]}"
    return {
        "sentence": f"{number(curve.means[-1])} {name} at layer {curve.layers[-1]} of {layers}: "
        f"{_named(result, *key)} {finding}{f' ({aside})' if aside else ''}.",
        "reasons": [*(_beside(paper) if apart and paper else []), *_reasons(found, key, level, turned)],
        "level": level,
        "rule": _rule(curve, level, turned is not None, cosine is not None),
        "metric": metric,
        "weights": key[0],
        "variant": key[1],
        "value": curve.means[-1],
        "layer": curve.layers[-1],
        "layers": layers,
        "entered": curve.means[0],
        "lowest": curve.means[low],
        "lowest_layer": curve.layers[low],
        "floor": curve.floors[-1],
    }


def level_of(curve: Curve, cosine: Curve | None) -> str | None:
    """The level of a curve, with the cosines of the same tokens."""
    return _level(curve, _turned(cosine) is not None)[0]


def _beside(paper: Curve) -> list[str]:
    """The paper's own number, where massive tokens make it another."""
    ends = f"{number(paper.means[0])} at layer {paper.layers[0]} and {number(paper.means[-1])} at layer {paper.layers[-1]}"
    return [
        f"The bulk is all tokens but massive ones, of over {MASSIVE} times the median norm. With these, as the paper "
        f"defines it, the residual is {ends}."
    ]


def _named(result: Result, weights: str, variant: str) -> str:
    fresh = ", freshly initialised," if weights == "init" else ""
    if variant == WHOLE:
        return name_of(result) + fresh
    if variant in PAPER:
        return f"{name_of(result)}{fresh} as {variant} (SAN: self-attention network)"
    return f"{name_of(result)}{fresh} with {variant} ablated"


def _level(curve: Curve, turned: bool) -> tuple[str | None, str]:
    """The level of a curve by the rules above, and the finding in words."""
    entered, last = curve.means[0], curve.means[-1]
    middle = range(1, len(curve.means) - 1)
    rules: tuple[tuple[bool, str | None, str], ...] = (
        (len(curve.means) == 1, None, "was measured at this layer alone"),
        (curve.at_floor(0), "collapsed", f"gets tokens that are already the same, {_WITHIN}"),
        (curve.at_floor(-1), "collapsed", f"ends with all tokens the same, {_WITHIN}"),
        (
            last < TENTH * entered,
            "collapsed",
            "brings its tokens together to less than a tenth of what entered",
        ),
        (
            last < HALF * entered,
            "watch",
            "brings its tokens closer together, to less than half of what entered",
        ),
        (
            any(map(curve.collapsed_at, middle)),
            "watch",
            "ends with its tokens apart, but loses nine tenths of that on the way",
        ),
        (turned, "watch", "keeps its tokens apart by this measure, but they turn the same way"),
    )
    return next((rule[1:] for rule in rules if rule[0]), ("healthy", "keeps its tokens apart"))


def _rule(curve: Curve, level: str | None, turned: bool, directed: bool) -> str | None:
    """The part of `LEVELS` that gave this curve its level. directed: the tokens' directions are known."""
    entered, last, end = curve.means[0], curve.means[-1], curve.layers[-1]
    way = range(1, len(curve.means) - 1)
    low = [curve.layers[i] for i in way if curve.collapsed_at(i)]
    kept = "of the residual that entered block 1"
    if level is None:
        return None
    if level == "collapsed":
        if curve.at_floor(0):
            return "what enters block 1 is at its rounding floor"
        floored = curve.at_floor(-1)
        return (
            f"layer {end} is at its rounding floor"
            if floored
            else f"layer {end} keeps less than a tenth {kept}"
        )
    if level == "healthy":
        parts = [f"layer {end} keeps at least half {kept}"]
        parts += ["every layer on the way at least a tenth"] if way else []
        parts += ["the tokens’ directions do not contradict it"] if directed else []
    else:
        parts = [f"layer {end} keeps less than half {kept}"] if last < HALF * entered else []
        parts += (
            [f"layer {low[0]} {'less than a tenth' if parts else f'keeps less than a tenth {kept}'}"]
            if low
            else []
        )
        parts += ["√(1 − mean cosine) is below half of what it was at layer 0"] if turned else []
    return ", and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _turned(cosine: Curve | None) -> str | None:
    """The sentence for tokens whose directions come together, None where they do not or it is not known."""
    if cosine is None or len(cosine.means) < 2:
        return None
    first, last = (math.sqrt(max(0.0, 1 - value)) for value in (cosine.means[0], cosine.means[-1]))
    if last >= HALF * first:
        return None
    return (
        f"The mean cosine between two tokens is {number(cosine.means[-1], 3)} at layer {cosine.layers[-1]} "
        f"({number(cosine.means[0], 3)} at layer {cosine.layers[0]})."
    )


def _reasons(
    found: dict[tuple[str, str], Curve], key: tuple[str, str], level: str | None, turned: str | None
) -> list[str]:
    weights, variant = key
    reasons = [turned] if turned else []
    if variant == WHOLE:
        reasons += _held_up(found, weights, level)
        reasons += _costliest(found, weights)
    fresh = found.get(("init", variant))
    if weights == "pretrained" and fresh is not None:
        reasons.append(f"The same architecture freshly initialised {fresh.ending}.")
    return reasons


def _held_up(found: dict[tuple[str, str], Curve], weights: str, level: str | None) -> list[str]:
    """What the paper's variants say about it. Where nothing is held up, only their ends are told."""
    plain, mlp, skip, whole = (found.get((weights, variant)) for variant in PAPER)
    if whole is None or plain is None:
        return []
    enough = HALF * whole.means[-1]
    half = f"half of the whole model’s {number(whole.means[-1])}"
    alone = f"Without attention skips and MLPs (SAN, self-attention network) the residual {plain.ending}"
    if level == "collapsed" or plain.means[-1] >= enough:
        so = "" if level == "collapsed" else f", so attention alone keeps at least {half}"
        return [f"{alone}{so}."]
    if skip is None or mlp is None:
        return [f"{alone}."]
    by_skip, by_mlp = (
        "0, at rounding" if curve.at_floor(-1) else number(curve.means[-1]) for curve in (skip, mlp)
    )
    if skip.means[-1] >= enough and mlp.means[-1] >= enough:
        held = f"attention skips ({by_skip}) or MLPs ({by_mlp}) are each enough to keep at least {half}"
    elif skip.means[-1] >= enough:
        held = f"attention skips alone keep {by_skip}, MLPs alone {by_mlp}"
    elif mlp.means[-1] >= enough:
        held = f"MLPs alone keep {by_mlp}, attention skips alone {by_skip}"
    else:
        held = f"neither attention skips ({by_skip}) nor MLPs ({by_mlp}) alone keep {half}"
    return [f"{alone}; {held}."]


def _costliest(found: dict[tuple[str, str], Curve], weights: str) -> list[str]:
    """The ablation, beside the paper's variants, after which the residual is lowest; those with equal curves are one."""
    whole = found.get((weights, WHOLE))
    curves = {v: c for (w, v), c in found.items() if w == weights and v not in PAPER}
    if whole is None or not curves:
        return []
    alike: dict[tuple[float, ...], list[str]] = {}
    for name, curve in curves.items():
        alike.setdefault(tuple(curve.means), []).append(name)
    names = min(alike.values(), key=lambda names: curves[names[0]].means[-1])
    lower, change = _change(whole, curves[names[0]])
    if len(alike) == 1:
        return [f"Ablating {' or '.join(names)} {'lowers' if lower else 'does not lower'} it: {change}."]
    if not lower:
        return [f"None of {len(curves)} ablations lowers it."]
    most = "lowers it most" if len(names) == 1 else "lower it most, by the same"
    return [f"Of {len(curves)} ablations, {' and '.join(names)} {most}: {change}."]


def _change(whole: Curve, ablated: Curve) -> tuple[bool, str]:
    """Whether the last value is lower beyond rounding, and from what to what, in digits that show a difference."""
    before, after = whole.means[-1], ablated.means[-1]
    noise = sum(floor for floor in (whole.floors[-1], ablated.floors[-1]) if math.isfinite(floor))
    if abs(after - before) <= noise:
        return False, f"{number(before)}, the same up to rounding"
    digits = next((d for d in range(2, 9) if number(before, d) != number(after, d)), 9)
    return after < before, f"{number(before, digits)} → {number(after, digits)}"
