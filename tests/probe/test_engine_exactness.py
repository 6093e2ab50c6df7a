"""The engine against whole passes with the same edits, bit by bit: families, edits, padding, what models return, notes."""

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from support import zoo
from support.odd_models import Stack, t5
from support.random_models import randomise
from torch import Tensor

from rc_probe import engine
from rc_probe.data.batches import Batch
from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.edits.edits import Editing, Edits
from rc_probe.hooks.edits.gates import COMPONENTS, Gate, gate_edits, has_component
from rc_probe.hooks.edits.model_state import measuring
from rc_probe.hooks.edits.stream_taps import Tap
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.structure.example_inputs import with_no_cache
from rc_probe.hooks.structure.structure import Structure
from rc_probe.hooks.structure.tape import walk

FAMILIES = [
    "bert", "modernbert", "deberta_v2", "xlnet", "mpnet", "albert",  # post-LN; norm first; one module for all blocks
    "gpt2_lm", "opt", "mistral", "gemma2", "olmo2", "mixtral",  # pre-LN, windows, sandwich norms, experts
    "gptj", "falcon_new",  # parallel
    "vit_classifier", "beit", "swin", "bert_classifier",  # images, stages, heads with labels
]  # fmt: skip


class Everything:
    """A reader that keeps all: streams by intervention and layer, outputs by intervention."""

    wants_output = True

    def __init__(self) -> None:
        self.streams: dict[tuple[str, int], Tensor] = {}
        self.outputs: dict[str, list[Tensor]] = {}

    def begin(self, batch: Batch) -> None:
        """One batch is all that is run."""

    def stream(self, name: str, layer: int, x: Tensor) -> None:
        self.streams[name, layer] = x.clone()

    def as_plain(self, name: str, layers: range) -> None:
        for layer in layers:
            self.streams[name, layer] = self.streams["transformer", layer]

    def output(self, name: str, output: Any) -> None:
        self.outputs[name] = [x.clone() for _, x in walk(output)]


def interventions(structure: Structure, samples: int) -> dict[str, Edits]:
    """Single gates of a middle block, several blocks, heads, skips, whole blocks, and gates per sample."""
    middle, last = structure.depth // 2 + 1, structure.depth
    parts = [c for c in COMPONENTS if c != "head" and has_component(structure.blocks[middle - 1], c)]
    lists = [[Gate(part, middle)] for part in parts]
    lists += [[Gate("attention", (1, last))], [Gate("attention.skip")], [Gate("mlp", (2, last), (), 0.5)]]
    lists += [[Gate("head", last, (1, 2))], [Gate("block", 1)], [Gate("block", (middle, last))]]
    lists += [
        [Gate("mlp", 2, (), torch.linspace(0, 1, samples))],
        [Gate("attention.skip", last), Gate("mlp", middle)],
    ]
    found = {}
    for gates in lists:
        try:
            found[" + ".join(map(str, gates))] = gate_edits(structure, gates)
        except RcProbeError:
            continue  # no such part, or no heads to be told apart
    return found


@torch.no_grad()
def expect_whole_passes(
    structure: Structure, inputs: dict[str, Any], notes: tuple[str, ...] = (), least: int = 8
) -> None:
    """What readers get of the engine is what the model itself gives under the same edits."""
    samples = next(x.shape[0] for x in inputs.values() if isinstance(x, Tensor))
    edits, reader = interventions(structure, samples), Everything()
    assert len(edits) >= least
    batch = Batch(inputs, torch.ones(samples, 1, dtype=torch.bool), 0)
    assert engine.run(structure, [batch], edits, [reader]) == list(notes)
    model, layers = structure.model, structure.depth + 1
    assert len(reader.streams) == (1 + len(edits)) * layers
    for name, each in {"transformer": Edits(), **edits}.items():
        streams: dict[int, Tensor] = {}
        with (
            measuring(model),
            Tap(structure, lambda n, x, s=streams: s.update({n: x.clone()})),
            Editing(structure, each),
        ):
            output = [x for _, x in walk(model(**with_no_cache(model, inputs)))]
        assert all(torch.equal(reader.streams[name, n], streams[n]) for n in range(layers)), name
        assert len(output) == len(reader.outputs[name]), name
        assert all(map(torch.equal, output, reader.outputs[name])), name


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    """Texts are padded; what a model returns is compared whole: streams, pooled, predictions, loss."""
    model, inputs = zoo.build(name, padded=zoo.ZOO[name].modality == "text", length=9)
    if hasattr(model, "classifier"):
        inputs["labels"] = torch.tensor([1, 3])
    if name == "gpt2_lm":
        inputs["labels"] = inputs["input_ids"]
    expect_whole_passes(find_structure(model, inputs), inputs)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_both_stacks_of_an_encoder_decoder(stack: str) -> None:
    """Cross-attention, T5's position bias of block 1, the loss; the decoder's encoder is done before."""
    model, ids = t5(), torch.arange(10, 24).reshape(2, 7)
    model.config.decoder_start_token_id = model.config.pad_token_id = 0
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(30, 40).reshape(2, 5)}
    structure = find_structure(model, inputs, stack=stack)
    assert ("X" in structure.signature) == (stack == "decoder")
    expect_whole_passes(structure, inputs)


def gemma4() -> tuple[Any, dict[str, Tensor]]:
    """Its last two blocks use keys and values of the first two, by a dictionary that all are given."""
    config = transformers.Gemma4TextConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, head_dim=8, global_head_dim=8, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=100, num_kv_shared_layers=2, sliding_window=6,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    model = transformers.Gemma4TextModel(config).eval()
    randomise(model, torch.float32)
    ids = torch.arange(10, 24).reshape(2, 7)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def full(why: str) -> tuple[str, ...]:
    return (f"Every pass was a full one: {why}.",)


def test_state_handed_on_outside_of_the_stream_gets_full_passes() -> None:
    model, inputs = gemma4()
    why = "block 1 (layers.0) hands on values that are not in what it returns"
    expect_whole_passes(find_structure(model, inputs), inputs, full(why))


def test_weights_that_processes_share_get_full_passes() -> None:
    model, inputs = zoo.build("gpt2_lm")
    next(model.parameters()).ds_id = 0  # as DeepSpeed marks them
    expect_whole_passes(find_structure(model, inputs), inputs, full("its weights are shared among processes"))


def test_a_model_that_runs_on_whole_batches_alone_gets_full_passes() -> None:
    class Whole(Stack):
        def forward(self, input_ids: Tensor) -> Tensor:
            if len(input_ids) != 3:
                raise RuntimeError("only batches of 3")
            return super().forward(input_ids)

    torch.manual_seed(0)
    inputs = {"input_ids": torch.randint(20, (3, 7))}
    model = Whole("add").eval()
    structure = find_structure(model, inputs)
    expect_whole_passes(structure, inputs, full("RuntimeError: only batches of 3"))


def test_a_filled_cache_is_the_same_in_every_pass() -> None:
    model, inputs = zoo.build("llama", length=9)
    structure = find_structure(model, inputs)
    ids = inputs["input_ids"]
    with torch.no_grad():
        cache = model(ids[:, :5], use_cache=True).past_key_values
        expected = model(ids, use_cache=False).last_hidden_state[:, 5:]
    given = {"input_ids": ids[:, 5:], "past_key_values": cache}
    reader = Everything()
    edits = {
        "mlp@2": gate_edits(structure, [Gate("mlp", 2, (), 1.0)]),
        "other": gate_edits(structure, [Gate("mlp", 2)]),
    }
    notes = engine.run(structure, [Batch(given, torch.ones(2, 4, dtype=torch.bool), 0)], edits, [reader])
    assert notes == list(full("its input 'past_key_values' is a DynamicCache, which passes write into"))
    assert cache.get_seq_length() == 5  # as it was given
    for name in ("transformer", "mlp@2"):
        torch.testing.assert_close(reader.outputs[name][0], expected)
    assert not torch.allclose(reader.outputs["other"][0], expected)


@pytest.mark.parametrize("how", ["cpu", "disk", "map"])
def test_offloaded_weights(how: str, tmp_path: Path) -> None:
    """Through accelerate's hooks, which move the weights of modules that are not called, too."""
    model, inputs = zoo.build("gpt2_lm", padded=True)
    if how == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif how == "disk":
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    else:
        places = {
            "transformer.wte": "cpu",
            "lm_head": "cpu",
            "transformer.wpe": "cpu",
            "transformer.ln_f": "cpu",
        }
        places |= {"transformer.h.0": "cpu", "transformer.h.1": "disk", "transformer.h.2": "disk"}
        accelerate.dispatch_model(
            model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
        )
    assert any(p.is_meta for p in model.parameters())
    expect_whole_passes(find_structure(model, inputs), inputs)
    assert any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_gradients_are_neither_recorded_nor_left(mode: Any) -> None:
    model, inputs = zoo.build("bert_mlm")
    structure = find_structure(model, inputs)
    reader, edits = Everything(), {"mlp@3": gate_edits(structure, [Gate("mlp", 3)])}
    with mode():
        batch = Batch(inputs, inputs["attention_mask"].bool(), 0)
        assert engine.run(structure, [batch], edits, [reader]) == []
    assert not any(x.requires_grad for x in (*reader.streams.values(), *reader.outputs["mlp@3"]))
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad(), Editing(structure, edits["mlp@3"]):
        assert torch.equal(reader.outputs["mlp@3"][0], model(**inputs).logits)
    assert not model.training
