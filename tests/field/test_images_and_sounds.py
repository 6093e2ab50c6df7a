"""Images of any depth, folders with other files in them, sounds with odd headers."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers
from PIL import Image
from support import tiny

import rc_probe
from rc_probe.data.batches import batches
from rc_probe.data.samples import load_samples
from rc_probe.hooks.errors import RcProbeError
from rc_probe.models.load import Loaded

RAMP = (np.arange(256).reshape(16, 16) * 37 % 256).astype(np.uint8)


def vision(channels: int = 3) -> Loaded:
    torch.manual_seed(0)
    model = transformers.ViTModel(
        transformers.ViTConfig(**tiny.VIT_SIZES, num_channels=channels, initializer_range=0.1)
    )
    mean = {"image_mean": [0.5] * channels, "image_std": [0.5] * channels}
    processor = transformers.ViTImageProcessorPil(size={"height": 8, "width": 8}, **mean)
    return Loaded(model.eval(), model.config, "vit", None, "image", processor)


def pixels(spec: Any, loaded: Loaded) -> torch.Tensor:
    (batch,) = batches(load_samples(spec, modality="image"), loaded)
    return batch.inputs["pixel_values"]


def test_sixteen_bits_are_read_as_eight(tmp_path: Path) -> None:
    """A ramp times 257 is the same picture; Pillow alone makes it white."""
    deep = RAMP.astype(np.uint16) * 257
    for suffix in (".png", ".tif"):
        Image.fromarray(deep).save(tmp_path / f"deep{suffix}")
        assert torch.equal(
            pixels(tmp_path / f"deep{suffix}", vision()), pixels([Image.fromarray(RAMP)], vision())
        )
    assert torch.equal(pixels([Image.fromarray(deep)], vision()), pixels([Image.fromarray(RAMP)], vision()))
    odd = np.resize(
        np.array([0, 128, 129, 300, 33000, 65406, 65407, 65535], np.uint16), (8, 8)
    )  # 65535 is 255
    near = np.resize(np.array([0, 0, 1, 1, 128, 254, 255, 255], np.uint8), (8, 8))
    assert torch.equal(pixels([Image.fromarray(odd)], vision()), pixels([Image.fromarray(near)], vision()))


def test_colours_stay_what_they_are(tmp_path: Path) -> None:
    """(x / 255 - 0.5) / 0.5 by NumPy, channels first, once: of a file and of an image, in RGB, with a palette or an alpha."""
    colours = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(colours)
    image.save(tmp_path / "rgb.png")
    wanted = torch.tensor((colours / 255 - 0.5) / 0.5).permute(2, 0, 1)[None].float()
    opaque = Image.merge("RGBA", (*image.split(), Image.new("L", (8, 8), 255)))
    few = Image.fromarray(colours // 128 * 128)  # eight colours
    for given in (tmp_path / "rgb.png", [image], [opaque]):
        assert torch.allclose(pixels(given, vision()), wanted, atol=1e-6)
    assert torch.allclose(
        pixels([few.convert("P", palette=Image.Palette.ADAPTIVE)], vision()), pixels([few], vision())
    )


@pytest.mark.parametrize("values", [RAMP.astype(np.int32) * 1000, RAMP.astype(np.float32)])
def test_pixels_without_a_known_white_are_refused(values: np.ndarray[Any, Any]) -> None:
    with pytest.raises(RcProbeError, match="have no known white"):
        pixels([Image.fromarray(values)], vision())


def test_a_model_of_one_channel(tmp_path: Path) -> None:
    """The residual of the processor's own pixels, by hand in float64."""
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    Image.merge("RGB", [Image.fromarray(RAMP)] * 3).save(tmp_path / "b.png")
    one = vision(1)
    result = rc_probe.probe(
        one.model,
        str(tmp_path),
        processor=one.processor,
        init=False,
        paths=False,
        recursion=False,
        metrics=["residual"],
        length=64,
    )
    assert "--length changed nothing: only texts have tokens" in result.settings["notes"]
    grey = np.asarray(Image.fromarray(RAMP).resize((8, 8), Image.Resampling.BILINEAR), dtype=np.float64)
    values = torch.tensor((grey / 255 - 0.5) / 0.5)[None, None]
    with torch.no_grad():
        states = one.model.double()(values, output_hidden_states=True).hidden_states
    wanted = []
    for state in states:
        x = state[0].numpy()
        rest = x - x.mean(0)
        sizes = [np.abs(m).sum(0).max() * np.abs(m).sum(1).max() for m in (rest, x)]
        wanted.append(np.sqrt(sizes[0] / sizes[1]))
    found = result.tables["residuals"].query("variant == 'transformer'")
    assert found["count"].tolist() == [2, 2, 2]
    np.testing.assert_allclose(found["mean"], wanted, rtol=1e-5)


def test_a_model_of_other_channels_is_refused() -> None:
    with pytest.raises(RcProbeError, match="takes images of 4 channels"):
        pixels([Image.fromarray(RAMP)], vision(4))


def test_other_files_in_a_folder_are_no_samples(tmp_path: Path) -> None:
    for name in ("notes.pdf", "data.h5", "plot.eps", "film.mpeg", "x.grib", "notes.txt"):
        (tmp_path / name).write_bytes(b"no image")
    (tmp_path / "x.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # to open it would wait for its writer
    os.mkfifo(tmp_path / "pipe.wav")
    Image.fromarray(RAMP).save(tmp_path / "x.png" / "inside.PNG")
    write(tmp_path / "a.wav", 8000)
    assert load_samples(tmp_path, modality="image").items == [tmp_path / "x.png" / "inside.PNG"]
    assert load_samples(tmp_path, modality="audio").items == [tmp_path / "a.wav"]
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")
    with pytest.raises(RcProbeError, match=r"gone\.png: a link to a file that is not there"):
        load_samples(tmp_path, modality="image")


def write(path: Path, rate: int) -> None:
    soundfile.write(path, np.sin(np.arange(800) / 9), 8000)
    content = bytearray(path.read_bytes())
    content[24:28] = struct.pack("<I", rate)
    path.write_bytes(content)


@pytest.mark.parametrize("rate", [1, 0, 999, 2_000_000_000])
def test_a_rate_that_no_sound_has(tmp_path: Path, rate: int) -> None:
    """At a rate of 1 a tenth of a second would become 13 minutes."""
    from rc_probe.data.sounds import wave

    write(tmp_path / "a.wav", rate)
    with pytest.raises(RcProbeError, match=r"a\.wav: .*(a rate of|not a readable sound)"):
        wave(tmp_path / "a.wav", 16000)
    with pytest.raises(RcProbeError, match="a rate of"):
        wave((np.zeros(800, np.float32), rate), 16000)
