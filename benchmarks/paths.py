"""What paths cost, against the plain forward pass, in one process.

    python benchmarks/paths.py [--rounds 7] [--part exact|sources|deep|memory|sampled]

BERT-base shape with random weights, 8 × 128 tokens, float32, 2 threads. Every figure is the median of the paired ratios of
process CPU time to a plain pass of the same model, before and after in turn, with the quartiles.

exact: `decompose` of all lengths 0 to 12, its check against a plain pass in it.
sources: tokens, positions and biases over all lengths (the table `path_sources`), its check in it.
deep: 48 blocks, 256 wide, with the default of --max-length: paths longer than 8 are one part.

memory: peak resident set of a process of its own for each mode, model and libraries in it; `sample` with five draws.

sampled: distinct paths per second of `sample` against a loop of frozen passes with one path each (`terms`). One draw of a
head for every block brings all the layer subsets with it, C(12, k) of each length k, which share these heads: so they are
many distinct paths, not as many independent ones. Both rates are printed: of paths, and of draws of heads.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from timing import quartiles

from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.frozen.frozen_pass import steps
from rc_probe.hooks.structure.structure import Structure
from rc_probe.paths import decompose, sample, terms
from rc_probe.paths.live import draw_paths
from rc_probe.paths.path_proofs import prove_heads, prove_steps
from rc_probe.paths.sample import draw_heads
from rc_probe.paths.tables import with_longest
from rc_probe.settings import Settings

Model = tuple[torch.nn.Module, Structure, dict[str, Any]]


def bert(**sizes: int) -> Model:
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**sizes)).eval()
    ids = torch.randint(1000, 30000, (8, 128))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model, find_structure(model, {k: v[:2, :16] for k, v in inputs.items()}), inputs


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def against_plain(name: str, limit: float, model: Model, rounds: int, **how: Any) -> None:
    """The cost of a decomposition in plain passes of its model."""
    plain_model, structure, inputs = model
    error = decompose(structure, inputs, **how).error
    plain_model(**inputs)
    times: list[tuple[float, float]] = []
    for turn in range(rounds):
        runs = [lambda: plain_model(**inputs), lambda: decompose(structure, inputs, **how)]
        found = [seconds(run) for run in runs[:: 1 if turn % 2 == 0 else -1]]
        times.append((found[turn % 2], found[1 - turn % 2]))
    low, middle, high = quartiles([whole / plain for plain, whole in times])
    print(f"plain: {statistics.median(plain for plain, _ in times):.2f} s CPU, {rounds} rounds")
    print(
        f"{name}: × {middle:.2f}  [{low:.2f} – {high:.2f}], wanted ≤ {limit}; error {error:.1e}", flush=True
    )


def exact(rounds: int) -> None:
    against_plain("exact, all lengths", 7.5, bert(), rounds)


def sources(rounds: int) -> None:
    against_plain("by source, all lengths together", 9, bert(), rounds, by_source=True, by_length=False)


def deep(rounds: int) -> None:
    model = bert(num_hidden_layers=48, hidden_size=256, num_attention_heads=4, intermediate_size=1024)
    longest = with_longest(Settings(), model[1].depth, []).max_length
    against_plain("exact, 48 blocks, default lengths", 12, model, rounds, max_length=longest)


def modes(
    model: torch.nn.Module, structure: Structure, inputs: dict[str, Any]
) -> dict[str, Callable[[], object]]:
    return {
        "plain": lambda: model(**inputs),
        "exact": lambda: decompose(structure, inputs),
        "exact by source": lambda: decompose(structure, inputs, by_source=True),
        "by source": lambda: decompose(structure, inputs, by_source=True, by_length=False),
        "sampled": lambda: sample(structure, inputs, paths=1, repeats=5),
    }


def memory(rounds: int) -> None:
    for mode in ("plain", "exact", "exact by source", "by source", "sampled"):
        command = [sys.executable, __file__, "--one", mode]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"{mode}: {float(done.stdout.split()[-1]) / 1024:.2f} GiB")


def distinct(heads: torch.Tensor) -> int:
    """How many different paths the draws (steps, draws) bring, all layer subsets of each."""
    depth = len(heads)
    subsets = torch.arange(2**depth)[:, None] >> torch.arange(depth) & 1
    every = (subsets[None] * (heads.T[:, None] + 1)).flatten(0, 1)
    return len(every.unique(dim=0))


def sampled(rounds: int) -> None:
    model, structure, inputs = bert()
    assert structure.model is model
    choices = steps(structure)
    prove_heads(structure, inputs, choices)  # once for a model, and not what is compared
    prove_steps(structure, inputs, choices)
    generator = torch.Generator().manual_seed(0)
    singles = [draw_paths(choices, 1 + i % 12, 1, generator) for i in range(rounds)]
    draws = 2
    count = distinct(draw_heads(choices, draws, seed=0))
    ratios = []
    for path in singles:
        one = seconds(lambda p=path: terms(structure, inputs, p))  # type: ignore[misc]
        many = seconds(lambda: sample(structure, inputs, paths=draws, repeats=1, seed=0))
        ratios.append((count / many) * one)
        print(f"one path: {one:.2f} s; {draws} draws of heads, {count} distinct paths: {many:.2f} s")
    print(f"paths per second, sampled against one by one: × {statistics.median(ratios):.0f}  (wanted: 50)")
    print(
        f"draws of heads per second against single paths: × {statistics.median(ratios) * draws / count:.2f}"
    )


PARTS: dict[str, Callable[[int], None]] = {
    "exact": exact, "sources": sources, "deep": deep, "memory": memory, "sampled": sampled,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--part", choices=list(PARTS), action="append")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    if given.one:
        held = bert()  # a structure alone keeps no model alive
        modes(*held)[given.one]()
        status = Path("/proc/self/status").read_text(encoding="utf-8")  # ru_maxrss has the parent's in it
        print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)
        return
    for part in given.part or PARTS:
        load = ", ".join(f"{n:.1f}" for n in os.getloadavg())
        print(f"\n{part}  (load of the machine {load}, {os.cpu_count()} cores)")
        PARTS[part](given.rounds)


if __name__ == "__main__":
    main()
