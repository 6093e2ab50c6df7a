"""sentence-transformers: an evaluator for its trainers. Importing this module imports the library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rc_probe.contexts import DEFAULT_METRICS
from rc_probe.hooks.errors import RcProbeError

from .monitor import Monitor

try:
    from sentence_transformers.base.evaluation import BaseEvaluator
except ImportError:  # before 6
    try:
        from sentence_transformers.evaluation import SentenceEvaluator as BaseEvaluator
    except ImportError:
        raise RcProbeError(
            "sentence_transformers is not installed", where="integrations",
            todo="pip install 'rc-probe[sentence-transformers]'",
        ) from None  # fmt: skip


class CollapseEvaluator(BaseEvaluator):  # type: ignore[misc]
    """How far the tokens of a sentence-transformers model are from collapse, as one of its evaluators.

    A call returns `residual_bulk_first`, `residual_bulk_last`, `residual_bulk_min`, `collapse_layer` and so on, each
    with `name` and a `_` in front (`Monitor.measure` says what they are). The primary metric is
    `residual_bulk_last`, and more is better. Among several evaluators the library takes the last one's
    primary metric as the score.

    Parameters
    ----------
    texts: what `rc_probe.Monitor` takes; None: the bundled biographies
    name: in front of the metrics
    metrics, options: those of `rc_probe.Monitor`

    With an `output_path`, every layer's numbers are written there, to `collapse[_NAME].csv`.

    >>> evaluator = CollapseEvaluator(texts, name="dev")                # doctest: +SKIP
    >>> SentenceTransformerTrainer(model, …, evaluator=evaluator)       # doctest: +SKIP
    """

    def __init__(
        self, texts: Any = None, *, name: str = "", metrics: Sequence[str] = DEFAULT_METRICS, **options: Any
    ) -> None:
        super().__init__()
        self.texts, self.name, self.options = texts, name, {"metrics": metrics, **options}
        self.greater_is_better, self.primary_metric = True, "residual_bulk_last"
        self._monitor: Monitor | None = None
        self._model: Any = None

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        if self._monitor is None or self._model is not model:
            self._monitor, self._model = Monitor(model, self.texts, **self.options), model
        self._monitor.steps = max(steps, 0)
        told: dict[str, float] = self.prefix_name_to_metrics(self._monitor.measure(), self.name)
        if output_path is not None:
            path = Path(output_path) / f"collapse{f'_{self.name}' if self.name else ''}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._monitor.frame().to_csv(path, index=False)
        if hasattr(model, "model_card_data"):
            self.store_metrics_in_model_card_data(model, told, epoch, steps)
        return told

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        return {"metrics": list(self.options["metrics"])}
