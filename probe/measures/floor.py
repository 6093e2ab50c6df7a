"""Below the float floor: the residual of pure attention without cancellation, and the theorem's bounds on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rc_probe.hooks.errors import RcProbeError
from rc_probe.options import Options, option
from rc_probe.results.tables import LAYER, WEIGHTS, Column, Table

from .measurement import Found, Measurement

if TYPE_CHECKING:
    from .context import Context

RECURSION = Table("recursion", "The recursion by layer", (
    WEIGHTS, LAYER,
    Column("residual", "float64", "relative residual of pure attention, computed without cancellation"),
    Column("residual_direct", "float64", "the same as the model's own arithmetic has it", "plain arithmetic"),
    Column("ratio_cubed", "float64", "residual divided by the cube of the layer before", "r / previous r³"),
))  # fmt: skip
BOUNDS = Table("bounds", "The one-layer bound, and theorem 2.2 unrolled, by layer", (
    WEIGHTS,
    Column("layer", "int64", "number of the attention layer, from 1"),
    Column("heads", "int64", "H, how many heads it has"),
    Column("d_qk", "int64", "d, the width of a query or a key", "d per head"),
    Column("beta", "float64", "largest ‖W_Q W_Kᵀ‖₁ ‖W_V W_O‖₁,∞ of its heads", "β"),
    Column("gamma", "float64", "the theorem's γ, as measured", "γ"),
    Column("coefficient", "float64", "what the cube of the residual is multiplied by", "4γβH/√d"),
    Column("spread", "float64", "how far the scores of a row spread at most; the theorem allows 1.256", "max D"),
    Column("residual_in", "float64", "‖res X‖₁,∞ of the tokens that enter the layer", "residual in"),
    Column("residual_out", "float64", "‖res X‖₁,∞ of what the layer gives", "residual out"),
    Column("bound_out", "float64", "the one-layer bound: of residual_out, from the measured residual_in; empty beyond floats",
           "one-layer bound"),
    Column("trivial_out", "float64", "what residual_out cannot exceed, whatever the attention patterns are",
           "any patterns"),
    Column("log10_bound_unrolled", "float64", "log₁₀ of theorem 2.2's own bound, from what enters layer 1 to here; empty beyond floats",
           "log₁₀ unrolled bound"),
    Column("vacuous", "bool", "whether the one-layer bound says nothing"),
    Column("reason", "str", "why it says nothing", "why vacuous"),
    Column("unrolled_vacuous", "bool", "whether the unrolled bound says nothing", "unrolled vacuous"),
    Column("unrolled_reason", "str", "why the unrolled bound says nothing", "why unrolled vacuous"),
))  # fmt: skip

COROLLARY = Table("corollary", "MLPs against the collapse: corollary 3.2, by layer of SAN+MLP", (
    WEIGHTS,
    Column("layer", "int64", "number of the block, from 1"),
    Column("lipschitz", "float64", "λ: how much an MLP with its skip can enlarge a residual, from its weights; empty for gated MLPs", "λ"),
    Column("gain", "float64", "‖res f(Y)‖₁,∞ / ‖res Y‖₁,∞, what it does on the sample", "measured gain"),
    Column("residual", "float64", "relative residual of SAN+MLP behind the block"),
    Column("rate", "float64", "that over the one before the block: below 1 tokens come together"),
    Column("rate_san", "float64", "the same of pure attention", "rate of SAN"),
    Column("coefficient", "float64", "what the cube of the residual is multiplied by without MLP", "4γβH/√d"),
    Column("base", "float64", "with it: 2λ times as much, 2 since the residual is about the token mean", "2λ·4γβH/√d"),
    Column("spread", "float64", "how far the scores of a row spread at most; the theorem allows 1.256", "max D"),
    Column("residual_in", "float64", "‖res X‖₁,∞ of the tokens that enter the attention", "residual in"),
    Column("residual_out", "float64", "‖res f(Y)‖₁,∞ of what the MLP gives, before any norm", "residual out"),
    Column("bound_out", "float64", "what residual_out cannot exceed, from the measured residual_in; empty beyond floats",
           "one-layer bound"),
    Column("log10_bound_unrolled", "float64", "log₁₀ of the corollary's own bound, from what enters layer 1 to here; empty beyond floats",
           "log₁₀ unrolled bound"),
    Column("vacuous", "boolean", "whether the unrolled bound says nothing; empty without one"),
    Column("reason", "str", "why it says nothing", "why vacuous"),
))  # fmt: skip


@dataclass(frozen=True)
class FloorOptions(Options):
    """Whether to measure it."""

    recursion: bool = option(True, "Follow pure attention below the float floor.")
    bounds: bool = option(True, "The theorem's bounds beside it.")


class Floor(Measurement):
    """The first sample; of fresh weights those of the first seed."""

    name, subject = "floor", "Pure attention below the float floor was"
    options = FloorOptions
    tables = (RECURSION, BOUNDS, COROLLARY)
    on_fresh = True

    def wanted(self, settings: Any) -> bool:
        return bool(settings.recursion)

    def run(self, context: Context) -> Found:
        if context.before is not None:
            return context.before
        context.advance("below the float floor")
        from .below_floor.below_float_floor import affordable, below_the_floor, said

        asked, shape = context.settings.bounds, context.shape
        chosen = affordable(shape, cut=context.loaded.modality == "text", bounds=asked)
        if chosen is None:
            raise RcProbeError(f"{shape.tokens} tokens take more than is allowed for", where=context.name)
        below = below_the_floor(context.structure, context.first, context.weights, chosen)
        tables = {"recursion": below.recursion, "bounds": below.bounds, "corollary": below.corollary}
        return Found(tables, [*said(chosen, asked), *below.notes])
