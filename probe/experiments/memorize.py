"""Memorize sentences: each token has a label of 0 or 1 that was drawn by chance, and the network learns them by heart.

Source: Dong et al. 2021, section 4.2. It is measured on what it is trained on: there is nothing else to know. Without
positions, equal words of a sentence cannot be told apart, so that even a perfect memory has a ceiling. The paper draws
.85 as the whole model and .5 as chance; both are computed here from the sentences at hand.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rc_probe.data.digest import digest_of
from rc_probe.data.samples import load_samples
from rc_probe.hooks.errors import RcProbeError
from rc_probe.models.own.san import SANConfig, SANForTokenClassification

from .labelling.data import NONE, Labelled, accuracy, commonest
from .labelling.experiment import Labelling, LabellingSizes, at, guess, longer
from .labelling.words import save_texts, word_tokenizer
from .protocol import Claim, Frames, SeedRun
from .training import Recipe

CEILING, WORD, CHANCE = "ceiling without positions", "best of the word alone", "commoner label"
MOST, SHORT = 128, 24  # tokens of a text at most; words of a bundled sentence
PAD, UNKNOWN = "[PAD]", "[UNK]"
PAPER = "Dong et al. 2021, section 4.2"


@dataclass(frozen=True)
class MemorizeSizes(LabellingSizes):
    """train: sentences; test: of them, those that paths are measured on."""


def sentences(count: int, data: Any = None) -> list[str]:
    """The shorter sentences of the bundled biographies, or the texts of `data` as they are; `count` at most."""
    if data is not None:
        return load_samples(data, modality="text", samples=count).items
    found = load_samples(None, modality="text", samples=10_000).items
    whole = [one for text in found for one in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)]
    return [one for one in whole if len(one.split()) <= SHORT][:count]


def vocabulary(texts: list[str]) -> dict[str, int]:
    """All words of the texts, numbered from 2; 0 is padding, 1 stands for all other words."""
    splitter = word_tokenizer({PAD: 0})

    def words(text: str) -> list[str]:
        normal = splitter.normalizer.normalize_str(text)
        return [word for word, _ in splitter.pre_tokenizer.pre_tokenize_str(normal)]

    found = sorted({word for text in texts for word in words(text)})
    return {PAD: 0, UNKNOWN: 1, **{word: number for number, word in enumerate(found, 2)}}


def memorize_data(texts: list[str], seed: int) -> Labelled:
    """The texts as word numbers with a mask, and a label of 0 or 1 for each word, by chance."""
    tokenizer = word_tokenizer(vocabulary(texts), UNKNOWN)
    rows = [one.ids[:MOST] for one in tokenizer.encode_batch(texts)]
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    mask = torch.arange(longest) < torch.tensor([[len(row)] for row in rows])
    labels = torch.randint(2, ids.shape, generator=torch.Generator().manual_seed(seed))
    return Labelled({"input_ids": ids, "attention_mask": mask.long()}, labels.masked_fill(~mask, NONE))


def guesses(data: Labelled, measured: int) -> dict[str, float]:
    """What needs no attention, fitted on all of `data` and scored on its first `measured` sentences.

    The commoner label of all; that of each word, all that paths of length 0 can know; that of each word of each sentence, the
    ceiling.
    """
    ids, labels = data.inputs["input_ids"], data.labels
    words = int(ids.max()) + 1
    own = torch.arange(len(ids))[:, None] * words + ids  # of each word of each sentence

    def best(keys: Tensor, count: int) -> float:
        return accuracy(commonest(keys, labels, count, 2)[keys[:measured]], labels[:measured])

    return {
        CHANCE: best(torch.zeros_like(ids), 1),
        WORD: best(ids, words),
        CEILING: best(own, len(ids) * words),
    }


def _over_chance(frames: Frames) -> float:
    return max((value - guess(frames, CHANCE) for value in longer(frames, 3)), default=math.nan)


class Memorize(Labelling[MemorizeSizes]):
    """The network of the paper: 6 blocks of 2 heads, width 250, no positions; no MLP, as in its first version."""

    name, title, source, reads_data = "memorize", "Memorizing labels by chance", PAPER, True
    claims: ClassVar = (
        Claim("The whole model remembers all that can be remembered: what it lacks to the ceiling", PAPER,
              lambda f: guess(f, CEILING) - at(f), most=0.03),
        Claim("20 live paths of length 1 remember more than 0.8", PAPER, lambda f: at(f, "live", 1, drawn=20), least=0.8),
        Claim("20 live paths of length 3 or more remember nothing: the most that one length has over the commoner label", PAPER,
              _over_chance, most=0.05),
        Claim("Paths of length 0 carry nothing: live accuracy less the commoner label", PAPER,
              lambda f: at(f, "live", 0, drawn=20) - guess(f, CHANCE), most=0.05),
        Claim("Paths of length 0 know what the word alone tells: live accuracy less that of the best such guess", "derived here",
              lambda f: at(f, "live", 0, drawn=20) - guess(f, WORD), least=-0.05, most=0.05),
        Claim("Lengths up to 3 together, exactly, are the whole model: what accuracy they lack", "exact, this package",
              lambda f: at(f) - at(f, "exact", 3, "up_to"), most=0.02),
    )  # fmt: skip
    sizes = MemorizeSizes(
        seeds=3,
        train=120,
        test=24,
        epochs=50,
        batch=8,
        repeats=3,
        recipe=Recipe(lr=3e-4, schedule="linear", clip=1.0),
    )
    quick = sizes.changed(seeds=1, train=60, test=12, epochs=40)

    def digest(self, sizes: MemorizeSizes, data: Any) -> str | None:
        if data is None:
            return None
        texts = sentences(sizes.train, data)
        if len(texts) < sizes.test:
            what = f"{len(texts)} texts are too few to memorize"
            raise RcProbeError(what, where="--data", todo=f"Give at least {sizes.test}")
        return digest_of(texts)

    def data(self, run: SeedRun[MemorizeSizes]) -> tuple[Labelled, Labelled]:
        texts = sentences(run.sizes.train, run.data)
        whole = memorize_data(texts, run.seed)
        return whole, whole.rows(slice(run.sizes.test))

    def config(self, train: Labelled) -> SANConfig:
        return SANConfig(
            vocab_size=int(train.inputs["input_ids"].max()) + 1, hidden_size=250, max_position_embeddings=0, num_labels=2,
        )  # fmt: skip

    def save(self, model: SANForTokenClassification, test: Labelled, run: SeedRun[MemorizeSizes]) -> None:
        """With its tokenizer, and the texts that it knows by heart."""
        super().save(model, test, run)
        assert run.folder is not None
        texts = sentences(run.sizes.train, run.data)
        tokenizer = word_tokenizer(vocabulary(texts), UNKNOWN)
        save_texts(tokenizer, texts, run.folder, pad_token=PAD, unk_token=UNKNOWN)

    def baselines(self, train: Labelled, test: Labelled, run: SeedRun[MemorizeSizes]) -> dict[str, float]:
        return guesses(train, run.sizes.test)


EXPERIMENT = Memorize()
