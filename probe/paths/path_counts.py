"""How many paths there are of each length, in exact integers.

At each attention sublayer a path takes the skip or one head; its length is the number of heads on it. With
H_j heads at sublayer j the number of paths of length k is the coefficient of x^k in prod_j (1 + H_j x):
C(L, k) H^k when all L sublayers have H heads. Drawn at random among all paths, the length is then binomial,
with L trials of probability H / (H + 1). Source: Dong et al. 2021, theorem 2.1 and figure 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rc_probe.results.tables import Row

if TYPE_CHECKING:
    from rc_probe.hooks.structure.structure import Structure


# (layers, heads). BERT-base, DistilBERT, MobileBERT, GPT-2, ViT-B and Llama-2-7B: defaults of the config classes of
# transformers; the others: config.json of the published checkpoints (bert-large, albert-base-v2, gpt2-medium, …),
# of T5 its encoder; GPT-3: Brown et al. 2020, table 2.1. The paper's figure has MobileBERT with 12 layers.
ARCHITECTURES: dict[str, tuple[int, int]] = {
    "DeiT-T": (12, 3),
    "DistilBERT": (6, 12),
    "MobileBERT": (24, 4),
    "BERT-base": (12, 12),
    "BERT-large": (24, 16),
    "ALBERT-base": (12, 12),
    "ALBERT-xxlarge": (12, 64),
    "ViT-B": (12, 12),
    "ViT-L": (24, 16),
    "ViT-H": (32, 16),
    "GPT-2": (12, 12),
    "GPT-2 medium": (24, 16),
    "GPT-2 large": (36, 20),
    "GPT-2 XL": (48, 25),
    "Llama-2-7B": (32, 32),
    "T5-3B": (24, 32),
    "T5-11B": (24, 128),
    "GPT-3": (96, 96),
}


def path_counts(heads: Sequence[int]) -> list[int]:
    """The number of paths of length 0 … len(heads); `heads` has the number of heads of each attention sublayer.

    They sum to prod (H_j + 1).
    """
    counts = [1]
    for H in heads:
        longer = [0, *(H * count for count in counts)]
        counts = [a + b for a, b in zip([*counts, 0], longer, strict=True)]
    return counts


def length_shares(heads: Sequence[int]) -> list[float]:
    """The share of all paths that has length 0 … len(heads): the law of the length of a random path."""
    total = math.prod(H + 1 for H in heads)
    return [count / total for count in path_counts(heads)]  # Python rounds quotients of large integers once


def mean_length(heads: Sequence[int]) -> float:
    """The mean length of a path drawn at random among all: sum_j H_j / (H_j + 1)."""
    return math.fsum(H / (H + 1) for H in heads)


def hops(structure: Structure, count_mlp: bool = False) -> list[int]:
    """What a path through the model may take in place of each skip: the number of heads at each junction.

    Heads of parallel self-attentions, which meet in one junction, add up. With `count_mlp` an MLP is a hop
    like a head; other mixers and cross-attention, which reads from elsewhere, are never counted. Raises
    RcProbeError where the heads of a branch are not known.
    """
    found = []
    for block in structure.blocks:
        for junction in block.junctions:
            here = 0
            for branch in junction.branches:
                if branch.kind == "attention":
                    if not branch.ops or not branch.ops[0].heads:
                        raise structure.error(
                            block,
                            "its paths cannot be counted: the heads of its attention are not known",
                            "Load the model with attn_implementation='eager'",
                        )
                    here += branch.ops[0].heads
                here += count_mlp and branch.kind == "mlp"
            found.append(here)
    return [here for here in found if here]


def count_rows(model: str, heads: Sequence[int]) -> list[Row]:
    """Rows `model, length, count, share` of the table `path_counts` for one model.

    `count` is text, the integer in decimal: most readers of JSON round integers beyond 2^53, and a pandas
    column of integers ends at 2^63. Read it by int(), from CSV with dtype={"count": str}.
    """
    pairs = zip(path_counts(heads), length_shares(heads), strict=True)
    return [
        {"model": model, "length": length, "count": str(count), "share": share}
        for length, (count, share) in enumerate(pairs)
    ]


def architecture_rows() -> list[Row]:
    """The same rows for the well-known ARCHITECTURES, to stand beside the model at hand."""
    return [
        row for name, (layers, heads) in ARCHITECTURES.items() for row in count_rows(name, [heads] * layers)
    ]
