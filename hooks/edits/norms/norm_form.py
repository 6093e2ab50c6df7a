"""What a norm computes, found by trying its module: LayerNorm, RMSNorm, and what rounds to one of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rc_probe.hooks.errors import reason
from rc_probe.hooks.structure.structure import Block, NormCall, Structure
from rc_probe.hooks.undo import unseen

EPSILONS = (1e-5, 1e-6, 1e-12, 1e-8, 1e-7, 0.0)  # that are in use, where the module does not name its own
SIZES = (20.0, 1.0, 0.5, 2e-3)  # of the tokens it is tried on; at the last one its epsilon is seen


@dataclass(frozen=True)
class NormForm:
    """A norm makes `gain · centre(x) / scale(x) + bias` of each token x; all but the gain is here.

    centred: whether the mean over features is taken off (LayerNorm), or not (RMSNorm); bias (dim,)
    """

    centred: bool
    epsilon: float
    bias: Tensor

    def centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def scale(self, x: Tensor) -> Tensor:
        """(…, 1): the root of the mean square of what is centred, as the norm divides by it."""
        return (self.centre(x).square().mean(-1, keepdim=True) + self.epsilon).sqrt()


def norm_form(structure: Structure, block: Block, norm: NormCall) -> NormForm:
    """The form of a norm, by trying its module on tokens of several sizes.

    Raises RcProbeError, with its name, where it computes something else: over several tokens, along another axis, or
    with more inputs than the stream.
    """
    module = structure.model.get_submodule(norm.name)
    first = next((p for p in module.parameters() if p.is_floating_point()), None)
    like = torch.zeros((), dtype=block_dtype(structure, block)) if first is None else first
    generator = torch.Generator().manual_seed(0x5EED)
    x = torch.randn(3, len(SIZES), block.dim, generator=generator) + 0.5
    x = (x * torch.tensor(SIZES)[:, None]).to(like.device, like.dtype)
    failed = "it is no LayerNorm or RMSNorm over the features of each token"
    try:
        with torch.no_grad(), unseen():
            found = _fitted(module, x)
    except Exception as error:  # the module's own, of any kind
        found, failed = None, f"it cannot be tried on tokens alone ({reason(error)})"
    if found is None:
        raise structure.error(block, f"its norm {norm.name}: {failed}", "Leave the norms of this block alone")
    return found


def block_dtype(structure: Structure, block: Block) -> torch.dtype:
    floats = (p.dtype for p in structure.module(block).parameters() if p.is_floating_point())
    return next(floats, torch.float32)


def _fitted(module: nn.Module, x: Tensor) -> NormForm | None:
    """The first form that fits, with one gain for all tokens. `forward` itself: hooks are for the model's own passes."""
    bias, y = (module.forward(given) for given in (torch.zeros_like(x), x))
    if not (isinstance(bias, Tensor) and isinstance(y, Tensor) and y.shape == x.shape):
        return None
    wide, wanted = x.double(), y.double() - bias.double()
    named = [v for k, v in vars(module).items() if "eps" in k and isinstance(v, float)]
    for epsilon in (*named, torch.finfo(x.dtype).eps, *EPSILONS):
        for centred in (True, False):
            form = NormForm(centred, epsilon, bias[0, 0].clone())
            normed = form.centre(wide) / form.scale(wide)
            gain = (wanted * normed).sum((0, 1)) / normed.square().sum((0, 1))
            off = (wanted - gain * normed).abs().amax()
            if bool(off <= max(1e-4, 8 * torch.finfo(x.dtype).eps) * wanted.abs().amax()):
                return form
    return None
