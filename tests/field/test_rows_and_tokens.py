"""Which rows and tokens of what a user runs count: those that are text, each text once."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.by_hand import (
    SEQ2SEQ,
    SIZES,
    blocks_of,
    gpt2,
    handed_on,
    ids,
    is_curve,
    made,
    residuals,
)  # fmt: skip
from support.tiny import tokenizer, words

import rc_probe
from rc_probe import RcProbeError

LONG = {"attention_window": [16] * 3, "max_position_embeddings": 66}
LED = SEQ2SEQ | {
    "attention_window": 16,
    "max_encoder_position_embeddings": 64,
    "max_decoder_position_embeddings": 64,
}
BIG_BIRD = SIZES | {"block_size": 4, "num_random_blocks": 1, "max_position_embeddings": 128}


def longformer() -> tuple[Any, str, dict[str, Any]]:
    return made("LongformerModel", "LongformerConfig", **(SIZES | LONG)), "encoder.layer", {}


def led() -> tuple[Any, str, dict[str, Any]]:
    return made("LEDModel", "LEDConfig", **LED), "encoder.layers", {"stack": "encoder"}


def big_bird() -> tuple[Any, str, dict[str, Any]]:
    return made("BigBirdModel", "BigBirdConfig", **BIG_BIRD), "encoder.layer", {}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("build", "length"), [(longformer, 8), (longformer, 9), (led, 9), (big_bird, 50)])
def test_padding_that_the_model_adds_is_no_token(build: Any, length: int, masked: bool) -> None:
    model, name, options = build()
    text, mask = ids(length, *([length - 3] if masked else []))
    inputs = {"input_ids": text} | ({"attention_mask": mask} if masked else {})
    inputs |= {"decoder_input_ids": text[:, :4]} if build is led else {}
    streams = handed_on(blocks_of(model, name), lambda: model(**inputs))
    assert streams[0].shape[1] > length
    wanted = residuals([x[:, :length] for x in streams], mask)
    with torch.no_grad(), rc_probe.attach(model, **options) as probe:
        model(**inputs)
    is_curve(probe.frame(), wanted, len(text))


def test_padding_that_the_model_adds_is_no_token_of_a_run_either() -> None:
    model = made("LongformerForMaskedLM", "LongformerConfig", **(SIZES | LONG | {"vocab_size": 32}))
    texts, tokens = [words(6), words(7, 3)], tokenizer()
    singles = [tokens(text, return_tensors="pt")["input_ids"] for text in texts]
    layers = blocks_of(model, "longformer.encoder.layer")
    each = [residuals([x[:, : t.shape[1]] for x in handed_on(layers, lambda t=t: model(t))]) for t in singles]
    result = rc_probe.probe(model, texts, processor=tokens, init=False, paths=False, recursion=False)
    rows = result.tables["residuals"].query("variant == 'transformer' and metric == 'residual'")
    assert rows["mean"].tolist() == pytest.approx(
        [sum(pair) / 2 for pair in zip(*each, strict=True)], rel=1e-9
    )


def test_tokens_that_the_model_adds_and_nothing_tells_are_refused() -> None:
    class Added(torch.nn.Module):
        """Two tokens before the text, and no mask of the blocks that says so."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = gpt2("GPT2Model"), None

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            embedded = self.inner.wte(torch.nn.functional.pad(input_ids, (2, 0), value=3))
            return self.inner(inputs_embeds=embedded).last_hidden_state

    text, mask = ids(7, 5)
    inputs = {"input_ids": text, "attention_mask": mask}
    with pytest.raises(RcProbeError, match=r"7 tokens and its stream 9.*cannot be told.*mask="):  # noqa: SIM117
        with rc_probe.attach(model := Added(), inputs=inputs):
            model(**inputs)


def test_the_users_mask_counts_and_no_inner_one() -> None:
    """The inner model is told that everything is real."""

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = gpt2("GPT2Model")

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.inner(input_ids, attention_mask=torch.ones_like(input_ids))

    model = Outer()
    text, mask = ids(9, 4)
    inputs = {"input_ids": text, "attention_mask": mask}
    streams = handed_on(blocks_of(model, "inner.h"), lambda: model(**inputs))
    with torch.no_grad(), rc_probe.attach(model, inputs=inputs) as probe:
        model(**inputs)
    is_curve(probe.frame(), residuals(streams, mask), 2)


def test_rows_of_fewer_than_two_tokens_are_no_samples() -> None:
    model = gpt2("GPT2Model")
    text, mask = ids(4, 1)
    inputs = {"input_ids": text, "attention_mask": mask}
    wanted = residuals(handed_on(blocks_of(model, "h"), lambda: model(**inputs)), mask)
    monitor = rc_probe.Monitor(model, [inputs])
    monitor.measure()
    with torch.no_grad(), rc_probe.attach(model) as probe:
        model(**inputs)
    for frame in (probe.frame(), monitor.frame()):
        is_curve(frame, wanted, 1)
    with torch.no_grad(), rc_probe.attach(model) as probe:
        model(**{name: t[1:] for name, t in inputs.items()})
    with pytest.raises(RcProbeError, match=r"none of the passes.*1 rows have fewer than two real tokens"):
        probe.frame()


def test_texts_packed_by_positions_are_refused() -> None:
    model = made("LlamaModel", "LlamaConfig", **SIZES)
    text, _ = ids(12)
    positions = torch.tensor([[*range(5), *range(7)]])
    with pytest.raises(RcProbeError, match=r"packs 2 texts.*a row of its own"), rc_probe.attach(model):
        model(text, position_ids=positions, use_cache=False)
    left, mask = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    positions = torch.tensor([[1, 1, 0, 1, 2], [*range(5)]])  # as generate makes them of padding on the left
    with torch.no_grad(), rc_probe.attach(model) as probe:
        model(left, attention_mask=mask, position_ids=positions)
    assert probe.frame()["count"].eq(2).all()


LOOKUP = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7]])
STEPS: dict[str, dict[str, Any]] = {
    "greedy": {}, "lookup": {"prompt_lookup_num_tokens": 3}, "no cache": {"use_cache": False}, "beams": {"num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2, "num_beams": 2}, "helped": {"assistant_model": True},
    "static": {"cache_implementation": "static"},
}  # fmt: skip


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("how", STEPS)
def test_a_prompt_of_generate_is_one_sample_however_it_goes_on(how: str, padded: bool) -> None:
    model, options = gpt2(), dict(STEPS[how])
    single = how in {"lookup", "helped"}  # of one text only, says the library
    text, mask = (LOOKUP, torch.ones_like(LOOKUP)) if single else ids(6, 4 if padded else 6)
    if padded:  # on the left
        extra = (2, 0) if single else (0, 0)
        text, mask = torch.nn.functional.pad(text, extra), torch.nn.functional.pad(mask, extra)
        text, mask = (text, mask) if single else (text.flip(1), mask.flip(1))
    if how == "helped":
        options["assistant_model"] = gpt2(n_layer=1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    blocks = blocks_of(model, "transformer.h")
    wanted = residuals(
        handed_on(blocks, lambda: model(text, attention_mask=mask, position_ids=positions)), mask
    )
    with rc_probe.attach(model) as probe:
        model.generate(
            text, attention_mask=mask, max_new_tokens=6, pad_token_id=0, **({"do_sample": False} | options)
        )
    is_curve(probe.frame(), wanted, len(text))


def test_a_prompt_in_chunks_is_refused() -> None:
    model, (text, mask) = gpt2(), ids(12, 12)
    with (
        pytest.raises(RcProbeError, match=r"chunks of 5 tokens.*without prefill_chunk_size"),
        rc_probe.attach(model),
    ):
        model.generate(text, attention_mask=mask, prefill_chunk_size=5, max_new_tokens=2)


def test_going_on_from_a_cache_is_no_sample_and_is_said() -> None:
    model, (text, _) = gpt2(), ids(9)
    with torch.no_grad():
        cache = model(text[:, :5], use_cache=True).past_key_values
        with rc_probe.attach(model) as probe:
            model(text[:, 5:], past_key_values=cache)
            model(text[:, :1])
    with pytest.raises(RcProbeError, match="1 went on from a filled cache, 1 were of one token"):
        probe.frame()


def test_the_encoder_under_beams_and_the_decoder_of_generate() -> None:
    model = made("BartForConditionalGeneration", "BartConfig", **SEQ2SEQ, forced_eos_token_id=None)
    text, mask = ids(9, 6)
    streams = handed_on(blocks_of(model, "model.encoder.layers"), lambda: model.model.encoder(text, mask))
    with rc_probe.attach(model, stack="encoder") as probe, rc_probe.attach(model, stack="decoder") as other:
        model.generate(text, attention_mask=mask, num_beams=3, max_new_tokens=3, do_sample=False)
    is_curve(probe.frame(), residuals(streams, mask), 2)
    with pytest.raises(
        RcProbeError, match="none of the passes that were seen is a sample: 1 were of one token"
    ):
        other.frame()


@pytest.mark.parametrize("cls", ["BartForConditionalGeneration", "T5ForConditionalGeneration"])
def test_labels_alone_say_which_tokens_of_the_decoder_are_text(cls: str, tmp_path: Path) -> None:
    t5 = {
        "vocab_size": 70,
        "d_model": 32,
        "d_kv": 8,
        "num_heads": 4,
        "d_ff": 64,
        "num_layers": 2,
        "decoder_start_token_id": 0,
    }
    model = made(cls, cls.partition("For")[0] + "Config", **(t5 if cls[0] == "T" else SEQ2SEQ))
    text, mask = ids(9, 6)
    goal, real = ids(7, 4, seed=2)
    batch = {"input_ids": text, "attention_mask": mask, "labels": goal.masked_fill(real == 0, -100)}
    blocks = blocks_of(model, "decoder.block" if cls[0] == "T" else "model.decoder.layers")
    wanted = residuals(handed_on(blocks, lambda: model(**batch)), real)
    with torch.no_grad(), rc_probe.attach(model) as probe:
        model(**batch)
    is_curve(probe.frame(), wanted, 2)
    rows = [
        {"input_ids": t[m == 1].tolist(), "labels": g[r == 1].tolist()}
        for t, m, g, r in zip(text, mask, goal, real, strict=True)
    ]
    arguments = transformers.Seq2SeqTrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True
    )
    collate = transformers.DataCollatorForSeq2Seq(tokenizer(), label_pad_token_id=-100)
    trainer = transformers.Seq2SeqTrainer(model, arguments, eval_dataset=rows, data_collator=collate)
    watched = rc_probe.watch(trainer)
    assert trainer.evaluate()["eval_residual_last"] == pytest.approx(wanted[-1], rel=1e-9)
    watched.remove()


def test_a_tower_beside_masked_texts_has_no_padding() -> None:
    text = SIZES | {"num_hidden_layers": 2, "max_position_embeddings": 20}
    image = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    image |= {"image_size": 16, "patch_size": 8}
    model = made("CLIPModel", "CLIPConfig", text_config=text, vision_config=image, projection_dim=16)
    tokens, mask = ids(5, 3)  # as many as a picture has patches, and one for all of it
    inputs = {"input_ids": tokens, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 16, 16).double()}
    streams = handed_on(blocks_of(model, "vision_model.encoder.layers"), lambda: model(**inputs))
    assert streams[0].shape[1] == tokens.shape[1]
    with torch.no_grad(), rc_probe.attach(model, inputs=inputs, stack="vision") as probe:
        model(**inputs)
    is_curve(probe.frame(), residuals(streams), 2)


def test_passes_of_our_own_are_none_of_the_users() -> None:
    model, tokens = gpt2(vocab_size=32), tokenizer(special=False)
    text, mask = ids(9, 6)
    inputs = {"input_ids": text % 32, "attention_mask": mask}
    wanted = residuals(handed_on(blocks_of(model, "transformer.h"), lambda: model(**inputs)), mask)
    with torch.no_grad(), rc_probe.attach(model) as probe:
        monitor = rc_probe.Monitor(model, [inputs])
        model(**inputs)
        monitor.measure()
        rc_probe.probe(
            model, [words(4), words(6)], processor=tokens, init=False, paths=False, recursion=False
        )
        with (  # each proved anew
            rc_probe.ablate(model, "mlp@1=1", inputs={"inputs_embeds": torch.randn(2, 5, 32).double()}),
            rc_probe.ablate(model, "mlp@2=1", inputs=inputs | {"position_ids": torch.arange(9)[None]}),
        ):
            model(**inputs)
    assert not probe.left_out, "not even passes that end early were seen"
    is_curve(probe.frame(), wanted, 4)
    is_curve(monitor.frame(), wanted, 2)


def test_a_model_is_proved_as_it_is_outside_of_other_contexts() -> None:
    model, (text, mask) = gpt2("GPT2Model"), ids(9, 6)
    with rc_probe.ablate(model, "attention"), torch.no_grad():
        streams = handed_on(blocks_of(model, "h"), lambda: model(text, attention_mask=mask))
        with rc_probe.attach(model, inputs={"inputs_embeds": torch.randn(2, 5, 32).double()}) as probe:
            model(text, attention_mask=mask)
    assert probe.structure.signature == "A|M"
    is_curve(probe.frame(), residuals(streams, mask), 2)


def test_blocks_that_were_dropped_are_said() -> None:
    model = made("BartModel", "BartConfig", **SEQ2SEQ, encoder_layerdrop=1.0)
    text, mask = ids(9, 6)
    with torch.no_grad(), rc_probe.attach(model, stack="encoder") as probe:
        model.train()
        model(text, attention_mask=mask)
    model.eval()
    with pytest.raises(RcProbeError, match=r"none of the passes.*: 1 ran 0 of 2 blocks"):
        probe.frame()
