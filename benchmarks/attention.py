"""What the model's own attention costs, against one plain pass over the run's samples (CPU time, median of paired ratios).

    python benchmarks/attention.py [--pairs 7] [--threads 2]

BERT-base shape with random weights, and all-MiniLM-L6, on the 32 bundled samples of up to 128 tokens in batches of 8, float32.
Four samples are read. `alone` has everything in it: the pass that reads the patterns, what is made of them, the rows.
`beside chained attention`, as in a default run, has the patterns from there.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from timing import cpu, quartiles

from rc_probe.data.batches import batches
from rc_probe.data.samples import load_samples
from rc_probe.hooks.attach import find_structure
from rc_probe.measures.attention.first_patterns import FirstPatterns
from rc_probe.measures.attention.reading import Reading
from rc_probe.models.load import Loaded, hold_model, load_model

LIMIT = 0.3


def measured(name: str, loaded: Loaded, pairs: int) -> None:
    made = batches(load_samples(None, modality="text"), loaded)
    inputs = [batch.inputs for batch in made]
    structure = find_structure(loaded.model, inputs[0])

    def plain() -> None:
        with torch.no_grad():
            for one in inputs:
                loaded.model(**one)

    def gather(read: FirstPatterns) -> None:
        found = Reading()
        for sample in read.samples(4):
            found.add(sample)
        found.head_rows(), found.mask_rows(), found.sink_rows(str)

    def alone() -> None:
        gather(FirstPatterns(structure, made))

    read = FirstPatterns(structure, made)
    gather(read)
    for words, ours in (("alone", alone), ("beside chained attention", lambda: gather(read))):
        ratios = []
        for _ in range(pairs):
            before, own = cpu(plain), cpu(ours)
            ratios.append(own / ((before + cpu(plain)) / 2))
        low, middle, high = quartiles(ratios)
        print(
            f"{name}, {words}: {middle:.2f} of a plain pass  [{low:.2f} – {high:.2f}], wanted ≤ {LIMIT}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    demo = load_model("demo")
    measured("all-MiniLM-L6", demo, given.pairs)
    base = transformers.BertModel(transformers.BertConfig()).eval()
    measured("BERT-base", hold_model(base, demo.processor), given.pairs)


if __name__ == "__main__":
    main()
