"""What an edit of attention has to know of the pass that runs: which tokens are real, and how many there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from rc_probe.hooks.edits.forward_calls import given_to, mask_in, side_of
from rc_probe.hooks.structure.structure import Block, Structure


class PassInputs:
    """What is known of the pass that runs: which tokens are real, and the size of the stream that entered a block."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.calls = 0  # of modules that hold all blocks, one inside the other
        self.padding: Tensor | None = None
        self.sizes: dict[int, tuple[int, ...]] = {}

    def called(self, module: nn.Module, call: Callable[[], Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """The mask of the outermost call counts; a decoder's is its own."""
        if not self.calls:
            self.padding = None
        mask = mask_in(given_to(module.forward, args, kwargs), side_of(self.structure, module))
        if self.padding is None and isinstance(mask, Tensor) and mask.ndim == 2:
            self.padding = mask != 0
        self.calls += 1
        try:
            return call()
        finally:
            self.calls -= 1

    def entered(self, block: Any, stream: Tensor) -> None:
        size = tuple(stream.shape[:-1])
        self.sizes[block.index] = size[::-1] if block.batch_axis == 1 else size

    def real(self, block: Block, rows: int, queries: int, keys: int, device: Any) -> Tensor | None:
        """(rows, keys) bool. RcProbeError where the op does not attend between the tokens of the stream."""
        if (rows, queries) != self.sizes[block.index]:
            raise self.structure.error(
                block,
                f"its attention works on {rows} × {queries} tokens, and its stream has "
                f"{' × '.join(map(str, self.sizes[block.index]))}: within windows or patches a mask is another one",
                "Its mask cannot be exchanged",
            )
        if self.padding is None:
            return None
        if self.padding.shape != (rows, keys):
            raise self.structure.error(
                block,
                f"the attention mask {tuple(self.padding.shape)} does not fit {rows} × {keys} keys",
                "Run it without a cache",
            )
        return self.padding.to(device)
