"""What `--fail-if` can say of embeddings: `embedding_cosine@last>0.5`, `isoscore@last<0.05`, `accuracy@last<0.8` of retrieval."""

from __future__ import annotations

from typing import Any

from rc_probe.hooks.errors import RcProbeError
from rc_probe.registry import WHOLE
from rc_probe.results.protocols import Measured, Result

from .embedding_words import by_layer


def plan_embeddings(text: str, variant: str, chosen: Measured) -> None:
    """RcProbeError for what these settings do not measure. Whether the model pools is not known yet."""
    options: Any = chosen
    where = f"--fail-if {text}"
    if options.embeddings is False:
        raise RcProbeError("embeddings are not measured", where=where, todo="Leave --no-embeddings out")
    if variant != WHOLE:
        raise RcProbeError(
            f"embeddings of {variant!r} are not measured", where=where, todo=f"Leave :{variant} out"
        )


def of_embeddings(result: Result, metric: str) -> dict[int, float]:
    """The metric by layer; the last one is the model's own embedding."""
    return by_layer(result.declared["embeddings"].read(result.tables), metric)
