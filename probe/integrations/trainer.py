"""transformers' Trainer: `watch` puts collapse into its evaluation record, `CollapseCallback` is the plain callback."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from transformers import TrainerCallback

from rc_probe.contexts import DEFAULT_METRICS
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.undo import undoing
from rc_probe.models.model_inputs import accepts

from .monitor import Monitor, same_random

if TYPE_CHECKING:
    import pandas as pd

OnCollapse = Literal["warn", "stop"] | None


class CollapseCallback(TrainerCallback):  # type: ignore[misc]
    """Measures at evaluations and adds `eval_residual_bulk_last` and the like to what `evaluate()` returns.

    They count for `metric_for_best_model` and stand in `log_history`; trackers log before callbacks run, so
    they see nothing of it: `watch` reaches them, too.

    Parameters
    ----------
    data: what `Monitor` takes
    every: measure once in so many evaluations
    on_collapse: where a layer has collapsed or is not finite: "warn", "stop" (warn and end the training)
    options: those of `Monitor`
    """

    def __init__(
        self, data: Any = None, *, every: int = 1, on_collapse: OnCollapse = None, **options: Any
    ) -> None:
        if every < 1:
            raise RcProbeError(f"every={every} is too small", where="Trainer", todo="Give 1 or more")
        if on_collapse not in (None, "warn", "stop"):
            what = f"on_collapse={on_collapse!r} is not known"
            raise RcProbeError(what, where="Trainer", todo="Give 'warn', 'stop' or None")
        self.data, self.every, self.on_collapse, self.options = data, every, on_collapse, options
        self.monitor: Monitor | None = None
        self._step: int | None = None  # of the last evaluation
        self._evaluations = 0
        self._finding: str | None = None

    def prepare(self, model: Any, processor: Any) -> Monitor:
        """The monitor, made on the first call: the model is proved, the data are read."""
        if self.monitor is None:
            self.monitor = Monitor(model, self.data, **{"processor": processor} | self.options)
        return self.monitor

    def read(self, model: Any, processor: Any, step: int) -> dict[str, float]:
        """The metrics of this evaluation, with the prefix `eval_`; none where it is not one of `every`."""
        if step != self._step:  # several datasets at one step are one evaluation
            self._step, self._evaluations = step, self._evaluations + 1
        self._finding = None
        if (self._evaluations - 1) % self.every:
            return {}
        monitor = self.prepare(model, processor)
        monitor.steps = step
        told = monitor.measure()
        self._finding = _finding(told, monitor.structure.depth, step)
        return {f"eval_{name}": value for name, value in told.items()}

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.prepare(
            given["model"], given.get("processing_class")
        )  # a model that has collapsed cannot be proved

    def on_evaluate(
        self, args: Any, state: Any, control: Any, *, metrics: dict[str, float] | None = None, **given: Any
    ) -> None:
        mine = self.read(given["model"], given.get("processing_class"), state.global_step)
        if metrics is not None:
            metrics.update(mine)
        if state.log_history and any(name.startswith("eval_") for name in state.log_history[-1]):
            state.log_history[-1].update(mine)
        self.act(control)

    def act(self, control: Any) -> None:
        """Warn, or stop the training, if the last reading was a collapse."""
        if self._finding and self.on_collapse:
            warnings.warn(self._finding, stacklevel=3)
            control.should_training_stop |= self.on_collapse == "stop"


class Watch(CollapseCallback):
    """What `watch` returns: `.frame()` has every measurement, `.remove()` ends the watching."""

    def __init__(self, trainer: Any, data: Any, options: dict[str, Any]) -> None:
        super().__init__(data, **options)
        self.trainer, self._loop = trainer, trainer.evaluation_loop
        monitor = self.prepare(trainer.model, trainer.processing_class)
        best = (trainer.args.metric_for_best_model or "").removeprefix("eval_")
        if self.every > 1 and (best == "collapse_layer" or best.rpartition("_")[0] in monitor.metrics):
            what = f"{best} chooses the best model, and would be missing from evaluations"
            raise RcProbeError(what, where="watch", todo="Measure at every=1")
        self._before = vars(trainer).get("evaluation_loop")
        self._watching = True
        try:
            trainer.evaluation_loop = self._evaluation_loop
            trainer.add_callback(self)
        except BaseException:
            self.remove()
            raise

    def _evaluation_loop(self, *args: Any, **given: Any) -> Any:
        output = self._loop(*args, **given)
        if self._watching and given.get("metric_key_prefix", "eval").startswith("eval"):
            trainer = self.trainer
            output.metrics.update(
                self.read(trainer.model, trainer.processing_class, trainer.state.global_step)
            )
        return output

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.act(control)  # the record has been made

    def frame(self) -> pd.DataFrame:
        """As `Monitor.frame`; `step` is the trainer's global step."""
        assert self.monitor is not None
        return self.monitor.frame()

    def remove(self) -> None:
        """Leave the trainer as it was found, whatever interrupts this. Other watches stay, and may end before or later."""
        with undoing(self._leave):
            pass

    def _leave(self) -> None:
        self._watching = False
        if self in self.trainer.callback_handler.callbacks:
            self.trainer.remove_callback(self)
        if vars(self.trainer).get("evaluation_loop") != self._evaluation_loop:
            return  # put back already; or another watch's, which calls this one, and puts back what stands before both
        if (before := self._before_all()) is None:
            vars(self.trainer).pop("evaluation_loop", None)
        else:
            self.trainer.evaluation_loop = before

    def _before_all(self) -> Any:
        """The loop before this watch and before those that have ended since."""
        owner = getattr(self._before, "__self__", None)
        return owner._before_all() if isinstance(owner, Watch) and not owner._watching else self._before


def watch(
    trainer: Any,
    data: Any = None,
    *,
    every: int = 1,
    metrics: Sequence[str] = DEFAULT_METRICS,
    on_collapse: OnCollapse = None,
    samples: int = 32,
    batch_size: int = 8,
    **options: Any,
) -> Watch:
    """Put `eval_residual_bulk_first`, `_last`, `_min`, `eval_collapse_layer` and so on into a Trainer's evaluation record.

    So they reach every tracker, `log_history`, what `evaluate()` returns and `metric_for_best_model`
    (`Monitor.measure` says what each is; of `eval_collapse_layer` more is better). Training is bitwise as
    without; what is measured is the model's own copy of each process. Trainers of sentence-transformers and trl
    are Trainers, too.

    Parameters
    ----------
    trainer: a transformers.Trainer, before or after `train()`
    data: texts, a file, a dataset, batches (see `Monitor`), or rows as the trainer's own datasets have them,
        which go through its collator; None: the first `samples` rows of its evaluation dataset
    every: measure once in so many evaluations
    metrics: names, see `rc_probe.METRICS`; the residual, also of the bulk, is always among them
    on_collapse: where a layer has collapsed or is not finite: "warn", or "stop" (warn and end the training)
    options: further ones of `Monitor`

    Raises RcProbeError, before any training, when the model cannot be proved or the data do not fit it.

    >>> watch(trainer, ["A text.", "Another text."])     # doctest: +SKIP
    >>> trainer.train()                                  # doctest: +SKIP
    """
    if not hasattr(trainer, "evaluation_loop"):
        todo = "Give a transformers.Trainer; in a loop of your own, rc_probe.Monitor"
        raise RcProbeError(f"{type(trainer).__name__} is no Trainer", where="watch", todo=todo)
    with same_random():  # a collator may mask at random
        made = _collated(trainer, _evaluation_rows(trainer) if data is None else data, samples, batch_size)
    given = {"every": every, "metrics": metrics, "on_collapse": on_collapse, "samples": samples}
    return Watch(trainer, made, given | {"batch_size": batch_size} | options)


def _evaluation_rows(trainer: Any) -> Any:
    found = trainer.eval_dataset
    if isinstance(found, dict):
        found = next(iter(found.values()), None)
    if found is None or isinstance(found, str):
        raise RcProbeError(
            "the trainer has no evaluation dataset", where="watch", todo="Give texts: watch(trainer, texts)"
        )
    return found


def _collated(trainer: Any, data: Any, samples: int, batch_size: int) -> Any:
    """Rows of a trainer's dataset as batches, by its collator; anything else as it is."""
    if isinstance(data, str | Mapping) or hasattr(data, "columns"):  # a file, a DataFrame
        return data
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        rows = [data[i] for i in range(min(len(data), samples))]
    elif isinstance(data, Iterable) and iter(data) is not data:
        rows = list(islice(data, samples))
    else:
        return data
    model, main = trainer.model, getattr(trainer.model, "main_input_name", "input_ids")
    if not all(isinstance(row, Mapping) and main in row and not _is_batch(row[main], main) for row in rows):
        return data
    if trainer.args.remove_unused_columns:
        names = {key for key in rows[0] if accepts(model, key) or key in trainer.label_names}
        rows = [{key: row[key] for key in row if key in names} for row in rows]
    return [trainer.data_collator(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]


def _is_batch(value: Any, main: str) -> bool:
    """Whether a main input is that of a batch: token ids of one text have one axis, other inputs at most three."""
    return getattr(value, "ndim", 1) > (1 if main == "input_ids" else 3)


def _finding(told: Mapping[str, float], depth: int, step: int) -> str | None:
    layer, last = told["collapse_layer"], told["residual_bulk_last"]
    if math.isnan(layer):
        return f"step {step}: the residual is not finite at some layer"
    if layer > depth:
        return None
    return (
        f"step {step}: collapsed at layer {layer:.0f} of {depth} (relative residual of the bulk {told['residual_bulk_first']:.2g} at "
        f"layer 0, {last:.2g} at the last)"
    )
