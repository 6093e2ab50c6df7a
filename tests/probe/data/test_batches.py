"""Batches: the same numbers for any batch size and any padding, within what the model can take."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from support import tiny
from torch import Tensor

from rc_probe.data.batches import Batches, batches, long_enough
from rc_probe.data.samples import Samples, load_samples
from rc_probe.data.tokens import max_length
from rc_probe.hooks.errors import RcProbeError
from rc_probe.models.load import Loaded, load_model

TEXTS = [tiny.words(count, step) for step, count in ((1, 30), (3, 5), (5, 9), (7, 9), (2, 3))]


def loaded(model: Any, processor: Any = None, modality: str = "text") -> Loaded:
    """What load_model makes, of a model that the test holds."""
    processor = processor or tiny.tokenizer()
    return Loaded(model.eval(), model.config, type(model).__name__, None, modality, processor)


def text_samples(texts: list[str] | None = None) -> Samples:
    return load_samples(texts or TEXTS, modality="text")


def make(name: str, sizes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    return getattr(transformers, f"{name}Model")(config)


FAMILIES: dict[str, dict[str, Any]] = {
    "Bert": tiny.SIZES,
    "Roberta": tiny.SIZES,
    "MPNet": tiny.SIZES,
    "GPT2": tiny.GPT2_SIZES,
    "Llama": tiny.SIZES | {"num_key_value_heads": 2},
    "XLNet": {"vocab_size": 32, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32},
    "Bloom": {"vocab_size": 32, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "OPT": tiny.SIZES | {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "T5": tiny.T5_SIZES | {"decoder_start_token_id": 0},
    "Bart": {"vocab_size": 32, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2}
    | {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 20}
    | {"encoder_attention_heads": 2, "decoder_attention_heads": 2},
    "FNet": tiny.SIZES,  # mixes all tokens, and takes no mask
    "ModernBert": tiny.SIZES | {"num_hidden_layers": 3, "cls_token_id": 1, "sep_token_id": 2},
}
LIMITS = {"XLNet": None, "Bloom": None, "T5": None, "Roberta": 19, "MPNet": 18}  # MPNet: padding_idx is 1


def states(model: Any, made: Batches) -> list[Tensor]:
    """The last hidden state of each text, padding left out: a list of (T, D)."""
    found = []
    with torch.no_grad():
        for batch in made:
            hidden = model(**batch.inputs).last_hidden_state
            for i, rows in enumerate(hidden):
                found.append(rows if batch.mask is None else rows[batch.mask[i]])
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_same_numbers_for_any_batch_size(name: str) -> None:
    model = make(name, FAMILIES[name])
    one = loaded(model, tiny.tokenizer(pad=name != "GPT2"))
    alone = batches(text_samples(), one, batch_size=1, length=64)
    plain = states(model, alone)
    assert all(batch.mask is None for batch in alone)
    assert max_length(one) == LIMITS.get(name, 20)
    for size in (2, 3, 5):
        made = batches(text_samples(), one, batch_size=size, length=64)
        for expected, found in zip(plain, states(model, made), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
        assert made.tokens == sum(len(rows) for rows in plain)


@pytest.mark.parametrize("name", [name for name in FAMILIES if LIMITS.get(name, 20) is not None])
def test_no_text_goes_past_the_positions(name: str) -> None:
    model = make(name, FAMILIES[name])
    one = loaded(model)
    limit = max_length(one)
    made = batches(text_samples(), one, length=64)
    assert made.length == limit and made.truncated == 1
    assert made.note == f"--length cut from 64 to {limit}, all the positions that the model has"
    states(model, made)
    if name in ("Bert", "Roberta", "MPNet", "GPT2"):  # a table of positions: one more and it ends
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 5))


def test_demo_against_the_tokenizer_itself() -> None:
    demo = load_model("demo", device="cpu")
    samples = load_samples(None, modality="text", samples=4)
    made = batches(samples, demo)
    (batch,) = made
    plain = demo.processor(samples.items, truncation=True, max_length=128, return_tensors="pt")
    assert batch.inputs.keys() == plain.keys()
    assert all(torch.equal(batch.inputs[key], plain[key]) for key in plain)
    assert batch.mask is None
    assert (made.length, made.tokens, made.truncated, made.note) == (128, 4 * 128, 4, "")


def test_padding_and_mask() -> None:
    made = batches(text_samples([tiny.words(3), tiny.words(1)]), loaded(tiny.bert()))
    (batch,) = made
    assert batch.inputs["input_ids"].tolist() == [[1, 4, 5, 6, 2], [1, 4, 2, 0, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.mask is not None
    assert torch.equal(batch.mask, batch.inputs["attention_mask"].bool())
    assert (made.tokens, made.truncated) == (8, 0)


def test_batches_are_in_order_and_can_be_read_again() -> None:
    made = batches(text_samples(), loaded(tiny.bert()), batch_size=2)
    sizes = [tuple(batch.inputs["input_ids"].shape) for batch in made]
    assert sizes == [(2, 20), (2, 11), (1, 5)] and len(made) == 3
    assert [tuple(batch.inputs["input_ids"].shape) for batch in made] == sizes


def test_models_without_a_mask_get_no_padding() -> None:
    made = batches(text_samples(), loaded(make("FNet", tiny.SIZES)), batch_size=8)
    assert [tuple(batch.inputs["input_ids"].shape) for batch in made] == [(1, 20), (1, 7), (2, 11), (1, 5)]
    assert all(batch.mask is None and "attention_mask" not in batch.inputs for batch in made)


def test_special_tokens() -> None:
    (batch,) = batches(text_samples([tiny.words(3)]), loaded(tiny.bert()), special_tokens=False)
    assert batch.inputs["input_ids"].tolist() == [[4, 5, 6]]


def test_truncation_counts_the_cut_texts_only() -> None:
    samples = text_samples([tiny.words(4), tiny.words(6), tiny.words(7), tiny.words(9)])
    made = batches(samples, loaded(tiny.bert()), length=8)
    assert made.truncated == 2 and made.tokens == 6 + 8 + 8 + 8
    last = next(iter(made)).inputs["input_ids"][-1].tolist()
    assert last == [1, 4, 5, 6, 7, 8, 9, 2]  # the end token stays


def test_the_tokenizer_has_a_limit_too() -> None:
    one = loaded(tiny.bert(), tiny.tokenizer(model_max_length=12))
    assert batches(text_samples(), one).length == 12


def test_a_cut_length_is_noted_where_it_cut_a_text() -> None:
    one = loaded(tiny.bert(), tiny.tokenizer(model_max_length=12))
    assert batches(text_samples([tiny.words(5)]), one).note == ""
    note = batches(text_samples([tiny.words(5), tiny.words(20)]), one).note
    assert note == "--length cut from 128 to 12, all the positions that the model has"


def test_tokenizer_is_left_alone(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(pad=False, padding_side="left")
    tokenizer.backend_tokenizer.enable_padding(length=7, pad_id=3)
    tokenizer.save_pretrained(tmp_path / "before")
    list(batches(text_samples(), loaded(tiny.bert(), tokenizer)))
    tokenizer.save_pretrained(tmp_path / "after")
    before, after = (
        json.loads((tmp_path / name / "tokenizer.json").read_text()) for name in ("before", "after")
    )
    assert before == after and before["padding"]["strategy"] == {"Fixed": 7}
    assert tokenizer.pad_token is None


def test_decoder_reads_the_text_one_behind() -> None:
    plain, head = make("T5", FAMILIES["T5"]), transformers.T5ForConditionalGeneration
    for model in (plain, head(plain.config)):
        (batch,) = batches(text_samples([tiny.words(3), tiny.words(1)]), loaded(model))
        assert batch.inputs["decoder_input_ids"].tolist() == [[0, 1, 4, 5, 6], [0, 1, 4, 2, 0]]
        assert torch.equal(batch.inputs["decoder_attention_mask"], batch.inputs["attention_mask"])
    (batch,) = batches(text_samples([tiny.words(3)]), loaded(transformers.T5EncoderModel(plain.config)))
    assert "decoder_input_ids" not in batch.inputs


def test_one_token_texts() -> None:
    one = loaded(make("GPT2", tiny.GPT2_SIZES), tiny.tokenizer(special=False))
    fits = long_enough(one)
    samples = load_samples(["w1", "w1 w2", ""], modality="text", fits=fits)
    assert samples.items == ["w1 w2"] and "1 texts of fewer than two tokens" in samples.note
    with pytest.raises(RcProbeError, match="every text has fewer than two tokens"):
        load_samples(["w1", "w2"], modality="text", fits=fits)
    with pytest.raises(RcProbeError, match="text 1 has fewer than two tokens"):
        batches(text_samples(["w1 w2", "w1"]), one)
    bert = loaded(tiny.bert())
    assert long_enough(bert)("w1") and not long_enough(bert, special_tokens=False)("w1")


def test_tokenizer_of_another_model() -> None:
    with pytest.raises(RcProbeError, match=r"BertModel: the tokenizer makes token 31, the model knows 20"):
        batches(text_samples([tiny.words(28)]), loaded(tiny.bert(vocab_size=20, max_position_embeddings=64)))


def test_samples_for_another_model() -> None:
    with pytest.raises(RcProbeError, match="takes texts, and the samples are images"):
        batches(Samples("image", "here", [Image.new("RGB", (4, 4))]), loaded(tiny.bert()))


# Images


def vision(name: str = "ViT", **changes: Any) -> Loaded:
    model = make(name, tiny.VIT_SIZES)
    options: dict[str, Any] = {"size": {"height": 8, "width": 8}} | changes
    return loaded(model, transformers.ViTImageProcessorPil(**options), "image")


@pytest.mark.parametrize("name", ["ViT", "CLIPVision"])
def test_images(name: str, tmp_path: Path) -> None:
    one = vision(name)
    images = [Image.effect_noise((9, 7), 50), Image.new("RGBA", (8, 8), "red"), Image.new("P", (20, 5))]
    images[0].save(tmp_path / "a.png")
    samples = load_samples(images, modality="image")
    made = batches(samples, one, batch_size=2)
    assert [tuple(batch.inputs["pixel_values"].shape) for batch in made] == [(2, 3, 8, 8), (1, 3, 8, 8)]
    assert all(batch.mask is None and batch.inputs.keys() == {"pixel_values"} for batch in made)
    assert (made.length, made.tokens, made.note, len(made)) == (None, None, "", 2)
    alone = batches(samples, one, batch_size=1)
    for expected, found in zip(states(one.model, alone), states(one.model, made), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    (file,) = batches(load_samples(tmp_path, modality="image"), one)
    assert torch.equal(file.inputs["pixel_values"][0], next(iter(made)).inputs["pixel_values"][0])


def test_images_in_the_dtype_of_the_model() -> None:
    one = vision()
    one.model.to(torch.bfloat16)
    (batch,) = batches(load_samples([Image.new("RGB", (8, 8))], modality="image"), one)
    assert batch.inputs["pixel_values"].dtype == torch.bfloat16


def test_images_are_upright(tmp_path: Path) -> None:
    """Photographs are stored as the sensor lay; a tag says how to turn them."""
    image = Image.new("RGB", (8, 8), "white")
    image.paste("black", (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "a.png", exif=exif)
    (batch,) = batches(load_samples(tmp_path, modality="image"), vision())
    top, bottom = batch.inputs["pixel_values"][0, 0, 0, 0], batch.inputs["pixel_values"][0, 0, 7, 7]
    assert top > bottom


def test_image_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    made = batches(load_samples(tmp_path, modality="image"), vision())  # its header is fine
    with pytest.raises(RcProbeError, match=r"a\.png: not a readable image"):
        list(made)


def test_images_that_do_not_stack() -> None:
    images = [Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))]
    made = batches(load_samples(images, modality="image"), vision(do_resize=False))
    with pytest.raises(RcProbeError, match=r"image processor does not take these images.*--batch-size 1"):
        list(made)
