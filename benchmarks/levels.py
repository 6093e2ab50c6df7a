"""What the headline metric and the level give on freshly initialised models: the table of docs/levels.md.

    python benchmarks/levels.py [FAMILY ...]

Each family is built from the defaults of its config class with seed 0 (Llama with the shape of SmolLM2-135M), and
measured on 8 samples of 64 random tokens (ViT: 8 images of Gaussian noise), float32. Nothing is downloaded.
"""

import sys
from collections.abc import Callable

import torch
import transformers

import rc_probe
from rc_probe.results.curves import Curve
from rc_probe.results.verdict import level_of

METRICS = ["residual", "residual_bulk", "cosine_bulk", "massive_share"]


def llama() -> transformers.PreTrainedModel:
    shape = {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    }  # fmt: skip
    return transformers.LlamaModel(transformers.LlamaConfig(**shape))


FAMILIES: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "BERT": lambda: transformers.BertModel(transformers.BertConfig()),
    "GPT-2": lambda: transformers.GPT2Model(transformers.GPT2Config()),
    "ViT": lambda: transformers.ViTModel(transformers.ViTConfig()),
    "Llama": llama,
}


def curves(name: str) -> dict[str, Curve]:
    """The curves of a fresh model by metric."""
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    if name == "ViT":
        inputs = {"pixel_values": torch.randn(8, 3, 224, 224)}
    else:
        ids = torch.randint(1000, 30000, (8, 64))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with rc_probe.attach(model, metrics=METRICS) as probe, torch.no_grad():
        model(**inputs)
    rows = probe.frame().sort_values("layer")
    columns = ("layer", "mean", "std", "floor")
    return {
        str(metric): Curve(*(part[column].tolist() for column in columns))
        for metric, part in rows.groupby("metric")
    }


def main(names: list[str]) -> None:
    """One row per family: residual of the bulk at layer 0, lowest, last; of all tokens last; massive share; level."""
    for name in names or list(FAMILIES):
        found = curves(name)
        bulk = found["residual_bulk"]
        low = min(range(len(bulk.means)), key=lambda i: bulk.means[i])
        print(
            f"{name}: {bulk.means[0]:.3f} at layer 0, lowest {bulk.means[low]:.3f} at layer {bulk.layers[low]}, "
            f"{bulk.means[-1]:.3f} at layer {bulk.layers[-1]}; all tokens {found['residual'].means[-1]:.3f}; "
            f"massive at most {max(found['massive_share'].means):.2%}; {level_of(bulk, found['cosine_bulk'])}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
