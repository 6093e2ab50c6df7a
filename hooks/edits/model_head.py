"""The model from behind its last block on: run with another stream, or for a few positions alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.module_calls import Call
from rc_probe.hooks.structure.example_inputs import with_no_cache
from rc_probe.hooks.structure.structure import CandidateBlock, Structure
from rc_probe.hooks.undo import hook, undoing

from .block_watch import BlockWatch, fetch, replace
from .model_state import measuring
from .single_precision import single_precision
from .stream_taps import batch_first, laid_out


class ModelHead(BlockWatch):
    """On one batch of inputs: the plain output, and what the model makes of other streams of its last layer.

    The plain pass runs at once, unless what the blocks returned in one is given. Inside the context the blocks do not
    run: they return that, the last one the stream given. So final norm, pooler and head are the model's own code.

    plain: the model's output, None where no pass ran; stream: (batch, tokens, dim) after the last block, as in the plain pass
    outputs: what each block returned, by its number
    """

    def __init__(
        self,
        structure: Structure,
        inputs: dict[str, Any],
        model: nn.Module | None = None,
        outputs: dict[int, Any] | None = None,
    ) -> None:
        super().__init__(structure, range(structure.depth))
        self.inputs = with_no_cache(structure.model, inputs)
        self.run = model or structure.model
        self.outputs: dict[int, Any] = outputs or {}
        self._given: Tensor | None = None
        self.plain: Any = None
        if outputs is None:
            with self:
                self.plain = self.run(**self.inputs)
        self.stream = batch_first(self._raw, structure.blocks[-1])

    @contextmanager
    def opened(self) -> Iterator[None]:
        with measuring(self.model), single_precision(self.model):
            yield

    @property
    def _raw(self) -> Tensor:
        raw: Tensor = fetch(self.outputs[self.structure.depth - 1], self.structure.blocks[-1].exit)
        return raw

    def returned(self, block: CandidateBlock, output: Any) -> None:
        if self._given is None:
            self.outputs[block.index] = output

    def instead(self, block: CandidateBlock, call: Call) -> Any:
        """What the plain pass returned, whatever hooks made of it."""
        if self._given is None:
            return call()
        output = self.outputs[block.index]
        if block.index < self.structure.depth - 1:
            return output
        return replace(output, block.exit, laid_out(self._given, block, self._raw).contiguous())

    def __call__(self, stream: Tensor) -> Any:
        """The model's output with `stream` (batch, tokens, dim) after its last block."""
        if stream.shape != self.stream.shape:
            raise RcProbeError(
                f"its head runs on {tuple(self.stream.shape)}, and the stream is {tuple(stream.shape)}, as with prompts "
                "that were learned",
                where=type(self.run).__name__,
                todo="What its paths predict cannot be scored",
            )
        self._given = stream.to(self._raw.device, self._raw.dtype)
        return self.run(**self.inputs)


class NarrowHead:
    """While it is installed and has positions, `head` gets (1, P, dim) of its input (batch, tokens, dim).

    >>> narrow = NarrowHead(model.get_output_embeddings())        # doctest: +SKIP
    >>> with narrow.installed():                                   # doctest: +SKIP
    ...     narrow.at = torch.tensor([0, 0, 1]), torch.tensor([3, 7, 2])
    ...     model(**inputs).logits.shape                           # (1, 3, words)

    at: rows and tokens, (P,) each; None: all, as the model does it
    """

    def __init__(self, head: nn.Module) -> None:
        self.head = head
        self.at: tuple[Tensor, Tensor] | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        def back() -> None:
            self.at = None

        with undoing(back), hook(self.head.register_forward_pre_hook, self._narrow):
            yield

    def _narrow(self, module: nn.Module, args: Any) -> Any:
        if self.at is None or not args:
            return None
        row, column = (place.to(args[0].device) for place in self.at)
        return (args[0][row, column][None], *args[1:])
