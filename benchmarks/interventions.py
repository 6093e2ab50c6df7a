"""What interventions cost, against plain forward passes in the same run (CPU time, median of paired ratios).

    python benchmarks/interventions.py [--pairs 7] [--batches 4]

BERT-base shape, batches of 8 × 128 tokens, float32, two threads. Each figure has everything in it that a run does: the
plain pass of each batch, the proof of the shortcuts on the first batch, the copies of what blocks returned, and the
residual of each layer. What is proved once for a model (attaching, shortcuts on 16 tokens) is in the first pair alone.
"""

from __future__ import annotations

import argparse

import torch
import transformers
from timing import cpu, quartiles

from rc_probe.data.batches import Batch
from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.edits.model_state import measuring
from rc_probe.interventions.grammar import parse_intervention
from rc_probe.interventions.intervention import Variant
from rc_probe.interventions.paper import paper_variants
from rc_probe.measures.variant_passes import measure_variants


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--batches", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig()).eval()
    mask = torch.ones(8, 128, dtype=torch.bool)
    batches = [
        Batch({"input_ids": torch.randint(30000, (8, 128)), "attention_mask": mask.long()}, mask, 8 * i)
        for i in range(given.batches)
    ]
    structure = find_structure(model, batches[0].inputs)
    lists: dict[str, tuple[list[Variant], int]] = {
        "12 ablations of one MLP each, by plain passes": ([parse_intervention(f"mlp@{n}") for n in range(1, 13)], 12),
        "12 ablations of one attention skip each, by plain passes": (
            [parse_intervention(f"attention.skip@{n}") for n in range(1, 13)], 12,
        ),
        "12 ablations of one block each, by plain passes": ([parse_intervention(f"block@{n}") for n in range(1, 13)], 12),
        "the paper's four variants, in plain passes": (paper_variants(structure), 1),
    }  # fmt: skip

    def plain() -> None:
        with measuring(model):
            for batch in batches:
                model(**batch.inputs)

    plain()
    for name, (variants, count) in lists.items():
        ratios = []
        for _ in range(given.pairs):
            before = cpu(plain)
            ours = cpu(lambda v=variants: measure_variants(structure, batches, v, ["residual"]))  # type: ignore[misc]
            ratios.append(ours / (count * (before + cpu(plain)) / 2))
        low, middle, high = quartiles(ratios)
        print(f"{name}: {middle:.3f} [{low:.3f} to {high:.3f}]", flush=True)


if __name__ == "__main__":
    main()
