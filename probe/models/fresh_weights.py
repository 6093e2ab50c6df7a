"""The `init` weights: a model like the given one, before any training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

from rc_probe.hooks.undo import entered, undoing

from .libraries import quiet
from .load import Loaded
from .locate import Source
from .model_inputs import input_device

HALF = (torch.bfloat16, torch.float16)
TODO = "Use --no-init to measure the pretrained weights only"
# What draws numbers in place, and what initialisers make of them.
IN_PLACE = {
    "normal_", "uniform_", "bernoulli_", "exponential_", "log_normal_", "kaiming_normal_", "kaiming_uniform_",
    "erfinv_", "clamp_", "mul_", "div_", "add_", "sub_",
}  # fmt: skip


@dataclass(frozen=True)
class Blueprint:
    """What fresh weights take from a model: all but its weights, so that these need not be held any longer.

    dtype: that most of it is computed in; dtypes: of each weight and buffer; devices: its device map, or none
    """

    model_class: Any
    config: Any
    dtype: torch.dtype
    dtypes: dict[str, torch.dtype]
    device: torch.device
    devices: dict[str, Any]
    source: Source

    def build(self, seed: int) -> Any:
        """The model with fresh weights, in eval mode. RcProbeError where none can be made.

        The numbers depend on the config and `seed` only: they are drawn on the CPU in float32, tensor by tensor, and then
        rounded. The global random state is as before.
        """
        if "disk" in self.devices.values():
            raise self.source.error("a model offloaded to disk cannot be initialised afresh", TODO)
        with quiet(), self.source.explain("no fresh copy can be made", TODO):
            fresh = self._drawn(seed)
            for name, tensor in _tensors(fresh):
                tensor.data = tensor.data.to(self.dtypes.get(name, tensor.dtype))
            if len(self.devices) > 1:
                from accelerate import dispatch_model

                return dispatch_model(fresh.eval(), device_map=self.devices)
            return fresh.to(self.device).eval()

    def _drawn(self, seed: int) -> Any:
        if self.dtype in HALF:
            try:
                with _default_dtype(self.dtype), entered(_InFloat32()):
                    return self._made(seed)
            except RuntimeError:  # some initialisers, such as orthogonal ones, know no half precision
                pass
        return self._made(seed)

    def _made(self, seed: int) -> Any:
        with torch.random.fork_rng(devices=[]), entered(DeviceContext(torch.device("cpu"))):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
            return self.model_class(copy.deepcopy(self.config))


def blueprint(loaded: Any) -> Blueprint:
    """Of a Loaded or a transformers model. Compiled graphs, adapters and int8 weights are left out: they come after training."""
    model = loaded.model if isinstance(loaded, Loaded) else loaded
    model = getattr(model, "_orig_mod", model)  # torch.compile
    model = model.get_base_model() if hasattr(model, "peft_config") else model
    return Blueprint(
        type(model), copy.deepcopy(model.config), model.dtype, {_plain(name): x.dtype for name, x in _tensors(model)},
        input_device(model), getattr(model, "hf_device_map", None) or {},
        Source(loaded.id if isinstance(loaded, Loaded) else type(model).__name__, "", {}),
    )  # fmt: skip


def fresh_model(loaded: Any, seed: int = 0) -> Any:
    """A model of the same class, config, dtypes and device with fresh weights: `blueprint(loaded).build(seed)`."""
    return blueprint(loaded).build(seed)


def weight_bytes(model: nn.Module) -> int:
    """Of its weights and buffers, each once."""
    return sum(x.numel() * x.element_size() for x in {id(x): x for _, x in _tensors(model)}.values())


class _InFloat32(TorchFunctionMode):
    """What draws half-precision numbers in place draws them in float32, and what follows goes on from there.

    A truncated normal takes several steps; rounded after each, its tails would become infinite. One tensor at a time is
    held in float32, until another one is changed.
    """

    tensor: Tensor | None = None
    exact: Tensor
    version: int

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args else kwargs.get("tensor")
        if not (getattr(func, "__name__", "") in IN_PLACE and isinstance(x, Tensor) and x.dtype in HALF):
            return func(*args, **kwargs)
        return self._drawn(func, x, args[1:], kwargs, named=not args)

    @torch.no_grad()
    def _drawn(self, func: Any, x: Tensor, args: Any, kwargs: Any, *, named: bool) -> Tensor:
        if self.tensor is not x or self.version != x._version:
            self.tensor, self.exact = x, x.detach().float()
        if named:
            func(**kwargs | {"tensor": self.exact})
        else:
            func(self.exact, *args, **kwargs)
        x.copy_(self.exact)
        self.version = x._version
        return x


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    with undoing(partial(torch.set_default_dtype, before)):
        torch.set_default_dtype(dtype)
        yield


def _plain(name: str) -> str:
    """The name that the weight has in a model of which no part is compiled or adapted."""
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "base_layer"))


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
