"""The Python blocks of docs/pipelines.md run, each with the names that its section speaks of."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support import tiny
from support.places import ROOT
from support.training import TEXTS, fresh, make_trainer, rows

import rc_probe

PAGE = (ROOT / "docs" / "pipelines.md").read_text("utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
BLOCKS = {name: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for name, text in SECTIONS.items()}


def run(section: str, **names: Any) -> dict[str, Any]:
    """The section's blocks, one after the other."""
    for block in BLOCKS[section]:
        exec(compile(block, f"pipelines.md, {section}", "exec"), names := {**names, "rc_probe": rc_probe})
    return names


def loop(folder: Path) -> dict[str, Any]:
    import transformers

    tokenizer, model = tiny.tokenizer(), fresh()
    items = [{key: value for key, value in row.items() if key != "name"} for row in rows(tokenizer)]
    loader = torch.utils.data.DataLoader(items, 4, collate_fn=transformers.DataCollatorWithPadding(tokenizer))
    train_on: Callable[[Any], None] = lambda batch: model(**batch).loss.backward()  # noqa: E731
    return {"model": model, "tokenizer": tokenizer, "texts": TEXTS, "loader": loader, "train_on": train_on}


def test_any_loop() -> None:
    model, tokenizer = fresh().eval(), tiny.tokenizer()
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    seen = []
    names = run("Any loop", model=model, my_evaluation=lambda m: seen.append(m(**inputs).logits))
    assert names["probe"].frame()["count"].eq(len(TEXTS)).all()
    assert not torch.equal(*seen)


def test_trainer(tmp_path: Path) -> None:
    names = run("Trainer", trainer=make_trainer(tmp_path), texts=TEXTS)
    assert names["watch"].frame()["step"].nunique() == 3
    callback = names["trainer"].callback_handler.callbacks[-1]
    assert callback.monitor.frame()["step"].nunique() == 3


def test_any_training_loop(tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    names = run("Any training loop", accelerator=accelerator, **loop(tmp_path))
    assert names["monitor"].frame()["step"].tolist()[0] == 2
    assert list(tmp_path.rglob("events.out.tfevents.*"))
    AcceleratorState._reset_state(reset_partial_state=True)


def test_sentence_transformers() -> None:
    names = run(
        "sentence-transformers", texts=["A text.", "Another text, of more words."], sentence_model=sentences()
    )
    assert names["evaluator"].primary_metric == "dev_residual_bulk_last"


def sentences() -> Any:
    from sentence_transformers import SentenceTransformer

    from rc_probe.models.locate import locate

    return SentenceTransformer(str(locate("demo", None, False).place), device="cpu")


def test_lm_eval(tmp_path: Path) -> None:
    import json

    import transformers
    from support.lm_eval_tasks import CHOICE

    from rc_probe.data.lm_eval_texts import task_manager

    documents = [{"question": text, "choices": ["w1", "w2"], "answer": i % 2} for i, text in enumerate(TEXTS)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, documents)))
    task = CHOICE.replace("DATA", str(tmp_path / "data.jsonl")).replace("tiny_choice", "my_task")
    (tmp_path / "my_task.yaml").write_text(task)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**tiny.GPT2_SIZES)).eval()
    manager = task_manager(["my_task"], str(tmp_path))
    tokenizer = tiny.tokenizer(special=False)
    names = run("lm-evaluation-harness", model=model, tokenizer=tokenizer, manager=manager)
    assert 0 <= names["scores"]["my_task"]["acc,none"] <= 1


def test_evaluate() -> None:
    import datasets
    import evaluate
    from transformers import pipeline

    class Accuracy(evaluate.Metric):
        def _info(self) -> Any:
            kinds = {name: datasets.Value("int64") for name in ("predictions", "references")}
            return evaluate.MetricInfo(
                description="", citation="", inputs_description="", features=datasets.Features(kinds)
            )

        def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
            return {"accuracy": sum(map(int.__eq__, predictions, references)) / len(references)}

    classifier = pipeline("text-classification", model=fresh().eval(), tokenizer=tiny.tokenizer())
    labels = [i % 2 for i in range(len(TEXTS))]
    names = run("evaluate", classifier=classifier, metric=Accuracy(), texts=TEXTS, labels=labels)
    assert len(names["predictions"]) == len(TEXTS)


def test_mteb() -> None:
    import mteb
    from datasets import Dataset

    texts = [
        "A cat sits here.",
        "Rain fell all day.",
        "He wrote a book.",
        "The train was late.",
        "Music filled the hall.",
    ]
    unset = ("reference", "date", "domains", "task_subtypes", "license", "annotations_creators", "dialect",
             "sample_creation", "bibtex_citation", "prompt")  # fmt: skip

    class Stub(mteb.abstasks.sts.AbsTaskSTS):  # type: ignore[name-defined,misc]
        metadata = mteb.TaskMetadata(
            name="Stub", description="Stub.", dataset={"path": "none", "revision": "1"}, type="STS", category="t2t",
            modalities=["text"], eval_splits=["test"], eval_langs=["eng-Latn"], main_score="cosine_spearman",
            **dict.fromkeys(unset),
        )  # fmt: skip
        min_score, max_score = 0, 5

        def load_data(self, *args: Any, **kwargs: Any) -> None:
            pairs = {
                "sentence1": texts,
                "sentence2": texts[1:] + texts[:1],
                "score": [1.0, 4.0, 2.0, 3.0, 0.5],
            }
            self.dataset, self.data_loaded = {"test": Dataset.from_dict(pairs)}, True

    names = run("MTEB", sentence_model=sentences(), tasks=[Stub()])
    assert -1 <= names["result"].task_results[0].get_score() <= 1


def test_no_block_is_left_out() -> None:
    runnable = {name for name, blocks in BLOCKS.items() if any("# not run" not in block for block in blocks)}
    tested = set(re.findall(r'\brun\(\s*"(.+?)"', Path(__file__).read_text("utf-8")))
    assert runnable == tested
