"""How far an MLP can drive two tokens apart: the Lipschitz constant of corollary 3.2 (Dong et al. 2021), and what it does on data.

f(y) = y + W₂ φ(W₁ y + b₁) + b₂ with slopes of φ between m and M has a derivative whose entries are at most those of

    G = |I + ½(m + M) W₂ W₁| + ½(M − m) |W₂| |W₁|.

For rows v_i of f(Y) − 1 f(c)ᵀ, |v_i| ≤ G |y_i − c|: row sums grow by at most the largest column sum of G, column sums by at most its
largest row sum, and ‖f(Y) − 1 f(c)ᵀ‖₁,∞ ≤ λ ‖Y − 1 cᵀ‖₁,∞ with λ = ‖G‖₁,∞. About the token mean instead of f(c) it is at most twice that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from rc_probe.hooks.edits.edits import Edits
from rc_probe.hooks.proofs.replay import Replay
from rc_probe.hooks.structure.structure import Block, Branch, Junction
from rc_probe.hooks.undo import entered
from rc_probe.metrics.norms import composite, composite_norm, norm_1, norm_inf

AGREE = 1e-4  # relative; two linear maps and an activation must give the MLP back
GATED = (
    "an MLP is not two linear maps with an activation between them, and so has no Lipschitz constant that its weights tell "
    "(gated MLPs multiply two maps)"
)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": functional.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


@dataclass(frozen=True)
class Mlp:
    """What an MLP branch did on one sample. before, after (T, D): the stream before and behind its add, without norms.

    entered (T, D): what the first linear map got: `before`, or `before` through a norm; inner (F, D), outer (D, F) its maps
    slopes: the least and the largest of its activation. None: it is not such a network, and `why` says so
    """

    before: Tensor
    after: Tensor
    entered: Tensor | None = None
    inner: Tensor | None = None
    outer: Tensor | None = None
    slopes: tuple[float, float] | None = None
    why: str = ""

    @property
    def gain(self) -> float:
        """‖res f(Y)‖ / ‖res Y‖, measured."""
        before, after = (float(composite_norm(x - x.mean(0))) for x in (self.before, self.after))
        return after / before if before else math.nan

    @cached_property
    def constant(self) -> float | None:
        """λ, from the weights. Where a norm stands before the MLP its gain is measured: a norm has no constant of its own."""
        if self.inner is None or self.outer is None or self.slopes is None or self.entered is None:
            return None
        if torch.equal(self.entered, self.before):
            return lipschitz(self.inner, self.outer, self.slopes)
        own_columns, own_rows = _largest(self.inner, self.outer, self.slopes, skip=False)
        residuals = [x - x.mean(0) for x in (self.entered, self.before)]
        columns, rows = (float(norm(residuals[0]) / norm(residuals[1])) for norm in (norm_1, norm_inf))
        return math.sqrt((1 + columns * float(own_rows.max())) * (1 + rows * float(own_columns.max())))


def lipschitz(inner: Tensor, outer: Tensor, slopes: tuple[float, float]) -> float:
    """λ of y + outer φ(inner y), with slopes of φ between these; inner (F, D), outer (D, F).

    >>> lipschitz(torch.zeros(4, 2), torch.zeros(2, 4), (0, 1))
    1.0
    """
    return float(composite(*_largest(inner, outer, slopes, skip=True)))


def _largest(
    inner: Tensor, outer: Tensor, slopes: tuple[float, float], *, skip: bool
) -> tuple[Tensor, Tensor]:
    """The sums of the columns and of the rows (D,) of G (D, D): what no entry of the derivative exceeds."""
    inner, outer = inner.double(), outer.double()
    middle, half = (slopes[0] + slopes[1]) / 2, (slopes[1] - slopes[0]) / 2
    straight = middle * (outer @ inner)
    if skip:
        straight = straight + torch.eye(len(straight), dtype=torch.float64, device=straight.device)
    straight, inner, outer = straight.abs(), inner.abs(), outer.abs()
    columns = straight.sum(0) + half * (outer.sum(0) @ inner)
    return columns, straight.sum(1) + half * (outer @ inner.sum(1))


@cache
def slopes_of(name: str) -> tuple[float, float]:
    """The least and the largest slope of an activation, on a grid as fine as 10⁻⁴, and a little more."""
    x = torch.linspace(-12, 12, 240_001, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        (found,) = torch.autograd.grad(ACTIVATIONS[name](x).sum(), x)
    return float(found.min()) - 1e-6, float(found.max()) + 1e-6


def mlp_of(replay: Replay, block: Block, edits: Edits, x: Tensor) -> tuple[Mlp, Tensor]:
    """The MLP of a block that gets the stream x (one sample) under `edits`, and the stream behind the block.

    Raises RcProbeError where the block has no MLP sublayer of its own behind its attention.
    """
    junction, branch = _sublayer(replay, block)
    seen: dict[str, Tensor] = {}
    watching = edits.then(Edits())
    for name, site in (("before", junction.skip), ("value", branch.site)):
        watching.at(site, partial(_kept, seen, name))
    maps = _LinearMaps()
    with entered(maps):
        out = replay.run(block, x, watching)
    before, value = (seen[name].detach().flatten(0, -2).double() for name in ("before", "value"))
    return _read(before, value, maps.calls), out


def _kept(seen: dict[str, Tensor], name: str, value: Tensor) -> Tensor:
    seen[name] = value.clone()
    return value


def _sublayer(replay: Replay, block: Block) -> tuple[Junction, Branch]:
    found = [(j, b) for j in block.junctions for b in j.branches if b.kind == "mlp"]
    if len(found) != 1 or len(found[0][0].branches) > 1 or block.feature_axis != -1:
        what = "its MLP runs beside its attention" if len(found) == 1 else f"it has {len(found)} MLPs"
        raise replay.structure.error(block, what, "Corollary 3.2 does not cover it")
    return found[0]


def _read(before: Tensor, value: Tensor, calls: list[_Linear]) -> Mlp:
    """Two of the linear maps that ran, with an activation between, that give the branch's value."""
    after = before + value
    for last in calls:
        scale = _scale(last.out, value)
        for first in calls if scale is not None else ():
            name = _activation(first.out, last.given)
            if name is not None and scale is not None and first.given.shape == before.shape:
                entered = before if _same(first.given, before) else first.given
                outer = scale[:, None] * last.weight.double()
                return Mlp(before, after, entered, first.weight, outer, slopes_of(name))
    return Mlp(before, after, why=GATED)


def _scale(out: Tensor, value: Tensor) -> Tensor | None:
    """What each feature of a linear map is multiplied by to be the branch's value (LayerScale); None where it is another."""
    if out.shape != value.shape:
        return None
    if _same(out, value):
        return torch.ones_like(out[0])
    scale = (value * out).sum(0) / out.square().sum(0).clamp_min(1e-300)
    return scale if _same(out * scale, value) else None


def _activation(x: Tensor, y: Tensor) -> str | None:
    if x.shape != y.shape:
        return None
    return next((name for name, function in ACTIVATIONS.items() if _same(function(x), y)), None)


def _same(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and bool((x - y).abs().max() <= AGREE * y.abs().max())


@dataclass(frozen=True)
class _Linear:
    """A linear map that ran: what it was given (n, in), its weight (out, in), its result (n, out)."""

    given: Tensor
    weight: Tensor
    out: Tensor


class _LinearMaps(TorchFunctionMode):
    """Keeps the linear maps that run on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Linear] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "linear" and len(args) >= 2:
            self._keep(args[0], args[1], result)
        elif name == "addmm" and len(args) == 3:
            self._keep(args[1], args[2].mT, result)
        return result

    def _keep(self, given: Tensor, weight: Tensor, out: Tensor) -> None:
        tokens = [x.detach().flatten(0, -2).double() for x in (given, out)]
        self.calls.append(_Linear(tokens[0], weight.detach(), tokens[1]))
