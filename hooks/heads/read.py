"""Read the heads of a model: which features of which projection each has, the forms that they make, and a proof of both.

No family is known by name. The tape says which modules make what enters an attention op. Passes in which these return the
numbers of their features say what arrives at which head. Weights are what a module does to its inputs. The proof: scores
at equal positions (all scores, where positions turn nothing) recomputed from the forms are those that enter the op.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rc_probe.hooks.edits.model_state import eager, full_precision, measuring, proving
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.structure.structure import Structure

from .affine import Affine, affine_map, norm_gain
from .features import Decoded, decode, decode_out, rotary_of
from .forms import Circuit, Heads, Projection
from .passes import QKV, Listened, Vector, coded, listen, listened, noise, ones

Read = tuple[dict[int, Heads], dict[int, str]]  # by block, from 0: what was read, and why it was not
_known: weakref.WeakKeyDictionary[Structure, tuple[Any, Read]] = weakref.WeakKeyDictionary()
SCORES = 1e-4  # by how much recomputed scores may differ, of the largest


def read_heads(structure: Structure) -> Read:
    """The heads of every block that attends, and why those of a block cannot be read. The model is as before.

    A few passes of the small example that the structure was proved on; again where a weight has changed since.

    >>> heads, refused = read_heads(find_structure(model))          # doctest: +SKIP
    >>> heads[0].qk.core.shape                                      # doctest: +SKIP
    torch.Size([12, 64, 64])
    """
    now = tuple((id(p), p._version) for p in structure.model.parameters())
    known = _known.get(structure)
    if known is None or known[0] != now:
        with proving(), measuring(structure.model), full_precision(structure.model), eager():
            known = _known[structure] = (now, _read(structure))
    return known[1]


def heads_of(structure: Structure, numbers: tuple[int, ...] | None) -> list[Heads]:
    """Of the blocks with these numbers, from 1; None: of all that attend. RcProbeError, by the op's name, where one cannot be read."""
    structure.attention_ops(numbers)  # refuses blocks without attention
    found, refused = read_heads(structure)
    chosen = sorted({*found, *refused}) if numbers is None else [number - 1 for number in numbers]
    for index in chosen:
        if index in refused:
            todo = "Choose other blocks"
            raise structure.error(
                structure.blocks[index], f"its heads cannot be read: {refused[index]}", todo
            )
    return [found[index] for index in chosen]


def _read(structure: Structure) -> Read:
    ops = listened(structure)
    seen = _all_passes(structure, ops)
    found: dict[int, Heads] = {}
    refused: dict[int, str] = {}
    for each in ops:
        try:
            if each.refused:
                raise RcProbeError(each.refused)
            found[each.block.index] = _heads(structure, each, seen)
        except RcProbeError as error:
            refused[each.block.index] = error.what
    return found, refused


Seen = dict[str, dict[int, Listened]]  # by pass, then by block


def _all_passes(structure: Structure, ops: list[Listened]) -> Seen:
    """What each pass showed, the plain one first."""
    readable = [each for each in ops if not each.refused]
    if not readable:
        return {}
    seen: Seen = {}
    passes: list[tuple[str, Vector | None]] = [("plain", None), ("ones", ones)]
    passes += [(f"noise {n}", partial(noise, n)) for n in (1, 2)]
    while passes:
        name, give = passes.pop(0)
        listen(structure, readable, give)
        seen[name] = {each.block.index: _kept(each, plain=name == "plain") for each in readable}
        if name == "plain":
            most = max(y.shape[-1] for each in readable for y in each.returns.values())
            dtype = next(iter(readable[0].returns.values())).dtype
            passes += [(f"digit {n}", code) for n, code in enumerate(coded(dtype, most))]
    return seen


def _kept(each: Listened, *, plain: bool) -> Listened:
    """What one pass showed, before the next overwrites it."""
    kept = Listened(
        each.block, each.branch, each.op, each.origins, op_got=dict(each.op_got), biased=each.biased
    )
    kept.reads = dict(each.reads) if plain else {"out": each.reads["out"]} if "out" in each.reads else {}
    kept.returns = dict(each.returns) if plain else {}
    return kept


def _heads(structure: Structure, each: Listened, seen: Seen) -> Heads:
    index, places = each.block.index, each.origins
    assert places is not None
    plain = seen["plain"][index]
    by_pass = {name: found[index] for name, found in seen.items()}
    if not torch.equal(plain.reads["query"], plain.reads["key"]):
        raise RcProbeError(
            f"its queries ({places.query.name}) and keys ({places.key.name}) are made of different inputs"
        )
    parts = {part: decode(by_pass, part) for part in QKV}
    if parts["query"].features.shape[1] != parts["key"].features.shape[1]:
        raise RcProbeError("its queries and keys are of different width")
    groups = parts["query"].features.shape[0] // parts["key"].features.shape[0]
    gain = (
        norm_gain(structure.model.get_submodule(places.norm), plain.reads["query"]) if places.norm else None
    )
    maps = {part: _map(structure, plain, part, parts[part]) for part in QKV}
    turns = parts["query"].turns or parts["key"].turns
    _prove(plain, maps, groups, turns)
    sides = {part: _with_bias(weight, bias, gain) for part, (weight, bias) in maps.items()}
    query, key, value = (
        sides["query"],
        *(sides[part].repeat_interleave(groups, 0) for part in ("key", "value")),
    )
    dim = plain.reads["query"].shape[-1]
    rotary = rotary_of(by_pass, parts["query"]) if turns else None
    ov, no_ov = _ov(structure, by_pass, value, dim)
    left_out = ["position biases that are added to its scores"] if plain.biased else []
    projections = {
        part: Projection(place.name, place.turn, parts[part].features, parts[part].scale)
        for part, place in (("query", places.query), ("key", places.key))
    }
    return Heads(
        each.block, each.op, projections["query"], projections["key"], groups, turns, rotary, Circuit.of(query, key, dim), ov,
        None if rotary is None else _energy(query, key, rotary.pairs), no_ov, tuple(left_out),
    )  # fmt: skip


def _map(structure: Structure, plain: Listened, part: str, found: Decoded) -> tuple[Tensor, Tensor]:
    """(heads, width, dim) and (heads, width): what makes a head's queries, keys or values of what the projection reads."""
    place = getattr(plain.origins, part)
    whole = _affine(structure, plain, part, place.name)
    weight = whole.weight[found.features] * found.scale[..., None]
    return weight, whole.bias[found.features] * found.scale


def _affine(structure: Structure, plain: Listened, part: str, name: str) -> Affine:
    found = affine_map(structure.model.get_submodule(name), plain.reads[part], plain.returns[part])
    return Affine(found.weight.cpu(), found.bias.cpu())


def _with_bias(weight: Tensor, bias: Tensor, gain: Affine | None) -> Tensor:
    """(heads, width, dim + 1), the gain of the norm before folded in and the bias as a last column."""
    if gain is not None:
        bias = bias + weight @ gain.bias.cpu()
        weight = weight * gain.weight.cpu()
    return torch.cat([weight, bias[..., None]], -1)


def _prove(plain: Listened, maps: dict[str, tuple[Tensor, Tensor]], groups: int, turns: bool) -> None:
    """RcProbeError where scores recomputed from the maps are not those of what enters the op."""
    z = plain.reads["query"].cpu().double()
    if z.ndim != 3:
        raise RcProbeError(f"its projections read {z.ndim} axes, and not (batch, tokens, features)")

    def made(part: str) -> Tensor:
        weight, bias = maps[part]
        return torch.einsum("btd,hwd->bhtw", z, weight) + bias[:, None]

    query, key = made("query"), made("key").repeat_interleave(groups, 1)
    got = plain.op_got["query"].cpu(), plain.op_got["key"].cpu().repeat_interleave(groups, 1)
    if got[0].shape != query.shape or got[1].shape != key.shape:
        raise RcProbeError(
            f"its op gets {tuple(got[0].shape)} queries, and its projections make {tuple(query.shape)}"
        )
    scores: Callable[[Tensor, Tensor], Tensor] = (
        (lambda q, k: (q * k).sum(-1)) if turns else (lambda q, k: q @ k.mT)
    )
    mine, theirs = scores(query, key), scores(*got)
    close = max(SCORES, 8 * torch.finfo(plain.reads["query"].dtype).eps)
    if not bool(((mine - theirs).abs() <= close * theirs.abs().amax()).all()):
        raise RcProbeError("scores recomputed from its projections are not those that enter its attention")


def _ov(
    structure: Structure, by_pass: dict[str, Listened], value: Tensor, dim: int
) -> tuple[Circuit | None, str]:
    """value: (heads, width, dim + 1)."""
    plain = by_pass["plain"]
    assert plain.origins is not None
    try:
        if plain.origins.out is None:
            raise RcProbeError(plain.origins.no_out)
        features = decode_out(by_pass, value.shape[0], value.shape[1])
        out = _affine(structure, plain, "out", plain.origins.out.name).weight
        if out.shape[0] != dim:
            raise RcProbeError(f"it maps {dim} features to {out.shape[0]}")
        return Circuit.of(out.T[features], value, dim), ""
    except RcProbeError as error:
        return None, error.what


def _energy(query: Tensor, key: Tensor, pairs: Tensor) -> Tensor:
    """(heads, pairs): ‖AᵀB‖² of the rows of each pair alone, over the sum of all pairs and of what does not turn."""

    def of(rows: Tensor) -> Tensor:
        a, b = query[:, rows], key[:, rows]
        return ((a @ a.mT) * (b @ b.mT)).sum((-2, -1))

    still = torch.ones(query.shape[1], dtype=torch.bool)
    still[pairs.flatten()] = False
    each = torch.stack([of(pair) for pair in pairs], -1)
    rest = (
        torch.stack([of(torch.tensor([i])) for i in still.nonzero().flatten()], -1).sum(-1)
        if bool(still.any())
        else 0
    )
    return each / (each.sum(-1) + rest)[:, None]
