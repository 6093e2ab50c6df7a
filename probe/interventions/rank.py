"""Ranks: the query-key form of heads truncated to fewer dimensions.

Source: Amsel, Yehudai, Bruna 2024, *On the benefits of rank in attention layers* (arXiv 2407.16153).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from .intervention import Intervention, Spec

if TYPE_CHECKING:
    from rc_probe.hooks.edits.edits import Edits
    from rc_probe.hooks.heads.forms import Heads
    from rc_probe.hooks.structure.structure import Structure

METHODS = ("weights", "data", "bottom", "random")
TODO = f"Write rank@2:5=4, or rank@all=8:METHOD with one of {', '.join(METHODS)}"
MOST = 99_999  # no head is so wide


@dataclass(frozen=True)
class Ranked(Intervention):
    """`rank@2:5=4`, `rank@all=8:data`. The width of a head is the model as it is; rank 0 looks at all tokens alike.

    weights: the best of that rank for any input. data: for the queries and keys of the plain model on the data.
    bottom: the smallest singular values instead, and random: a random subspace, both to compare with.
    """

    value: str = ""

    parts = {"rank": f"rank of the query-key form of heads: 8, or 8:METHOD with {', '.join(METHODS)}"}  # noqa: RUF012 - a constant
    sweep = ("0", "1", "2", "4", "8", "16")

    @classmethod
    def parse(cls, spec: Spec) -> Self:
        rank, colon, method = (spec.value or "").partition(":")
        if not (rank.isascii() and rank.isdigit()) or int(rank[:6]) > MOST:
            raise spec.error(f"{rank!r} is no rank", TODO)
        if colon and method not in METHODS:
            raise spec.error(f"{method!r} is no way to choose what is kept", TODO)
        return cls(spec.part, spec.blocks, spec.heads, spec.value or "")

    @property
    def rank(self) -> int:
        return int(self.value.partition(":")[0])

    @property
    def method(self) -> str:
        return self.value.partition(":")[2] or METHODS[0]

    @property
    def on_data(self) -> bool:
        return self.method == "data"

    @classmethod
    def reading(cls, structure: Structure, given: Sequence[Intervention]) -> Any:
        """The moments of all their blocks."""
        from rc_probe.hooks.heads.moments import Moments
        from rc_probe.hooks.heads.read import heads_of

        heads = {each.block.index: each for one in given for each in heads_of(structure, one.blocks)}
        return Moments(structure, heads.values())

    def edits(self, structure: Structure) -> Edits:
        from rc_probe.hooks.edits.edits import Edits
        from rc_probe.hooks.heads.rank import rank_edit
        from rc_probe.hooks.heads.read import heads_of

        edits = Edits()
        for heads in heads_of(structure, self.blocks):
            rank_edit(edits, structure, heads, self._chosen(structure, heads), self.rank, self.method)
        return edits

    def _chosen(self, structure: Structure, heads: Heads) -> list[int]:
        """The heads of a block, from 0. RcProbeError where one is not there, or not so wide."""
        for head in self.heads:
            if not 1 <= head <= heads.count:
                raise structure.error(
                    heads.block, f"there is no head {head}", f"Heads are numbered 1 to {heads.count}"
                )
        if self.rank > heads.width:
            what = f"its heads are {heads.width} wide, and none has rank {self.rank}"
            raise structure.error(heads.block, what, f"Give a rank from 0 to {heads.width}")
        return [head - 1 for head in self.heads] or list(range(heads.count))
