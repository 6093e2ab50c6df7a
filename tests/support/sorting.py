"""The SAN that sorts, trained with the sizes of the experiment."""

from typing import Any, NamedTuple

from torch import Tensor

from rc_probe.experiments.protocol import SeedRun
from rc_probe.experiments.sort import EXPERIMENT
from rc_probe.experiments.training import Trainer
from rc_probe.models.own.san import SANConfig, SANForTokenClassification


class Trained(NamedTuple):
    """The model, in eval mode, with the test sequences that it never saw, (sequences, tokens) each."""

    model: SANForTokenClassification
    inputs: Tensor
    labels: Tensor


def train_sorting(
    seed: int = 0, config: SANConfig | None = None, trainer: Trainer | None = None, **sizes: Any
) -> Trained:
    run = SeedRun(seed, EXPERIMENT.sizes.changed(**sizes), trainer or Trainer("cpu"))
    train, test = EXPERIMENT.data(run)
    return Trained(EXPERIMENT.train(run, train, config), test.inputs["input_ids"], test.labels)
