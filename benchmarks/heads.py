"""What the ranks of heads cost: CPU seconds of all spectra, and truncations of one block against plain forward passes.

    python benchmarks/heads.py [--times 5] [--pairs 5] [--samples 16] [--block 6]

BERT-base with its masked-language head and random weights, float32, two threads. Spectra: 144 heads of width 64, two circuits each, once
in a process, on an example of 2 × 16 tokens. Truncation: the heads of one block at six ranks by four methods, bundled texts of up to 128
tokens in batches of 8, with the plain pass, proofs, losses, and rows of attention compared; median of paired ratios of CPU time.
"""

from __future__ import annotations

import argparse
import os
import statistics

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from timing import cpu

from rc_probe import engine
from rc_probe.data.batches import batches
from rc_probe.data.samples import load_samples
from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.edits.edits import Edits
from rc_probe.hooks.heads.read import read_heads
from rc_probe.interventions.rank import METHODS, Ranked
from rc_probe.measures.context import Context
from rc_probe.measures.heads.row_divergence import DivergenceReader
from rc_probe.measures.heads.spectra import rows_of
from rc_probe.measures.importance.scored import plan_scored, score
from rc_probe.models.load import hold_model, load_model
from rc_probe.processes.world import World
from rc_probe.settings import Settings

RANKS = (1, 2, 4, 8, 16, 32)


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


def truncations(pairs: int, count: int, block: int) -> None:
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig()).eval()
    loaded = hold_model(model, load_model("demo").processor)
    settings = Settings()
    samples = load_samples(None, modality="text", samples=count)
    made = batches(samples, loaded)
    structure = find_structure(model, next(iter(made)).inputs)
    context = Context(loaded, structure, samples, made, settings, World(), name="BERT-base")
    plan = plan_scored(loaded, samples, settings)
    asked = [Ranked("rank", (block,), (), f"{rank}:{method}") for method in METHODS for rank in RANKS]
    engine.prepare(structure, made, asked)
    edits: dict[str, Edits] = {each.label: each.edits(structure) for each in asked}

    def plain() -> None:
        with torch.no_grad():
            for batch in made:
                model(**batch.inputs)

    def measured() -> None:
        reader = DivergenceReader(dict.fromkeys(edits, (block, None)))
        base, notes = reader.watched(structure, [structure.blocks[block - 1]])
        assert not notes
        _, notes = score(context, plan, edits, {}, base=base, readers=[reader])
        assert not notes, "passes begin at the block"

    plain()
    ratios = []
    for _ in range(pairs):
        before = cpu(plain)
        ours = cpu(measured)
        ratios.append(ours / (len(edits) * (before + cpu(plain)) / 2))
    print(f"{len(edits)} truncations of block {block} of 12, by as many forwards: {statistics.median(ratios):.3f} "
          f"[{min(ratios):.3f} to {max(ratios):.3f}], wanted ≤ 0.7", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--block", type=int, default=6)
    given = parser.parse_args()
    torch.set_num_threads(2)
    spectra(given.times)
    truncations(given.pairs, given.samples, given.block)


if __name__ == "__main__":
    main()
