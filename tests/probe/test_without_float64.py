"""Apple's GPU has no float64, in which the statistics are summed: refused before the user's first forward pass."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import zoo
from torch import Tensor

import rc_probe
from rc_probe.models.load import check_device, load_model

ON_MPS = "is on mps, which has no float64, .*float64. Move it first: model.to"


def moved(model: Any) -> Any:
    """The model as one that says it is on mps."""

    def parameters(recurse: bool = True) -> Iterator[Any]:
        yield SimpleNamespace(device=torch.device("mps", 0), data=None)

    model.parameters = parameters
    return model


def refused(says: str, use: Any, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(rc_probe.RcProbeError, match=says) as caught:
        use(*args, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["mps", "mps:0"])
def test_the_option_is_refused_before_anything_is_loaded(device: str) -> None:
    says = "^--device: mps has no float64, .* Use cpu, or leave --device out"
    refused(says, check_device, device)
    refused(says, load_model, "/no/such/folder", device=device)


def test_contexts_refuse_such_a_model() -> None:
    model, inputs = zoo.build("bert")
    moved(model)
    refused(ON_MPS, rc_probe.attach, model, inputs=inputs)
    refused(ON_MPS, rc_probe.ablate, model, "mlp@1", inputs=inputs)
    refused(ON_MPS, rc_probe.Monitor, model, [inputs])


def test_a_model_that_moved_since_is_refused_at_the_door() -> None:
    model, inputs = zoo.build("bert")
    monitor = rc_probe.Monitor(model, [inputs])
    context = rc_probe.attach(model, inputs=inputs)
    seen: list[Tensor] = []
    hook = model.register_forward_pre_hook(lambda *_: seen.append(torch.ones(())))
    moved(model)
    refused(ON_MPS, context.__enter__)
    refused(ON_MPS, monitor.measure)
    hook.remove()
    assert not seen
