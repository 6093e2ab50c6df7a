"""lm-evaluation-harness, offline: a small local GPT-2, a local task file over a local table."""

import copy
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import tiny
from support.lm_eval_tasks import CHOICE

import rc_probe
from rc_probe.cli.app import main
from rc_probe.data.lm_eval_texts import task_manager, task_texts
from rc_probe.integrations.lm_eval import ablated_scores, refuse_encoders

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.models.huggingface import HFLM  # noqa: E402 - where it is installed

ROLLING = """
task: tiny_text
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
"""
DOCUMENTS = 70


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("tasks")
    draw = random.Random(0)

    def text(count: int) -> str:
        return " ".join(f"w{draw.randrange(28)}" for _ in range(count))

    rows = [
        {"question": text(3 + i % 5), "choices": [text(1), text(2), text(1)], "answer": i % 3}
        for i in range(DOCUMENTS)
    ]
    (home / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in (("choice", CHOICE), ("rolling", ROLLING)):
        (home / f"{name}.yaml").write_text(task.replace("DATA", str(home / "data.jsonl")))
    return home


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("socket.socket.connect", offline)


def offline(*args: Any) -> None:
    raise AssertionError("the network was asked")


@pytest.fixture(scope="module")
def gpt2() -> Any:
    torch.manual_seed(1)
    config = transformers.GPT2Config(**tiny.GPT2_SIZES, initializer_range=0.4)
    return transformers.GPT2LMHeadModel(config).eval()


def questions(folder: Path) -> list[str]:
    return [json.loads(line)["question"] for line in (folder / "data.jsonl").read_text().splitlines()]


def scores(model: Any, folder: Path, batch_size: int = 4) -> dict[str, float]:
    """What the harness says by itself."""
    scorer = HFLM(pretrained=model, tokenizer=tiny.tokenizer(special=False), batch_size=batch_size)
    found = lm_eval.simple_evaluate(
        scorer,
        tasks=["tiny_choice", "tiny_text"],
        task_manager=task_manager(["tiny_choice", "tiny_text"], str(folder)),
        limit=30,
        bootstrap_iters=0,
    )
    results = found["results"]
    return {
        "acc": results["tiny_choice"]["acc,none"],
        "word_perplexity": results["tiny_text"]["word_perplexity,none"],
    }


def zeroed(model: Any) -> Any:
    model = copy.deepcopy(model)
    for parameter in model.transformer.h[1].mlp.c_proj.parameters():
        parameter.data.zero_()
    return model


def test_attached_and_ablated_scores_of_the_harness(gpt2: Any, folder: Path) -> None:
    plain = scores(gpt2, folder, 1)
    with rc_probe.attach(gpt2) as probe:
        assert scores(gpt2, folder, 1) == plain
    assert probe.curves.samples >= 30 * 3
    with rc_probe.ablate(gpt2, "mlp@2"):
        ablated = scores(gpt2, folder)
    assert ablated == scores(zeroed(gpt2), folder)
    assert ablated["acc"] != plain["acc"] and ablated["word_perplexity"] != plain["word_perplexity"]


def test_programs_that_the_harness_starts_say_nothing(
    gpt2: Any,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    git = tmp_path / "git"
    git.write_text("#!/bin/sh\ntouch asked\necho 'fatal: not a git repository' >&2\nexit 128\n")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    ablated_scores(
        gpt2,
        tiny.tokenizer(special=False),
        ["tiny_choice"],
        limit=2,
        include_path=str(folder),
        bootstrap_iters=0,
    )
    assert Path("asked").exists(), "the harness asks git"
    os.write(2, b"spoken again")
    assert capfd.readouterr().err == "spoken again"


def test_batches_that_the_harness_pads_without_a_mask_are_refused(gpt2: Any, folder: Path) -> None:
    with (
        pytest.raises(rc_probe.RcProbeError, match=r"without an attention mask.*one by one"),
        rc_probe.attach(gpt2),
    ):
        scores(gpt2, folder, 4)


def test_the_table_of_scores(gpt2: Any, folder: Path) -> None:
    frame = ablated_scores(
        gpt2, tiny.tokenizer(special=False), ["tiny_choice", "tiny_text"], ["mlp@2", "head@1:1"],
        limit=30, include_path=str(folder), batch_size=4, bootstrap_iters=0,
    )  # fmt: skip
    assert frame.columns.tolist() == ["task", "metric", "ablation", "value", "stderr", "baseline", "change"]
    assert frame["ablation"].unique().tolist() == ["none", "mlp@2", "head@1:1"]
    by_metric = {a: dict(zip(g["metric"], g["value"], strict=True)) for a, g in frame.groupby("ablation")}
    plain, without = scores(gpt2, folder), scores(zeroed(gpt2), folder)
    assert {name: by_metric["none"][name] for name in plain} == plain
    assert {name: by_metric["mlp@2"][name] for name in without} == without
    changed = frame.query("ablation == 'mlp@2' and metric == 'word_perplexity'").iloc[0]
    assert changed["change"] == without["word_perplexity"] - plain["word_perplexity"]
    assert frame.query("ablation == 'none'")["change"].eq(0).all()


def test_the_command(gpt2: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tiny.saved(tmp_path / "model", gpt2, tiny.tokenizer(special=False))
    words = ["lm-eval", place, "--tasks", "tiny_choice", "--include-path", str(folder), "--limit", "30"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--ablate", "mlp@2", "--json", "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert ended.value.code == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["ablation"] for row in rows if row["metric"] == "acc"] == ["none", "mlp@2"]
    assert rows[0]["value"] == scores(gpt2, folder)["acc"]
    capsys.readouterr()
    assert rows == json.loads((tmp_path / "out" / "lm_eval.json").read_text())
    assert (
        (tmp_path / "out" / "lm_eval.csv")
        .read_text()
        .startswith("task,metric,ablation,value,stderr,baseline")
    )
    with pytest.raises(SystemExit):
        main([*words, "--ablate", "mlp@2"])
    shown = capsys.readouterr()
    assert "tiny_choice" in shown.out and f"{rows[0]['value']:.4f}" in shown.out and shown.err == ""


def test_what_cannot_be_scored_is_one_line(gpt2: Any, folder: Path, tmp_path: Path, capsys: Any) -> None:
    place = tiny.saved(tmp_path / "gpt2", gpt2, tiny.tokenizer(special=False))
    bert = tiny.saved(tmp_path / "bert", tiny.bert("BertForMaskedLM"), tiny.tokenizer())
    include = ["--include-path", str(folder)]
    capsys.readouterr()
    for words, wanted in (
        ([bert, "--tasks", "tiny_choice", *include], "BertForMaskedLM: its tokens see the tokens after them"),
        ([place, "--tasks", "no_such_task", *include], "--tasks no_such_task: the harness fails"),
        (
            [place, "--tasks", "tiny_choice", "--include-path", "nowhere"],
            "--include-path nowhere: no such folder",
        ),
        ([place, "--tasks", "tiny_choice", *include, "--ablate", "mlpp@1"], "did you mean 'mlp'"),
        ([place, "--tasks", "tiny_choice", *include, "--ablate", "mlp@9"], "there is no block 9"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["lm-eval", *words, "--out", str(tmp_path / "out")])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and wanted in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_encoders_and_models_without_a_head_are_refused(gpt2: Any) -> None:
    refuse_encoders(gpt2)
    torch.manual_seed(0)
    refuse_encoders(tiny.bert("BertLMHeadModel", is_decoder=True).eval())
    t5 = transformers.T5Config(**tiny.T5_SIZES, decoder_start_token_id=0)
    refuse_encoders(transformers.T5ForConditionalGeneration(t5).eval())
    with pytest.raises(rc_probe.RcProbeError, match="encoder"):
        refuse_encoders(tiny.bert("BertForMaskedLM").eval())
    for headless in (gpt2.transformer, tiny.bert("BertForSequenceClassification").eval()):
        with pytest.raises(rc_probe.RcProbeError, match="no language-modelling head"):
            refuse_encoders(headless)


def test_texts_of_a_task_as_data(gpt2: Any, folder: Path) -> None:
    assert list(task_texts(f"lm-eval:tiny_choice:{folder}")) == questions(folder)
    assert list(task_texts(f"lm-eval:tiny_text:{folder}")) == questions(folder)
    result = rc_probe.probe(
        gpt2,
        f"lm-eval:tiny_choice:{folder}",
        processor=tiny.tokenizer(special=False),
        samples=5,
        init=False,
        recursion=False,
    )
    again = rc_probe.probe(
        gpt2, questions(folder)[:5], processor=tiny.tokenizer(special=False), init=False, recursion=False
    )
    assert result.tables["residuals"].equals(again.tables["residuals"])
    assert result.settings["data"] == f"lm-eval:tiny_choice:{folder}"
