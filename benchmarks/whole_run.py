"""What a whole run costs, against the plain passes that its numbers need (CPU time, median of paired ratios).

    python benchmarks/whole_run.py [--pairs 7] [--run 'default'] [--tiny]

BERT-base shape with random weights, the 32 bundled samples of up to 128 tokens in batches of 8, float32, two threads.
The nominal passes are eight plain passes over all samples: four variants × {pretrained, init}. A run has everything in
it: proofs, fresh weights, curves, recursion, bounds, corollary, the model's own attention, embeddings (the model has no head, so that its
task is retrieval: one more plain pass over halves), paths, chains, importance, and the report with all files written. Imports and
one small run are made before. All of it in a process that keeps freed memory, as that of the command does. --tiny measures the default run of two blocks on eight texts, in seconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from timing import cpu, quartiles

import rc_probe
from rc_probe.data.batches import batches
from rc_probe.data.samples import load_samples
from rc_probe.models.load import hold_model, load_model
from rc_probe.processes.allocator import keep_freed_memory

RUNS: dict[str, tuple[dict[str, Any], float]] = {
    "default": ({}, 2.8),
    "--no-paths --importance none": ({"paths": False, "importance": "none"}, 1.0),
    "--no-paths --importance none --no-attention --no-embeddings": (
        {"paths": False, "importance": "none", "attention": False, "embeddings": False},
        1.0,
    ),
}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--run", choices=RUNS, action="append", help="Which runs. (default: all)")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(2)
    keep_freed_memory()
    torch.manual_seed(0)
    processor = load_model("demo").processor

    def probed(model: Any, **options: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            rc_probe.probe(model, processor=processor, **options).save(folder)

    tiny = transformers.BertModel(transformers.BertConfig(**TINY)).eval()
    probed(tiny, samples=8)
    if given.tiny:
        times = [cpu(lambda: probed(tiny, samples=8)) for _ in range(given.pairs)]
        print(f"two blocks, eight texts: {statistics.median(times):.2f} s CPU, wanted ≤ 2.5")
        return
    model = transformers.BertModel(transformers.BertConfig()).eval()
    made = list(batches(load_samples(None, modality="text"), hold_model(model, processor)))

    def plain() -> None:
        with torch.no_grad():
            for _ in range(8):
                for batch in made:
                    model(**batch.inputs)

    for name in given.run or RUNS:
        options, limit = RUNS[name]
        ratios = []
        for _ in range(given.pairs):
            before = cpu(plain)
            ours = cpu(lambda o=options: probed(model, **o))
            ratios.append(ours / ((before + cpu(plain)) / 2))
            print(f"  {name}: {ours:.1f} s CPU, eight plain passes {before:.1f} s", flush=True)
        low, middle, high = quartiles(ratios)
        print(f"{name}: × {middle:.2f}  [{low:.2f} – {high:.2f}], wanted ≤ {limit}", flush=True)


if __name__ == "__main__":
    main()
