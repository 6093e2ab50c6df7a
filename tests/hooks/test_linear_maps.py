"""Products by the faster library: the numbers of float64, to rounding, and where it is not taken."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import zoo
from torch import Tensor
from torch.nn import functional

from rc_probe.hooks import linear_maps
from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.linear_maps import LARGE, linear
from rc_probe.paths import decompose


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("weight", [noise(256, 128), noise(1, 128, 256)[0].T], ids=["rows", "a view"])
def test_a_large_product_is_that_of_float64(weight: Tensor) -> None:
    x = noise(4, 128, 2, 128).transpose(1, 2)
    assert x.numel() * len(weight) >= LARGE
    wanted = torch.einsum("abti,oi->abto", x.double(), weight.double())
    assert torch.allclose(linear(x, weight).double(), wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:3],  # small
        lambda x: x.double(),
        lambda x: x.bfloat16(),
        pytest.param(lambda x: x, id="switched off"),
    ],
)
@pytest.mark.filterwarnings("ignore:TF32")
def test_what_is_not_for_the_other_library_is_torchs_own(change: Callable[[Tensor], Tensor]) -> None:
    x = change(noise(1024, 128))
    weight = noise(256, 128).to(x.dtype)
    with torch.backends.mkldnn.flags(enabled=x.shape[0] < 1024 or x.dtype != torch.float32):  # type: ignore[no-untyped-call]
        assert torch.equal(linear(x, weight), functional.linear(x, weight))


@pytest.mark.parametrize("name", ["gpt2", "llama"])  # `addmm`; grouped heads and a gated MLP
def test_parts_by_the_other_library(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = zoo.build(name)
    structure = find_structure(model, inputs)
    asked: list[tuple[int, ...]] = []
    large = linear_maps._large

    def every(x: Tensor, weight: Any) -> bool:
        asked.append(tuple(x.shape))
        return x.dtype == torch.float32

    wanted = decompose(structure, inputs).parts
    monkeypatch.setattr(linear_maps, "_large", every)
    found = decompose(structure, inputs).parts
    monkeypatch.setattr(linear_maps, "_large", large)
    assert len(asked) >= 4 * structure.depth  # value, output and the MLP's two or three
    assert torch.allclose(found, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))
