"""What is proved of masks and norms, shown on small networks of attention alone, with patterns and products by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rc_probe.data.batches import Batch
from rc_probe.hooks.attach import find_structure
from rc_probe.interventions.grammar import parse_intervention
from rc_probe.measures.variant_passes import measure_variants

N, DEPTH = 16, 32
MASKS = ("complete", "causal", "left:4", "window:4", "left:1", "window:1")
# Distance between tokens that the graph of the mask needs so many steps for, from its nearest center.
RADIUS = {"left:4": 4, "window:4": 2}


class Attention(nn.Module):
    """One head with an orthogonal value matrix; `blocks`: tokens see their own half alone."""

    def __init__(self, size: float, *, blocks: bool) -> None:
        super().__init__()
        self.query, self.key = (nn.Linear(N, N, bias=False) for _ in "qk")
        for each in (self.query, self.key):
            nn.init.normal_(each.weight, std=1 / math.sqrt(N))
        self.value = nn.Parameter(size * torch.linalg.qr(torch.randn(N, N))[0])
        half = torch.arange(N) < N // 2
        self.register_buffer("seen", half[:, None] == half if blocks else torch.ones(N, N, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t[:, None] for t in (self.query(x), self.key(x), x @ self.value))
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.seen)[:, 0]


class Block(nn.Module):
    def __init__(self, size: float, *, blocks: bool, norm: bool) -> None:
        super().__init__()
        self.attention = Attention(size, blocks=blocks)
        self.norm = nn.RMSNorm(N, eps=1e-12, elementwise_affine=False) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.attention(x))


class Net(nn.Module):
    def __init__(
        self, size: float = 1.0, *, blocks: bool = False, norm: bool = False, depth: int = DEPTH
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(size, blocks=blocks, norm=norm) for _ in range(depth))
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def streams() -> Tensor:
    return torch.randn(3, N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def curves(model: Net, *specs: str) -> dict[str, np.ndarray]:
    """‖res X‖_F / ‖X‖_F, and ‖res X‖_F, by layer, of attention alone with each of these masks or norms."""
    x, metrics = streams(), ["residual_frobenius", "residual_frobenius_absolute"]
    structure = find_structure(model, {"x": x})
    variants = [parse_intervention("+".join(filter(None, ("attention.skip@all", spec)))) for spec in specs]
    found, _ = measure_variants(structure, [Batch({"x": x}, None, 0)], variants, metrics)
    layers = range(structure.depth + 1)
    return {
        spec: np.array([[float(found[variant.name].values[n, m].mean) for n in layers] for m in metrics])
        for spec, variant in zip(specs, variants, strict=True)
    }


@pytest.fixture(scope="module")
def pure() -> tuple[Net, dict[str, np.ndarray]]:
    model = Net()
    return model, curves(model, *(f"mask@all={mask}" for mask in MASKS))


def allowed(mask: str) -> np.ndarray:
    kind, _, size = mask.partition(":")
    back = np.subtract.outer(np.arange(N), np.arange(N))  # how far behind the query a key stands
    if kind == "complete":
        return np.ones((N, N), dtype=bool)
    if kind == "causal":
        return back >= 0
    return (abs(back) <= int(size)) & ((back >= 0) | (kind == "window"))


def dobrushin(model: Net, mask: str, layers: int) -> float:
    """Of the product of the patterns of the first layers, mean over samples, by NumPy."""
    seen, found = allowed(mask), []
    for x in streams().numpy():
        X, P = x, np.eye(N)
        for block in model.layers[:layers]:
            weights = {name: value.detach().numpy() for name, value in block.attention.named_parameters()}
            scores = (X @ weights["query.weight"].T) @ (X @ weights["key.weight"].T).T / math.sqrt(N)
            A = np.where(seen, np.exp(scores - scores.max(1, keepdims=True)), 0)
            A /= A.sum(1, keepdims=True)
            X, P = A @ X @ weights["value"], A @ P
        found.append(max(abs(P[i] - P[j]).sum() / 2 for i in range(N) for j in range(i)))
    return float(np.mean(found))


def test_masks_with_a_center_collapse_exponentially(pure: tuple[Net, dict[str, np.ndarray]]) -> None:
    """Every one of these graphs has a token that all others hear of. Of two that never hear of each other it is not so."""
    for spec, (relative, _) in pure[1].items():
        logs = np.log(np.maximum(relative, 1e-16))
        assert logs[4] < logs[2] < logs[1] < logs[0], spec
        if spec in (
            "mask@all=window:4",
            "mask@all=left:1",
            "mask@all=window:1",
        ):  # the others have reached rounding
            steps = np.diff(logs[DEPTH // 2 :])
            assert steps.max() < 0 and steps.min() > 3 * steps.mean(), spec  # about as much at each layer
    (apart,) = curves(Net(blocks=True), "").values()
    assert apart[0, DEPTH] > 0.1 and apart[0, DEPTH] == pytest.approx(apart[0, DEPTH // 2], rel=1e-3)


def test_masks_are_ordered_by_the_product_of_patterns_and_not_by_radius(
    pure: tuple[Net, dict[str, np.ndarray]],
) -> None:
    model, found = pure
    at = 12
    taus = {mask: dobrushin(model, mask, at) for mask in MASKS}
    residuals = {mask: found[f"mask@all={mask}"][0, at] / found[f"mask@all={mask}"][0, 0] for mask in MASKS}
    assert sorted(MASKS, key=lambda m: taus[m]) == sorted(MASKS, key=lambda m: residuals[m])
    assert residuals["left:4"] < residuals["window:4"] and RADIUS["left:4"] > RADIUS["window:4"]


def test_a_norm_does_not_hold_orthogonal_values(pure: tuple[Net, dict[str, np.ndarray]]) -> None:
    """All tokens stay on the sphere, and fall together all the same under complete and causal masks."""
    specs = [f"mask@all={mask}" for mask in ("complete", "causal", "window:1")]
    found = curves(Net(norm=True, depth=2 * DEPTH), *specs)
    for spec in specs[:2]:
        assert found[spec][0, -1] < 1e-15, spec
    assert found[specs[2]][0, -1] > 1e-3


def test_relative_and_absolute_residuals_disagree_where_weights_shrink() -> None:
    """Values of half the size: the absolute residual of a narrow window falls as 2^-t, the relative one hardly."""
    half, whole = (
        curves(Net(size, depth=12), "mask@all=window:1")["mask@all=window:1"] for size in (0.5, 1.0)
    )
    assert half[0, 12] > 0.3 * half[0, 0]
    assert half[1, 12] < 1e-3 * half[1, 0]
    assert whole[1, 12] > 0.1 * whole[1, 0]
