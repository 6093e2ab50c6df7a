"""`attach` and `ablate` around the loops of other libraries, against streams that the model gives itself."""

import copy
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from PIL import Image
from support import tiny
from support.loops import REAL, TEXTS, alone, numpy_residual, tokenized
from transformers import pipeline

import rc_probe
from rc_probe.models.load import Loaded
from rc_probe.models.locate import locate


def means(frame: pd.DataFrame, metric: str = "residual") -> list[float]:
    return frame[frame["metric"] == metric]["mean"].tolist()


def without_mlp(model: Any, name: str) -> Any:
    """A copy whose module `name`, the last of an MLP, writes zeros."""
    model = copy.deepcopy(model)
    for parameter in model.get_submodule(name).parameters():
        parameter.data.zero_()
    return model


def numbers(output: Any) -> np.ndarray:
    """All scores and features that a pipeline returned."""
    if isinstance(output, dict):
        return np.concatenate([numbers(output[key]) for key in sorted(output)])
    if isinstance(output, list):
        return np.concatenate([numbers(item) for item in output])
    return np.atleast_1d(np.asarray(output, dtype=float)) if not isinstance(output, str) else np.array([])


@pytest.mark.parametrize(
    ("task", "cls", "texts"),
    [
        ("text-classification", "BertForSequenceClassification", TEXTS),
        ("fill-mask", "BertForMaskedLM", [f"{text} w27 w3" for text in TEXTS if "w27" not in text]),
        ("feature-extraction", "BertModel", TEXTS),
    ],
)
def test_text_pipelines(task: str, cls: str, texts: list[str]) -> None:
    model, tokenizer = tiny.bert(cls).eval(), tiny.tokenizer(mask_token="w27")
    last = ("" if cls == "BertModel" else "bert.") + "encoder.layer.1.output.dense"
    run = pipeline(task, model=model, tokenizer=tokenizer, batch_size=3)
    plain = run(texts)
    with rc_probe.attach(model) as probe:
        attached = run(texts)
    frame = probe.frame()
    assert frame["count"].eq(len(texts)).all()
    assert means(frame) == pytest.approx(alone(model, tokenized(tokenizer, texts), 3), rel=1e-5)
    assert numbers(attached).tolist() == numbers(plain).tolist()
    with rc_probe.ablate(model, "mlp@2"):
        ablated = numbers(run(texts))
    zeroed = pipeline(task, model=without_mlp(model, last), tokenizer=tokenizer, batch_size=3)
    assert ablated.tolist() == numbers(zeroed(texts)).tolist() != numbers(plain).tolist()


def gpt2() -> tuple[Any, Any]:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**tiny.GPT2_SIZES)).eval()
    return model, tiny.tokenizer(
        special=False, padding_side="left", model_input_names=["input_ids", "attention_mask"]
    )


def test_text_generation_measures_each_prompt_once() -> None:
    model, tokenizer = gpt2()
    run = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=3)
    how = {"max_new_tokens": 4, "do_sample": False}
    plain = run(TEXTS, **how)
    with rc_probe.attach(model) as probe:
        assert run(TEXTS, **how) == plain
    assert probe.frame()["count"].eq(len(TEXTS)).all()
    # Before the last, whose hidden state has the final norm.
    assert means(probe.frame())[:2] == pytest.approx(alone(model, tokenized(tokenizer), 2), rel=1e-5)
    with rc_probe.ablate(model, "mlp@2"):
        ablated = run(TEXTS, **how)
    zeroed = without_mlp(model, "transformer.h.1.mlp.c_proj")
    assert ablated == pipeline("text-generation", model=zeroed, tokenizer=tokenizer, batch_size=3)(
        TEXTS, **how
    )


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"use_cache": False}])
def test_generate_measures_the_padded_prompts(how: dict[str, Any]) -> None:
    model, tokenizer = gpt2()
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert not inputs["attention_mask"][:, 0].all()
    with rc_probe.attach(model) as probe:
        model.generate(**inputs, max_new_tokens=1 if how else 4, do_sample=False, **how)
    assert probe.frame()["count"].eq(5).all()
    assert means(probe.frame())[:2] == pytest.approx(alone(model, tokenized(tokenizer), 2), rel=1e-5)


@pytest.mark.parametrize("told", [True, False])
def test_a_cache_that_makes_masks_of_its_own(told: bool) -> None:
    model, tokenizer = gpt2()
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    how = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    with rc_probe.attach(model, mask=inputs["attention_mask"] if told else "auto") as probe:
        model.generate(**inputs, **how)
    assert means(probe.frame())[:2] == pytest.approx(alone(model, tokenized(tokenizer), 2), rel=1e-5)


def test_image_pipelines() -> None:
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**tiny.VIT_SIZES)).eval()
    processor = transformers.ViTImageProcessorPil(size={"height": 8, "width": 8})
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 255, (9, 9, 3), dtype=np.uint8)) for _ in range(5)]
    run = pipeline("image-classification", model=model, image_processor=processor, batch_size=2)
    plain = run(images)
    with rc_probe.attach(model) as probe:
        assert run(images) == plain
    singles = [dict(processor(image, return_tensors="pt")) for image in images]
    assert probe.frame()["count"].eq(5).all()
    assert means(probe.frame()) == pytest.approx(alone(model, singles, 3), rel=1e-5)
    with rc_probe.ablate(model, "mlp@2"):
        assert run(images) != plain


def trainer_of(model: Any, tokenizer: Any, folder: Path, **options: Any) -> transformers.Trainer:
    rows = [{**tokenizer(text), "labels": i % 2} for i, text in enumerate(TEXTS)]
    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=True, per_device_eval_batch_size=2, disable_tqdm=True, report_to=[], **options
    )
    collate = transformers.DataCollatorWithPadding(tokenizer)
    return transformers.Trainer(model, arguments, eval_dataset=rows, data_collator=collate)


def test_the_evaluation_of_a_trainer(tmp_path: Path) -> None:
    model, tokenizer = tiny.bert("BertForSequenceClassification").eval(), tiny.tokenizer()
    trainer = trainer_of(model, tokenizer, tmp_path)
    plain = trainer.evaluate()["eval_loss"]
    with rc_probe.attach(model) as probe:
        assert trainer.evaluate()["eval_loss"] == plain
    assert probe.frame()["count"].eq(5).all()
    assert means(probe.frame()) == pytest.approx(alone(model, tokenized(tokenizer), 3), rel=1e-5)
    with rc_probe.ablate(model, "mlp@2"):
        ablated = trainer.evaluate()["eval_loss"]
    zeroed = without_mlp(model, "bert.encoder.layer.1.output.dense")
    assert ablated == trainer_of(zeroed, tokenizer, tmp_path).evaluate()["eval_loss"] != plain


@pytest.fixture(scope="module")
def sentences() -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(locate("demo", None, False).place), device="cpu")


@pytest.mark.parametrize("whole", [True, False])
def test_sentence_transformers_encode(sentences: Any, demo: Loaded, whole: bool) -> None:
    model = sentences if whole else sentences[0].auto_model
    plain = sentences.encode(REAL)
    before = vars(type(sentences[0].auto_model)).get("forward")
    with rc_probe.attach(model) as probe:
        assert vars(type(sentences[0].auto_model)).get("forward") is not before
        encoded = sentences.encode(REAL, batch_size=2)
    assert vars(type(sentences[0].auto_model)).get("forward") is before
    assert np.allclose(encoded, plain, atol=1e-6)
    assert probe.frame()["count"].eq(3).all()
    singles = [dict(demo.processor(text, return_tensors="pt")) for text in REAL]
    assert means(probe.frame()) == pytest.approx(alone(demo.model, singles, 7), rel=1e-5)
    with rc_probe.ablate(model, "mlp@6"):
        ablated = sentences.encode(REAL)
    zeroed = without_mlp(demo.model, "encoder.layer.5.output.dense")
    inputs = demo.processor(REAL, padding=True, return_tensors="pt")
    with torch.no_grad():
        states, mask = zeroed(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
    pooled = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))
    assert np.allclose(ablated, pooled.numpy(), atol=1e-6)
    assert not np.allclose(ablated, plain, atol=1e-3)


def test_a_sentence_transformer_without_blocks_is_told() -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    static = SentenceTransformer(
        modules=[StaticEmbedding(tiny.tokenizer().backend_tokenizer, embedding_dim=4)]
    )
    with pytest.raises(rc_probe.RcProbeError, match="SentenceTransformer: no transformers model in it"):
        rc_probe.attach(static)


def test_texts_packed_into_one_row_are_refused() -> None:
    model, tokenizer = tiny.bert(), tiny.tokenizer()
    ids = torch.cat([sample["input_ids"] for sample in tokenized(tokenizer, TEXTS[:2])], 1)
    with (
        pytest.raises(rc_probe.RcProbeError, match=r"packs 2 texts.*unpad_inputs"),
        rc_probe.attach(model),
    ):
        model(ids, cu_seq_lens_q=torch.tensor([0, 6, ids.shape[1]]))


@pytest.mark.parametrize("attached_inside", [True, False])
@pytest.mark.parametrize("mode", ["inference", "autocast", "both"])
def test_inference_mode_and_autocast(demo: Loaded, mode: str, attached_inside: bool) -> None:
    from contextlib import ExitStack

    inputs = demo.processor(REAL, padding=True, return_tensors="pt")

    def modes(stack: ExitStack) -> None:
        if mode != "autocast":
            stack.enter_context(torch.inference_mode())
        if mode != "inference":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))

    model = copy.deepcopy(demo.model)
    with torch.no_grad(), ExitStack() as stack:
        if attached_inside:
            modes(stack)
            probe = stack.enter_context(rc_probe.attach(model))
        else:
            probe = stack.enter_context(rc_probe.attach(model))
            modes(stack)
        states = model(**inputs, output_hidden_states=True).hidden_states
    mask = inputs["attention_mask"].bool().numpy()
    wanted = [
        np.mean([numpy_residual(x[m]) for x, m in zip(s.float().numpy(), mask, strict=True)]) for s in states
    ]
    frame = probe.frame()
    assert means(frame) == pytest.approx(wanted, rel=2e-6)
    assert all(m.mean.dtype == torch.float64 for m in probe.curves.values.values())
    coarse = torch.bfloat16 if mode != "inference" else torch.float32
    assert frame.query("metric == 'residual'")["floor"].unique() == pytest.approx(
        [4 * torch.finfo(coarse).eps]
    )
    with torch.no_grad(), ExitStack() as stack:
        if attached_inside:
            modes(stack)
            stack.enter_context(rc_probe.ablate(model, "mlp@6"))
        else:
            stack.enter_context(rc_probe.ablate(model, "mlp@6"))
            modes(stack)
        ablated = model(**inputs).last_hidden_state
    zeroed = without_mlp(demo.model, "encoder.layer.5.output.dense")
    with torch.no_grad(), ExitStack() as stack:
        modes(stack)
        assert torch.equal(ablated, zeroed(**inputs).last_hidden_state)


@pytest.mark.parametrize("way", ["wrapped", "in place", "wrapped, attached"])
def test_compiled_models(way: str) -> None:
    model, tokenizer = tiny.bert("BertForSequenceClassification").eval(), tiny.tokenizer()
    inputs = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    if way == "in place":
        model.compile(backend="eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = compiled(**inputs).logits
        with rc_probe.attach(compiled if "attached" in way else model) as probe:
            attached = compiled(**inputs).logits
        with rc_probe.ablate(compiled if "attached" in way else model, "mlp@2"):
            ablated = compiled(**inputs).logits
        zeroed = without_mlp(model, "bert.encoder.layer.1.output.dense")
        assert torch.equal(ablated, zeroed(**inputs).logits)
        assert torch.equal(compiled(**inputs).logits, plain)
    assert torch.equal(attached, plain)
    assert means(probe.frame()) == pytest.approx(alone(model, tokenized(tokenizer), 3), rel=1e-5)


def test_forward_called_directly_is_heard_and_forgotten() -> None:
    """Contexts that close in any order leave the class as it was; another model of the class is not measured."""
    model, tokenizer = tiny.bert(), tiny.tokenizer()
    other = tiny.bert()
    forward, wanted = vars(type(model))["forward"], signature(model.forward)
    inputs = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    first, second, third = rc_probe.attach(model), rc_probe.attach(model), rc_probe.attach(other)
    with torch.no_grad():
        for context in (first, second, third):
            context.__enter__()
        model.forward(**inputs)
        assert signature(model.forward) == wanted
        first.__exit__(None, None, None)
        model.forward(**inputs)
        third.__exit__(None, None, None)
        second.__exit__(None, None, None)
        assert vars(type(model))["forward"] is forward
    assert first.frame()["count"].eq(5).all()
    assert second.frame()["count"].eq(10).all()
    assert third.curves.samples == 0


def test_a_forward_that_was_replaced_is_heard_by_hooks() -> None:
    model, tokenizer = tiny.bert(), tiny.tokenizer()
    inputs = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    model.forward = model.forward  # as accelerate leaves its own there
    with torch.no_grad(), rc_probe.attach(model) as probe:
        model(**inputs)
        with pytest.raises(rc_probe.RcProbeError, match="without an attention mask"):
            model.forward(**inputs)  # and the mask of the call before is not taken for its own
    assert probe.frame()["count"].eq(5).all()
