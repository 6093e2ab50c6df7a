"""Measuring during training: it sees what is there, and training goes on as if it were not."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support import tiny
from support.loops import REAL, alone, numpy_residual, tokenized
from support.training import TEXTS, fresh, make_trainer, rows
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions as Output

import rc_probe
from rc_probe.integrations.monitor import collapse_layer, summarise
from rc_probe.integrations.trainer import CollapseCallback
from rc_probe.models.load import Loaded

MINE = {"eval_residual_first", "eval_residual_last", "eval_residual_min", "eval_collapse_layer"}


def random_states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


def trained(trainer: transformers.Trainer) -> tuple[dict[str, torch.Tensor], list[float], list[Any]]:
    """Weights, losses and the state of every random generator after training."""
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    states = random_states()
    return trainer.model.state_dict(), losses, states


def same_training(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    weights = all(torch.equal(one[0][key], other[0][key]) for key in one[0])
    return weights and one[1:] == other[1:]


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("how", ["rows", "texts", "callback"])
def test_watched_training_is_bitwise_as_without(tmp_path: Path, how: str, options: dict[str, Any]) -> None:
    plain = trained(make_trainer(tmp_path, **options))
    callback = CollapseCallback(TEXTS) if how == "callback" else None
    trainer = make_trainer(tmp_path, callbacks=[callback] if callback else None, **options)
    watch = callback or rc_probe.watch(trainer, TEXTS if how == "texts" else None)
    watched = trained(trainer)
    assert same_training(plain, watched)
    monitor = watch.monitor
    assert monitor is not None
    assert monitor.frame()["step"].unique().tolist() == [2, 4, 6]
    assert monitor.frame()["count"].eq(len(TEXTS)).all()
    assert monitor.frame().query("layer == 2 and metric == 'residual'")["mean"].nunique() == 3
    records = [record for record in trainer.state.log_history if "eval_loss" in record]
    assert len(records) == 3 and all(record.keys() >= MINE for record in records)


def test_training_can_be_told_apart(tmp_path: Path) -> None:
    """The comparison above sees a callback that draws one random number."""

    class Draws(transformers.TrainerCallback):
        def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
            torch.rand(1)

    plain = trained(make_trainer(tmp_path))
    assert not same_training(plain, trained(make_trainer(tmp_path, callbacks=[Draws()])))


def test_the_numbers_are_those_of_the_model_then(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    watch = rc_probe.watch(trainer, TEXTS[:5], metrics=["cosine"])
    trainer.train()
    told = trainer.evaluate()
    curve = alone(trainer.model.eval(), tokenized(tiny.tokenizer(), TEXTS[:5]), 3)
    wanted = {"first": curve[0], "last": curve[2], "min": min(curve[1:])}
    assert {key: told[f"eval_residual_{key}"] for key in wanted} == pytest.approx(wanted, rel=1e-5)
    assert {"eval_cosine_first", "eval_cosine_last", "eval_cosine_max"} <= told.keys()
    assert "eval_cosine_min" not in told
    assert all(type(value) is float for name, value in told.items() if name.startswith("eval_residual"))
    assert trainer.state.log_history[-1].keys() >= MINE
    assert not MINE & trainer.predict(trainer.eval_dataset).metrics.keys()
    frame = watch.frame()
    assert list(frame.columns) == ["step", "layer", "metric", "mean", "std", "count", "floor"]
    watch.remove()
    assert not MINE & trainer.evaluate().keys()
    assert "evaluation_loop" not in vars(trainer)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("own", [False, True])
def test_two_watches_end_in_any_order(first: int, own: bool, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    if own:  # a loop that the user has set
        trainer.evaluation_loop = lambda *args, **given: type(trainer).evaluation_loop(
            trainer, *args, **given
        )
    before = vars(trainer).get("evaluation_loop")
    watches = [rc_probe.watch(trainer, TEXTS[:2], metrics=[name]) for name in ("cosine", "norm")]
    watches.pop(first).remove()
    told = trainer.evaluate()
    assert ("eval_cosine_last" in told, "eval_norm_last" in told) == (first == 1, first == 0)
    watches[0].remove()
    assert not MINE & trainer.evaluate().keys()
    assert vars(trainer).get("evaluation_loop") is before
    assert not any(isinstance(callback, type(watches[0])) for callback in trainer.callback_handler.callbacks)


def test_a_watch_that_cannot_begin_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path)

    def interrupted(callback: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "add_callback", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rc_probe.watch(trainer, TEXTS[:2])
    assert "evaluation_loop" not in vars(trainer)


def test_rows_and_texts_say_the_same(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    by_rows, by_texts = rc_probe.watch(trainer).monitor, rc_probe.watch(trainer, TEXTS).monitor
    batches = [
        dict(tiny.tokenizer()(TEXTS[i : i + 3], padding=True, return_tensors="pt")) for i in (0, 3, 6, 9)
    ]
    by_batches = rc_probe.Monitor(trainer.model, iter(batches))
    loader = torch.utils.data.DataLoader(rows(tiny.tokenizer()), 5, collate_fn=Collate(trainer))
    by_loader = rc_probe.Monitor(trainer.model, loader)
    told = [monitor.measure() for monitor in (by_rows, by_texts, by_batches, by_loader) if monitor]
    assert len(told) == 4 and all(one == pytest.approx(told[0], rel=1e-6) for one in told)


class Collate:
    def __init__(self, trainer: transformers.Trainer) -> None:
        self.trainer = trainer

    def __call__(self, items: list[dict[str, Any]]) -> Any:
        return self.trainer.data_collator([{k: v for k, v in item.items() if k != "name"} for item in items])


def test_it_chooses_the_best_model(tmp_path: Path) -> None:
    how = {"save_strategy": "steps", "save_steps": 2, "metric_for_best_model": "eval_residual_last"}
    trainer = make_trainer(tmp_path, **how, load_best_model_at_end=True, greater_is_better=False)
    watch = rc_probe.watch(trainer)
    trainer.train()
    last = watch.frame().query("layer == 2 and metric == 'residual'").set_index("step")["mean"]
    assert trainer.state.best_metric == last.min()
    assert trainer.state.best_global_step == last.idxmin()
    with pytest.raises(rc_probe.RcProbeError, match="residual_last chooses the best model"):
        rc_probe.watch(make_trainer(tmp_path, **how), every=2)


def test_every_counts_evaluations_and_several_datasets_are_one(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eval_steps=1)
    watch = rc_probe.watch(trainer, TEXTS, every=3)
    trainer.train()
    assert watch.frame()["step"].unique().tolist() == [1, 4]
    trainer = make_trainer(tmp_path)
    trainer.eval_dataset = {"one": trainer.eval_dataset, "two": trainer.eval_dataset}
    watch = rc_probe.watch(trainer, every=2)
    trainer.train()
    assert watch.frame()["step"].unique().tolist() == [2, 6]
    assert trainer.state.log_history[-2].keys() >= {"eval_two_loss", "eval_collapse_layer"}


def collapsing(layer: int) -> Callable[[Any], None]:
    """Makes all tokens nearly equal after block `layer`, by the weights of its last norm."""

    def change(model: Any) -> None:
        norm = model.bert.encoder.layer[layer - 1].output.LayerNorm
        norm.weight.data.fill_(1e-3)
        norm.bias.data.fill_(1.0)

    return change


@pytest.mark.parametrize("plain", [True, False])
def test_collapse_is_told_or_stops(tmp_path: Path, plain: bool) -> None:
    def run(how: Any, spoil: bool) -> transformers.Trainer:
        model = fresh()
        if spoil:
            collapsing(1)(model)
        callback = [CollapseCallback(TEXTS, on_collapse=how)] if plain else None
        trainer = make_trainer(tmp_path, model, learning_rate=1e-9, callbacks=callback)
        if not plain:
            rc_probe.watch(trainer, TEXTS, on_collapse=how)
        trainer.train()
        return trainer

    with pytest.warns(UserWarning, match="step 2: collapsed at layer 1 of 2"):
        stopped = run("stop", True)
    assert stopped.state.global_step == 2
    assert stopped.state.log_history[1]["eval_collapse_layer"] == 1
    with pytest.warns(UserWarning, match="step 6: collapsed"):
        assert run("warn", True).state.global_step == 6
    assert run("stop", False).state.global_step == 6
    assert run(None, True).state.global_step == 6


def test_what_is_not_finite_is_no_health(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    watch = rc_probe.watch(trainer, TEXTS, on_collapse="stop")
    trainer.model.bert.encoder.layer[1].output.dense.bias.data[0] = float("nan")
    assert np.isnan(trainer.evaluate()["eval_collapse_layer"])
    assert watch.frame().query("layer == 1")["mean"].notna().all()
    with pytest.warns(UserWarning, match="step 2: the residual is not finite"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_the_layer_of_collapse() -> None:
    assert collapse_layer([(1.0, 0.0), (0.5, 0.0), (0.0999, 0.0), (0.5, 0.0)]) == 2
    assert collapse_layer([(1.0, 0.0), (0.5, 0.0), (0.1, 0.0)]) == 3
    assert collapse_layer([(1.0, 0.0), (0.5, 0.5), (0.4, 0.0)]) == 1
    assert collapse_layer([(1e-8, 1e-7), (0.5, 0.0)]) == 0
    row = {"metric": "residual_bulk", "floor": 0.0}
    told = summarise(
        [{**row, "layer": i, "mean": mean} for i, mean in enumerate([0.1, 0.5, float("nan"), 0.7])]
    )
    assert told["residual_bulk_last"] == 0.7
    assert np.isnan(told["residual_bulk_min"]) and np.isnan(told["collapse_layer"])


def test_tensorboard_shows_the_metrics(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(tmp_path / "run", report_to=["tensorboard"])
    watch = rc_probe.watch(trainer)
    trainer.train()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("eval/residual_last")]
    last = watch.frame().query("layer == 2 and metric == 'residual'")
    assert shown == [(s, pytest.approx(v, rel=1e-6)) for s, v in zip(last["step"], last["mean"], strict=True)]
    assert {"eval/residual_first", "eval/residual_min", "eval/collapse_layer"} <= set(
        events.Tags()["scalars"]
    )


def test_the_trainer_of_sentence_transformers(tmp_path: Path) -> None:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, losses
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments

    from rc_probe.models.locate import locate

    def run(watched: bool) -> tuple[Any, Any]:
        model = SentenceTransformer(str(locate("demo", None, False).place), device="cpu")
        pairs = Dataset.from_dict({"anchor": REAL, "positive": REAL[::-1]})
        arguments = Arguments(
            str(tmp_path), use_cpu=True, max_steps=2, per_device_train_batch_size=3, eval_strategy="steps",
            eval_steps=1, save_strategy="no", disable_tqdm=True, report_to=[],
        )  # fmt: skip
        trainer = SentenceTransformerTrainer(
            model,
            arguments,
            train_dataset=pairs,
            eval_dataset=pairs,
            loss=losses.MultipleNegativesRankingLoss(model),
        )
        if watched:
            rc_probe.watch(trainer, column="anchor")
        trainer.train()
        return model.state_dict(), trainer.state.log_history

    (plain, _), (watched, history) = run(False), run(True)
    assert all(torch.equal(plain[key], watched[key]) for key in plain)
    assert sum(record.keys() >= MINE for record in history) == 2


def train(model: Any, steps: int, monitor: Any = None) -> list[dict[str, float] | None]:
    """A plain loop, with dropout and a loader that shuffles."""
    torch.manual_seed(0)
    tokenizer = tiny.tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    collate = transformers.DataCollatorWithPadding(tokenizer)
    items = [{key: value for key, value in row.items() if key != "name"} for row in rows(tokenizer)]
    loader = torch.utils.data.DataLoader(items, 4, shuffle=True, collate_fn=collate)
    model.train()
    told, done = [], 0
    while done < steps:
        for batch in loader:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            told.append(monitor.step() if monitor else None)
    return told


def test_a_plain_loop_goes_on_as_without() -> None:
    plain, watched = fresh(), fresh()
    train(plain, 6)
    monitor = rc_probe.Monitor(watched, TEXTS, every=2, processor=tiny.tokenizer())
    told = train(watched, 6, monitor)
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True)
    )
    assert watched.training and all(module.training for module in watched.modules())
    assert [one is not None for one in told] == [False, True] * 3
    assert monitor.frame()["step"].unique().tolist() == [2, 4, 6]
    curve = alone(watched.eval(), tokenized(tiny.tokenizer(), TEXTS), 3)
    assert told[-1] is not None and told[-1]["residual_last"] == pytest.approx(curve[2], rel=1e-5)


def test_an_accelerate_loop_with_its_trackers(tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    AcceleratorState._reset_state(reset_partial_state=True)  # a Trainer may have set another precision
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("run")
    model = accelerator.prepare(fresh())
    monitor = rc_probe.Monitor(model, TEXTS, every=3, processor=tiny.tokenizer())
    told = train(model, 6, monitor)
    for number, metrics in enumerate(told, 1):
        if metrics:
            accelerator.log(metrics, step=number)
    accelerator.end_training()
    AcceleratorState._reset_state(reset_partial_state=True)
    (file,) = (file for file in tmp_path.rglob("events.out.tfevents.*"))
    events = EventAccumulator(str(file)).Reload().Scalars("residual_last")
    assert [event.step for event in events] == [3, 6]
    assert [event.value for event in events] == pytest.approx([one["residual_last"] for one in told if one])


@pytest.mark.parametrize("outer", ["autocast", "grad", "inference"])
def test_it_measures_the_weights_whatever_the_loop_is_in(demo: Loaded, outer: str) -> None:
    monitor = rc_probe.Monitor(demo.model, REAL)
    plain = monitor.measure()
    modes = {
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "grad": torch.enable_grad(),
        "inference": torch.inference_mode(),
    }
    with modes[outer]:
        assert monitor.measure() == plain


def test_reading_the_data_draws_no_random_numbers(tmp_path: Path) -> None:
    def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        np.random.rand(), random.random()
        return dict(
            tiny.tokenizer().pad([{"input_ids": item["input_ids"]} for item in items], return_tensors="pt")
        )

    loader = torch.utils.data.DataLoader(rows(tiny.tokenizer()), 4, shuffle=True, collate_fn=collate)
    model, trainer = fresh(), make_trainer(tmp_path)
    before = random_states()
    rc_probe.Monitor(model, loader)
    trainer.data_collator = collate
    rc_probe.watch(trainer)
    assert random_states() == before
    next(iter(loader))
    assert all(one != other for one, other in zip(random_states(), before, strict=True))


def test_gradients_flow_after_a_measurement_under_autocast() -> None:
    """Casts of weights that autocast keeps are not those that were made without gradients."""
    model, tokenizer = fresh().train(), tiny.tokenizer()
    monitor = rc_probe.Monitor(model, TEXTS, processor=tokenizer)
    with torch.autocast("cpu", torch.bfloat16):
        monitor.measure()
        out = model(
            **tokenizer(TEXTS, padding=True, return_tensors="pt"), labels=torch.ones(len(TEXTS), dtype=int)
        )
    out.loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "pooler" not in name)


def test_batches_of_a_plain_module() -> None:
    class Blocks(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
            self.encoder = torch.nn.TransformerEncoder(layer, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.encoder(x)

    model, data = Blocks(), [{"x": torch.randn(4, 6, 16)} for _ in range(3)]
    monitor = rc_probe.Monitor(model, data, samples=10)
    told = monitor.measure()
    assert monitor.frame()["count"].eq(10).all() and model.training
    entered = np.mean([numpy_residual(x.numpy()) for x in torch.cat([batch["x"] for batch in data])[:10]])
    assert told["residual_first"] == pytest.approx(entered, rel=1e-5)


def test_what_cannot_be_watched_is_told(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    with pytest.raises(rc_probe.RcProbeError, match="on_collapse='end' is not known"):
        rc_probe.watch(trainer, TEXTS, on_collapse="end")  # type: ignore[arg-type]
    with pytest.raises(rc_probe.RcProbeError, match="every=0 is too small"):
        rc_probe.watch(trainer, TEXTS, every=0)
    with pytest.raises(rc_probe.RcProbeError, match="every: 0 is too small"):
        rc_probe.Monitor(trainer.model, TEXTS, every=0)
    with pytest.raises(rc_probe.RcProbeError, match="no metric is called 'resdual'"):
        rc_probe.watch(trainer, TEXTS, metrics=["resdual"])
    trainer.eval_dataset = None
    with pytest.raises(rc_probe.RcProbeError, match=r"no evaluation dataset.*watch\(trainer, texts\)"):
        rc_probe.watch(trainer)
    assert "evaluation_loop" not in vars(trainer)
    batch = {"input_ids": torch.tensor([[1, 5, 2, 0], [1, 6, 7, 2]])}
    monitor = rc_probe.Monitor(trainer.model, [batch])
    with pytest.raises(rc_probe.RcProbeError, match="without an attention mask"):
        monitor.measure()
    monitor = rc_probe.Monitor(make_trainer(tmp_path).model, TEXTS, processor=tiny.tokenizer())
    encoder = monitor.model.bert.encoder
    encoder.forward = lambda x, *args, **kwargs: Output(x)
    with pytest.raises(rc_probe.RcProbeError, match="new Monitor"):
        monitor.measure()
