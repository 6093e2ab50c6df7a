"""Which features of a projection arrive where in each head, read off passes in which the projection returned their numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rc_probe.hooks.errors import RcProbeError

from .forms import Rotary
from .passes import Listened, base_of, noise

WHOLE = 0.2  # how far from a whole number a feature's number may be
PARTS = {"query": "queries", "key": "keys", "value": "values"}


@dataclass(frozen=True)
class Decoded:
    """features: (heads, width) of the projection's output, and what each is taken times (heads, width).

    at: sample and token where they arrive as they are; turns: whether they arrive otherwise at other tokens
    """

    features: Tensor
    scale: Tensor
    at: tuple[int, int]
    turns: bool


def decode(by_pass: dict[str, Listened], part: str) -> Decoded:
    """RcProbeError where what arrives is not the features, each times a number, at any token."""
    one, codes = by_pass["ones"].op_got[part], _codes(by_pass)
    numbers = torch.zeros_like(one)
    worst = torch.zeros(one.shape[0], one.shape[2], dtype=torch.float64, device=one.device)
    for code, weight in codes:
        value = code.op_got[part] / one
        worst = torch.maximum(worst, (value - value.round()).abs().nan_to_num(nan=1.0).amax((1, 3)))
        numbers = numbers + value.round() * weight
    batch, token = divmod(int(worst.argmin()), worst.shape[1])
    features = numbers[batch, :, token].cpu()
    size = by_pass["plain"].returns[part].shape[-1]
    fits = bool(features.isfinite().all()) and bool(((features >= 0) & (features < size)).all())
    if float(worst.min()) > WHOLE or not fits:
        raise RcProbeError(
            f"its {PARTS[part]} are not what their projection returns: something that is not linear lies between"
        )
    mixed = by_pass["noise 1"].op_got[part]
    there = mixed[batch, :, token]
    close = max(1e-5, 4 * torch.finfo(by_pass["plain"].returns[part].dtype).eps)
    turns = not bool(((mixed - there[None, :, None]).abs() <= close * there.abs().amax()).all())
    scale = one[batch, :, token].cpu()
    expected = noise(1, size)[features.long()] * scale
    if not bool(((there.cpu() - expected).abs() <= close * expected.abs().amax()).all()):
        raise RcProbeError(f"its {PARTS[part]} are no linear map of what their projection returns")
    return Decoded(features.long(), scale, (batch, token), turns)


def _codes(by_pass: dict[str, Listened]) -> list[tuple[Listened, int]]:
    dtype = next(iter(by_pass["plain"].returns.values())).dtype
    names = sorted(name for name in by_pass if name.startswith("digit"))
    return [(by_pass[name], base_of(dtype) ** place) for place, name in enumerate(names)]


def decode_out(by_pass: dict[str, Listened], heads: int, width: int) -> Tensor:
    """(heads, width): where the output projection reads each head. RcProbeError where it does not read them as they are."""
    one = by_pass["ones"].reads["out"].double()
    numbers = torch.zeros_like(one)
    for code, weight in _codes(by_pass):
        numbers = numbers + code.reads["out"].double() * weight
    row = numbers.flatten(0, -2)[0].cpu()
    same = bool((one == 1).all()) and bool((numbers == numbers.flatten(0, -2)[0]).all())
    whole = torch.arange(heads * width, dtype=torch.float64)
    if not same or row.numel() != heads * width or not torch.equal(row.sort().values, whole):
        raise RcProbeError("its output projection does not read what its attention returns")
    return row.argsort().reshape(heads, width)


def rotary_of(by_pass: dict[str, Listened], found: Decoded) -> Rotary | None:
    """The pairs of features that turn together, and by which angle a step; None where they cannot be told."""
    batch, token = found.at
    size = by_pass["plain"].returns["query"].shape[-1]
    given = torch.stack([noise(n, size)[found.features[0]] for n in (1, 2)])  # (2, width)
    got = torch.stack(
        [by_pass[f"noise {n}"].op_got["query"][batch, 0].cpu() / found.scale[0] for n in (1, 2)]
    )  # (2, tokens, width)
    one = by_pass["ones"].op_got["query"][batch, 0].cpu() / found.scale[0]
    last = got.shape[1] - 1
    if last - token < 1:
        return None
    cosine, sine, wrong = _solved(given, got[:, last], one[last])
    close = 1e-4 if by_pass["plain"].returns["query"].dtype.itemsize >= 4 else 2e-2
    moved = ((got[:, last] - given).abs() > close / 10 * given.abs()).any(0)
    partner = wrong.argmin(1)
    mine = torch.arange(len(partner))
    if (
        not moved.any()
        or bool((wrong.amin(1)[moved] > close).any())
        or bool((partner[partner] != mine)[moved].any())
    ):
        return None
    cosine, sine, _ = _solved(given, got[:, token + 1], one[token + 1])
    angles = torch.atan2(sine[mine, partner].abs(), cosine[mine, partner])
    first = moved & (mine < partner)
    order = angles[first].argsort(descending=True)
    pairs = torch.stack([mine[first], partner[first]], -1)[order]
    return Rotary(pairs, angles[first][order])


def _solved(given: Tensor, got: Tensor, one: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of feature i with each other p, (width, width): c and s with got = c given_i + s given_p, and |c + s − one|."""
    a, b = given[0], given[1]
    det = a[:, None] * b - b[:, None] * a
    cosine = (got[0][:, None] * b - got[1][:, None] * a) / det
    sine = (a[:, None] * got[1][:, None] - b[:, None] * got[0][:, None]) / det
    wrong = (cosine + sine - one[:, None]).abs().nan_to_num(nan=torch.inf)
    wrong.fill_diagonal_(torch.inf)
    return cosine, sine, wrong
