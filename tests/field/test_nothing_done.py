"""What a context did not do is said: ablations that met no block, copies, traces and other processes."""

import copy
import gc
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support import untouched
from support.by_hand import gpt2, ids

import rc_probe
from rc_probe import RcProbeError

TEXT = ids(7)[0]


def test_an_ablation_of_which_no_block_ran_is_an_error() -> None:
    model, other = gpt2("GPT2Model"), gpt2("GPT2Model")
    with (
        pytest.raises(
            RcProbeError, match=r"none of the blocks that ablate changes ran.*\(1, 2, 3\).*very model"
        ),
        torch.no_grad(),
        rc_probe.ablate(model, "mlp"),
    ):
        other(TEXT)
    with pytest.raises(ZeroDivisionError), rc_probe.ablate(model, "mlp"):  # the user's own error is told
        raise ZeroDivisionError
    with (
        torch.no_grad(),
        rc_probe.ablate(model, "mlp@1", "mlp@3"),
        pytest.warns(UserWarning, match="block 3 did not run"),
    ):
        context = rc_probe.ablate(model, "mlp@1", "mlp@3")
        with context:
            model.h[0](torch.randn(1, 7, 32).double())
        model(TEXT)


@pytest.mark.parametrize("what", ["attach", "ablate"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_are_without_the_context_and_it_is_said(what: str, how: str, tmp_path: Path) -> None:
    model = gpt2("GPT2Model")
    with torch.no_grad():
        plain = model(TEXT)[0]
        context: Any = rc_probe.attach(model) if what == "attach" else rc_probe.ablate(model, "mlp")
        with (
            context,
            pytest.warns(UserWarning, match=f"GPT2Model: this copy.*inside of {what} and runs without"),
        ):
            if how == "deepcopy":
                other = copy.deepcopy(model)
            elif how == "pickle":
                other = pickle.loads(pickle.dumps(model))
            else:
                torch.save(model, tmp_path / "model.pt")
                other = torch.load(tmp_path / "model.pt", weights_only=False)
            assert torch.equal(model(TEXT)[0], plain) is (what == "attach")
            assert torch.equal(other(TEXT)[0], plain)
        assert untouched.state(other)["attributes"] == untouched.state(model)["attributes"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            copy.deepcopy(model)


def test_a_trace_would_keep_what_the_context_does() -> None:
    model = gpt2("GPT2Model", use_cache=False)

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, text: torch.Tensor) -> torch.Tensor:
            return self.model(text).last_hidden_state

    with (
        torch.no_grad(),
        pytest.raises(RcProbeError, match=r"being traced.*outside"),
        rc_probe.ablate(model, "mlp"),
    ):
        torch.jit.trace(Plain(), (TEXT,))


@pytest.mark.parametrize("what", ["attach", "ablate"])
def test_a_context_that_was_entered_by_hand_and_dropped_is_closed(what: str) -> None:
    model = gpt2()
    before, forward, generate = untouched.state(model), type(model).forward, type(model).generate
    with torch.no_grad():
        plain = model(TEXT)[0]
        context: Any = rc_probe.attach(model) if what == "attach" else rc_probe.ablate(model, "mlp")
        context.__enter__()
        model(TEXT)
        del context
        gc.collect()
        assert torch.equal(model(TEXT)[0], plain)
    untouched.same(before, untouched.state(model))
    assert (type(model).forward, type(model).generate) == (forward, generate)
