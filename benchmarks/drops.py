"""What removing blocks costs on samples that did not choose them, and what tools that rank blocks see of it: tables of docs/importance.md.

    python benchmarks/drops.py demo-decoder demo trained albert=FOLDER     # curves of `--drop 4`, a table for each model
    python benchmarks/drops.py peers=trained peers=demo-decoder            # true losses beside proxies, uni-layer and hooks

`demo-decoder` is SmolLM2-135M-Instruct, `demo` all-MiniLM-L6-v2, both packaged. `trained` is a GPT-2 of six blocks, trained here on walks round
rings of words (half a minute). FOLDER is `rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k` of the unpacked wheel of rxnmapper 0.4.3:
an ALBERT that fills in masked atoms of reactions. `peers` measures uni-layer too where it is installed (0.7.0). Nothing is downloaded.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from scipy.stats import spearmanr
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import cosine_similarity

import rc_probe
from rc_probe.data.batches import batches
from rc_probe.data.samples import load_samples
from rc_probe.models.load import hold_model, load_model

REMOVED = 4
LEAN: dict[str, Any] = {
    "init": False,
    "paths": False,
    "recursion": False,
    "metrics": ("residual",),
    "embeddings": False,
}
SMILES = (
    r"(\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$|\%[0-9]{2}|[0-9])"
)
REACTIONS = """
CC(=O)O.OCC>>CC(=O)OCC
CC(=O)Cl.NCC>>CC(=O)NCC
c1ccccc1Br.OB(O)c1ccccc1>>c1ccc(-c2ccccc2)cc1
CC(=O)c1ccccc1>>CC(O)c1ccccc1
OCc1ccccc1>>O=Cc1ccccc1
C=Cc1ccccc1>>CCc1ccccc1
O=Cc1ccccc1.CC(C)=O>>CC(=O)C=Cc1ccccc1
Nc1ccccc1.CC(=O)OC(C)=O>>CC(=O)Nc1ccccc1
C=CC=C.C=CC(=O)OC>>COC(=O)C1CCC=CC1
CCBr.[O-]c1ccccc1>>CCOc1ccccc1
O=[N+]([O-])c1ccccc1>>Nc1ccccc1
COC(=O)c1ccccc1.O>>OC(=O)c1ccccc1.CO
CC(C)(C)OC(=O)NCc1ccccc1>>NCc1ccccc1
O=C(Cl)c1ccccc1.NC1CCCCC1>>O=C(NC1CCCCC1)c1ccccc1
N#Cc1ccccc1.O>>NC(=O)c1ccccc1
CC=O.NCc1ccccc1>>CCNCc1ccccc1
""".splitlines()[1:]
RINGS, AROUND = 4, 7  # of words: 4 rings of 7


def tokenizer(words: list[str], split: Any, *, around: bool) -> Any:
    """A word a token. around: [CLS] and [SEP]"""
    numbers = {word: number for number, word in enumerate(words)}
    rust = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    rust.pre_tokenizer = split
    if around:
        ends = [(name, numbers[name]) for name in ("[CLS]", "[SEP]")]
        rust.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=rust, **{name: word for name, word in names.items() if word in numbers}
    )


def albert(folder: str) -> tuple[Any, Any, list[str]]:
    """The ALBERT of rxnmapper, its tokenizer and reactions."""
    words = (Path(folder) / "vocab.txt").read_text("utf-8").split()
    split = pre_tokenizers.Split(Regex(SMILES), "isolated")
    unknown = {part for text in REACTIONS for part in re.findall(SMILES, text)} - set(words)
    assert not unknown, unknown
    config = transformers.AlbertConfig.from_pretrained(folder)
    model = transformers.AlbertForMaskedLM(config)
    states = torch.load(Path(folder) / "pytorch_model.bin", map_location="cpu", weights_only=True)
    missing = model.load_state_dict(states, strict=False).missing_keys
    assert not [name for name in missing if "pooler" not in name], missing
    return model.eval(), tokenizer(words, split, around=True), REACTIONS


def walks(count: int, length: int, generator: torch.Generator) -> Tensor:
    """(count, length): rounds of a ring in steps of 1, 2 or 3; what comes next follows from two words."""
    ring, start, step = (torch.randint(high, (count, 1), generator=generator) for high in (RINGS, AROUND, 3))
    return 2 + AROUND * ring + (start + (step + 1) * torch.arange(length)) % AROUND


def trained() -> tuple[Any, Any, list[str]]:
    """A GPT-2 of six blocks that knows the walks, its tokenizer and walks that it has not seen."""
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", *(f"w{n}" for n in range(RINGS * AROUND))]
    config = transformers.GPT2Config(
        vocab_size=len(words), n_embd=64, n_layer=6, n_head=4, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model, generator = transformers.GPT2LMHeadModel(config), torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(400):
        ids = walks(32, 16, generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    texts = [" ".join(words[i] for i in row) for row in walks(32, 16, generator).tolist()]
    return model.eval(), tokenizer(words, pre_tokenizers.Whitespace(), around=False), texts


def held(name: str) -> tuple[Any, Any, list[str] | None]:
    """(model, processor, data); the packaged ones with the bundled texts."""
    if name.startswith("albert="):
        return albert(name.removeprefix("albert="))
    if name == "trained":
        return trained()
    loaded = load_model(name)
    return loaded.model, loaded.processor, None


def curves(name: str) -> None:
    """The table of one model: the change on samples held out, of each method after each removal."""
    model, processor, data = held(name)
    found = rc_probe.probe(
        model, data, processor=processor, samples=32, length=64, importance="none", drop=REMOVED, **LEAN
    )
    facts, frame = found.model["drops"], found.tables["drops"]
    rows = frame[frame["metric"] == facts["criterion"]]
    whole = rows[(rows["split"] == "held_out")]["baseline"].iloc[0]
    print(
        f"\n{name.partition('=')[0]}: {facts['criterion']} of the whole model {whole:.3f} on samples held out; {facts['samples']}"
    )
    print(f"| blocks removed | {' | '.join(map(str, range(1, REMOVED + 1)))} |")
    print(f"|---|{'---|' * REMOVED}")
    for method, own in rows[rows["split"] == "held_out"].groupby("method", sort=False):
        cost = own.groupby("step")["change"].mean()
        print(f"| {method} | {' | '.join(f'{change:+.3f}' for change in cost)} |")
    greedy = rows[(rows["method"] == "greedy") & (rows["split"] == "chosen")].sort_values("step")
    print(
        f"greedy removes {greedy['block'].tolist()}; the list is that of {facts['method']}: {facts['from_1']}"
    )
    print(f"forms: {[*(facts.get('forms') or {})]}; refused: {facts.get('refused') or 'nothing'}", flush=True)


# ---- peers


def hooked_influence(model: Any, blocks: list[Any], made: Any) -> list[float]:
    """Block influence by forward hooks, twenty lines of them: 1 − mean over real tokens of cos(before, behind)."""
    sums, counts = [0.0] * len(blocks), 0

    def hook(number: int) -> Callable[..., None]:
        def read(module: Any, inputs: Any, keywords: Any, output: Any) -> None:
            before = inputs[0] if inputs else keywords["hidden_states"]
            behind = output[0] if isinstance(output, tuple) else output
            sums[number] += float((1 - cosine_similarity(before, behind, dim=-1))[mask].double().sum())

        return read

    handles = [block.register_forward_hook(hook(n), with_kwargs=True) for n, block in enumerate(blocks)]
    with torch.no_grad():
        for batch in made:
            mask = (
                torch.ones_like(batch.inputs["input_ids"], dtype=torch.bool)
                if batch.mask is None
                else batch.mask
            )
            counts += int(mask.sum())
            model(**batch.inputs)
    for handle in handles:
        handle.remove()
    return [total / counts for total in sums]


def hooked_losses(model: Any, blocks: list[Any], made: Any) -> list[float]:
    """The loss without each block by a hook that gives its input back: a full pass each. First the whole model's."""

    def loss() -> float:
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in made:
                ids, mask = batch.inputs["input_ids"], batch.mask
                logits = model(**batch.inputs).logits[:, :-1].log_softmax(-1)
                each = -logits.gather(-1, ids[:, 1:, None])[..., 0]
                wanted = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
                total, count = (
                    total + float(each[wanted[:, 1:]].double().sum()),
                    count + int(wanted[:, 1:].sum()),
                )
        return total / count

    found = [loss()]
    for block in blocks:
        handle = block.register_forward_hook(
            lambda module, inputs, keywords, output: inputs[0] if inputs else keywords["hidden_states"],
            with_kwargs=True,
        )
        found.append(loss())
        handle.remove()
    return found


def uni_layer(model: Any, blocks: list[Any], made: Any) -> list[float] | None:
    """Its BlockInfluence, block by block; it flattens the tokens of a text into one vector. None where it is not installed."""
    try:
        from uni_layer.metrics.representation.block_influence import BlockInfluence
    except ImportError:
        return None
    ids = [batch.inputs["input_ids"] for batch in made]
    measure = BlockInfluence(num_batches=len(ids))
    return [
        float(
            measure.compute(model, block, f"block {n}", n, data_loader=ids, device="cpu")["block_influence"]
        )
        for n, block in enumerate(blocks)
    ]


def peers(name: str) -> None:
    """A decoder on eight texts of up to 64 tokens: rank correlation with the true loss."""
    model, processor, data = held(name)
    samples = load_samples(data, modality="text", samples=8)
    made = list(batches(samples, hold_model(model, processor), length=64))
    blocks = next(
        list(each) for each in model.modules()
        if isinstance(each, torch.nn.ModuleList) and len(each) == model.config.num_hidden_layers
    )  # fmt: skip
    how = {"processor": processor, "samples": 8, "length": 64}
    found = rc_probe.probe(model, data, importance="blocks", **how, **LEAN)
    frame = found.tables["importance"]
    truth = frame.query("metric == 'loss'")["change"].to_numpy()
    losses = hooked_losses(model, blocks, made)
    by_hand = np.array(losses[1:]) - losses[0]
    print(
        f"\n{name}: losses without a block, rc-probe and hooks: at most {np.abs(by_hand - truth).max():.1e} nats apart"
    )
    proxies = {
        proxy: frame[frame["metric"] == proxy]["value"].to_numpy()
        for proxy in frame["metric"].unique()
        if proxy.startswith("proxy")
    }
    proxies["hooks, block influence"] = np.array(hooked_influence(model, blocks, made))
    theirs = uni_layer(model, blocks, made)
    if theirs is not None:
        proxies["uni-layer, BlockInfluence"] = np.array(theirs)
    costly = np.argsort(-truth)[:4]
    print(
        f"| ranked by | Spearman with the true loss | ranks of the four costliest blocks {(costly + 1).tolist()} |\n|---|---|---|"
    )
    for proxy, values in proxies.items():
        ranks = (-values).argsort().argsort()[costly] + 1
        print(f"| {proxy} | {spearmanr(values, truth).statistic:.2f} | {', '.join(map(str, ranks))} |")


def main(names: list[str]) -> None:
    for name in names or ["demo-decoder", "demo", "trained", "peers=trained", "peers=demo-decoder"]:
        peers(name.removeprefix("peers=")) if name.startswith("peers=") else curves(name)


if __name__ == "__main__":
    main(sys.argv[1:])
