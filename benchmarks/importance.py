"""What importance and greedy removals cost, against plain forward passes of the same samples (CPU time, median of paired ratios).

    python benchmarks/importance.py [--pairs 7] [--samples 16]

BERT-base with its masked-language head and random weights, bundled texts of up to 128 tokens in batches of 8, float32, two threads. Each
figure has everything in it that a run does: the plain pass, the proof of the shortcuts on the first batch, the copies of
what blocks returned, losses, the residual of the bulk, proxies. What is proved once for a model is in the first pair alone.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from timing import cpu, quartiles

from rc_probe.data.batches import batches
from rc_probe.data.samples import load_samples
from rc_probe.hooks.attach import find_structure
from rc_probe.measures.context import Context
from rc_probe.measures.drops.search import Halves, _Search
from rc_probe.measures.importance.removed import importance
from rc_probe.measures.importance.scored import plan_scored
from rc_probe.models.load import hold_model, load_model
from rc_probe.processes.world import World
from rc_probe.settings import Settings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--samples", type=int, default=16)
    given = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig()).eval()
    loaded = hold_model(model, load_model("demo").processor)
    settings = Settings(drop=4)
    samples = load_samples(None, modality="text", samples=given.samples)
    made = batches(samples, loaded)
    structure = find_structure(model, next(iter(made)).inputs)
    context = Context(loaded, structure, samples, made, settings, World(), name="BERT-base")
    plan = plan_scored(loaded, samples, settings)
    assert plan.task is not None

    def plain() -> None:
        with torch.no_grad():
            for batch in made:
                model(**batch.inputs)

    def greedy() -> None:
        _Search(context, Halves(plan, plan)).greedy(4)

    figures: dict[str, tuple[Callable[[], object], int, float]] = {
        "12 blocks, by 12 forwards": (lambda: importance(context, plan, "blocks"), 12, 0.60),
        "5 parts of 12 blocks, by 60 forwards": (lambda: importance(context, plan, "parts"), 60, 0.62),
        "greedy removal of 4 of 12 blocks, in forwards": (greedy, 1, 30),
    }
    plain()
    for name, (measured, count, limit) in figures.items():
        ratios = []
        for _ in range(given.pairs):
            before = cpu(plain)
            ours = cpu(measured)
            ratios.append(ours / (count * (before + cpu(plain)) / 2))
        low, middle, high = quartiles(ratios)
        print(f"{name}: {middle:.3f} [{low:.3f} to {high:.3f}], wanted ≤ {limit}", flush=True)


if __name__ == "__main__":
    main()
