"""What measuring costs on a GPU, against the plain forward pass; and that its loop never waits for the device.

    python benchmarks/gpu_overhead.py [--rounds 15] [--batch 32] [--length 512] [--device cuda]

BERT-base shape, 32 × 512 tokens, bfloat16 and float32. Modes alternate within each round, in turned order every
other round; reported is the median of the paired ratios of device time (CUDA events; on a CPU, for trying the
script, wall time), with the quartiles. The aim is a residual at every layer for at most 1.05 of the plain pass.

A host sync is whatever torch.cuda.set_sync_debug_mode counts: those of the plain pass are the model's own,
and measuring must add none. Ends with 1 if it does, with 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import torch
import transformers
from timing import quartiles

from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.edits.edits import Edits
from rc_probe.interventions.paper import paper_variants
from rc_probe.measures.variant_passes import stream_pass
from rc_probe.metrics.layer_curves import Curves
from rc_probe.registry import METRICS, select

AIM = 1.05
CHEAP = [name for name in select() if METRICS[name].cost == "cheap"]
Mode = Callable[[], object]


def modes(dtype: torch.dtype, device: torch.device, batch: int, length: int) -> dict[str, Mode]:
    """The plain pass; the taps with one metric and with all cheap ones; and the pure attention variant."""
    torch.manual_seed(0)
    config = transformers.BertConfig(max_position_embeddings=max(512, length))
    model = transformers.BertModel(config).eval().to(device, dtype)
    ids = torch.randint(1000, 30000, (batch, length), device=device)
    mask = torch.ones_like(ids)
    mask[: batch // 2, length - length // 8 :] = 0  # half of the texts are padded
    inputs = {"input_ids": ids, "attention_mask": mask}
    structure = find_structure(model, inputs)
    san = paper_variants(structure)[0].edits(structure)

    def tapped(metrics: list[str], edits: Edits) -> Mode:
        curves = Curves(metrics)  # kept, as in a run: its sums lie on the device
        curves.mask = mask.bool()
        return lambda: stream_pass(structure, inputs, edits, curves.on_stream)

    return {
        "plain": lambda: model(**inputs),
        "residual": tapped(["residual"], Edits()),
        "all cheap metrics": tapped(CHEAP, Edits()),
        "residual, variant SAN": tapped(["residual"], san),
    }


def seconds(mode: Mode, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        mode()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    mode()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def ratios(found: dict[str, Mode], rounds: int, device: torch.device) -> dict[str, float]:
    names = list(found)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names * 3:  # kernels are chosen, memory is there
        found[name]()
    for turn in range(rounds):
        for name in names[:: 1 if turn % 2 == 0 else -1]:
            times[name].append(seconds(found[name], device))
    base, middles = times[names[0]], {}
    print(f"  {names[0]}: {1000 * statistics.median(base):.2f} ms, {rounds} rounds")
    for name in names[1:]:
        paired = [t / b for t, b in zip(times[name], base, strict=True)]
        low, middles[name], high = quartiles(paired)
        print(f"  {name}: × {middles[name]:.3f}  [{low:.3f} – {high:.3f}]")
    return middles


def syncs(mode: Mode) -> int:
    """How often the host waits for the device in one pass."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            mode()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in seen)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("There is no GPU here, so nothing was measured. (--device cpu tries the script out.)")
        return 2
    print(
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else "CPU: a trial of the script, no result"
    )
    worst = 0
    for dtype in (torch.bfloat16, torch.float32):
        print(f"{str(dtype).removeprefix('torch.')}, {given.batch} × {given.length} tokens")
        found = modes(dtype, device, given.batch, given.length)
        with torch.no_grad():
            middles = ratios(found, given.rounds, device)
            print(f"  residual at most × {AIM}: {'yes' if middles['residual'] <= AIM else 'NO'}")
            if device.type == "cuda":
                counts = {name: syncs(mode) for name, mode in found.items()}
                print(f"  host syncs in a pass: {counts}")
                worst = max(worst, *(count - counts["plain"] for count in counts.values()))
    if device.type == "cuda":
        print(f"measuring adds {worst} host syncs to a pass")
    return 1 if worst > 0 else 0


if __name__ == "__main__":
    sys.exit(main())
