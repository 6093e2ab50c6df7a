"""The evaluator for sentence-transformers."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, losses
from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
from support.loops import REAL, alone

from rc_probe.integrations.sentence_transformers import CollapseEvaluator
from rc_probe.models.load import Loaded
from rc_probe.models.locate import locate


def model() -> Any:
    return SentenceTransformer(str(locate("demo", None, False).place), device="cpu")


def test_an_evaluator_by_itself(demo: Loaded, tmp_path: Path) -> None:
    evaluator = CollapseEvaluator(REAL, name="dev", metrics=["cosine"])
    told = evaluator(model(), str(tmp_path / "eval"))
    singles = [dict(demo.processor(text, return_tensors="pt")) for text in REAL]
    curve = alone(demo.model, singles, 7)
    assert told["dev_residual_first"] == pytest.approx(curve[0], rel=1e-5)
    assert told["dev_residual_bulk_last"] == pytest.approx(curve[6], rel=1e-5)
    assert told["dev_residual_min"] == pytest.approx(min(curve[1:]), rel=1e-5)
    assert told["dev_collapse_layer"] == 7
    assert {"dev_cosine_last", "dev_cosine_max"} <= told.keys()
    assert evaluator.primary_metric == "dev_residual_bulk_last" and evaluator.greater_is_better
    written = pd.read_csv(tmp_path / "eval" / "collapse_dev.csv")
    assert written.query("metric == 'residual'")["mean"].tolist() == pytest.approx(curve, rel=1e-5)


def run(folder: Path, evaluator: Any) -> tuple[Any, Any]:
    from datasets import Dataset

    trained = model()
    pairs = Dataset.from_dict({"anchor": REAL, "positive": REAL[::-1]})
    arguments = Arguments(
        str(folder), use_cpu=True, max_steps=2, per_device_train_batch_size=3, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_dev_residual_last", disable_tqdm=True, report_to=[],
    )  # fmt: skip
    loss = losses.MultipleNegativesRankingLoss(trained)
    trainer = SentenceTransformerTrainer(
        trained, arguments, train_dataset=pairs, eval_dataset=pairs, loss=loss, evaluator=evaluator
    )
    trainer.train()
    return trained, trainer


def test_the_trainer_takes_it(tmp_path: Path) -> None:
    _, trainer = run(tmp_path, CollapseEvaluator(REAL, name="dev"))
    told = [record["eval_dev_residual_last"] for record in trainer.state.log_history if "eval_loss" in record]
    assert len(told) == 2 and told[0] != told[1]
    assert trainer.state.best_metric == max(told)


def test_among_other_evaluators(tmp_path: Path) -> None:
    from sentence_transformers.base.evaluation import SequentialEvaluator
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    other = EmbeddingSimilarityEvaluator(REAL, REAL[::-1], [0.1, 0.9, 0.4], name="sts")
    both = SequentialEvaluator([other, CollapseEvaluator(REAL, name="dev")])
    trained = model()
    state = torch.get_rng_state()
    told = both(trained)
    assert told["sequential_score"] == told["dev_residual_bulk_last"] and "sts_spearman_cosine" in told
    assert torch.equal(state, torch.get_rng_state())
