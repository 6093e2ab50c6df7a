"""A config class -> a config of the same shape, small: sizes are chosen by the names of the attributes.

The same names are given the same sizes in every sub-config, so that towers, adapters and decoders fit
together: 64 wide, 4 heads of 16, 3 layers, a vocabulary of 128, images of 32 pixels.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig

Overrides = Mapping[str, Any]  # dotted names -> values, e.g. {"vision_config.patch_size": 4}

WIDTH, HEADS, HEAD, LAYERS, STAGES = 64, 4, 16, 3, 2
VOCAB, IMAGE, PATCH, POSITIONS, WINDOW, EXPERTS = 128, 32, 8, 128, 8, 4

Size = Callable[[int], int]


def _most(limit: int) -> Size:
    return lambda value: min(value, limit)


def _same(value: int) -> int:
    return value


# The first pattern found in an attribute's name says what becomes of its number (and of each in a list).
RULES: tuple[tuple[str, Size], ...] = tuple(
    (pattern, size)
    for pattern, size in [
        (r"type_vocab_size|pretraining_tp|^id2label|^label2id", _same),
        (
            r"mel_bins|mel_dim|^n_mels|feature_size|^input_dim$|projection_input_dim|input_feat|sampling_rate|sample_rate|^(num|in|input)_channels$",
            _same,
        ),
        (r"vocab|^num_embeddings|codebook_size|_labels$", _most(VOCAB)),
        (r"(image|img|crop|resolution)_size$|^input_size$|image_embedding_size", _most(IMAGE)),
        (r"kv_shared_layers", lambda _: 0),
        (
            r"temporal|tubelet|window_size_per_stage|merge_size|kernel|strides?$|padding|dilation|ratios?$|factors?$",
            _same,
        ),
        (r"patch_size$", _most(PATCH)),
        (r"(sliding|local|attention|keep)_(window|attention)|sliding_window_size|chunk_size", _most(WINDOW)),
        (
            r"window_size$",
            lambda value: IMAGE if value > 100 else min(value, WINDOW // 2),
        ),  # pixels, or patches
        (r"patch_embed_hidden_size", lambda _: 3 * PATCH**2),
        (r"n_window_infer", _most(4 * WINDOW)),
        (r"n_window", _most(WINDOW)),
        (r"max_source_positions", _most(32)),
        (
            r"max_.*(position|length|len$)|n_positions|n_ctx|(context|model_max)_length|max_pos",
            _most(POSITIONS),
        ),
        (r"(kv|key_value|key|query)_heads$", _most(2)),
        (r"heads$|n_head$|heads_per_", _most(HEADS)),
        (r"mamba_d_head|mamba_head_dim", _most(2 * HEAD)),
        (r"qk_(rope|nope)_head_dim|rotary_dim|index_head_dim", _most(HEAD // 2)),
        (r"head_dim|d_kv|d_head|dim_head|kv_channels", _most(HEAD)),
        (r"lora_rank|dt_rank|time_step_rank", _most(HEAD)),
        (r"experts?_per_tok|top_?k$|moe_k$|per_token$", _most(2)),
        (r"num_expert_groups?|^n_group$", _most(2)),
        (r"topk_group", _most(1)),
        (r"n_shared_experts|num_shared_experts|dense_replace|num_dense_layers", _most(1)),
        (r"experts$|expert_num$", _most(EXPERTS)),
        (r"(period|interval|frequency|sparse_step|pattern)$", _most(2)),
        (r"offset$", _most(1)),
        (r"layers?$|layers_per_stack|^depth$|num_blocks|_depth$", _most(LAYERS)),
        (r"depths|block_repeats|blocks_per_stage|stage_num_blocks", _most(2)),
        (r"groups$", lambda value: WIDTH if value >= WIDTH else min(value, 4)),
        (r"intermediate|ffn|inner|mlp_dim|linear_units|feed_?forward", _most(2 * WIDTH)),
        (r"num_pos_feats", _most(WIDTH // 2)),
        (r"num_conv_pos_embeddings", _most(HEAD)),
        (
            r"quer(ies|y_tokens)$|latents|latent_query_num|num_image_tokens|tokens_per_image|_seq_length",
            _most(4),
        ),
        (
            r"dims?(_|$)|sizes?(_|$)|channels?(_|$)|features?$|filters|units$|^d_|_d_|rank$|n_embd|width$|dimension",
            _most(WIDTH),
        ),
    ]
)
# Attributes that the library leaves unset and then needs
UNSET = {
    "head_dim": HEAD,
    "vocab_size": VOCAB,
    "num_key_value_heads": HEADS,
    "n_routed_experts": EXPERTS,
    "prediction_length": WINDOW,
    **dict.fromkeys(["image_token_id", "image_token_index"], 30),
    **dict.fromkeys(["audio_token_id", "audio_token_index"], 31),
}
STAGE_LISTS = ("depths", "num_block_repeats", "hidden_sizes", "blocks_per_stage", "embed_dim")
LAYER_COUNTS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"),
    *("depth", "layers"),
)
TOKEN = re.compile(
    r"(_token(_id|_index|_ids|_idx)?|(^|_)(bos|eos|pad|eod|sep|unk|mask|im_start|im_end|im_newline)_(id|index|idx))$"
)


def tiny(cls: type[PreTrainedConfig], overrides: Overrides | None = None, *, whole: bool = False) -> Any:
    """A small config of the class. Special tokens keep their order and stand at the vocabulary's start.

    overrides: what the rules cannot know. whole: a hierarchy keeps all its stages.
    """
    overrides = overrides or {}
    bare = {key: value for key, value in overrides.items() if "." not in key}
    default = _default(cls, bare)
    tokens = sorted({token for part in parts(default) for token in _tokens(part)})
    return _shrink(default, overrides, {old: new for new, old in enumerate(tokens)}, whole)


def parts(config: Any) -> Iterator[Any]:
    """The config and every config within it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from parts(value)


def layer_count(config: Any) -> int | None:
    """The number of layers that the config states for itself, by whatever name."""
    counts = (vars(config).get(name) for name in LAYER_COUNTS)
    return next((count for count in counts if isinstance(count, int)), None)


def _default(cls: type[PreTrainedConfig], overrides: Overrides) -> Any:
    """The config with the library's defaults, optional towers included."""
    towers = {name: spec.default_config for name, spec in cls.sub_configs_defaults.items() if spec.optional}
    for arguments in (towers, {}, dict(overrides)):  # some cannot be made without arguments
        try:
            return cls(**arguments)
        except Exception as error:
            last = error
    raise last


def _tokens(config: Any) -> Iterator[int]:
    for name, value in vars(config).items():
        if TOKEN.search(name):
            for token in value if isinstance(value, list | tuple) else [value]:
                if _is_int(token) and token >= 0:
                    yield token


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class _Shrink:
    """What the rules need to know of the config that an attribute stands in."""

    tokens: Mapping[int, int]  # id of a special token -> its new id
    layers: int | None  # of the default config
    stages: int | None  # of the default config; None: not a hierarchy
    whole: bool  # every stage stays
    heads: int | None
    sections: bool  # turns by time, height and width

    def value(self, name: str, value: Any) -> Any:
        """An attribute's new value: by the kind of its value, then by its name."""
        if isinstance(value, bool) or value is None:
            return value
        if TOKEN.search(name):
            return self._map(lambda token: self.tokens.get(token, token), value)
        if isinstance(value, dict):
            return (
                self.rope(value) if "rope" in name else {k: self.value(str(k), v) for k, v in value.items()}
            )
        if isinstance(value, list | tuple):
            return self.values(name, value)
        if _is_int(value):
            return self.number(name, value)
        return max(value, 0.5) if name == "partial_rotary_factor" else value

    def number(self, name: str, value: int) -> int:
        """A size, by its name, unless it counts stages or is as many as the heads."""
        if value == self.stages and re.search(r"num_(stages|encoder_blocks|hidden_layers|layers)$", name):
            return value if self.whole else STAGES
        if self.stages and self.whole and name == "embed_dim":  # doubles from stage to stage
            return HEAD
        if value == self.heads and name.endswith(("kv_heads", "key_value_heads")):
            return min(value, HEADS)
        return _resize(name, value)

    def values(self, name: str, value: Any) -> Any:
        """A list is cut to the stages or layers it counts; its numbers follow the rules."""
        kind = type(value)
        if name == "image_grid_pinpoints":  # the sizes that an image may be cut into
            return [[IMAGE, IMAGE]]
        if self.stages and len(value) == self.stages:
            keep = (
                [*range(STAGES)] if "channels" in name else [0, -1]
            )  # the last stage is often the special one
            value = value if self.whole else kind(value[place] for place in keep)
        elif self.layers and not self.stages and len(value) == self.layers > LAYERS:
            value = kind(_cut(list(value), LAYERS))
        elif re.search(r"(layers?|layer_ids|ind(ex|ic)es|block_ind\w+)$", name) and all(map(_is_int, value)):
            return kind(self._places(value))
        if self.whole and self.stages and name.endswith("heads"):
            return kind(2 for _ in value)
        growing = len(set(map(str, value))) > 1 and all(map(_is_int, value)) and not self.whole
        if growing and re.search(r"^(hidden_sizes|embed_dims?|num_(attention_)?heads)$", name):
            return kind(_scale(name, value))
        return kind(self.value(name, item) for item in value)

    def _places(self, value: Any) -> list[int]:
        """Layer numbers, brought into the range of the new count."""
        if any(place < 0 for place in value):
            return [max(min(place, LAYERS), -LAYERS) for place in value]
        most = max(self.layers or 0, *value, LAYERS) + 1 if value else 1
        return sorted({place if most <= LAYERS else place * LAYERS // most for place in value})

    def rope(self, value: dict[str, Any]) -> dict[str, Any]:
        """Rotary settings: enough turned dimensions, and sections (time, height, width) that sum to half of them."""
        new: dict[str, Any] = {
            key: self.rope(item) if isinstance(item, dict) else item for key, item in value.items()
        }
        if new.get("partial_rotary_factor"):
            new["partial_rotary_factor"] = max(new["partial_rotary_factor"], 0.5)
        if "rope_type" in new and self.sections:
            half = int(HEAD * new.get("partial_rotary_factor", 1)) // 2
            new["mrope_section"] = [half - 2 * (half // 4), half // 4, half // 4]
        return new

    def counts(self, value: Any) -> bool:
        """Whether this list has one entry for each layer or stage."""
        return isinstance(value, list | tuple) and len(value) in (self.layers, self.stages)

    def by_layer(self, layers: Mapping[int, Any], kinds: Any, new_kinds: Any) -> dict[int, Any]:
        """What differs from layer to layer, for the new layers: as for an old layer of the same kind."""
        found = {kinds[int(layer)]: values for layer, values in layers.items()} if kinds else {}
        small = {
            kind: {
                name: self.value(name, value) * (2 if name == "head_dim" else 1)
                for name, value in values.items()
            }
            for kind, values in found.items()
        }
        return {layer: small[kind] for layer, kind in enumerate(new_kinds or []) if kind in small}

    @staticmethod
    def _map(function: Callable[[Any], Any], value: Any) -> Any:
        return type(value)(map(function, value)) if isinstance(value, list | tuple) else function(value)


def _resize(name: str, value: int) -> int:
    for pattern, size in RULES:
        if re.search(pattern, name):
            return size(value)
    return value


def _scale(name: str, values: Any) -> list[int]:
    """Numbers that grow from stage to stage double: widths from 32, heads from 2."""
    start = 2 if "heads" in name else WIDTH // 2
    return [start * 2**stage for stage in range(len(values))]


def _cut(values: list[Any], count: int) -> list[Any]:
    """The first entries, with every kind that the whole list has, as far as they fit."""
    short = values[:count]
    kinds = dict.fromkeys(map(repr, values))
    missing = [kind for kind in kinds if kind not in map(repr, short)] if len(kinds) <= count else []
    for place, kind in zip(range(count - 1, 0, -1), missing, strict=False):
        short[place] = next(value for value in values if repr(value) == kind)
    return short


def _shrink(default: Any, overrides: Overrides, tokens: Mapping[int, int], whole: bool) -> Any:
    old = vars(default)
    stages = next(
        (len(value) for name in STAGE_LISTS if isinstance(value := old.get(name), list | tuple)), None
    )
    sections = "mrope_section" in (getattr(default, "ignore_keys_at_rope_validation", None) or ())
    rule = _Shrink(tokens, layer_count(default), stages, whole, old.get("num_attention_heads"), sections)
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(default):
        name = field.name
        value = old.get(
            name, old.get(default.attribute_map.get(name, name))
        )  # some are kept under another name
        inner = {key.split(".", 1)[1]: new for key, new in overrides.items() if key.startswith(name + ".")}
        if isinstance(value, PreTrainedConfig):  # a backbone gives every stage to its head
            changes[name] = _shrink(value, inner, tokens, whole or "backbone" in name)
        elif value is None and name in UNSET:
            changes[name] = UNSET[name]
        elif (
            field.default is not None
            or rule.counts(value)
            or re.search(r"rope|pinpoints$|^image_size$", name)
        ):
            new = rule.value(name, value)
            if new is not None and (
                new != value or value != field.default
            ):  # the owner of a sub-config has defaults of its own
                changes[name] = new
    if whole and (outputs := old.get("_out_indices")):
        changes |= _outputs(default, outputs, bool(stages))
    if layers := old.get("per_layer_config"):
        changes["per_layer_config"] = rule.by_layer(
            layers, old.get("layer_types"), changes.get("layer_types")
        )
    changes |= {key: value for key, value in overrides.items() if "." not in key}
    return type(default)(**changes)


def _outputs(default: Any, outputs: list[int], hierarchy: bool) -> dict[str, Any]:
    """A backbone gives as many feature maps as before: its stages, or its last layers."""
    if hierarchy:
        return {"out_indices": list(outputs)}
    name = next((name for name in LAYER_COUNTS if name in vars(default)), None)
    if name is None:
        return {}
    layers = max(LAYERS, len(outputs))
    return {name: layers, "out_indices": [*range(layers - len(outputs) + 1, layers + 1)]}
