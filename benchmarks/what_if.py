"""What cells of masks, norms and maps cost, against plain scored passes of the same samples (CPU time, median of paired ratios).

    python benchmarks/what_if.py [--pairs 7] [--samples 16]

BERT-base with its masked-language head and random weights, bundled texts of up to 128 tokens in batches of 8, float32, two threads. A
figure is what a run with these cells takes more than one with a map of three, by how many cells it has more. What each cell costs is in it:
its edits, the residuals of each layer, ranks, the loss; not what a run does once (a plain pass, the proof of the shortcuts). A plain pass
is the model's own forward pass with the loss of its task.
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
from rc_probe.measures.importance.scored import plan_scored, prepared_batches
from rc_probe.measures.what_if.cells import Planned, what_if
from rc_probe.models.load import hold_model, load_model
from rc_probe.processes.world import World
from rc_probe.settings import Settings

LIMIT = 1.05
FEW = ("temperature=2", "skip=0.9")
OPTIONS = {
    "masks": Settings(masks=True, map=FEW),
    "norms": Settings(norms=True, map=FEW),
    "a map of temperature and skip": Settings(map=("temperature=0.25,0.5,2,4", "skip=0.5,0.75,0.9")),
}


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
    samples = load_samples(None, modality="text", samples=given.samples)
    made = batches(samples, loaded)
    structure = find_structure(model, next(iter(made)).inputs)
    scored = plan_scored(loaded, samples, Settings())
    task = scored.task
    assert task is not None

    def plain() -> None:
        with torch.no_grad():
            for batch in prepared_batches(task, scored.batches(loaded, Settings())):
                assert batch.prepared is not None
                task.read(model(**batch.inputs), batch.prepared)

    def planned(settings: Settings) -> tuple[Callable[[], object], int]:
        """A run with these settings, and how many cells it has."""
        plan = Planned(scored)
        context = Context(loaded, structure, samples, made, settings, World(), name="BERT-base")
        cells = {cell.spec for cell in plan.cells(context) if cell.interventions}
        return lambda: what_if(context, plan), len(cells)

    plain()
    few, least = planned(Settings(map=FEW))
    for name, settings in OPTIONS.items():
        run, count = planned(settings)
        ratios = []
        for _ in range(given.pairs):
            before = cpu(plain)
            more = cpu(run) - cpu(few)
            ratios.append(more / ((count - least) * (before + cpu(plain)) / 2))
        low, middle, high = quartiles(ratios)
        print(f"{name}, a cell: {middle:.3f} [{low:.3f} to {high:.3f}] passes, wanted ≤ {LIMIT}", flush=True)


if __name__ == "__main__":
    main()
