"""The paper's four variants, and ablations written as text: `attention.skip@3-5`, `head@2:5`, `mlp=0.5`."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass

from rc_probe.hooks.edits.gates import COMPONENTS, ONLY_REMOVED, Gate
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.structure.structure import Structure
from rc_probe.registry import PAPER

FORM = "COMPONENT[@BLOCKS][:HEADS][=GATE], for example attention.skip@3-5, mlp@7, attention@all, head@2:5"
MOST = 9999  # blocks or heads: no model has more
_PATTERN = re.compile(r"(?P<component>[a-z.]+)(@(?P<blocks>[^:=]+))?(:(?P<heads>[^=]+))?(=(?P<value>.+))?")


@dataclass(frozen=True)
class Variant:
    """A named set of gates; `transformer` has none. Blocks and heads in `gates` are numbered from 1."""

    name: str
    gates: tuple[Gate, ...]


def paper_variants(structure: Structure) -> list[Variant]:
    """`SAN`, `SAN+MLP`, `SAN+skip` and `transformer` (Dong et al. 2021, figure 2) for this model.

    Two switches: the attention skip, and the MLP sublayer as a whole. In a parallel block there is
    one skip, the attention skip. In a block without attention it is the skip around its mixer (state
    space, convolution). Blocks without an MLP have nothing to switch off.
    """
    attending = [b for b in structure.blocks if any(branch.kind == "attention" for branch in b.branches)]
    mixing = [
        b for b in structure.blocks if b not in attending and any(x.kind == "mixer" for x in b.branches)
    ]
    if not attending and not mixing:
        raise structure.error(
            structure.blocks[0],
            f"no branch of the model moves anything between tokens ({structure.signature})",
            "Choose a model with attention or another mixer",
        )
    no_skip: tuple[Gate, ...] = (Gate("attention.skip"),) if attending else ()
    no_skip += (Gate("mixer.skip", tuple(b.index + 1 for b in mixing)),) if mixing else ()
    has_mlp = any(branch.kind == "mlp" for block in structure.blocks for branch in block.branches)
    no_mlp = (Gate("mlp.sublayer"),) if has_mlp else ()
    return [
        Variant(name, gates)
        for name, gates in zip(PAPER, (no_skip + no_mlp, no_skip, no_mlp, ()), strict=True)
    ]


def mixer_note(structure: Structure) -> str | None:
    """What the variants mean where blocks have no attention; None where all have."""
    without = [b for b in structure.blocks if all(branch.kind != "attention" for branch in b.branches)]
    if not without:
        return None
    return (
        f"{len(without)} of {structure.depth} blocks have no attention: there the variants switch the skip around "
        "the mixer, and what holds for attention alone (heads, the recursion, the bound) does not apply."
    )


def parse_ablation(text: str) -> Variant:
    """One `--ablate` text as a variant; several components may be joined by `+`.

    Raises RcProbeError with the nearest component when one is misspelt.
    """
    return Variant(text, tuple(_parse_one(text, part.strip()) for part in text.split("+")))


def _parse_one(text: str, part: str) -> Gate:
    match = _PATTERN.fullmatch(part)
    if not match:
        raise _error(text, f"{part!r} is not an ablation")
    component, blocks, heads, value = match.group("component", "blocks", "heads", "value")
    if component not in COMPONENTS:
        near = difflib.get_close_matches(component, COMPONENTS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise _error(
            text, f"there is no component {component!r}{hint}", f"Components: {', '.join(COMPONENTS)}"
        )
    if (component == "head") != (heads is not None):
        raise _error(
            text, "heads are named as head@BLOCK:HEAD" if component == "head" else "only 'head' takes :HEADS"
        )
    return Gate(
        component,
        None if blocks in (None, "all") else _numbers(text, blocks),
        () if heads is None else _numbers(text, heads),
        0.0 if value is None else _gate(text, value, component),
    )


def _gate(text: str, value: str, component: str) -> float:
    try:
        gate = float(value)
    except ValueError:
        raise _error(text, f"the gate {value!r} is not a number") from None
    if not math.isfinite(gate):
        raise _error(text, f"the gate {value!r} is not a finite number")
    if component in ONLY_REMOVED and gate != 0:
        raise _error(
            text, f"{component!r} can only be removed", "Scale its branches instead, such as mlp=0.5"
        )
    return gate


def _numbers(text: str, spec: str) -> tuple[int, ...]:
    """`3`, `3-5`, `1,4-6` as numbers from 1."""
    numbers: list[int] = []
    for part in spec.split(","):
        ends = part.strip().split("-")
        if len(ends) > 2 or not all(end.isascii() and end.isdigit() for end in ends):
            raise _error(text, f"{part.strip()!r} is not a number or a range such as 3-5")
        if any(len(end) > len(str(MOST)) or int(end) > MOST for end in ends):
            raise _error(text, f"{part.strip()!r} is beyond {MOST:,}", "Give numbers of blocks or heads")
        first, last = int(ends[0]), int(ends[-1])
        if last < first:
            raise _error(text, f"the range {part.strip()!r} runs backwards")
        numbers += range(first, last + 1)
    return tuple(dict.fromkeys(numbers))


def _error(text: str, what: str, todo: str = f"Write {FORM}") -> RcProbeError:
    return RcProbeError(what, where=f"--ablate {text}", todo=todo)


def span(numbers: tuple[int, ...] | None) -> str:
    """Block or head numbers as short text: `all`, `7`, `3-5`, `1,4-6`."""
    if numbers is None:
        return "all"
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
