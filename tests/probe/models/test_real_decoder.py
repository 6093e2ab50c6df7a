"""A real decoder from a GGUF file: SmolLM2-135M, whose massive token stands at position 1 from block 12 to layer 29."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from support.loops import numpy_residual

import rc_probe
from rc_probe.data.batches import batches
from rc_probe.data.samples import load_samples
from rc_probe.interventions.grammar import parse_intervention
from rc_probe.interventions.intervention import Variant
from rc_probe.measures.context import Context
from rc_probe.measures.importance.scored import plan_scored, score
from rc_probe.measures.massive import FACTORS, MOST
from rc_probe.measures.massive_reader import MassiveReader
from rc_probe.measures.variant_passes import measure_variants
from rc_probe.models.load import Loaded, load_model
from rc_probe.models.locate import locate
from rc_probe.models.packaged import DEMOS
from rc_probe.processes.world import World
from rc_probe.settings import Settings


@pytest.fixture(scope="module")
def readers() -> list[Any]:
    """The GGUF files that were parsed."""
    return []


@pytest.fixture(scope="module")
def decoder(readers: list[Any]) -> Loaded:
    class Counted(gguf.GGUFReader):  # type: ignore[misc]
        def __init__(self, path: Any) -> None:
            readers.append(path)
            super().__init__(path)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gguf, "GGUFReader", Counted)
        loaded = load_model(str(DEMOS["demo-decoder"].find("demo-decoder")), device="cpu")
        assert gguf.GGUFReader is Counted
    return loaded


def test_its_file_is_parsed_once(decoder: Loaded, readers: list[Any]) -> None:
    """And the weights are those of the file, de-quantised by gguf itself, to the last bit."""
    assert len(readers) == 1
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(readers[0]).tensors}
    state = decoder.model.state_dict()
    for theirs, ours in (
        ("token_embd", "model.embed_tokens"),
        ("blk.0.attn_norm", "model.layers.0.input_layernorm"),
        ("blk.29.ffn_down", "model.layers.29.mlp.down_proj"),
        ("blk.7.attn_v", "model.layers.7.self_attn.v_proj"),
    ):
        one = tensors[f"{theirs}.weight"]
        assert np.array_equal(gguf.dequantize(one.data, one.tensor_type), state[f"{ours}.weight"].numpy())


def test_a_gguf_file_is_a_decoder_with_its_tokenizer(decoder: Loaded) -> None:
    """30 Llama blocks whose grouped heads, tied head and words are those of the original."""
    config: Any = decoder.config
    assert (decoder.modality, type(decoder.model).__name__) == ("text", "LlamaForCausalLM")
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert decoder.processor("hello world")["input_ids"] == [28120, 905]
    assert decoder.notes == ["The weights of the GGUF file were de-quantised; the model computes with these."]
    assert locate("demo-decoder", None, False).options == locate(decoder.id, None, False).options


def test_the_curves_and_the_massive_token_are_those_of_the_hidden_states(decoder: Loaded) -> None:
    made = batches(load_samples(None, modality="text", samples=2), decoder, length=48)
    with rc_probe.attach(decoder.model) as attached:
        structure = attached.structure
    reader = MassiveReader(FACTORS)
    found, _ = measure_variants(
        structure, made, [Variant("transformer")], ["residual", "residual_bulk"], readers=[reader]
    )
    curves = {(row["metric"], row["layer"]): row["mean"] for row in found["transformer"].rows()}
    (batch,) = made
    with torch.no_grad():
        states = decoder.model(**batch.inputs, output_hidden_states=True).hidden_states
    for layer, state in enumerate(states[:30]):  # the library norms the last one
        wanted: dict[str, list[float]] = {"residual": [], "residual_bulk": []}
        for x in state.double().numpy():
            norms = np.linalg.norm(x, axis=1)
            wanted["residual"].append(numpy_residual(x))
            wanted["residual_bulk"].append(numpy_residual(x[norms <= 5 * np.median(norms)]))
        for metric, values in wanted.items():
            assert curves[metric, layer] == pytest.approx(float(np.mean(values)), abs=1e-3), (metric, layer)
    assert curves["residual", 12] > 1.1 and curves["residual_bulk", 12] < 0.7
    rows = [row for row in reader.rows(MOST, str) if row["position"] == 1 and row["norm_over_median"] > 12.5]
    assert {row["layer"] for row in rows} == set(range(12, 30))
    assert {row["coordinate"] for row in rows} == {507}


def test_what_removals_cost_is_what_skipping_by_hand_costs(decoder: Loaded) -> None:
    """Block 12, an attention and an MLP: the loss of every token, against the model with the part taken out."""
    settings, samples = Settings(length=12), load_samples(None, modality="text", samples=2)
    plan = plan_scored(decoder, samples, settings)
    made = batches(samples, decoder, length=12)
    with rc_probe.attach(decoder.model) as attached:
        structure = attached.structure
    context = Context(decoder, structure, samples, made, settings, World(), name="SmolLM2")
    edits = {
        text: parse_intervention(text).edits(structure) for text in ("block@12", "attention@2", "mlp@30")
    }
    scores, _ = score(context, plan, edits, {})
    (batch,) = made
    ids, layers = batch.inputs["input_ids"], decoder.model.model.layers

    @torch.no_grad()
    def loss() -> float:
        logs = decoder.model(**batch.inputs, use_cache=False).logits[:, :-1].log_softmax(-1)
        picked = -logs.gather(-1, ids[:, 1:, None])[..., 0]
        return float(picked[batch.mask[:, 1:]].mean() if batch.mask is not None else picked.mean())

    def without(change: Any) -> float:
        stack = ExitStack()
        with stack:
            change(stack)
            return loss()

    def zeroed(linear: Any) -> Any:
        return lambda stack: stack.callback(linear.register_forward_hook(lambda _, args, out: out * 0).remove)

    def shorter(stack: ExitStack) -> None:
        stack.callback(setattr, decoder.model.model, "layers", layers)
        decoder.model.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(layers) if i != 11)

    whole = loss()
    changes = {
        "block@12": shorter,
        "attention@2": zeroed(layers[1].self_attn.o_proj),
        "mlp@30": zeroed(layers[29].mlp),
    }
    for text, change in changes.items():
        mine = scores.mean(text, "loss") - scores.mean("transformer", "loss")
        assert mine == pytest.approx(without(change) - whole, abs=2e-3), text
        assert mine > 0.5
