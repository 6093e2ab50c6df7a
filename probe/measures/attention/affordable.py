"""How many samples the model's own attention is read on: from shapes, by one formula."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rc_probe.budget import Shape, first_that_fits

PASSES = 0.3  # plain passes over all samples that it may cost
READ = 1.5  # plain passes that reading the patterns of a sample costs
ENTRY, CUBE = (
    1500,
    20,
)  # multiply-adds for each weight of a pattern; for each tokens³ of its distances and singular values
AT_MOST = "0.3 of a plain pass over all samples"


@dataclass(frozen=True)
class Chosen:
    """The first `samples`, of their first `tokens` (None: all); cubes: also what takes tokens³ operations a pattern."""

    samples: int = 4
    tokens: int | None = None
    cubes: bool = True


def affordable(shape: Shape, heads: int, *, cut: bool) -> Chosen | None:
    """The first within the limits of rc_probe.budget, of all tokens, half of them, a quarter …: four samples, two, one, and
    one without distances and singular values.

    heads: of all blocks. cut: whether the first tokens of a sample can be had alone
    """
    choices = [
        Chosen(samples, tokens, cubes)
        for tokens in (shape.halved() if cut else [shape.tokens])
        for samples, cubes in ((4, True), (2, True), (1, True), (1, False))
    ]

    def work(one: Chosen) -> float:
        tokens = one.tokens or shape.tokens
        each = ENTRY + (CUBE * tokens if one.cubes else 0)
        return min(one.samples, shape.samples) * (READ * shape.plain(tokens) + heads * each * tokens**2)

    def memory(one: Chosen) -> float:
        return 4.0 * (heads + 16 * max(shape.heads, default=1)) * (one.tokens or shape.tokens) ** 2

    found = first_that_fits(choices, shape, work, memory, PASSES)
    return replace(found, tokens=None) if found and found.tokens == shape.tokens else found


def said(chosen: Chosen) -> list[str]:
    """A note where something was cut."""
    if chosen == Chosen():
        return []
    parts = [f"{chosen.samples} sample{'s' * (chosen.samples > 1)}"]
    parts[0] += f" of {chosen.tokens} tokens" if chosen.tokens else ""
    parts += [] if chosen.cubes else ["no Dobrushin coefficients and singular values"]
    return [f"The model's own attention: {', '.join(parts)}, so that it costs no more than {AT_MOST}."]
