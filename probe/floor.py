"""The table `recursion`: a model's pure attention variant, run in split arithmetic below the float floor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.gates import gate_edits
from rc_probe.hooks.prove import Replay, token_axis
from rc_probe.hooks.split import Split
from rc_probe.hooks.state import measuring
from rc_probe.hooks.structure import Block, Structure
from rc_probe.hooks.taps import Tap, run_stopped

from .batches import Batch
from .recursion import recursion
from .run import Curves, Row, stream_pass
from .variants import paper_variants


def first_sample(batch: Batch) -> Batch:
    """The first sample of a batch, without the padding that the others made."""
    mask = None if batch.mask is None else batch.mask[:1]
    inputs: dict[str, Any] = {
        k: v[:1] if isinstance(v, Tensor) and v.ndim else v for k, v in batch.inputs.items()
    }
    if mask is not None:
        tokens, length = int(mask.sum()), mask.shape[1]
        cut = {
            k: v[:, :tokens] for k, v in inputs.items() if isinstance(v, Tensor) and v.shape[1:2] == (length,)
        }
        inputs |= cut
    return Batch(inputs, None)


def below_the_floor(structure: Structure, batch: Batch, weights: str) -> tuple[list[Row], str]:
    """Rows of the table `recursion` for the first sample of `batch`, and a note ("" if all is said).

    Beside each residual stands what the model's own arithmetic gives. A model with an operation that
    split arithmetic has no rule for, or whose result does not agree where both can be compared, gets
    no rows, and the note says why.
    """
    sample = first_sample(batch)
    san = gate_edits(structure, paper_variants(structure)[0].gates)
    direct = Curves(["residual"])
    replay = Replay(structure)
    with measuring(structure.model):
        with replay, Tap(structure, lambda layer, x: None, stop=True):
            run_stopped(lambda: structure.model(**sample.inputs))
        stream_pass(structure, sample.inputs, san, direct.on_stream)
        plain = [row["mean"] for row in direct.rows("", "")]
        first = structure.blocks[0]

        def running(block: Block) -> Callable[[Split], Any]:
            return lambda stream: replay.run(block, stream, san)

        try:
            found = recursion(
                [running(block) for block in structure.blocks], replay.stream(first), None, plain,
                axis=token_axis(first) - first.ndim,
            )  # fmt: skip
        except RcProbeError as error:
            return [], f"Below the float floor, {weights}: {error}"
    return [{"weights": weights, **row} for row in found.rows], found.note
