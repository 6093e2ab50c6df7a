"""Sounds: from files, datasets and arrays to the tables, each as long as it is, at the model's rate."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import tiny
from support.audio import RATE, extractor, held, model, sound, write
from support.command import FAST, Run, fails

import rc_probe
from rc_probe.data.batches import Batches, batches, long_enough
from rc_probe.data.samples import load_samples
from rc_probe.data.sounds import features, wave
from rc_probe.hooks.errors import RcProbeError
from rc_probe.models.load import Loaded, load_model


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A tiny wav2vec 2.0."""
    return tiny.saved(tmp_path / "wav2vec2", model("Wav2Vec2"), extractor("Wav2Vec2"))


def speech(place: Path) -> str:
    """Five sounds, those of one length not all side by side."""
    for i, seconds in enumerate((0.1, 0.1, 0.15, 0.1, 0.12)):
        write(place / "speech" / f"{i}{('.wav', '.flac', '.ogg')[i % 3]}", sound(seconds, seed=i))
    return str(place / "speech")


def refuses(spec: Any, *parts: str, **options: Any) -> None:
    with pytest.raises(RcProbeError) as caught:
        loaded = held("Wav2Vec2")
        samples = load_samples(spec, modality="audio", fits=long_enough(loaded), **options)
        batches(samples, loaded)
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line


def load(spec: Any, **options: Any) -> list[Any]:
    return load_samples(spec, modality="audio", **options).items


# From the command and from Python to the tables


@pytest.mark.parametrize(
    ("name", "tokens"),
    # 0.1 s at 16 kHz, stride 20; 1 s in frames of 10 ms, stride 2; patches of 4 x 4 every 4, [CLS], [distil]
    [("Wav2Vec2", [79, 79, 119, 79, 95]), ("Whisper", [50] * 5), ("AST", [8 * 4 + 2] * 5)],
)
def test_command(
    name: str,
    tokens: list[int],
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    read = rc_probe.metrics.layer_curves.Curves.read

    def reading(self: Any, layer: int, x: Any) -> Any:
        if layer == 2 and self.metrics == ["residual"]:
            seen.extend([x.shape[1]] * len(x))
        return read(self, layer, x)

    monkeypatch.setattr("rc_probe.metrics.layer_curves.Curves.read", reading)
    place = tiny.saved(tmp_path / "model", model(name), extractor(name))
    code, out, err = run(place, "--data", speech(tmp_path), "--out", "out", *FAST, "--batch-size", "1")
    assert (code, err) == (0, "")
    result = rc_probe.ProbeResult.load("out")
    rows = result.tables["residuals"]
    assert set(rows["count"]) == {5} and set(rows["layer"]) == {0, 1, 2} and len(rows) == 4 * 3
    assert [seen[i] for i in range(0, 20, 4)] == tokens
    assert (result.settings["modality"], result.settings["samples"]) == ("audio", 5)
    assert (result.settings["length"], result.settings["tokens"]) == (None, None)
    assert "5 sounds" in Path("out/report.html").read_text(encoding="utf-8")
    to = {"Whisper": "to 1 s; silence counts", "AST": "to one length; silence counts"}.get(name)
    assert [to in note for note in result.settings["notes"][1:]] == ([True] if to else [])
    assert to is None or to in " ".join(out.split())


def test_probe_from_python(folder: str) -> None:
    options: dict[str, Any] = {"metrics": "residual", "recursion": False, "samples": 3}
    held_one = transformers.Wav2Vec2Model.from_pretrained(folder)
    sounds = [sound(0.1), sound(0.2, 8000), sound(0.15, seed=2), sound(0.3)]
    pairs = [sounds[0], (sounds[1], 8000), (sounds[2], RATE), sounds[3]]
    rows = [rc_probe.probe(one, pairs, **options).tables["residuals"] for one in (folder, held_one)]
    assert rows[0].equals(rows[1]) and set(rows[0]["count"]) == {3}
    assert set(rows[0]["weights"]) == {"pretrained", "init"}
    given = rc_probe.probe(held_one, pairs, processor=extractor("Wav2Vec2"), **options)
    assert given.tables["residuals"].equals(rows[0])


@pytest.mark.parametrize("name", ["Wav2Vec2", "Whisper", "SeamlessM4T"])
def test_no_number_depends_on_the_batch_size(name: str, tmp_path: Path) -> None:
    one = held(name)
    samples = load_samples(speech(tmp_path), modality="audio")

    def states(made: Batches) -> list[Any]:
        with torch.no_grad():
            return [
                row for batch in made for row in one.model(**batch.inputs, output_hidden_states=True)[-1][-1]
            ]

    alone = batches(samples, one, batch_size=1)
    for size in (2, 8):
        made = batches(samples, one, batch_size=size)
        lengths = [len(next(iter(batch.inputs.values()))) for batch in made]
        assert lengths == (([2, 2, 1] if size == 2 else [5]) if name == "Whisper" else [2, 1, 1, 1])
        assert all(batch.mask is None and "attention_mask" not in batch.inputs for batch in made)
        for expected, found in zip(states(alone), states(made), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


# What is heard


def test_sampling_rates(tmp_path: Path) -> None:
    """The same tones at 8 and at 16 kHz; told the wrong rate, they would be others."""
    low, high = sound(0.2, 8000), sound(0.2, RATE)
    one = held("Whisper")
    for item in ((low, 8000), write(tmp_path / "low.wav", low, 8000), (sound(0.2, 44100), 44100)):
        heard = wave(item, RATE)
        assert len(heard) == len(high) and heard.dtype == np.float32
        assert np.abs(heard - high)[100:-100].max() < 0.01
        error = (features(one, item)["input_features"] - features(one, high)["input_features"])[..., 2:18]
        assert error.abs().max() < 0.2
    wrong = (features(one, (low, RATE))["input_features"] - features(one, high)["input_features"])[..., 2:18]
    assert wrong.abs().max() > 0.5


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = sound(seed=1), sound(seed=2)
    path = write(tmp_path / "a.wav", np.stack([left, right], axis=1))
    np.testing.assert_allclose(wave(path, RATE), (left + right) / 2, atol=1e-4)


def test_integers_as_files_store_them() -> None:
    values = (sound() * 2**15).astype(np.int16)
    np.testing.assert_allclose(wave(values, RATE), sound(), atol=1e-4)


def test_frames_that_the_extractor_marks_as_padding_are_cut_off() -> None:
    """Seamless fills up to an even number of frames, and marks the last token as padding."""
    one = held("SeamlessM4T")
    item = sound(0.105)
    made = one.processor(item, sampling_rate=RATE, return_tensors="pt")
    assert made["attention_mask"].tolist() == [[1] * 4 + [0]]
    assert torch.equal(features(one, item)["input_features"], made["input_features"][:, :4])


def test_random_crops_are_the_same_ones() -> None:
    clap = transformers.ClapFeatureExtractor(max_length_s=1, truncation="rand_trunc")
    one = held("Whisper")
    one = Loaded(one.model, one.config, "clap", None, "audio", clap)
    item = np.random.default_rng(0).standard_normal(200_000)
    first = features(one, item)["input_features"]
    np.random.random()
    before = np.random.get_state()[1:3]
    assert torch.equal(features(one, item)["input_features"], first)
    after = np.random.get_state()[1:3]
    assert (after[0] == before[0]).all() and after[1] == before[1]


# Sources


def test_folder_and_file(tmp_path: Path) -> None:
    paths = [write(tmp_path / name) for name in ("b.wav", "more/c.ogg", "a.flac", "d.mp3")]
    (tmp_path / "notes.md").write_text("no sound")
    (tmp_path / ".hidden.wav").write_text("nor this")
    assert load(tmp_path) == [paths[2], paths[0], paths[3], paths[1]]
    assert load(str(paths[0])) == [paths[0]]
    assert load(tmp_path, samples=2) == [paths[2], paths[0]]


def test_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.wav")
    rows = {"audio": [str(path)] * 2, "text": ["a b", "c d"]}
    local = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio())
    monkeypatch.setattr("rc_probe.data.samples.hub_problem", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: local.to_iterable_dataset())
    stored = {"bytes": path.read_bytes(), "path": None}
    decoded = {"array": sound().tolist(), "sampling_rate": RATE, "path": None}
    url = {"bytes": None, "path": f"file://{path}"}
    for spec in (local, local.to_iterable_dataset(), "some/speech:train", [stored, decoded], [url, url]):
        items = load(spec)
        assert len(items) == 2
        for item in items:
            np.testing.assert_allclose(wave(item, RATE), sound(), atol=1e-4)
    assert load_samples(local, modality="text").items == ["a b", "c d"]  # nothing is decoded on the way
    renamed = local.rename_column("audio", "clip")
    assert len(load(renamed)) == 2
    assert len(load(renamed, column="clip")) == 2


def test_short_sounds_are_left_out() -> None:
    loaded = held("Wav2Vec2")
    fits = long_enough(loaded)
    sounds = [sound(0.1), sound(0.024), sound(0.0), sound(0.03)]
    samples = load_samples(sounds, modality="audio", fits=fits)
    assert [len(item) for item in samples.items] == [1600, 480]
    assert samples.note.startswith("2 sounds of fewer than two tokens left out")
    loaded.model.config.conv_stride = (100, 10)  # a token every 1000 numbers
    assert not fits(sound(0.05)) and fits(sound(0.1))
    with pytest.raises(RcProbeError, match="sound 1 has fewer than two tokens"):
        batches(load_samples([sound(), sound(0.05)], modality="audio"), loaded)


# What cannot be meant


def test_one_line_each(run: Run, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty, texts, place = tmp_path / "empty", tmp_path / "a.txt", speech(tmp_path)
    empty.mkdir()
    texts.write_text("some words")
    fails(run, "data: no sounds come with rc-probe. Give --data: a folder of .wav", folder)
    fails(run, "no sounds in it. Give --data", folder, "--data", str(empty))
    fails(run, "takes sounds, and this is no source of sounds", folder, "--data", str(texts))
    fails(run, "takes texts, and this is no source of texts", "demo", "--data", place)
    fails(run, "no columns here", folder, "--data", place, "--column", "audio")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "soundfile", None)
        fails(run, r'package soundfile.*pip install "rc-probe\[audio\]"', folder, "--data", place)
    (tmp_path / "speech" / "3.wav").write_bytes(b"not a sound")
    fails(run, r"speech/3.wav: not a readable sound", folder, "--data", place)


def test_files_that_break(tmp_path: Path) -> None:
    write(tmp_path / "a.flac", sound(5))
    (tmp_path / "a.flac").write_bytes((tmp_path / "a.flac").read_bytes()[:5000])
    refuses(tmp_path, "a.flac", "not a readable sound")
    soundfile.write(tmp_path / "b.wav", np.full(1600, np.nan), RATE, subtype="FLOAT")
    refuses(tmp_path / "b.wav", "b.wav", "NaN or infinity")
    refuses([{"bytes": b"no sound", "path": "row.wav"}], "row.wav", "not a readable sound")
    refuses([{"bytes": None, "path": "no/where.wav"}], "no/where.wav", "cannot be read")


def test_objects_that_are_no_sounds() -> None:
    refuses(["a.wav"], "row 0 is a str, and the model takes sounds")
    refuses([np.zeros((2, 100))], "row 0 is a ndarray")
    refuses([sound(), 3], "row 1 is a int")
    refuses([(sound(), 0)], "rate of 0")
    refuses([{"array": [[0.0]], "sampling_rate": RATE}], "shape (1, 1)")
    refuses(7, "int holds no samples", "Give a list of arrays")
    refuses([sound(0.01)], "every sound has fewer than two tokens", "longer sounds")
    refuses(datasets.Dataset.from_dict({"text": ["a"]}), "no column of sounds", "--column")


def test_feature_extractors_that_do_not_fit(folder: str) -> None:
    loaded = held("Wav2Vec2")
    other = Loaded(loaded.model, loaded.config, "x", None, "audio", tiny.tokenizer())
    with pytest.raises(RcProbeError, match=r"x: \w+ is no feature extractor"):
        features(other, sound())
    other = Loaded(loaded.model, loaded.config, "x", None, "audio", extractor("Whisper"))
    with pytest.raises(
        RcProbeError, match=r"the feature extractor does not take this sound \('input_values'\)"
    ):
        features(other, sound())
    both = SimpleNamespace(feature_extractor=extractor("Wav2Vec2"), tokenizer=None)  # as Wav2Vec2Processor
    whole = Loaded(loaded.model, loaded.config, "x", None, "audio", both)
    assert torch.equal(features(whole, sound())["input_values"], features(loaded, sound())["input_values"])
    (Path(folder) / "preprocessor_config.json").unlink()
    with pytest.raises(RcProbeError, match=r"no feature extractor.*preprocessor_config\.json"):
        load_model(folder, device="cpu")


def test_the_mask_of_training_may_be_missing(folder: str) -> None:
    """As in facebook/wav2vec2-base-960h; no stream depends on it."""
    weights = load_file(f"{folder}/model.safetensors")
    del weights["masked_spec_embed"]
    save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
    (note,) = load_model(folder, device="cpu").notes
    assert "masked_spec_embed" in note and "no stream depends on it" in note
