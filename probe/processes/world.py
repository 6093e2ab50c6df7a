"""Several processes as one run: what each measures, and how it comes together."""

from __future__ import annotations

import datetime
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, distributed

from rc_probe.hooks.errors import RcProbeError, out_of_memory
from rc_probe.models.libraries import first_line, quiet

from .heartbeat import JOIN, ElsewhereError, Pulse

Value = TypeVar("Value")
CLAIMS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
SMALLER = "Try a smaller --batch-size or --length"
START = "Start it with rc-probe MODEL --num-processes N, torchrun, or accelerate launch --multi_gpu"
_joined = itertools.count()


class FailedTogetherError(RcProbeError):
    """What failed in one process, raised in each at the same point: they can go on with something else."""


class World(AbstractContextManager["World"]):
    """The processes of a run. `World()` is one process by itself; every method is then trivial.

    rank: number of this process, from 0; size: how many there are; local: number on this machine
    device: the GPU of this process, None without GPUs

    A measurement goes through three steps, the same for any number of processes: measure
    `world.share(batches)`, whole batches, since float32 rounds by a batch's shape; put together what came
    out by `world.sum(tensor)` or `world.gather(value)`, which every process must call, also one that had no
    batch; and go on with the result, which is the same everywhere. `world.once(make)` is for what one process does for
    all. Process 0 writes.

    `check()`, called now and then, raises the error of another process. As a context manager a World tells the others
    why this process ends; `post` does it earlier and says who prints the line.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, local: int = 0, device: torch.device | None = None
    ) -> None:
        self.rank, self.size, self.local, self.device = rank, size, local, device
        self._group: Any = None
        self._pulse: Pulse | None = None
        self._steps = 0
        self._release: Callable[[], None] = lambda: None

    # ---- beginning and end

    @classmethod
    def join(cls, *, cpu: bool = False) -> Self:
        """The processes that torchrun, `accelerate launch --multi_gpu` or MPI started; this one alone without them.

        `cpu` leaves GPUs aside. A process group that the program has already started is used, and stays.
        Raises RcProbeError where a launcher meant several processes and there are not as many.
        """
        claimed = _claimed()
        if claimed == 1:
            return cls()
        from accelerate import PartialState

        cpu = cpu or not torch.cuda.is_available()
        ours = not distributed.is_initialized()
        options: dict[str, Any] = {"timeout": datetime.timedelta(seconds=JOIN)} if ours else {}
        if ours and not cpu:
            options["backend"] = "gloo"  # little goes between the processes, and NCCL is not needed for it
        try:
            with quiet():
                state = PartialState(cpu=cpu, **options)
        except Exception as error:
            what = f"{claimed} processes were meant, and they do not find each other ({first_line(error)})"
            raise RcProbeError(what, where="launcher", todo=START) from error
        if state.num_processes != claimed:
            what = f"{claimed} processes were meant, and this one sees {state.num_processes}"
            raise RcProbeError(what, where="launcher", todo=START)
        device = None if cpu else _own_gpu(state)
        world = cls(state.process_index, state.num_processes, max(state.local_process_index, 0), device)
        world._group = None if distributed.get_backend() == "gloo" else distributed.new_group(backend="gloo")
        if ours:
            world._release = lambda: _release(state)
        number = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_joined)}"
        shared = distributed.distributed_c10d._get_default_store()
        store = distributed.distributed_c10d.PrefixStore(f"rc_probe/{number}", shared)
        world._pulse = Pulse(store, world.rank, world.local, world.size)
        return world

    @classmethod
    def given(cls) -> Self:
        """The process group that the program itself has started; this process alone without one.

        Raises RcProbeError if a launcher started several processes and they form no group.
        """
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        if (claimed := _claimed()) > 1:
            what = f"{claimed} processes were started, and they form no group"
            todo = "Make accelerate's PartialState() or call torch.distributed.init_process_group() first"
            raise RcProbeError(what, where="launcher", todo=todo)
        return cls()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._pulse is None:
            return
        try:
            if error is None:
                self._arrive()
            elif not isinstance(error, ElsewhereError):
                self.post(error)
        except BaseException as later:
            self.post(later)
            raise
        finally:
            self._pulse.leave()
            self._pulse = None
            self._release()

    # ---- what went wrong

    def check(self) -> None:
        """Raise the error of another process, if there is one. Costs nothing."""
        if self._pulse is not None and self._pulse.trouble is not None:
            raise self._pulse.trouble

    def post(self, error: BaseException) -> bool:
        """Tell the others why this process ends; whether it is to say it on the terminal, one of each machine."""
        if self._pulse is None:
            return True
        if isinstance(error, RcProbeError):
            return self._pulse.post(str(error))
        what = "interrupted" if isinstance(error, KeyboardInterrupt) else f"it failed ({first_line(error)})"
        return self._pulse.post(f"process {self.rank}: {what}")

    # ---- together

    def share(self, items: Sequence[Value]) -> Sequence[Value]:
        """Those of `items` that this process takes: every `size`-th, none left out and none twice."""
        return items[self.rank :: self.size]

    def gather(self, value: Value, what: str = "") -> list[Value]:
        """The `value` of each process, in the order of the processes; in every process. Anything that pickles.

        Waits for the slowest without a time limit; `what` must be the same in all.
        """
        if self.size == 1:
            return [value]
        self._arrive()
        found: list[Any] = [None] * self.size
        try:
            distributed.all_gather_object(found, (what, value), group=self._group)
        except RuntimeError as error:  # a connection broke
            self._wait_for_trouble()
            raise RcProbeError(
                f"a process of the run died ({first_line(error)})", where="launcher"
            ) from error
        if any(name != what for name, _ in found):
            names = sorted({name for name, _ in found})
            raise RcProbeError(
                f"the processes went different ways: {', '.join(names)}", where="launcher",
                todo="Give all of them the same model, data and options",
            )  # fmt: skip
        return [theirs for _, theirs in found]

    def together(self, work: Callable[[], Value], what: str = "") -> list[Value]:
        """What `work()` gives in each process, in every process. Where it fails in one, all get that error.

        So all go on together with what comes next. Errors that are neither of rc-probe nor of memory end the run.
        """
        if self.size == 1:
            return [work()]
        found: tuple[Value | None, RcProbeError | None]
        try:
            found = work(), None
        except ElsewhereError:
            raise
        except RcProbeError as error:
            found = None, error
        except Exception as error:
            if not out_of_memory(error):
                raise
            found = None, RcProbeError(f"process {self.rank} has no memory left", todo=SMALLER)
        outcomes = self.gather(found, what)
        for _, failed in outcomes:
            if failed is not None:
                raise FailedTogetherError(failed.what, where=failed.where, todo=failed.todo)
        return [value for value, _ in outcomes]  # type: ignore[misc]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, float64, in the order of the processes, on the device of `tensor`.

        Shapes must agree; a process without data gives zeros.
        """
        parts = self.gather(tensor.detach().double().cpu(), "sum")
        return torch.stack(parts).sum(0).to(tensor.device)

    def once(self, make: Callable[[], Value], what: str = "") -> Value:
        """What `make()` gives in process 0, in every process."""
        found: list[Any] = self.gather(make() if self.rank == 0 else None, what)
        value: Value = found[0]
        return value

    def same(self, facts: dict[str, Any]) -> None:
        """RcProbeError, naming what differs, unless all processes have the same facts."""
        for rank, theirs in enumerate(all_facts := self.gather(facts, "facts")):
            for name, value in theirs.items():
                if value != all_facts[0].get(name):
                    what = f"it has other {name} than process 0"
                    raise RcProbeError(
                        what,
                        where=f"process {rank}",
                        todo="Give all of them the same model, data and versions",
                    )

    @contextmanager
    def local_first(self) -> Iterator[None]:
        """Process 0 of each machine runs the body first: downloads happen once, the others find them."""
        if self.local:
            self._arrive()
        yield
        if not self.local:
            self._arrive()

    # ---- waiting

    def _arrive(self) -> None:
        """Wait until every process has come this far, or one has failed."""
        if self._pulse is None:
            return
        self._steps += 1
        key, wait = f"step/{self._steps}", 0.001
        try:
            come = self._pulse.store.add(key, 1)
            while come < self.size:
                self.check()
                time.sleep(wait)
                wait = min(wait * 1.5, 0.1)
                come = self._pulse.store.add(key, 0)
        except RuntimeError as error:  # the store is gone (ElsewhereError is none)
            self._wait_for_trouble()
            raise RcProbeError(
                f"a process of the run died ({first_line(error)})", where="launcher"
            ) from error

    def _wait_for_trouble(self) -> None:
        """Give the pulse time to find out what happened, and raise that."""
        for _ in range(50):
            self.check()
            time.sleep(0.1)


def _claimed() -> int:
    """How many processes a launcher says that there are. RcProbeError if they do not know their numbers."""
    env = os.environ
    claims = {name: int(env[name]) for name in CLAIMS if env.get(name, "").isdigit()}
    if not claims and "ACCELERATE_MIXED_PRECISION" in env and "MASTER_PORT" in env:
        # what `accelerate launch --cpu --num_processes 2` does
        what = "accelerate was told to start several processes, and started one"
        raise RcProbeError(what, where="launcher", todo="Use accelerate launch --multi_gpu, without --cpu")
    name = next(iter(claims), "")
    if claims.get(name, 1) > 1 and not any(rank in env for rank in RANKS):
        what = (
            f"{name} is {claims[name]}, and this process has no number (RANK), so all would do the same work"
        )
        raise RcProbeError(what, where="launcher", todo=f"{START}; for a run by itself unset {name}")
    return claims.get(name, 1)


def _own_gpu(state: Any) -> torch.device:
    """The GPU of this process."""
    there, local = torch.cuda.device_count(), max(state.local_process_index, 0)
    if local >= there or int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > there:
        what = f"there are more processes on this machine than its {there} GPUs"
        raise RcProbeError(what, where="launcher", todo=f"Start {there}, or use --device cpu")
    return torch.device("cuda", local)


def _release(state: Any) -> None:
    """End the process group, and let accelerate forget that there was one."""
    state.destroy_process_group()
    type(state)._reset_state()
