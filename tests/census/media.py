"""Images, videos and sounds in the layouts that models take them in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from census.inputs import Maker


@dataclass
class Media:
    """One kind of data in one layout: its inputs, and the tokens that stand for it in the text."""

    name: str  # "image", "video" or "audio"
    kind: int  # in mm_token_type_ids
    inputs: dict[str, Any]
    token: int | None = None  # None: no tokens in the text
    tokens: int | None = None  # in each sample; None: ask the model
    around: tuple[int, int] | None = None

    def learn(self, error: str, batch: int) -> bool:
        """Take the number of tokens from the library's error that features and tokens do not match."""
        found = re.search(rf"{self.name} features .*features:? (\d+)", error, re.IGNORECASE)
        if self.token is None or not found or int(found[1]) // batch in (0, self.tokens):
            return False
        self.tokens = int(found[1]) // batch
        return True


def media(maker: Maker) -> list[list[Media]]:
    """For each kind of data that the model takes, the layouts to try."""
    return [
        [Media("image", 1, inputs, *_token(maker, "image")) for inputs in _images(maker)],
        [Media("audio", 3, inputs, *_token(maker, "audio")) for inputs in _sounds(maker)],
    ]


def _token(maker: Maker, name: str) -> tuple[int | None, None, tuple[int, int] | None]:
    from census.inputs import find

    config = maker.config
    names = [f"{name}_token_id", f"{name}_token_index", f"{name}_token"]
    token = next((value for key in names if isinstance(value := getattr(config, key, None), int)), None)
    if token is None:
        token = find(config, "text", *names)
    start = getattr(config, f"{'vision' if name != 'audio' else name}_start_token_id", None)
    end = getattr(config, f"{'vision' if name != 'audio' else name}_end_token_id", None)
    around = (start, end) if isinstance(start, int) and isinstance(end, int) else None
    return token if isinstance(token, int) else None, None, around


def _images(maker: Maker) -> Iterator[dict[str, Any]]:
    from census.inputs import find

    B, names, config = maker.batch, maker.names, maker.config
    keys = ["pixel_values", "flattened_patches", "pixel_values_videos", "image"]
    keys += ["hidden_states"] * ("grid_thw" in names)
    key = next((name for name in keys if name in names), None)
    if key is None:
        return

    def get(*attributes: str) -> Any:
        return find(config, "vision|image|encoder|backbone", *attributes)

    C = get("num_channels", "in_channels", "in_chans") or 3
    C = C if isinstance(C, int) else 3
    P = get("patch_size") or 8
    P = P if isinstance(P, int) else P[0]
    size = get("image_size", "img_size", "input_size")
    sizes = [size] if size else []
    side = size if isinstance(size, int) else size[0] if isinstance(size, list | tuple) else 32
    grid = next((name for name in ("image_grid_thw", "grid_thw") if name in names), None)
    if grid:
        T = get("temporal_patch_size", "patch_temporal") or 1
        rows = torch.tensor([[1, 4, 4]] * B)
        for depth in dict.fromkeys([T, 1]):
            yield {key: maker.noise(B * 16, C * depth * P * P), grid: rows}
            yield {key: maker.noise(B * 16, C, P, P), grid: rows}
            yield {key: maker.noise(1, B * 16, C, P, P), grid: rows}
            yield {key: maker.noise(B, 16, C * depth * P * P), grid: rows}
        return
    if key == "flattened_patches":
        places = torch.stack(torch.meshgrid(torch.arange(1, 5), torch.arange(1, 5), indexing="ij"), -1).view(
            1, 16, 2
        )
        yield {key: torch.cat([places.expand(B, 16, 2).to(maker.dtype), maker.noise(B, 16, C * P * P)], -1)}
    if "spatial_shapes" in names:
        yield {
            key: maker.noise(B, 16, C * P * P),
            "pixel_attention_mask": torch.ones(B, 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4]] * B),
        }
    for position in ("image_position_ids", "pixel_position_ids"):
        if position in names:
            places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).view(
                1, 16, 2
            )
            yield {key: maker.noise(B, 16, C * P * P), position: places.repeat(B, 1, 1)}
    if "aspect_ratio_ids" in names:
        tiles = get("max_num_tiles") or 4
        extra = {
            "aspect_ratio_ids": torch.ones(B, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(B, 1, tiles, dtype=torch.long),
        }
        yield {key: maker.noise(B, 1, tiles, C, side, side)} | extra
    frames = get("num_frames", "frames_per_clip") or 2
    frames = frames if isinstance(frames, int) else 2
    for s in dict.fromkeys([side, 32, 64, 128] if not sizes else [side, 64]):
        H, W = (s, s) if isinstance(size, int) or not size or s != side else (size[0], size[1])
        for shape in (
            (B, C, H, W),
            (B, 1, C, H, W),
            (B, frames, C, H, W),
            (B, 2, C, H, W),
            (B, C, frames, H, W),
        ):
            yield {key: maker.noise(*shape)}
            if "image_sizes" in names:
                yield {key: maker.noise(*shape), "image_sizes": torch.tensor([[H, W]] * B)}


def _sounds(maker: Maker) -> Iterator[dict[str, Any]]:
    for key in ("input_features", "input_values"):
        if key in maker.names:
            yield from _sound(maker, key)


def _sound(maker: Maker, key: str) -> Iterator[dict[str, Any]]:
    from census.inputs import find

    B, names, config = maker.batch, maker.names, maker.config
    hint = "audio|speech|encoder"
    bins = [
        find(config, hint, name)
        for name in (
            "num_mel_bins",
            "feature_size",
            "input_feat_size",
            "n_mels",
            "mel_bins",
            "input_dim",
            "feature_projection_input_dim",
            "input_size",
            "num_features",
            "input_channels",
        )
    ]
    bins = [value for value in dict.fromkeys([*bins, 80, 128, 64]) if isinstance(value, int)]
    positions = find(config, hint, "max_source_positions")
    frames = 2 * positions if isinstance(positions, int) and positions <= 64 else 64
    if key == "input_values":
        samples = 320 * 16
        yield {key: maker.noise(B, samples)}
        yield {key: maker.noise(B, 1, samples)}
        most = find(config, hint, "max_length")
        frames = most if isinstance(most, int) else frames
    for mel in bins:
        for shape in ((B, mel, frames), (B, frames, mel), (B, 1, frames, mel)):
            given: dict[str, Any] = {key: maker.noise(*shape)}
            masks = [n for n in ("input_features_mask", "feature_attention_mask") if n in names]
            yield given | {name: torch.ones(B, frames, dtype=torch.bool) for name in masks}
            if masks:
                yield given
