"""The small self-attention network with skips of the paper's path experiments, as a transformers model.

Post-LN: a block is h <- LN(attention(h) + h), then h <- LN(mlp(h) + h) if it has an MLP. Source: Dong et al.
2021, section 4.2 and its code. Unlike there, the embedding of token 0 is trained like the others.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import initialization
from transformers.modeling_outputs import BaseModelOutput, TokenClassifierOutput


class SANConfig(transformers.PretrainedConfig):  # type: ignore[misc]  # transformers has no types here
    """Sizes of a SAN; the defaults are those for sorting 8 letters of 10, but for `num_labels`.

    vocab_size: 0 where tokens are points instead of ids
    coordinates: of such a point; 0 where tokens are ids
    deep_entry: whether points go through a second linear map, behind a GELU
    skip: whether attention has its skip
    intermediate_size: width of the MLPs, 0 for none
    max_position_embeddings: longest sequence; 0 for no positions
    num_labels: how many there are, 2 if nothing is said, as in all configs of transformers
    """

    model_type = "rc_probe_san"

    def __init__(
        self,
        vocab_size: int = 10,
        coordinates: int = 0,
        deep_entry: bool = False,
        skip: bool = True,
        hidden_size: int = 48,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 2,
        intermediate_size: int = 0,
        max_position_embeddings: int = 8,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        layer_norm_eps: float = 1e-12,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.coordinates = coordinates
        self.deep_entry = deep_entry
        self.skip = skip
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        super().__init__(**kwargs)


class Mixing(nn.Linear):
    """A map of values or outputs, which the paper's code initialises wider than the others."""


class SANAttention(nn.Module):
    """Multi-head self-attention (batch, tokens, dim) -> (batch, tokens, dim) among the tokens that the mask keeps."""

    def __init__(self, config: SANConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.heads, self.dropout = config.num_attention_heads, config.attention_dropout
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.value, self.output = Mixing(dim, dim), Mixing(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, dim / heads)
            for part in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
        )
        out: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return out


class SANBlock(nn.Module):
    """One post-LN block, (batch, tokens, dim) -> (batch, tokens, dim)."""

    def __init__(self, config: SANConfig) -> None:
        super().__init__()
        dim, width = config.hidden_size, config.intermediate_size
        self.skip = config.skip
        self.attention = SANAttention(config)
        self.attention_norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        if width:
            self.mlp = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, dim))
            self.mlp_norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        mixed = self.dropout(self.attention(x, mask))
        x = self.attention_norm(mixed + x if self.skip else mixed)
        if hasattr(self, "mlp"):
            x = self.mlp_norm(self.dropout(self.mlp(x)) + x)
        return x


class SANPreTrained(transformers.PreTrainedModel):  # type: ignore[misc]
    """What the models share: the initialisation of the paper's code."""

    config_class = SANConfig
    base_model_prefix = "san"
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        """N(0, .02) as in BERT, but for values and outputs, which are U(±1/sqrt(dim)); biases zero."""
        if isinstance(module, Mixing):
            bound = 1 / math.sqrt(module.in_features)
            initialization.uniform_(module.weight, -bound, bound)
            initialization.zeros_(module.bias)
        else:
            super()._init_weights(module)


class SANModel(SANPreTrained):
    """Token ids (batch, tokens), or points (batch, tokens, coordinates), -> last_hidden_state (batch, tokens, dim)."""

    def __init__(self, config: SANConfig) -> None:
        super().__init__(config)
        dim, positions = config.hidden_size, config.max_position_embeddings
        if config.coordinates:
            self.main_input_name = "points"
            self.words: nn.Module = nn.Linear(config.coordinates, dim)
        else:
            self.words = nn.Embedding(config.vocab_size, dim)
        self.positions = nn.Embedding(positions, dim) if positions else None
        self.project: nn.Module = nn.Linear(dim, dim)
        if config.coordinates:
            self.project = nn.Sequential(nn.GELU(), self.project) if config.deep_entry else nn.Identity()
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(SANBlock(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.words = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        points: Tensor | None = None,
    ) -> BaseModelOutput:
        given = input_ids if points is None else points
        assert given is not None
        x = self.words(given)
        if self.positions is not None:
            x = x + self.positions(torch.arange(given.shape[1], device=given.device))
        x = self.dropout(self.norm(self.project(x)))
        mask = (
            None if attention_mask is None else attention_mask.bool()[:, None, None]
        )  # (B, 1, 1, T): of keys
        for block in self.blocks:
            x = block(x, mask)
        return BaseModelOutput(last_hidden_state=x)


class SANForTokenClassification(SANPreTrained):
    """The inputs of SANModel -> logits (batch, tokens, num_labels); with labels, the mean cross-entropy.

    labels (batch, tokens): −100 where nothing is asked
    """

    def __init__(self, config: SANConfig) -> None:
        super().__init__(config)
        self.san = SANModel(config)
        self.main_input_name = self.san.main_input_name
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        points: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> TokenClassifierOutput:
        last = self.san(input_ids, attention_mask, points).last_hidden_state
        logits = self.classifier(self.dropout(last))
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return TokenClassifierOutput(loss=loss, logits=logits)


transformers.AutoConfig.register(SANConfig.model_type, SANConfig, exist_ok=True)
transformers.AutoModel.register(SANConfig, SANModel, exist_ok=True)
transformers.AutoModelForTokenClassification.register(SANConfig, SANForTokenClassification, exist_ok=True)
