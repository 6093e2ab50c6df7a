"""Shortcuts are proved before they are taken: a fault in what was recorded is found, and full passes are made."""

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from support import zoo
from support.odd_models import t5
from torch import Tensor, nn

from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.edits import passes as module
from rc_probe.hooks.edits.edits import Edits
from rc_probe.hooks.edits.passes import Passes
from rc_probe.hooks.proofs.shortcuts import batch_problem, shortcut_problem
from rc_probe.hooks.structure.structure import Structure
from rc_probe.hooks.structure.tape import walk


def attached(name: str) -> tuple[Any, dict[str, Tensor], Structure]:
    model, inputs = zoo.build(name)
    return model, inputs, find_structure(model, inputs)


@pytest.mark.parametrize("name", ["bert_mlm", "gpt2_lm", "albert_groups", "t5_encoder", "swin", "falcon"])
def test_shortcuts_are_proved(name: str) -> None:
    _, inputs, structure = attached(name)
    assert shortcut_problem(structure, inputs) is None
    assert batch_problem(structure, inputs) is None


def spoilt(passes: Passes, number: int, item: int | None) -> None:
    """Change one number of what a block returned, in the tensor `item` of its tuple."""
    output = passes.recorded[number]
    tensor = output[item or 0] if isinstance(output, tuple) else output
    tensor[(0,) * tensor.ndim] += 1


@pytest.mark.parametrize(
    ("name", "number", "item"),
    [("bert_mlm", 0, None), ("bert_mlm", 1, None), ("t5_encoder", 0, 0), ("t5_encoder", 0, 1)],
)
def test_one_block_that_is_stale_is_found(
    name: str, number: int, item: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, inputs, structure = attached(name)
    plain, made = Passes.plain, []

    def spoil(self: Passes, *args: Any, **how: Any) -> Any:
        output = plain(self, *args, **how)
        if not made:  # of the pass whose outputs are given again
            spoilt(self, number, item)
        made.append(self)
        return output

    monkeypatch.setattr(Passes, "plain", spoil)
    expected = f"block {number + 1} returns other numbers than in the pass before"
    assert batch_problem(structure, inputs) == expected
    made.clear()
    assert shortcut_problem(structure, inputs) == expected
    monkeypatch.undo()
    assert shortcut_problem(structure, inputs) == expected  # proved once for a structure
    assert shortcut_problem(structure, {**inputs, "attention_mask": inputs["attention_mask"].float()}) is None


@pytest.mark.parametrize(("name", "kept"), [("bert_mlm", "begun"), ("gpt2_lm", "begun"), ("t5", "finished")])
def test_other_modules_that_are_stale_are_found(
    name: str, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the first edited block that are done before its edit; the encoder of a decoder."""
    if name == "t5":
        model, ids = t5(), torch.arange(10, 20).reshape(2, 5)
        inputs = {"input_ids": ids, "decoder_input_ids": ids + 10}
        structure = find_structure(model, inputs)
    else:
        model, inputs, structure = attached(name)
    plain = Passes.plain

    def spoil(self: Passes, *args: Any, **how: Any) -> Any:
        output = plain(self, *args, **how)
        for each in getattr(self, kept).values():
            next(x for _, x in walk(each)).mul_(1.5)
        return output

    monkeypatch.setattr(Passes, "plain", spoil)
    says = "a pass that begins at block {} does not give what the whole one gives"
    first, last = structure.blocks[structure.depth // 2], structure.blocks[-1]
    assert shortcut_problem(structure, inputs) == says.format(f"{first.index + 1} ({first.name})")
    assert batch_problem(structure, inputs) == says.format(f"{last.index + 1} ({last.name})")


def test_recordings_that_are_written_into_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Writes(nn.Module):
        """A block that adds to its input in place."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(16), nn.Linear(16, 16)
            self.attention = nn.Linear(16, 48)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.attention(self.norm(x)).chunk(3, -1)
            x += torch.nn.functional.scaled_dot_product_attention(q, k, v)
            x += self.mlp(x).tanh()
            return x

    torch.manual_seed(0)
    model = nn.Sequential(*(Writes() for _ in range(3))).eval()

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            for layer in self.layers:
                x = layer(x)
            return x

    holder, inputs = Holder().eval(), {"x": torch.randn(2, 5, 16)}
    structure = find_structure(holder, inputs)
    assert shortcut_problem(structure, inputs) is None  # copies are kept and given
    monkeypatch.setattr(module, "copied", lambda value, take=None: value)
    expected = "block 1 returns other numbers than in the pass before"
    assert shortcut_problem(replace(structure), inputs) == expected
    assert batch_problem(structure, inputs) == expected


def test_what_a_model_keeps_outside_of_its_blocks_is_found() -> None:
    class Remembers(nn.Module):
        """The second block adds what the first one left behind."""

        left: ClassVar[list[Tensor]] = []

        def __init__(self, first: bool) -> None:
            super().__init__()
            self.first, self.norm = first, nn.LayerNorm(16)
            self.attention, self.up = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.attention(self.norm(x)).chunk(3, -1)
            mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            if self.first:
                self.left[:] = [mixed.detach().mean((1, 2), keepdim=True)]
            x = x + mixed
            return x + self.up(x) * (1 + self.left[0])

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Remembers(i == 0) for i in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    holder, inputs = Holder().eval(), {"x": torch.randn(2, 5, 16)}
    structure = find_structure(holder, inputs)
    assert shortcut_problem(structure, inputs) == (
        "block 1 (layers.0) hands on values that are not in what it returns"
    )
    blocks = (replace(b, flow=replace(b.flow, closed=True)) for b in structure.blocks)
    unseen = replace(structure, blocks=tuple(blocks))  # as where the tape does not see it
    assert "does not give what the whole one gives" in (shortcut_problem(unseen, inputs) or "")


def test_a_batch_is_proved_once_for_its_form_and_each_time_under_a_base(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, inputs, structure = attached("gpt2_lm")
    plain, made = Passes.plain, []
    monkeypatch.setattr(Passes, "plain", lambda self, *a, **k: (made.append(self), plain(self, *a, **k))[1])

    def proved(inputs: dict[str, Tensor], **how: Any) -> bool:
        made.clear()
        assert batch_problem(structure, inputs, **how) is None
        return bool(made)

    shorter = {name: value[:, :-1] for name, value in inputs.items()}
    assert proved(inputs) and not proved(inputs)
    assert proved(shorter) and not proved(shorter)
    assert proved(inputs, stop=True) and not proved(inputs)
    structure.model.transformer.h[0].switched = True
    assert proved(inputs), "the model is set to something else"
    assert all(proved(inputs, base=Edits()) for _ in range(2))
