"""The metrics: how far the tokens of a stream are apart. Pure, aware of padding, each with its rounding
floor.

Everywhere X is the stream of one sample, one row per real token; B samples, T tokens with padding, D
dimensions. Each metric is a function (x (B, T, D), mask (B, T) or None) -> (B,) float64 on the device of x,
and one recipe over `Tokens`, which shares the passes over the stream; `measure` runs many metrics at once.

Conventions, the same for all metrics
- Half precision is computed in float32, float32 and float64 in their own. Nothing here waits for the device,
  except the SVD and solver metrics.
- NaN and infinite values of real tokens come out as NaN (or infinite); those of padded positions do not
  enter.
- A sample without real tokens is NaN. One token: residuals 0, ranks 1, cosines NaN (there is no pair).
- Zero stream: residuals 0 (its rows are equal), ranks 0, cosines 0. A zero token has cosine 0 with every
  other.

Rounding floors (in the metric's unit; below them a number is noise)
The stream itself carries the rounding of the network that made it. Per token it is taken as `NOISE` eps of
the token's size, eps of the stream's own dtype before any upcast (or, under autocast, of the coarser one
that products are computed in): a collapsed float32 network shows
relative residuals of 1.0e-7 to 3.0e-7, that is .8 to 2.5 eps (the upper end where trained MLPs amplify the
noise of a collapsed stream). Every floor is what noise of that size does
to the metric.
"""

from collections.abc import Callable, Iterable
from functools import wraps

import torch
from torch import Tensor

from rc_probe.hooks.one_thread import one_thread
from rc_probe.registry import select

from .tokens import Reading, Tokens, ratio

SVD_NOISE = 8.0  # of a singular value, in eps of σ₁; of equal rows (400, 150) LAPACK's are off by up to 4.5
NORMS = {"residual", "residual_bulk", "residual_absolute", "norm", "massive_share"}  # that need no angles
ONE_THREAD = 2**22  # entries of a stream up to which one CPU thread measures it (16 MiB of float32)

MetricFunction = Callable[..., Tensor]  # (x (B, T, D), mask (B, T) or None) -> values (B,)

_READERS: dict[str, "Callable[[Tokens], Reading]"] = {}


def measure(
    x: Tensor, mask: Tensor | None = None, names: Iterable[str] | None = None, noise: float = 0.0
) -> dict[str, Reading]:
    """Several metrics of one stream, sharing their intermediates; which ones, `select(names)` says.

    x: (B, T, D) floating; mask: (B, T), nonzero = real token, or None when there is no padding (see
    `useful_mask`). noise: how far rounding moves a token, relative to its length, where that is more than its dtype says
    Returns name -> (values (B,), rounding floors (B,)), float64, on the device of x.
    Takes memory for two tensors of the size of x, of a large stream on the CPU of one of its samples, and for a copy of samples
    whose real tokens have gaps; for the slow metrics a few more.
    Raises RcProbeError for wrong shapes and for a name that is not in the registry.
    """
    chosen = select(names)
    readings = {}
    with one_thread(x.device.type == "cpu" and x.numel() <= ONE_THREAD):
        tokens = Tokens(x, mask, noise, angles=not NORMS.issuperset(chosen))
        for name in chosen:
            values, floors = _READERS[name](tokens)
            if tokens.real is not None:
                values = values.where(tokens.count > 0, torch.nan)
            readings[name] = values, floors
    return readings


def useful_mask(mask: Tensor | None) -> Tensor | None:
    """None if the mask hides nothing, else the mask as bool. Waits for the device: call it once per batch."""
    return None if mask is None or bool(mask.bool().all()) else mask.bool()


def _metric(recipe: Callable[[Tokens], Reading]) -> MetricFunction:
    """Register a recipe under its name, and make it a function (x, mask=None) -> values (B,)."""
    _READERS[recipe.__name__] = recipe

    @wraps(recipe)
    def metric(x: Tensor, mask: Tensor | None = None) -> Tensor:
        return measure(x, mask, [recipe.__name__])[recipe.__name__][0]

    return metric


def residual_of(t: Tokens) -> Reading:
    """The relative residual of the tokens that t holds."""
    return ratio(t.centred_size, t.size), t.constant(t.noise)


@_metric
def residual(t: Tokens) -> Reading:
    """‖res X‖₁,∞ / ‖X‖₁,∞ with the token mean, a ratio in [0, 2]; 0 exactly when all rows are equal.

    It can exceed 1, since the mean is not the best x; it is at most twice `residual_argmin`.
    Source: Dong et al. 2021, section 2 (whose code takes the mean). Floor: the noise of the
    stream.
    """
    return residual_of(t)


@_metric
def residual_bulk(t: Tokens) -> Reading:
    """`residual` of the bulk: the tokens of norm at most MASSIVE times the median norm of their sample, about
    their own mean. Equal to `residual`, bitwise, where no token is massive.

    A massive token (an attention sink, a register) is 10 to 1000 times as long as the others, and alone decides
    `residual`. Floor: the noise of the stream.
    """
    return residual_of(t.bulk)


@_metric
def residual_frobenius(t: Tokens) -> Reading:
    """‖res X‖_F / ‖X‖_F, a ratio in [0, 1]. Source: Wu et al. 2024, μ(X), divided by the size of X.

    Floor: the noise of the stream.
    """
    part, whole = (torch.linalg.vector_norm(v.double(), dim=1) for v in (t.centred_lengths, t.lengths))
    return ratio(part, whole).clamp(max=1), t.constant(t.noise)


@_metric
def residual_absolute(t: Tokens) -> Reading:
    """‖res X‖₁,∞, a norm in the unit of the stream. Source: Dong et al. 2021, section 2 (the bounded
    quantity).

    It mixes collapse with the scale of the weights: read it beside `residual`. Floor: the noise times ‖X‖₁,∞.
    """
    return t.centred_size, t.noise * t.size


@_metric
def residual_frobenius_absolute(t: Tokens) -> Reading:
    """‖res X‖_F, a norm in the unit of the stream. Source: Wu et al. 2024, μ(X). Floor: the noise times ‖X‖_F."""
    part, whole = (torch.linalg.vector_norm(v.double(), dim=1) for v in (t.centred_lengths, t.lengths))
    return part, t.noise * whole


@_metric
def cosine_absolute(t: Tokens) -> Reading:
    """Mean |cosine| over pairs of different tokens, in [0, 1], in O(T² D): tokens that point opposite ways count as one way.

    Source: Wu et al. 2024, figure 4. Floor: as for `cosine`.
    """
    return t.mean_absolute_cosine(t.x, t.lengths), t.cosine[1]


@_metric
def cosine(t: Tokens) -> Reading:
    """Mean cosine over pairs of different tokens, in [-1/(tokens - 1), 1]; 1 when all point one way.

    Source: Shi et al. 2022 (arXiv 2202.08625), their measure of over-smoothing. Floor: two tokens, each
    turned by the noise.
    """
    return t.cosine


@_metric
def cosine_bulk(t: Tokens) -> Reading:
    """`cosine` of the bulk (see `residual_bulk`)."""
    return t.bulk.cosine


@_metric
def cosine_centred(t: Tokens) -> Reading:
    """Mean cosine over pairs of different tokens after subtracting the token mean, in [-1/(tokens - 1), 1].

    The common part of the tokens hides in it; what is left shows whether the rest spreads out or lies on a
    line.
    Floor: as for `cosine`, but the noise is that of the whole token and of the mean, and the vector may be
    short, so it nears 2 when the stream has collapsed.
    """
    return t.cosine_centred


@_metric
def norm(t: Tokens) -> Reading:
    """Mean Euclidean length of a token, in the unit of the stream. Floor: the noise times that length."""
    mean = t.lengths.double().sum(1) / t.count
    return mean, t.noise * mean


@_metric
def massive_share(t: Tokens) -> Reading:
    """Share of the real tokens that are massive, in [0, 1/2]. Floor: 0, since tokens are counted."""
    share = t.massive.sum(1).double() / t.count
    return share.where(t.lengths.isfinite().all(1), torch.nan), t.constant(0.0)


@_metric
def effective_rank(t: Tokens) -> Reading:
    """exp of the entropy (nats) of p = σ / Σσ, in [1, min(tokens, D)]; the singular values are those of raw
    X.

    Source: Roy, Vetterli 2007, definition 1. (Not RankMe's with an added eps, nor the entropy of σ².)
    Floor: the noise E has ‖E‖_F = noise ‖X‖_F, and moves the k singular values by at most sqrt(k) ‖E‖_F in
    all (Mirsky), and the SVD itself, in float64, each by at most SVD_NOISE eps σ₁. So p moves by δ = that / Σσ
    in total variation, and the entropy by δ ln(k - 1) + h(δ) (Fannes, Audenaert).
    """
    return _effective_rank(t)


def _effective_rank(t: Tokens) -> Reading:
    s = t.singular_values
    total, most = s.sum(1), t.count.clamp(max=t.x.shape[2])
    entropy = torch.special.entr(ratio(s, total[:, None])).sum(1)
    rank = entropy.exp().where(total != 0, 0.0)
    noise = t.noise * most.sqrt() * torch.linalg.vector_norm(s, dim=1)
    noise = noise + SVD_NOISE * torch.finfo(s.dtype).eps * most * s.amax(1)
    delta = ratio(noise, total).clamp(max=0.5)
    binary = torch.special.entr(delta) + torch.special.entr(1 - delta)
    moved = delta * (most - 1).clamp_min(1).log() + binary
    return rank, torch.minimum(rank * moved.expm1(), most)


@_metric
def stable_rank(t: Tokens) -> Reading:
    """‖X‖_F² / σ₁² of raw X, in [1, rank X]. Source: Rudelson, Vershynin 2007 (numerical rank).

    Floor: the noise moves ‖X‖_F and σ₁ each by at most noise ‖X‖_F; to first order, twice the relative
    errors.
    """
    return _stable_rank(t)


def _stable_rank(t: Tokens) -> Reading:
    s = t.singular_values
    first = s.amax(1)
    root = ratio(torch.linalg.vector_norm(s, dim=1), first)  # of the stable rank
    rank = root.square()
    return rank, torch.minimum(2 * t.noise * (1 + root) * rank, t.count)


@_metric
def effective_rank_bulk(t: Tokens) -> Reading:
    """`effective_rank` of the bulk (see `residual_bulk`)."""
    return _effective_rank(t.bulk)


@_metric
def stable_rank_bulk(t: Tokens) -> Reading:
    """`stable_rank` of the bulk (see `residual_bulk`)."""
    return _stable_rank(t.bulk)


@_metric
def residual_argmin(t: Tokens) -> Reading:
    """min over x of ‖X - 1 xᵀ‖₁,∞ / ‖X‖₁,∞, in [0, 1]: the value attained by a convex solver (about a
    second).

    The true minimum lies between `residual_argmin_low` and this. Source: Dong et al. 2021, section 2.
    """
    return ratio(t.best[0], t.size), t.constant(t.noise)


@_metric
def residual_argmin_low(t: Tokens) -> Reading:
    """Certified lower bound of `residual_argmin`; see `rc_probe.metrics.best_residual`."""
    return ratio(t.best[1], t.size), t.constant(t.noise)
