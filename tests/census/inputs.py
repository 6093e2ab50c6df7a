"""Inputs for one forward pass of a model, from the signature of its forward and its config.

Where several layouts are possible (mel bins first or last, one image or a list, patches or pixels), they are
tried in turn, all kinds of data together first, text alone last: the first that runs and is finite is taken.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
from census.build import NotBuilt, reason
from census.media import Media, media
from torch import Tensor

Inputs = dict[str, Any]
MOST_TRIES = 40


def inputs_for(
    model: Any, *, batch: int = 2, length: int = 12, padded: bool = False, seed: int = 0
) -> Inputs:
    """Keyword inputs for one pass of a model of `build`, the same for the same arguments.

    batch: samples; length: text tokens of each (images and sounds add theirs). padded: texts get shorter from
    sample to sample, with an attention mask, padded where the family pads.
    Raises NotBuilt, with the first error in one line, where no layout runs.
    """
    maker = Maker(model, batch, length, padded, seed)
    first: Exception | None = None
    for shape, plan in itertools.islice(maker.plans(), MOST_TRIES):
        maker.codes = shape
        for _ in range(1 + len(plan)):  # again with the number of tokens that an error tells
            try:
                inputs = maker.inputs(plan)
                _check(model, inputs, seed)
                return inputs
            except Exception as error:
                first = first or error
                if not any(item.learn(str(error), batch) for item in plan):
                    break
    raise NotBuilt(reason(first) if first else "no input is known for it") from first


@torch.no_grad()
def _check(model: Any, inputs: Inputs, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = model(**inputs)
    if not all(tensor.isfinite().all() for tensor in floats(output)):
        raise NotBuilt("the output is not finite")


def floats(output: Any) -> list[Tensor]:
    """Every floating-point tensor in a model's output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [tensor for item in output for tensor in floats(item)]
    return []


class Maker:
    """Makes the inputs of one model."""

    def __init__(self, model: Any, batch: int, length: int, padded: bool, seed: int) -> None:
        self.model, self.config = model, model.config
        self.batch, self.length, self.padded = batch, length, padded
        self.codes: tuple[int, ...] = (batch, length)
        parameters = inspect.signature(model.forward).parameters
        self.names = set(parameters)
        self.required = {
            name
            for name, parameter in parameters.items()
            if parameter.default is inspect.Parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        } - {"args"}
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.vocab = find(self.config, "text", "vocab_size", "src_vocab_size") or 2
        self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def plans(self) -> Iterator[tuple[tuple[int, ...], list[Media]]]:
        """The shape of the ids, and which data to give in which layouts; the fullest first."""
        kinds = [options for options in media(self) if options]
        for count in range(len(kinds), -1, -1):
            for chosen in itertools.combinations(kinds, count):
                if count or "input_ids" in self.names or not kinds:
                    for plan in itertools.product(*chosen):
                        yield from ((shape, list(plan)) for shape in self.shapes())

    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of ids: a text, or a code of each of the K codebooks of a sound at each step."""
        B, T = self.batch, self.length
        channels = [] if "pixel_values" in self.names else ["num_channels"]
        K = find(self.config, "decoder", "num_codebooks", *channels)
        if not isinstance(K, int) or not self.names & {"input_ids", "decoder_input_ids"}:
            return [(B, T)]
        return [(B, T), (B * K, T), (B, T, K), (B, T, K + 1), (B, K, T)]

    def inputs(self, plan: list[Media]) -> Inputs:
        """The inputs of a plan."""
        given: Inputs = {name: value for item in plan for name, value in item.inputs.items()}
        decoder = "decoder_input_ids" in self.names
        if "input_ids" in self.names:
            codes = not decoder and self.codes != (self.batch, self.length)
            given |= {"input_ids": self.ids(*self.codes)} if codes else self.text(plan)
        if decoder and (self.config.is_encoder_decoder or "input_ids" not in self.names):
            given["decoder_input_ids"] = self.ids(*self.codes)
        for name, make in EXTRAS.items():  # in this order: some need others
            if name in self.names - set(given) and (name in self.required or name in ALWAYS):
                value = make(self, given)
                if value is not None:
                    given[name] = value
        return given

    def text(self, plan: list[Media]) -> Inputs:
        """input_ids with the tokens that stand for each image or sound in front, their mask and their types."""
        front = torch.zeros(self.batch, 0, dtype=torch.long)
        types: list[int] = []
        for item in plan:
            if item.token is None:
                continue
            count = item.tokens if item.tokens is not None else self.features(item)
            row = [item.token] * count
            if item.around:
                row = [item.around[0], *row, item.around[1]]
            types += [item.kind if token == item.token else 0 for token in row]
            front = torch.cat([front, torch.tensor([row] * self.batch)], dim=1)
        ids = torch.cat([front, self.ids(self.batch, self.length)], dim=1)
        mask = torch.ones_like(ids)
        if self.padded:
            self.pad(ids, mask)
        given: Inputs = {"input_ids": ids}
        if "attention_mask" in self.names:
            given["attention_mask"] = mask
        kinds = torch.tensor([types + [0] * self.length] * self.batch)
        if "mm_token_type_ids" in self.names:
            given["mm_token_type_ids"] = kinds
        if "token_type_ids" in self.names:
            if types:
                given["token_type_ids"] = (kinds > 0).long()
            elif (getattr(self.config, "type_vocab_size", 0) or 0) > 1:  # a second segment from the middle on
                given["token_type_ids"] = (
                    (torch.arange(self.length) >= self.length // 2).long().expand_as(ids).clone()
                )
        return given

    def pad(self, ids: Tensor, mask: Tensor) -> None:
        """Shorten each text but the first, in place; images and sounds in front stay."""
        for row in range(1, self.batch):
            count = min(row * self.length // 3, self.length - 2)
            if padding_side(self.config.model_type) == "left" and ids.shape[1] == self.length:
                mask[row, :count] = 0
            else:
                mask[row, ids.shape[1] - count :] = 0
        pad = find(self.config, "text", "pad_token_id")
        ids[mask == 0] = pad if isinstance(pad, int) and 0 <= pad < self.vocab else 0

    def features(self, item: Media) -> int:
        """How many tokens of a sample the model's own tower makes of an image or a sound."""
        method = getattr(self.model, f"get_{item.name}_features", None)
        if method is None:
            return 1
        names = inspect.signature(method).parameters
        try:
            output = method(**{name: value for name, value in item.inputs.items() if name in names})
        except Exception:  # some return nothing but the count in the error of a pass
            return 1
        if hasattr(output, "pooler_output"):
            output = output.pooler_output if output.pooler_output is not None else output.last_hidden_state
        tensors = floats(output)
        return sum(tensor.numel() // tensor.shape[-1] for tensor in tensors) // self.batch

    def ids(self, *shape: int) -> Tensor:
        """Token ids that are no special tokens (as far as the vocabulary allows)."""
        low = min(40, self.vocab // 2)
        return torch.randint(low, max(self.vocab, low + 1), shape, generator=self.generator)

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)


def find(config: Any, hint: str, *names: str) -> Any:
    """The first of these attributes that is set: in the sub-configs named after the hint, the config, the rest."""
    subs = [(name, value) for name, value in vars(config).items() if hasattr(value, "to_diff_dict")]
    hinted = [value for name, value in subs if re.search(hint, name)]
    for part in [*hinted, None, *(value for _, value in subs if value not in hinted)]:
        if part is None:
            value = next((v for name in names if (v := getattr(config, name, None)) is not None), None)
        else:
            value = find(part, hint, *names)
        if value is not None:
            return value
    return None


def padding_side(model_type: str) -> str:
    """The side on which the type's tokenizer pads."""
    import transformers
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    entry = TOKENIZER_MAPPING_NAMES.get(model_type)
    name = entry if isinstance(entry, str) or not entry else entry[0]
    return getattr(getattr(transformers, name, None), "padding_side", "right") if name else "right"


def _boxes(maker: Maker, given: Inputs) -> Tensor:
    """Boxes (x0, y0, x1, y1) of words, within the page."""
    half = (find(maker.config, "text", "max_2d_position_embeddings") or 1000) // 2 - 1
    corners = torch.randint(0, half, (*given["input_ids"].shape, 4), generator=maker.generator)
    return torch.cat([corners[..., :2], corners[..., 2:] + half], dim=-1)


def _history(maker: Maker, *features: int) -> Tensor:
    """Values of a time series: (batch, time) or (batch, time, features)."""
    config = maker.config
    steps = (config.context_length or config.prediction_length) + max(
        getattr(config, "lags_sequence", None) or [0]
    )
    return maker.noise(maker.batch, steps, *features)


def _series(maker: Maker, given: Inputs) -> Tensor:
    channels = find(maker.config, "", "num_input_channels")
    return _history(maker, channels) if channels else _history(maker)


def _embeddings(maker: Maker, given: Inputs) -> Tensor:
    """A stream that another part of the model would give."""
    width = find(maker.config, "text", "hidden_size", "d_model", "hidden_dim", "n_embd") or 64
    return maker.noise(maker.batch, maker.length, width)


def _seen_images(maker: Maker, given: Inputs) -> Tensor | None:
    """Idefics: which image each token sees; its one image."""
    if "image_encoder_embeddings" not in maker.names:
        return None
    return torch.ones(*given["input_ids"].shape, 1, dtype=torch.long)


def _image_places(maker: Maker, given: Inputs) -> Tensor | None:
    """Kosmos: the tokens that an image's features replace."""
    count = find(maker.config, "text", "latent_query_num")
    if "input_ids" not in given or count is None:
        return None
    mask = torch.zeros_like(given["input_ids"])
    mask[:, 1 : 1 + count] = 1
    return mask


def _second_images(maker: Maker, given: Inputs) -> Tensor | None:
    """Images for the tower of high resolution."""
    side = find(maker.config, "high_res", "image_size")
    return maker.noise(maker.batch, 3, side, side) if "pixel_values" in given else None


def _merges(maker: Maker, given: Inputs) -> Tensor | None:
    grid = given.get("image_grid_thw", given.get("grid_thw"))
    return None if grid is None else torch.full((maker.batch,), 2)


# Inputs besides text, images and sounds: made where the model requires them, or always.
EXTRAS: dict[str, Any] = {
    "bbox": _boxes,
    "past_values": _series,
    "past_observed_mask": lambda maker, given: (
        torch.ones_like(given["past_values"]) if "past_values" in given else _history(maker) * 0 + 1
    ),
    "past_time_features": lambda maker, given: _history(maker, maker.config.num_time_features),
    "future_values": lambda maker, given: maker.noise(maker.batch, maker.config.prediction_length),
    "future_time_features": lambda maker, given: maker.noise(
        maker.batch, maker.config.prediction_length, maker.config.num_time_features
    ),
    "inputs_embeds": _embeddings,
    "hidden_states": _embeddings,
    "query_embeds": _embeddings,
    "context": _embeddings,
    "inputs": _embeddings,
    "attention_mask": lambda maker, given: torch.ones(maker.batch, maker.length, dtype=torch.long),
    "qformer_input_ids": lambda maker, given: maker.ids(maker.batch, maker.length),
    "task_inputs": lambda maker, given: maker.ids(maker.batch, maker.config.task_seq_len),
    "visual_feats": lambda maker, given: maker.noise(maker.batch, 4, maker.config.visual_feat_dim),
    "visual_pos": lambda maker, given: maker.noise(maker.batch, 4, 4),
    "lang_ids": lambda maker, given: torch.zeros(maker.batch, dtype=torch.long),
    "spectrogram": lambda maker, given: maker.noise(maker.batch, maker.length, maker.config.model_in_dim),
    "states": lambda maker, given: maker.noise(maker.batch, maker.length, maker.config.state_dim),
    "actions": lambda maker, given: maker.noise(maker.batch, maker.length, maker.config.act_dim),
    "rewards": lambda maker, given: maker.noise(maker.batch, maker.length, 1),
    "returns_to_go": lambda maker, given: maker.noise(maker.batch, maker.length, 1),
    "timesteps": lambda maker, given: torch.arange(maker.length).repeat(maker.batch, 1),
    "prompt_pixel_values": lambda maker, given: maker.noise(*given["pixel_values"].shape),
    "prompt_masks": lambda maker, given: maker.noise(*given["pixel_values"].shape),
    "image_attention_mask": _seen_images,
    "image_embeds_position_mask": _image_places,
    "high_res_pixel_values": _second_images,
    "image_merge_sizes": _merges,
    "merge_sizes": _merges,
    "noise": lambda maker, given: torch.rand(maker.batch, 16, generator=maker.generator),
}
ALWAYS = {
    *("bbox", "visual_feats", "visual_pos", "states", "actions", "rewards", "returns_to_go", "timesteps"),
    *("future_values", "future_time_features", "noise", "image_attention_mask", "image_embeds_position_mask"),
    *("high_res_pixel_values", "image_merge_sizes", "merge_sizes"),
}
