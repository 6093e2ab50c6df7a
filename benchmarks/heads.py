"""What the spectra of all heads cost: CPU seconds of reading and of all singular values, once in a process.

    python benchmarks/heads.py [--times 5]

BERT-base with random weights and an example of 2 × 16 tokens, float32: 144 heads of width 64, two circuits each.
"""

from __future__ import annotations

import argparse
import os
import statistics

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from timing import cpu

from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.heads.read import read_heads
from rc_probe.measures.heads.spectra import rows_of


def spectra(times: int) -> None:
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig()).eval()
    inputs = {"input_ids": torch.randint(1000, 9000, (2, 16))}
    structure = find_structure(model, inputs)
    first = model.encoder.layer[0].attention.self.query.weight

    def measured() -> None:
        with torch.no_grad():
            first.mul_(1)  # a weight that changed is read anew
        heads, refused = read_heads(structure)
        assert not refused
        assert sum(len(rows_of(each, 128, None)) for each in heads.values()) == 144 * 17

    found = [cpu(measured) for _ in range(times)]
    print(f"spectra of 144 heads of BERT-base: {statistics.median(found):.2f} s of CPU time "
          f"[{min(found):.2f} to {max(found):.2f}], wanted < 3")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=5)
    given = parser.parse_args()
    spectra(given.times)


if __name__ == "__main__":
    main()
