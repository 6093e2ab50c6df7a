"""Tasks of models of sounds: classes named by folders, and embeddings."""

from pathlib import Path

import numpy as np
import torch
import transformers
from support.audio import WAV2VEC2, extractor, held, sound, write

from rc_probe.data.batches import batches, long_enough
from rc_probe.data.samples import load_samples
from rc_probe.data.sounds import features
from rc_probe.models.load import Loaded
from rc_probe.tasks import FULL, choose_task

NAMES = {0: "high", 1: "low"}


def with_head(name: str) -> Loaded:
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(**WAV2VEC2, id2label=NAMES, vocab_size=9)
    model = getattr(transformers, name)(config).eval()
    return Loaded(model, model.config, name, None, "audio", extractor("Wav2Vec2"))


def test_classes_by_folder(tmp_path: Path) -> None:
    for i, seconds in enumerate((0.1, 0.15, 0.1, 0.12, 0.1)):
        write(tmp_path / ("low" if i % 2 else "high") / f"{i}.wav", sound(seconds, seed=i))
    loaded = with_head("Wav2Vec2ForSequenceClassification")
    samples = load_samples(tmp_path, modality="audio", label_column="folder", fits=long_enough(loaded))
    assert samples.labels == ["high", "low", "high", "low", "high"]
    task, notes = choose_task(loaded, samples)
    assert task is not None and task.name == "classification" and not notes
    for size in (1, 4):
        tally = task.tally()
        with torch.no_grad():
            for batch in batches(task.samples, loaded, batch_size=size):
                tally.start(prepared := task.prepare(batch), task.model(**prepared.inputs))
        losses = []
        for file, label in zip(samples.items, (0, 1, 0, 1, 0), strict=True):
            logits = loaded.model(**features(loaded, file)).logits[0].detach().double().numpy()
            losses.append(np.log(np.exp(logits).sum()) - logits[label])
        np.testing.assert_allclose(tally.scores()[FULL]["loss"], losses, atol=1e-5)
        assert tally.baselines()["accuracy"] == 0.6


def test_sounds_find_the_nearest() -> None:
    given = load_samples([sound(seed=i) for i in range(4)], modality="audio", samples=4)
    for loaded, trunk in ((with_head("Wav2Vec2ForCTC"), "Wav2Vec2Model"), (held("AST"), "ASTModel")):
        task, notes = choose_task(loaded, given)
        assert task is not None and (task.name, task.metrics) == ("retrieval", ("agreement",))
        assert type(task.model).__name__ == trunk
        assert ("neither of classes nor of tokens" in notes[0]) == (trunk == "Wav2Vec2Model")
        (batch,) = batches(given, loaded)
        prepared = task.prepare(batch)
        with torch.no_grad():
            output = task.model(**prepared.inputs)
        found = task.read(output, prepared)["embedding"]
        mean = output.last_hidden_state.double().mean(1).numpy()
        np.testing.assert_allclose(found, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-5)
