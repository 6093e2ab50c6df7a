"""The head of words runs at the scored positions, a few at a time: the numbers of the whole head."""

from typing import Any

import pytest
import torch
import transformers
from support import tiny, trained, zoo
from torch.nn import functional

import rc_probe
from rc_probe.data.batches import batches
from rc_probe.data.samples import load_samples
from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.edits import single_precision
from rc_probe.hooks.edits.model_head import ModelHead
from rc_probe.hooks.linear_maps import linear_in_single
from rc_probe.measures.paths import last_streams
from rc_probe.measures.paths.last_streams import kept_streams
from rc_probe.measures.paths.paths import Paths
from rc_probe.models.load import Loaded
from rc_probe.paths import head_answers
from rc_probe.tasks import choose_task

TEXTS, _ = trained.walks(5, seed=3)
LESS: dict[str, Any] = {
    "init": False,
    "recursion": False,
    "importance": "none",
    "metrics": "residual",
    "batch_size": 4,
}


def make(kind: str) -> Loaded:
    torch.manual_seed(0)
    if kind == "bert":
        model, words = tiny.bert("BertForMaskedLM", **trained.BERT), trained.tokenizer()
    elif kind == "gpt2":
        config = transformers.GPT2Config(**trained.GPT2)
        model, words = transformers.GPT2LMHeadModel(config), tiny.tokenizer(pad=False, special=False)
    else:
        config = transformers.T5Config(
            **tiny.T5_SIZES, pad_token_id=0, decoder_start_token_id=0, eos_token_id=2
        )
        model, words = transformers.T5ForConditionalGeneration(config), trained.tokenizer()
    return Loaded(model.double().eval(), model.config, "tiny", None, "text", words)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_the_head_runs_at_the_scored_positions_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = make(kind)
    ask: dict[str, Any] = {"processor": given.processor, "path_draws": (1,), "repeats": 2, **LESS}
    with monkeypatch.context() as patch:
        patch.setattr("rc_probe.paths.effectiveness.narrow_head", lambda *_: None)
        whole = rc_probe.probe(given.model, TEXTS, **ask).tables["paths"]
    head, real = given.model.get_output_embeddings(), functional.linear
    sizes, rows = list[int](), set[int]()

    def counted(x: Any, weight: Any, bias: Any = None) -> Any:
        if weight is head.weight:
            rows.add(len(x))
            sizes.extend([x.shape[1]] if len(x) == 1 else [])
        return real(x, weight, bias)

    monkeypatch.setattr(functional, "linear", counted)
    monkeypatch.setattr(head_answers, "CHUNK", 3 * len(head.weight))  # three positions
    found = rc_probe.probe(given.model, TEXTS, **ask).tables["paths"]
    numbers = ["mean", "std", "low", "high"]
    assert found.drop(columns=numbers).equals(whole.drop(columns=numbers))
    assert found[numbers].to_numpy() == pytest.approx(whole[numbers].to_numpy(), abs=1e-12, nan_ok=True)
    task, _ = choose_task(given, load_samples(TEXTS, modality="text"))
    assert task is not None
    count = [len(task.prepare(batch).row) for batch in batches(task.samples, given, batch_size=4)]
    # the plain stream, no path, three scopes of three lengths, of which two are the same; these of two estimates; three live
    # ones of each
    streams = 2 + (3 * 3 - 1) + 2 * (3 * 3 - 1) + 2 * 3
    own = (
        kind == "bert"
    )  # whose masked texts no other pass has read: a plain pass, whose head runs at one position
    assert sum(size <= 3 for size in sizes) == sum(own + streams * -(-each // 3) for each in count)
    assert rows.isdisjoint({4})  # the whole head on a batch
    assert not head._forward_pre_hooks


@pytest.mark.parametrize(
    ("kind", "more"),
    [("gpt2", {}), ("bert", {"importance": "blocks"}), ("t5", {}), ("bert", {})],
    ids=["of the curves", "of importance", "with an encoder", "its own"],
)
def test_a_plain_pass_that_was_made_before_is_not_made_again(
    kind: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit the same numbers; how often the first block runs while paths are measured is counted."""
    given = make(kind)
    ask: dict[str, Any] = {"processor": given.processor, **LESS, **more}
    calls: list[int] = []
    real = Paths.run

    def counted(self: Paths, context: Any) -> Any:
        block = context.structure.module(context.structure.blocks[0])
        with block.register_forward_pre_hook(lambda *_: calls.append(1)):
            return real(self, context)

    monkeypatch.setattr(Paths, "run", counted)
    found = rc_probe.probe(given.model, TEXTS, **ask).tables
    shared = len(calls)
    monkeypatch.setattr(last_streams, "LIMIT", 0)  # nothing is kept
    alone = rc_probe.probe(given.model, TEXTS, **ask).tables
    batches_of, narrow = 2, 2  # the trial of the narrow head runs the model twice
    decompositions = batches_of + (
        kind != "t5"
    )  # by source is of the first batch; what joins T5's tokens cannot be told
    assert shared - narrow >= decompositions
    assert len(calls) - 2 * shared == (0 if kind == "bert" and not more else batches_of)
    for name in ("paths", "path_sources"):
        assert (name in found) == (name in alone)
        assert name not in found or found[name].equals(alone[name])


def test_streams_of_another_precision_are_not_taken() -> None:
    model, inputs = zoo.build("gpt2_lm")
    structure = find_structure(model, inputs)
    assert kept_streams(structure, 2) is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kept_streams(structure, 2) is None
    model.bfloat16()
    assert kept_streams(structure, 2) is None


def test_a_batch_without_a_scored_position() -> None:
    """Texts of special tokens alone: nothing is scored of them, and the others are."""
    given = make("bert")
    texts = [*TEXTS[:2], "[CLS] [SEP]", "[SEP] [CLS]"]
    found = rc_probe.probe(given.model, texts, processor=given.processor, **LESS | {"batch_size": 2})
    loss = found.tables["paths"].query("metric == 'loss' and scope == 'full'")
    assert loss["mean"].notna().all()
    assert found.settings["missing"] == {}


# ---- a table of half precision


@pytest.mark.parametrize("bias", [False, True])
def test_a_large_table_of_half_precision_is_not_copied_as_a_whole(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    table = torch.randn(50, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    more = torch.arange(50).bfloat16() if bias else None
    monkeypatch.setattr("rc_probe.hooks.linear_maps.ROWS", 16)
    wanted = x.double() @ table.double().T + (0 if more is None else more.double())
    found = linear_in_single(x, table, more)
    assert found.dtype == torch.float32 and torch.allclose(found.double(), wanted, rtol=1e-6, atol=1e-6)

    model, inputs = zoo.build("gpt2_lm")
    structure = find_structure(model.bfloat16(), inputs)
    with ModelHead(structure, inputs) as head:
        whole = head(head.stream).logits
    monkeypatch.setattr(single_precision, "TABLE", model.lm_head.weight.numel())
    rows: list[int] = []
    real = functional.linear

    def counted(x: Any, weight: Any, bias: Any = None) -> Any:
        rows.append(len(weight))
        return real(x, weight, bias)

    monkeypatch.setattr(functional, "linear", counted)
    with ModelHead(structure, inputs) as head:
        rows.clear()
        found = head(head.stream).logits
    assert rows == [100, *[16] * 6, 4]  # what the model calls, and what is called instead
    assert whole.dtype == torch.float32
    assert torch.allclose(found, whole, rtol=0, atol=1e-6 * float(whole.abs().max()))
