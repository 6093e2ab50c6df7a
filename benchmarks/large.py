"""What the default run of a large decoder costs: CPU time and peak memory of each measurement.

    python benchmarks/large.py random [--samples 4] [--tokens 1024] [--blocks 24] [-- OPTION=VALUE …]
    python benchmarks/large.py smollm2 [--samples 8] [--tokens 1024]

`random` is a decoder of 0.5 billion random weights in bfloat16 (the shape of Qwen2-0.5B, 24 blocks, 152,000 words, as a Llama), read
from a folder as a user's would be; `smollm2` the packaged SmolLM2-135M. CPU time stands as a multiple of eight nominal
plain passes over the same samples (four variants, pretrained and fresh), head included; memory beside the weights, which
are held once. Wanted of `random`: at most × 3 and weights + 2.5 GiB; of `smollm2`: ten minutes of CPU time.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from timing import cpu
from tokenizers import Tokenizer, models, pre_tokenizers

import rc_probe
from rc_probe.data.batches import batches
from rc_probe.data.samples import load_samples
from rc_probe.measures import MEASUREMENTS
from rc_probe.models.fresh_weights import weight_bytes
from rc_probe.models.load import load_model

WORDS = 152_000
QWEN2 = {
    "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": WORDS,
    "max_position_embeddings": 32768, "tie_word_embeddings": True, "rope_theta": 1e6, "eos_token_id": 0, "bos_token_id": 0,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=["random", "smollm2"])
    parser.add_argument("--samples", type=int)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--off", nargs="*", default=[], help="parts that are not measured, such as paths")
    given = parser.parse_args()
    samples = given.samples or (4 if given.model == "random" else 8)
    with tempfile.TemporaryDirectory() as folder:
        if given.model == "random":
            model, texts = _random(Path(folder), given.blocks, samples, given.tokens)
        else:
            model, texts = "demo-decoder", _long_texts(samples, given.tokens)
        _measure(model, texts, given.tokens, dict.fromkeys(given.off, False))


def _measure(model: str, texts: list[str], tokens: int, off: dict[str, bool]) -> None:
    plain, weights = _plain(model, texts, tokens)
    print(f"weights {weights / 2**30:.2f} GiB, eight plain passes {plain:.1f} s CPU", flush=True)
    for each in MEASUREMENTS:
        _timed(type(each), each.name, plain, weights)
    with _peak() as peak:
        seconds = cpu(lambda: rc_probe.probe(model, texts, length=tokens, **off).to_html())
    print(
        f"{'all, the report too':>24}  {seconds:8.1f} s  × {seconds / plain:.2f}  + {(peak[0] - weights) / 2**30:.2f} GiB"
    )


def _timed(kind: Any, name: str, plain: float, weights: int) -> None:
    run = kind.run

    def timed(self: Any, context: Any) -> Any:
        start = time.process_time()
        with _peak() as peak:
            found = run(self, context)
        seconds = time.process_time() - start
        print(
            f"{name:>12}, {context.weights:10}  {seconds:8.1f} s  × {seconds / plain:.2f}  + {(peak[0] - weights) / 2**30:.2f} GiB",
            *found.notes, sep="\n    ", flush=True,
        )  # fmt: skip
        return found

    kind.run = timed


def _plain(model: str, texts: list[str], tokens: int) -> tuple[float, int]:
    """CPU seconds of eight plain passes over all samples, and the bytes of the weights."""
    loaded = load_model(model)
    made = list(batches(load_samples(texts, modality="text"), loaded, length=tokens, batch_size=1))
    with torch.no_grad():
        loaded.model(**made[0].inputs)
        return 8 * cpu(lambda: [loaded.model(**batch.inputs) for batch in made]), weight_bytes(loaded.model)


@contextmanager
def _peak() -> Iterator[list[float]]:
    """The most memory that this process holds, looked at every 20 ms; what was held when it began before is not told apart."""
    process, found, done = psutil.Process(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            found[0] = max(found[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def _random(folder: Path, blocks: int, samples: int, tokens: int) -> tuple[str, list[str]]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**QWEN2, attention_bias=True, num_hidden_layers=blocks)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    rust = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=rust, unk_token="w0", eos_token="w0"
    ).save_pretrained(folder)
    drawn = torch.randint(1, WORDS, (samples, tokens)).tolist()
    return str(folder), [" ".join(f"w{i}" for i in row) for row in drawn]


def _long_texts(samples: int, tokens: int) -> list[str]:
    """Bundled biographies one behind the other, each text from another one on."""
    bundled = list(load_samples(None, modality="text").items)
    return [
        " ".join(bundled[(3 * n + i) % len(bundled)] for i in range(tokens // 50)) for n in range(samples)
    ]


if __name__ == "__main__":
    main()
