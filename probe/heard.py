"""What the calls around a pass say of it: which tokens are real, and whether it is a sample at all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rc_probe.hooks.edits.forward_calls import Generation, generation, labels_alone, mask_in, side_of
from rc_probe.hooks.edits.stream_taps import Tap
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.structure.structure import Structure, decodes
from rc_probe.hooks.structure.tape import walk

OTHER_INPUTS = {"pixel_values", "pixel_values_videos", "input_features", "input_values"}  # no texts


class Heard:
    """One pass, as the calls around its blocks tell of it, the outermost first. What that one says counts.

    text: (batch, tokens) of the text that enters; None where it is not known, as of pictures (`tower`)
    masks: those with two axes, in the order of the calls; given: whether the first is one of the outermost call
    unread: a mask of other axes was given
    skip: why it is no sample; "" where it is one
    """

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.generation: Generation | None = generation()
        self.text: tuple[int, int] | None = None
        self.tower = False
        self.masks: list[Tensor] = []
        self.given = self.unread = False
        self.skip = ""
        self.calls = 0  # that are running, one inside the other
        self.blocks = 0  # that ran

    def hear(self, module: nn.Module, given: dict[str, Any]) -> None:
        """A module that holds all blocks is called."""
        side = side_of(self.structure, module)
        if not self.calls:
            _refuse_packed(self.structure, module, given)
            self._see_cache(given)
        _refuse_one_row(self.structure, given)
        main = _tensor(given, f"{side}input_ids", 2)
        embedded = _tensor(given, f"{side}inputs_embeds", 3)
        first = next((t for t in (main, embedded, labels_alone(given, side)) if t is not None), None)
        if first is None and any(isinstance(given.get(name), Tensor) for name in OTHER_INPUTS) and not side:
            # Texts around it are not its own.
            self.text, self.masks, self.given, self.tower = None, [], False, True
        elif self.text is None and first is not None and not self.tower:
            self.text = int(first.shape[0]), int(first.shape[1])
        mask = mask_in(given, side)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self.given = self.given or not self.calls
            self.masks.append(mask)
        elif isinstance(mask, Tensor):
            self.unread = self.unread or not self.masks
        if first is not None:
            _refuse_restarts(self.structure, given.get("position_ids"), mask)

    def _see_cache(self, given: dict[str, Any]) -> None:
        for value in given.values():
            filled = value.get_seq_length() if hasattr(value, "get_seq_length") else 0
            if int(filled) > 0:
                self.skip = "went on from a filled cache"
        old = given.get("past_key_values")
        if isinstance(old, tuple) and old:
            self.skip = "went on from a filled cache"

    @property
    def is_text(self) -> bool:
        """Whether rows may be padded: a model of the user's own is taken to read texts."""
        reads = getattr(self.structure.model, "main_input_name", "input_ids")
        return not self.tower and (self.text is not None or reads == "input_ids")

    def real(self, x: Tensor) -> Iterator[Tensor]:
        """Masks (batch, tokens) bool that may be the stream's, the outermost first."""
        for mask in self.masks:
            fits = mask.shape == (self.text or x.shape[:2])
            if fits and ((self.given and mask is self.masks[0]) or bool(((mask == 0) | (mask == 1)).all())):
                yield mask != 0


def _tensor(given: dict[str, Any], name: str, ndim: int) -> Tensor | None:
    value = given.get(name)
    return value if isinstance(value, Tensor) and value.ndim == ndim else None


def _refuse_one_row(structure: Structure, given: dict[str, Any]) -> None:
    lengths = given.get("cu_seq_lens_q")  # what flash attention needs for several texts in one row
    if isinstance(lengths, Tensor) and len(lengths) > 2:
        raise structure.error(
            structure.blocks[0],
            f"its stream packs {len(lengths) - 1} texts into one sequence",
            "Pad and mask them instead (sentence-transformers: unpad_inputs=False)",
        )


def _refuse_packed(structure: Structure, module: nn.Module, given: dict[str, Any]) -> None:
    """A stream without a batch axis is one sample to every metric, so it must be one."""
    block = structure.blocks[0]
    main = given.get(getattr(module, "main_input_name", "input_ids"))
    if main is None and module is structure.model:
        main = next((t for _, t in walk(given)), None)
    if block.batch_axis is not None or not isinstance(main, Tensor) or not main.ndim:
        return
    grids = [t for name, t in given.items() if "grid" in name and isinstance(t, Tensor)]
    count = len(grids[0] if grids else main)  # of images, whose patches are packed
    if count > 1:
        raise structure.error(
            block, f"its stream packs all {count} samples into one sequence", "Run samples one by one"
        )


def _refuse_restarts(structure: Structure, positions: Any, mask: Any) -> None:
    """Positions that go back within a row: it holds several texts."""
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.shape[1] < 2:
        return
    back = positions[:, 1:] < positions[:, :-1]
    if isinstance(mask, Tensor) and mask.shape == positions.shape:
        real = mask != 0
        back = back & real[:, 1:] & real[:, :-1]
    texts = int(back.sum(1).amax()) + 1
    if texts > 1:
        raise structure.error(
            structure.blocks[0],
            f"its positions begin anew within a row, which packs {texts} texts into it",
            "Give each text a row of its own, padded and masked",
        )


def no_mask(structure: Structure, texts: int) -> RcProbeError:
    """The refusal of a batch of which it is not known what is padding."""
    return RcProbeError(
        f"a batch of {texts} texts came without an attention mask, so padding cannot be told from text",
        where=type(structure.model).__name__,
        todo="Pass attention_mask= (batch, tokens) to the model, run texts one by one, or say attach(model, mask=…): "
        "the mask of every batch, or None if nothing is padded",
    )


def tokens_of_prompt(heard: Heard, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The stream x of the first pass of `generate`, of each prompt once and without what was guessed; and its mask.

    Beams and several returned sequences repeat each prompt. Where a helper guesses the next tokens, they stand behind it.
    """
    given = heard.generation
    if given is None or given.prompt is None or heard.text is None or decodes(heard.structure):
        return x, None
    rows, tokens = given.prompt
    if heard.text != tuple(x.shape[:2]) or x.shape[0] % rows or x.shape[1] < tokens:
        return x, None
    x = x[:: x.shape[0] // rows, :tokens]
    mask = given.mask
    if mask is None:
        mask = next((m[:: len(m) // rows, :tokens] for m in heard.masks if len(m) % rows == 0), None)
    if mask is None and heard.unread and rows > 1:
        raise no_mask(heard.structure, rows)
    return x, torch.ones(rows, tokens, dtype=torch.bool) if mask is None else mask != 0


def mask_of_stream(heard: Heard, x: Tensor, tap: Tap) -> Tensor | None:
    """(batch, tokens) bool of the stream x of layer 0, read off the calls around it; None: all tokens are real.

    Raises RcProbeError where it cannot be told.
    """
    prompt, mask = tokens_of_prompt(heard, x)
    if mask is None:
        mask = next(heard.real(x), None)
    if mask is None and heard.given:
        raise no_fit(heard.structure, heard.masks[0], x)
    if mask is None and heard.is_text and x.shape[0] > 1:
        raise no_mask(heard.structure, x.shape[0])
    if mask is None and heard.text is not None and heard.text[1] < x.shape[1]:
        mask = torch.ones(heard.text, dtype=torch.bool)
    if mask is None:
        return None
    if mask.shape[1] <= prompt.shape[1]:
        return tap.fit(mask.to(x.device), prompt)
    if bool(mask.all()):
        return None  # pooled, and nothing of it is padding
    raise no_fit(heard.structure, mask, prompt, "or run texts one by one")


def no_fit(structure: Structure, mask: Tensor, x: Tensor, otherwise: str = "") -> RcProbeError:
    """The refusal of a mask of another shape than the stream x."""
    what = (
        f"the mask {tuple(mask.shape)} does not fit the stream's {x.shape[0]} samples of {x.shape[1]} tokens"
    )
    todo = ", ".join(filter(None, ["Say attach(model, mask=…), the mask of the stream", otherwise]))
    return RcProbeError(what, where=type(structure.model).__name__, todo=todo)
