"""The ablations: the model without each part that `--ablate` names, and the paper's variants, at the last layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rc_probe.interventions.gate import Gated
from rc_probe.interventions.grammar import parse_intervention
from rc_probe.interventions.intervention import Intervention, Variant, span
from rc_probe.options import Options, option
from rc_probe.registry import PAPER, WHOLE
from rc_probe.results.tables import BASELINE, METRIC, Column, Table

from .measurement import Found, Measurement

if TYPE_CHECKING:
    from .context import Context

ABLATIONS = Table("ablations", "Every ablation and metric at the last layer", (
    Column("component", "str", "what is off or changed, or the name of a variant of the paper"),
    Column("layer", "str", "in which blocks, counted from 1"),
    Column("head", "str", "which heads, counted from 1; empty for all else"),
    METRIC,
    Column("value", "float64", "with the part off, mean over samples"),
    *BASELINE,
))  # fmt: skip
ABLATE_HELP = (
    "Leave a part out and compare: attention.skip@3-5, mlp@7, mlp.skip, attention@all, head@2:5, "
    "block@5-8, mlp@4=0.5. Blocks and heads count from 1. Repeat for more; join parts by '+'."
)


@dataclass(frozen=True)
class AblationOptions(Options):
    """What to leave out, one spec each."""

    ablate: tuple[str, ...] = option(
        (), ABLATE_HELP, typed=list[str] | None, read=lambda given: tuple(given or ())
    )

    def check(self) -> None:
        super().check()
        self.asked()

    def asked(self) -> tuple[Variant, ...]:
        """The interventions, each once. RcProbeError, with the nearest name, for what is misspelt."""
        return tuple(parse_intervention(text) for text in dict.fromkeys(self.ablate))


class Ablations(Measurement):
    """No passes of its own: the curves bring the numbers."""

    name, subject = "ablations", "Ablations were"
    options = AblationOptions
    tables = (ABLATIONS,)
    on_mixed = True

    def run(self, context: Context) -> Found:
        last: dict[str, dict[str, float]] = {}
        for row in context.found["curves"].tables["residuals"]:
            if row["layer"] == context.structure.depth:
                last.setdefault(row["variant"], {})[row["metric"]] = row["mean"]
        rows = [
            {**_columns(variant), "metric": metric, "value": value, "baseline": last[WHOLE][metric],
             "change": value - last[WHOLE][metric]}
            for variant in context.variants if variant.interventions
            for metric, value in last[variant.name].items()
        ]  # fmt: skip
        return Found({"ablations": rows})

    def entries(self, settings: Any, samples: int) -> dict[str, Any]:
        return {"ablate": list(settings.ablate)}


def _columns(variant: Variant) -> dict[str, str | None]:
    given = variant.interventions
    heads = [span(each.heads) for each in given if each.heads]
    return {
        "component": variant.name
        if variant.name in PAPER
        else "+".join(dict.fromkeys(_what(each) for each in given)),
        "layer": "+".join(dict.fromkeys(span(each.blocks) for each in given)),
        "head": "+".join(heads) or None,
    }


def _what(each: Intervention) -> str:
    """The part; with its value where that says what is done: `norm=frozen`, but `mlp` whatever its gate."""
    return each.part if isinstance(each, Gated) else f"{each.part}={each.value}"
