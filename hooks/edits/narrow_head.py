"""The model's last map, from the stream to scores of all words, at the positions alone that are looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from rc_probe.hooks.undo import undoing


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
            handle.remove()
            self.at = None

        handle = self.head.register_forward_pre_hook(self._narrow)
        with undoing(back):
            yield

    def _narrow(self, module: nn.Module, args: Any) -> Any:
        if self.at is None or not args:
            return None
        row, column = (place.to(args[0].device) for place in self.at)
        return (args[0][row, column][None], *args[1:])
