"""Single faults that no test once caught: each put back turns one of these red."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support import tiny, zoo
from support.command import Run

import rc_probe
from rc_probe.data.batches import Batch
from rc_probe.data.digest import digest_of
from rc_probe.engine import run as run_engine
from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.edits.edits import Edits
from rc_probe.hooks.errors import RcProbeError
from rc_probe.interventions.paper import paper_variants
from rc_probe.paths.decompose import hops
from rc_probe.paths.live import draw_paths
from rc_probe.results.curves import Curve
from rc_probe.results.verdict import level_of
from rc_probe.settings import Settings


@pytest.mark.parametrize(
    ("special", "length", "tokens"), [(True, 128, [7, 5]), (False, 128, [5, 3]), (True, 4, [4, 4])]
)
def test_the_tokens_that_paths_get(
    special: bool, length: int, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rc_probe.paths import effectiveness

    whole, seen = effectiveness.decompose, []

    def decompose(structure: Any, batch: Any, **how: Any) -> Any:
        seen.append(batch["attention_mask"].sum(1).tolist())
        return whole(structure, batch, **how)

    monkeypatch.setattr(effectiveness, "decompose", decompose)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**tiny.GPT2_SIZES)).eval()
    rc_probe.probe(
        model, ["w1 w2 w3 w4 w5", "w6 w7 w8"], processor=tiny.tokenizer(), length=length,
        special_tokens=special, init=False, recursion=False, chains=False, metrics=["residual"],
    )  # fmt: skip
    assert seen and all(counts == tokens for counts in seen)


def test_the_blocks_whose_mixers_the_variants_switch() -> None:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "state_size": 4,
        "initializer_range": 0.1,
    }
    model = transformers.MambaModel(transformers.MambaConfig(**sizes)).eval()
    structure = find_structure(model, {"input_ids": torch.randint(3, 32, (2, 6))})
    san = paper_variants(structure)[0]
    assert san.name == "SAN"
    assert [(each.part, each.blocks) for each in san.interventions] == [("mixer.skip", (1, 2, 3))]


def test_each_stack_has_its_own_mask() -> None:
    """An encoder and a decoder whose texts end at other places; the residual of each text alone, in float64."""
    torch.manual_seed(0)
    config = transformers.T5Config(**tiny.T5_SIZES, decoder_start_token_id=0)
    model = transformers.T5Model(config).eval()
    batch = {
        "input_ids": torch.randint(3, 32, (2, 9)), "attention_mask": (torch.arange(9) < torch.tensor([[9], [4]])).long(),
        "decoder_input_ids": torch.randint(3, 32, (2, 7)), "decoder_attention_mask": (torch.arange(7) < torch.tensor([[3], [7]])).long(),
    }  # fmt: skip
    wanted: list[list[float]] = []
    for row, (source, target) in enumerate(((9, 3), (4, 7))):
        with torch.no_grad():
            states = model(
                input_ids=batch["input_ids"][row : row + 1, :source], decoder_input_ids=batch["decoder_input_ids"][row : row + 1, :target],
                output_hidden_states=True,
            ).decoder_hidden_states  # fmt: skip
        x = states[0][0].double().numpy()
        rest = x - x.mean(0)
        sizes = [np.abs(m).sum(0).max() * np.abs(m).sum(1).max() for m in (rest, x)]
        wanted.append([float(np.sqrt(sizes[0] / sizes[1]))])
    with torch.no_grad(), rc_probe.attach(model, metrics=["residual"], stack="decoder") as probe:
        model(**batch)
    first = probe.frame().query("layer == 0")
    assert first["count"].tolist() == [2]
    assert first["mean"].tolist() == pytest.approx([np.mean(wanted)], abs=1e-6)


def test_code_of_a_model_runs_only_if_it_is_asked_for(run: Run, tmp_path: Path) -> None:
    assert (Settings().trust_remote_code, Settings().allow_pickle) == (False, False)
    folder = Path(tiny.saved(tmp_path / "model", tiny.bert("BertForMaskedLM"), tiny.tokenizer()))
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "code.Mine", "AutoModel": "code.Mine", "AutoModelForCausalLM": "code.Mine"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": names}))
    (folder / "code.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\nclass Mine: ...\n"
    )
    for words in ([str(folder)], ["lm-eval", str(folder), "--tasks", "x"]):
        code, out, err = run(*words)
        assert (code, out, err.count("\n")) == (2, "", 1) and "--trust-remote-code" in err, err
    assert not (tmp_path / "ran").exists()


def test_every_head_and_every_subset_is_drawn_as_often() -> None:
    model, inputs = zoo.build("gpt2")
    choices = hops(find_structure(model, inputs), count_mlp=False)
    count, heads = 6000, choices[0].heads
    drawn = draw_paths(choices, 1, count, torch.Generator().manual_seed(0))
    assert drawn.shape == (count, len(choices)) and bool(((drawn > 0).sum(1) == 1).all())
    subsets = Counter(int(row.nonzero()) for row in drawn)
    taken = Counter(drawn[drawn > 0].tolist())
    for found, many in ((subsets, len(choices)), (taken, heads)):
        assert len(found) == many
        share, spread = count / many, 5 * np.sqrt(count * (1 / many) * (1 - 1 / many))
        assert all(abs(times - share) < spread for times in found.values()), found


def test_no_sample_finds_itself_in_any_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    from rc_probe.tasks import retrieval

    torch.manual_seed(0)
    points = torch.nn.functional.normalize(torch.randn(7, 5, dtype=torch.float64), dim=1)
    cosines = points @ points.T
    wanted = [max((j for j in range(7) if j != i), key=lambda j, i=i: float(cosines[i, j])) for i in range(7)]  # type: ignore[misc]
    task = object.__new__(retrieval.Embedding)
    task.paired = False
    for chunk in (1024, 3, 2, 1):
        monkeypatch.setattr(retrieval, "CHUNK", chunk)
        assert task.found(points.clone()).tolist() == wanted


def test_samples_packed_into_one_row_are_refused() -> None:
    """As images of Qwen2-VL: their stream has no axis of samples."""
    model, inputs = zoo.build("bert")
    structure = find_structure(model, inputs)
    blocks = tuple(replace(block, batch_axis=None) for block in structure.blocks)
    packed = replace(structure, blocks=blocks)
    with pytest.raises(RcProbeError, match=r"packs all samples into one sequence.*--batch-size 1"):
        run_engine(packed, [Batch(inputs, None)], {"transformer": Edits()}, [])


def test_a_digest_knows_the_order() -> None:
    assert digest_of(["a", "b"]) != digest_of(["b", "a"])
    assert digest_of([{"x": 1, "y": 2}]) == digest_of([{"y": 2, "x": 1}])


def curve(means: list[float], floors: list[float] | None = None) -> Curve:
    return Curve(list(range(len(means))), means, [0.0] * len(means), floors or [1e-7] * len(means))


def test_levels_at_their_edges() -> None:
    flat = curve([0.5, 0.5, 0.5])
    assert level_of(flat, curve([0.1, 0.99, 0.1])) == "healthy", "the last cosine counts, not the largest"
    assert level_of(flat, curve([0.1, 0.1, 0.99])) == "watch"
    assert level_of(curve([0.5, 0.5, 0.25]), None) == "healthy", "a half is kept"
    assert level_of(curve([0.5, 0.5, 0.3], [0, 0, 0.3]), None) == "collapsed", (
        "up to the floor is at the floor"
    )
    assert level_of(curve([0.5, 0.5, 0.3], [0, 0, 0.2999]), None) == "healthy"
