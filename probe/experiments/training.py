"""The one training loop: Adam and a schedule, on the device that accelerate chooses or the user names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rc_probe.hooks.errors import RcProbeError
from rc_probe.models.libraries import quiet
from rc_probe.models.load import check_device

M = TypeVar("M", bound=nn.Module)
EVERY = 20  # steps between two reports


@dataclass(frozen=True)
class Recipe:
    """Adam with this learning rate. schedule: a name of `transformers.get_scheduler`; warm_up: share of the steps.

    decay: weight decay as an L2 term, as in the paper's code; clip: of the gradient's norm, 0 for none
    """

    lr: float
    schedule: str = "constant"
    warm_up: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    decay: float = 0.0
    clip: float = 0.0


class Trainer:
    """Trains models on one device; the global random state is as before.

    >>> Trainer("cpu").fit(nn.Linear(2, 1), batches, loss, Recipe(lr=1e-3), steps=100, seed=0)  # doctest: +SKIP

    device: cpu, cuda, cuda:1 …; None is what accelerate chooses
    report: called as report(what, done, total) while there is training, and may raise
    """

    def __init__(
        self,
        device: str | None = None,
        report: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> None:
        with quiet():  # accelerate imports what warns
            from accelerate import Accelerator
            from accelerate.utils import patch_environment

        wanted = None if device is None else check_device(device)
        with patch_environment(**({} if wanted is None else {"ACCELERATE_TORCH_DEVICE": str(wanted)})):
            self._accelerator = Accelerator(cpu=wanted is not None and wanted.type == "cpu")
        self.device: torch.device = self._accelerator.device
        if wanted is not None and (wanted.type, wanted.index or 0) != (
            self.device.type,
            self.device.index or 0,
        ):
            what = f"accelerate is set up for {self.device} in this process already"
            raise RcProbeError(what, where="--device", todo="Leave it out, or use a new process")
        if self._accelerator.num_processes > 1:
            raise RcProbeError(
                "experiments are run by one process", where="accelerate", todo="Start one process"
            )
        self.report = report

    def fit(
        self,
        model: M,
        batches: Iterator[Any],
        loss: Callable[[Any, Any], Tensor],
        recipe: Recipe,
        *,
        steps: int,
        seed: int,
        what: str = "training",
    ) -> M:
        """The model, trained for `steps` batches and in eval mode. The same numbers for the same seed on one machine.

        batches: on any device; loss(model, batch) is what is made small. RcProbeError where it is no number any more.
        """
        from transformers import get_scheduler

        with seeded(seed):
            optimiser = torch.optim.Adam(
                model.parameters(), lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.decay
            )
            schedule = get_scheduler(recipe.schedule, optimiser, round(recipe.warm_up * steps), steps)
            ready, stepper = self._accelerator.prepare(model.train(), optimiser)
            for step, batch in zip(range(1, steps + 1), batches, strict=False):
                value = loss(ready, batch)
                stepper.zero_grad()
                self._accelerator.backward(value)
                if recipe.clip:
                    self._accelerator.clip_grad_norm_(model.parameters(), recipe.clip)
                stepper.step()
                schedule.step()
                if step % EVERY == 0 or step == steps:
                    self._check(float(value.detach()), recipe)
                    self.report(what, step, steps)
        self._accelerator._models.clear()  # it would keep all of them
        self._accelerator._optimizers.clear()
        return model.eval()

    def _check(self, value: float, recipe: Recipe) -> None:
        if not math.isfinite(value):
            what = f"the loss is {value} with a learning rate of {recipe.lr:g}"
            raise RcProbeError(what, where="training", todo="Give a smaller one")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from `seed`, and the generators as they were afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def save_model(model: Any, folder: Path) -> None:
    """The folder of a transformers model, without the bars that the library draws."""
    with quiet():
        model.save_pretrained(folder)


def epochs(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Numbers of rows, (size,) each or fewer at the end of an epoch: all `count` rows in a new order, for ever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).split(size)
