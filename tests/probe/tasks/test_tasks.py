"""Tasks of heads: scores against numpy on each text by itself, and the right task for each kind of head."""

import copy
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from support import tiny, trained

import rc_probe
from rc_probe.data.batches import Batch, batches
from rc_probe.data.samples import Samples, load_samples
from rc_probe.hooks.errors import RcProbeError
from rc_probe.models.load import Loaded, load_model
from rc_probe.tasks import FULL, Tally, Task, choose, choose_task, each_once
from rc_probe.tasks import prediction as predict

TEXTS, KINDS = trained.walks(13, seed=5)
TWIST = torch.linspace(-1, 2, 64)  # makes another version of a model: its logits times this


def samples(texts: list[str] | None = None, labels: list[Any] | None = None) -> Samples:
    found = load_samples(texts or TEXTS, modality="text", samples=1000)
    return replace(found, labels=labels)


def chosen(loaded: Loaded, given: Samples | None = None, **options: Any) -> Task:
    task, _ = choose_task(loaded, given or samples(), **options)
    assert task is not None
    return task


@torch.no_grad()
def tally(loaded: Loaded, task: Task, batch_size: int = 4, **options: Any) -> Tally:
    """The model itself, and "twist"."""
    found = task.tally()
    for batch in batches(task.samples, loaded, batch_size=batch_size, **options):
        prepared = task.prepare(batch)
        logits = task.head(task.model(**prepared.inputs))
        found.start(prepared, logits)
        found.add("twist", logits * TWIST[: logits.shape[-1]])
    return found


@torch.no_grad()
def alone(loaded: Loaded, ids: list[int]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The logits (T, V) or (1, C), float64, of one text; and of its twist."""
    logits = loaded.model(input_ids=torch.tensor([ids])).logits.double()[0].numpy()
    logits = np.atleast_2d(logits)
    return logits, logits * TWIST[: logits.shape[-1]].double().numpy()


def numbers(logits: Any, full: Any, targets: Any) -> dict[str, float]:
    """Independent arithmetic: logits (P, V) at the scored places."""
    e = np.exp(logits - logits.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    return {
        "agreement": float(np.mean(logits.argmax(-1) == full.argmax(-1))),
        "accuracy": float(np.mean(logits.argmax(-1) == targets)),
        "loss": float(np.mean([-np.log(p[i, t]) for i, t in enumerate(targets)])),
    }


def check(found: Tally, expected: dict[Any, list[dict[str, float]]], exact: float = 2e-6) -> None:
    scores = found.scores()
    assert scores.keys() == expected.keys() == {FULL, "twist"}
    for key, rows in expected.items():
        assert scores[key].keys() == rows[0].keys()
        for metric, values in scores[key].items():
            assert values.dtype == torch.float64
            np.testing.assert_allclose(values, [row[metric] for row in rows], atol=exact)


def test_next_token(trained_causal: Loaded) -> None:
    task = chosen(trained_causal)
    assert (task.name, task.metrics) == ("next token", ("agreement", "accuracy", "loss"))
    expected: dict[Any, list[Any]] = {FULL: [], "twist": []}
    right: Counter[int] = Counter()
    targets: Counter[int] = Counter()
    for text in TEXTS:
        ids = [4 + int(word[1:]) for word in text.split()]
        for key, logits in zip((FULL, "twist"), alone(trained_causal, ids), strict=True):
            expected[key].append(numbers(logits[:-1], alone(trained_causal, ids)[0][:-1], ids[1:]))
        for i in ids[1:]:
            right[i] += 1 / (len(ids) - 1) / len(TEXTS)
        targets.update(ids[1:])
    found = tally(trained_causal, task)
    assert found.counts().tolist() == [len(text.split()) - 1 for text in TEXTS]
    check(found, expected)
    assert found.scores()[FULL]["accuracy"].mean() > 0.85  # all but the first step of a walk can be known
    assert 0 < found.scores()["twist"]["agreement"].mean() < 1
    base = found.baselines()
    assert base["accuracy"] == pytest.approx(max(right.values()))
    shares = np.array(list(targets.values())) / sum(
        targets.values()
    )  # losses are of tokens, accuracies of texts
    assert base["loss"] == pytest.approx(-np.sum(shares * np.log(shares)))


def test_agreement_baseline(trained_classifier: Loaded) -> None:
    task = chosen(trained_classifier)
    said = Counter(int(alone(trained_classifier, trained_ids(text))[0].argmax()) for text in TEXTS)
    assert len(said) == 3
    assert tally(trained_classifier, task).baselines() == {
        "agreement": pytest.approx(max(said.values()) / 13)
    }


def trained_ids(text: str) -> list[int]:
    return [1, *(4 + int(word[1:]) for word in text.split()), 2]


def hidden_places(task: Task, loaded: Loaded, batch_size: int = 4) -> dict[str, list[int]]:
    """For each text, the tokens that are masked, read off the inputs."""
    places = {}
    for batch in batches(task.samples, loaded, batch_size=batch_size):
        prepared = task.prepare(batch)
        for i, number in enumerate(prepared.samples):
            changed = prepared.inputs["input_ids"][i] != batch.inputs["input_ids"][i]
            assert (prepared.inputs["input_ids"][i][changed] == trained.MASK).all()
            places[task.samples.items[number]] = changed.nonzero()[:, 0].tolist()
    return places


def test_masked_token(trained_masked: Loaded) -> None:
    trained_masked = replace(trained_masked, model=copy.deepcopy(trained_masked.model).double())
    task = chosen(trained_masked)
    assert task.name == "masked token"
    expected: dict[Any, list[Any]] = {FULL: [], "twist": []}
    for text, places in hidden_places(task, trained_masked).items():
        ids = trained_ids(text)
        hidden = [trained.MASK if i in places else token for i, token in enumerate(ids)]
        full, twist = alone(trained_masked, hidden)
        targets = [ids[i] for i in places]
        for key, logits in ((FULL, full), ("twist", twist)):
            expected[key].append(numbers(logits[places], full[places], targets))
    found = tally(trained_masked, task)
    check(found, expected, exact=1e-12)
    assert found.scores()[FULL]["accuracy"].mean() > 0.7


def test_masks_are_those_of_the_text(trained_masked: Loaded) -> None:
    task = chosen(trained_masked)
    places = hidden_places(task, trained_masked)
    for text, found in places.items():
        words = len(text.split())
        assert len(found) == max(1, round(0.15 * words)) and all(0 < i <= words for i in found)
    again = chosen(trained_masked, samples(TEXTS[::-1]))
    assert hidden_places(again, trained_masked, batch_size=1) == places
    assert hidden_places(task, trained_masked, batch_size=13) == places
    assert hidden_places(chosen(trained_masked, seed=1), trained_masked) != places
    assert len({tuple(found) for found in places.values()}) > 4  # not the same places in each
    assert len(set(range(1, 7)) & {i for found in places.values() for i in found}) == 6  # anywhere


@pytest.mark.parametrize("name", ["trained_causal", "trained_masked", "trained_classifier"])
def test_same_scores_for_any_batch_size(name: str, request: pytest.FixtureRequest) -> None:
    loaded = request.getfixturevalue(name)
    task = chosen(loaded, samples(labels=KINDS))
    one = tally(loaded, task, batch_size=1)
    for size in (5, 13):
        other = tally(loaded, task, batch_size=size)
        for key, scores in one.scores().items():
            for metric, values in scores.items():
                torch.testing.assert_close(other.scores()[key][metric], values, atol=1e-5, rtol=0)
        assert other.baselines() == pytest.approx(one.baselines())


def test_texts_without_a_place_to_score_are_left_out(trained_causal: Loaded, trained_masked: Loaded) -> None:
    for loaded in (trained_causal, trained_masked):
        task = chosen(loaded, samples([TEXTS[0], "unknown words", TEXTS[1]]))
        found = tally(loaded, task, batch_size=2).scores()
        alike = tally(loaded, chosen(loaded, samples(TEXTS[:2]))).scores()
        for key, scores in found.items():
            for metric, values in scores.items():
                torch.testing.assert_close(values, alike[key][metric], atol=1e-5, rtol=0)
        nothing = tally(loaded, chosen(loaded, samples(["unknown words"])))
        assert nothing.scores()[FULL]["loss"].shape == nothing.counts().shape == (0,)
        assert nothing.baselines()["agreement"] == 0


@pytest.mark.parametrize("cls", [predict.NextToken, predict.MaskedToken, predict.TokenClasses])
def test_padding_is_no_text_whatever_it_is_filled_with(cls: Any) -> None:
    """Some tokenizers have no token of their own for it."""
    ids = torch.tensor([[9, 9, 9, 9, 9, 9], [7, 1, 9, 9, 9, 9]])
    mask = torch.arange(6) < torch.tensor([[6], [3]])
    prepared = cls(None, samples(), special=frozenset({1})).prepare(Batch({"input_ids": ids}, mask))
    places = prepared.column[prepared.row == 1].tolist()
    assert (
        places
        in {"next token": ([1],), "token classification": ([0, 2],), "masked token": ([0], [2])}[cls.name]
    )


def test_classification(trained_classifier: Loaded) -> None:
    task = chosen(trained_classifier, samples(labels=KINDS))
    assert (task.name, task.metrics) == ("classification", ("agreement", "accuracy", "loss"))
    expected: dict[Any, list[Any]] = {FULL: [], "twist": []}
    for text, kind in zip(TEXTS, KINDS, strict=True):
        full, twist = alone(trained_classifier, trained_ids(text))
        for key, logits in ((FULL, full), ("twist", twist)):
            expected[key].append(numbers(logits, full, [kind]))
    found = tally(trained_classifier, task)
    check(found, expected)
    many, kinds = trained.walks(200, seed=6)  # it has learned something
    answers = [alone(trained_classifier, trained_ids(text))[0].argmax() for text in many]
    assert np.mean(np.equal(answers, kinds)) > 0.7
    assert found.baselines()["accuracy"] == pytest.approx(max(Counter(KINDS).values()) / 13)
    assert chosen(trained_classifier).metrics == ("agreement",)


def test_only_small_things_are_kept(trained_causal: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    task = chosen(trained_causal)
    batch = next(iter(batches(task.samples, trained_causal)))
    prepared = task.prepare(batch)
    output = trained_causal.model(**prepared.inputs)  # with its gradients
    readout = task.read(output, prepared)
    places = len(prepared.row)
    assert {key: tuple(value.shape) for key, value in readout.items()} == {
        "prediction": (places,),
        "log_prob": (places,),
    }
    assert not any(value.requires_grad for value in readout.values())
    monkeypatch.setattr(predict, "CHUNK", 40)  # one position of 32 logits at a time
    again = task.read(output, prepared)
    assert all(torch.equal(again[key], readout[key]) for key in readout)
    twice = torch.cat([output.logits, -output.logits])  # two versions in one batch
    one, other = (task.read(part, prepared) for part in twice.chunk(2))
    assert torch.equal(one["prediction"], readout["prediction"])
    assert torch.equal(other["prediction"], output.logits[prepared.row, prepared.column].argmin(-1))


def test_tallies_of_parts_merge(trained_causal: Loaded) -> None:
    whole = tally(trained_causal, chosen(trained_causal))
    parts = [tally(trained_causal, chosen(trained_causal, samples(TEXTS[a:b]))) for a, b in ((0, 5), (5, 13))]
    parts[0].merge(parts[1])
    assert parts[0].baselines() == pytest.approx(whole.baselines())
    assert torch.equal(parts[0].counts(), whole.counts())
    for key, scores in whole.scores().items():
        for metric, values in scores.items():
            torch.testing.assert_close(parts[0].scores()[key][metric], values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_none(trained_causal: Loaded, bad: float) -> None:
    task = chosen(trained_causal)
    prepared = task.prepare(next(iter(batches(task.samples, trained_causal))))
    logits = trained_causal.model(**prepared.inputs).logits.detach()
    logits[0, 0, 7] = bad
    with pytest.raises(
        RcProbeError, match=r"GPT2LMHeadModel: its head gives NaN or infinity\. Try --dtype float32"
    ):
        task.read(logits, prepared)


# Which task


def hold(model: Any, processor: Any = None, modality: str = "text") -> Loaded:
    return Loaded(
        model.eval(), model.config, type(model).__name__, None, modality, processor or trained.tokenizer()
    )


def make(name: str, sizes: dict[str, Any], **changes: Any) -> Any:
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    return cls(cls.config_class(**(sizes | {"vocab_size": 33} | changes)))


LLAMA = tiny.SIZES | {"num_key_value_heads": 2}
XLNET = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}
MODELS: dict[str, tuple[dict[str, Any], str, str]] = {  # class: sizes, task, a part of its notes
    "GPT2LMHeadModel": (tiny.GPT2_SIZES, "next token", ""),
    "LlamaForCausalLM": (LLAMA, "next token", ""),
    "T5ForConditionalGeneration": (tiny.T5_SIZES | {"decoder_start_token_id": 0}, "next token", "it copies"),
    "BertForMaskedLM": (tiny.SIZES, "masked token", ""),
    "BertForPreTraining": (tiny.SIZES, "masked token", ""),
    "RobertaForMaskedLM": (tiny.SIZES, "masked token", ""),
    "BertLMHeadModel": (tiny.SIZES, "masked token", ""),  # not as a decoder: each token sees all
    "XLNetLMHeadModel": (XLNET, "masked token", ""),
    "BertForTokenClassification": (tiny.SIZES, "token classification", ""),
    "BertForSequenceClassification": (tiny.SIZES | {"num_labels": 4}, "classification", ""),
    "GPT2ForSequenceClassification": (tiny.GPT2_SIZES | {"pad_token_id": 0}, "classification", ""),
    "BertModel": (tiny.SIZES, "retrieval", "mean"),
    "GPT2Model": (tiny.GPT2_SIZES, "retrieval", "mean"),
    "ElectraForPreTraining": (
        tiny.SIZES | {"embedding_size": 16},
        "retrieval",
        "neither of classes nor of tokens",
    ),
    "BertForQuestionAnswering": (tiny.SIZES, "retrieval", "mean"),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_task_of_a_head(name: str) -> None:
    sizes, task_name, note = MODELS[name]
    loaded = hold(make(name, sizes))
    training = [module.training for module in loaded.model.modules()]
    state = torch.get_rng_state()
    task, notes = choose_task(loaded, samples())
    assert task is not None and task.name == task_name
    assert note in " ".join(notes) and bool(note) == bool(notes)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in loaded.model.modules()] == training
    found = task.tally()
    for batch in batches(task.samples, loaded, batch_size=6):
        prepared = task.prepare(batch)
        found.start(prepared, task.model(**prepared.inputs))
    scores = found.scores()[FULL]
    assert tuple(scores) == task.metrics == tuple(found.baselines())
    assert (scores["agreement"] == 1).all() and len(scores["agreement"]) == 13
    assert all(values.isfinite().all() for values in scores.values())


def test_no_mask_token_for_a_model_that_sees_all() -> None:
    task, notes = choose_task(hold(make("BertForMaskedLM", tiny.SIZES), tiny.tokenizer()), samples())
    assert task is not None and task.name == "retrieval" and task.model is not None
    assert "each token sees those after it, and the tokenizer has no mask token" in notes[0]


def test_tokens_that_see_no_others_are_no_proof_of_a_decoder() -> None:
    model = make("BertForMaskedLM", tiny.SIZES)
    for layer in model.bert.encoder.layer:
        layer.attention.output.dense.weight.data.zero_()
    assert chosen(hold(model)).name == "masked token"
    assert chosen(hold(model, tiny.tokenizer())).name == "next token"


def test_decoder_of_a_pair_is_asked_for_the_text() -> None:
    loaded = hold(make("T5ForConditionalGeneration", tiny.T5_SIZES | {"decoder_start_token_id": 0}))
    prepared = chosen(loaded).prepare(next(iter(batches(samples(["w3 w5 w9"]), loaded))))
    assert prepared.inputs["decoder_input_ids"].tolist() == [[0, 1, 7, 9, 13]]
    assert prepared.targets is not None and prepared.targets.tolist() == [7, 9, 13]
    assert prepared.column is not None and prepared.column.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "task_name"),
    [
        ("BertForSequenceClassification", "retrieval"),
        ("BertForMaskedLM", "retrieval"),
        ("BertModel", "retrieval"),
    ],
)
def test_a_random_head_is_not_asked(tmp_path: Path, name: str, task_name: str) -> None:
    trunk = make("BertModel", tiny.SIZES)
    trunk.config.architectures = [name]
    folder = tiny.saved(tmp_path, trunk, trained.tokenizer())
    config = (tmp_path / "config.json").read_text().replace('"BertModel"', f'"{name}"')
    (tmp_path / "config.json").write_text(config)
    loaded = load_model(folder, device="cpu")
    assert type(loaded.model).__name__ == name
    task, notes = choose_task(loaded, samples())
    assert task is not None and task.name == task_name
    assert any("it is random" in note for note in notes) == (name != "BertModel")
    assert type(task.model).__name__ == "BertModel"


def test_a_random_pooler_is_part_of_a_classifier_only(tmp_path: Path) -> None:
    for name, task_name in (
        ("BertForSequenceClassification", "retrieval"),
        ("BertForPreTraining", "masked token"),
    ):
        folder = tiny.saved(tmp_path / name, make(name, tiny.SIZES), trained.tokenizer())
        file = tmp_path / name / "model.safetensors"
        kept = {key: value for key, value in load_file(file).items() if "pooler" not in key}
        save_file(kept, file, metadata={"format": "pt"})
        loaded = load_model(folder, device="cpu")
        assert loaded.random == ("bert.pooler.dense.bias", "bert.pooler.dense.weight")
        assert chosen(loaded).name == task_name


def test_the_head_of_an_adapter_is_asked(tmp_path: Path) -> None:
    """The base model's checkpoint has none; the adapter brings it."""
    peft = pytest.importorskip("peft")
    base = tiny.saved(tmp_path / "base", make("BertModel", tiny.SIZES), trained.tokenizer())
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace('"BertModel"', '"BertForSequenceClassification"'))
    model = transformers.BertForSequenceClassification.from_pretrained(base)
    for saves, task_name in ((["classifier", "pooler"], "classification"), (["pooler"], "retrieval")):
        options = {"target_modules": ["query"], "modules_to_save": saves}
        adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
        adapted.save_pretrained(tmp_path / task_name)
        trained.tokenizer().save_pretrained(tmp_path / task_name)
        loaded = load_model(str(tmp_path / task_name), device="cpu")
        task = chosen(loaded)
        assert task.name == task_name
        prepared = task.prepare(next(iter(batches(task.samples, loaded))))
        assert task.read(task.model(**prepared.inputs), prepared)
        model = adapted.unload()


def test_a_head_of_the_checkpoint_is_asked(tmp_path: Path) -> None:
    model = make("BertForSequenceClassification", tiny.SIZES | {"num_labels": 3})
    loaded = load_model(tiny.saved(tmp_path, model, trained.tokenizer()), device="cpu")
    assert loaded.random == () and chosen(loaded).name == "classification"


def test_heads_that_depend_on_padding() -> None:
    gpt2 = make("GPT2ForSequenceClassification", tiny.GPT2_SIZES | {"pad_token_id": None})
    task, notes = choose_task(hold(gpt2), samples())
    assert task is not None and task.name == "retrieval"
    assert "does not run" in notes[0] and "padding" in notes[0]
    assert chosen(hold(gpt2), batch_size=1).name == "classification"
    other = make("GPT2ForSequenceClassification", tiny.GPT2_SIZES | {"pad_token_id": 9})
    task, notes = choose_task(hold(other), samples())
    assert task is not None and task.name == "retrieval" and "depends on the padding" in notes[0]
    task, notes = choose_task(hold(other), samples(["w1 w2 w3", "w5 w6 w7", "w1 w2"]))  # the last is padded
    assert task is not None and task.name == "retrieval" and "depends on the padding" in notes[0]
    assert chosen(hold(other), samples(["w1 w2 w3", "w5 w6 w7", "w1 w4 w2"])).name == "classification"


def test_one_number_is_no_class() -> None:
    loaded = hold(make("BertForSequenceClassification", tiny.SIZES | {"num_labels": 1}))
    task, notes = choose_task(loaded, samples())
    assert task is not None and task.name == "retrieval" and "neither of classes" in notes[0]


def test_images() -> None:
    images = [Image.effect_noise((8, 8), 20 + 30 * i) for i in range(4)]
    given = load_samples(images, modality="image")
    processor = transformers.ViTImageProcessorPil(size={"height": 8, "width": 8})
    config = transformers.ViTConfig(**tiny.VIT_SIZES, num_labels=5)
    torch.manual_seed(0)
    loaded = hold(transformers.ViTForImageClassification(config), processor, "image")
    task = chosen(loaded, replace(given, labels=[0, 1, 4, 1]))
    found = tally(loaded, task, batch_size=3)
    logits = (
        torch.cat([loaded.model(**batch.inputs).logits.detach() for batch in batches(given, loaded)])
        .double()
        .numpy()
    )
    right = [numbers(logits[i : i + 1], logits[i : i + 1], [label]) for i, label in enumerate((0, 1, 4, 1))]
    np.testing.assert_allclose(found.scores()[FULL]["loss"], [row["loss"] for row in right], atol=2e-6)
    assert found.baselines()["accuracy"] == 0.5


def test_labels_without_a_use(trained_causal: Loaded) -> None:
    _, notes = choose_task(trained_causal, samples(labels=KINDS))
    assert notes == ["The label column was not used: the model's task is the next token."]


def test_what_a_model_is_for_is_found_out_on_short_texts_and_once_in_a_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Importance and paths ask for the task of the same samples. Another number of samples is another question."""
    given = hold(make("GPT2LMHeadModel", tiny.SIZES | {"max_position_embeddings": 128}), tiny.tokenizer())
    texts = samples([tiny.words(100, step) for step in (1, 3, 5)])
    tokens: list[int] = []
    hook = given.model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with each_once():
        first, _ = choose_task(given, texts)
        asked = len(tokens)
        again, notes = choose_task(given, replace(texts, items=list(texts.items)))
        assert again is first and len(tokens) == asked > 0
        assert choose_task(given, replace(texts, items=texts.items[:2]))[0] is not first
        notes.append("of one reader")
        assert "of one reader" not in choose_task(given, texts)[1]
    assert choose_task(given, texts)[0] is not first
    assert set(tokens) == {64}
    hook.remove()
    asked_in_a_run = counted(monkeypatch, "_found_out")
    rc_probe.probe(given.model, [tiny.words(9 + n) for n in range(16)], processor=given.processor, init=False)
    assert len(asked_in_a_run) == 1


def test_texts_are_cut_once_in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths and embeddings both search with halves of what is read of the texts."""
    given = hold(make("BertModel", tiny.SIZES | {"max_position_embeddings": 128}), tiny.tokenizer())
    cut = counted(monkeypatch, "what_is_read")
    rc_probe.probe(given.model, [tiny.words(9 + n) for n in range(16)], processor=given.processor, init=False)
    assert len(cut) == 1
    other = hold(make("BertModel", tiny.SIZES | {"max_position_embeddings": 16}), given.processor)
    one, two = samples(["a b c d"] * 3), samples(["d c b a"] * 3)
    with each_once():  # of other texts, to another length, for another model, it is another question
        for loaded, texts, length in ((given, one, 32), (given, one, 16), (given, two, 32), (other, two, 32)):
            for _ in range(2):
                choose.embedding_task(loaded, texts, length=length)
    assert len(cut) == 5


def test_what_was_asked_about_lives_on_so_that_nothing_else_is_taken_for_it() -> None:
    class Text(str): ...

    text = Text("a")
    dropped = weakref.ref(text)
    with each_once():
        choose._once("read", [text], (), lambda: None)
        del text
        assert dropped() is not None
    assert dropped() is None


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """An entry for each call of a function of `choose`."""
    calls: list[str] = []
    real = getattr(choose, name)

    def count(*args: Any, **options: Any) -> Any:
        calls.append(name)
        return real(*args, **options)

    monkeypatch.setattr(choose, name, count)
    return calls
