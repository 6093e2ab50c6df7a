"""A model whose attention interface cannot be owned says why, wherever that is missed."""

from typing import Any

import pytest
import torch
import transformers
from support import zoo
from support.attention import seen
from support.random_models import randomise
from torch import Tensor
from transformers import AttentionInterface

from rc_probe import Gate, RcProbeError
from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.edits.attention_patterns import patterns
from rc_probe.hooks.edits.gates import gate_edits


def by_hand(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
) -> tuple[Tensor, None]:
    """Attention whose softmax has heads behind tokens: which are the heads of it is not proved."""
    weights = torch.einsum("bhtd,bhsd->bths", query, key).softmax(-1)
    return torch.einsum("bths,bhsd->bthd", weights, value), None


def layouts(strict: bool, attention: str) -> Any:
    """A small BERT; a strict one compares the name of its attention by hand."""

    class Model(transformers.BertModel):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            name = self.config._attn_implementation
            if strict and name.startswith("rc-probe:"):
                raise KeyError(f"no attention is named {name[:9]}")
            return super().forward(*args, **kwargs)

    AttentionInterface.register("by hand", by_hand)
    model = Model(transformers.BertConfig(**zoo.BERT, attn_implementation=attention)).eval()
    randomise(model, torch.float32)
    return model, zoo.inputs_for("bert", model)


def test_why_it_is_not_owned_stands_among_what_is_proved() -> None:
    model, inputs = layouts(True, "sdpa")
    structure = find_structure(model, inputs)
    assert structure.unowned == "with it owned, the forward pass fails ('no attention is named rc-probe:')"
    assert structure.proved[-1] == (
        "attention operations are intercepted one by one, and not by the library's interface: "
        + structure.unowned
    )
    assert {b.ops[0].via for b in structure.blocks[0].branches if b.ops} == {"scaled_dot_product_attention"}
    free, _ = layouts(False, "sdpa")
    owned = find_structure(free, inputs)
    assert owned.unowned == ""
    assert len(owned.proved) == len(structure.proved) - 1
    for one, other in zip(seen(structure, inputs), seen(owned, inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_errors_about_heads_and_patterns_say_it() -> None:
    model, inputs = layouts(True, "by hand")
    structure = find_structure(model, inputs)
    reason = r"\(the library's attention interface is not used: with it owned, the forward pass fails"
    with pytest.raises(RcProbeError, match="their layout is not proved " + reason):
        patterns(structure, lambda *_: None)
    with pytest.raises(RcProbeError, match="cannot be told apart " + reason):
        gate_edits(structure, [Gate("head", 1, 1)])
    free, _ = layouts(False, "by hand")
    owned = find_structure(free, inputs)
    assert {b.ops[0].heads for b in owned.blocks[0].branches if b.ops} == {
        4
    }  # the interface tells them apart


def test_an_output_that_changes_with_it_owned_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from rc_probe.hooks.edits import attention_interface

    monkeypatch.setattr(
        attention_interface.OpCall, "run", lambda self: other(self.function(*self.args, **self.kwargs))
    )
    model, inputs = layouts(False, "sdpa")

    def other(result: Any) -> Any:
        return (result[0] * 1.001, *result[1:]) if isinstance(result, tuple) else result

    assert find_structure(model, inputs).unowned == "with it owned, the output changes"


def test_what_is_wrong_with_a_pattern_keeps_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = zoo.build("bert")
    structure = find_structure(model, inputs)

    def fails(*_: Any, **__: Any) -> Any:
        raise IndexError("no such window")

    from rc_probe.hooks.edits import attention_patterns

    monkeypatch.setattr(attention_patterns, "implementation", lambda *_: fails)
    with pytest.raises(
        RcProbeError, match=r"block 1 .*its eager attention fails \(no such window\)"
    ) as caught:
        seen(structure, inputs)
    assert isinstance(caught.value.__cause__, RcProbeError)
    assert isinstance(caught.value.__cause__.__cause__, IndexError)
