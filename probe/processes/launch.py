"""`--num-processes N`: the same command N times on this machine, as one run. torch is imported only to start it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import uuid

from rc_probe.common_options import ModelAndData
from rc_probe.hooks.errors import RcProbeError

PATIENCE = 3.0  # seconds
OPTION = "--num-processes"


def launched() -> int | None:
    """How many processes torchrun, accelerate or `start` has started, this one among them; None if nobody did."""
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if size.isdigit() and "RANK" in os.environ else None


def first_to_speak() -> bool:
    """Whether this process says what is wrong before the processes know each other: the first of them.

    The others wait a little, since launchers end all processes as soon as one has ended.
    """
    if launched() is None or os.environ["RANK"] == "0":
        return True
    time.sleep(PATIENCE)
    return False


def start_or_join(processes: int, chosen: ModelAndData) -> None:
    """Start the run and end with its exit code; return if this is one of its processes, or the only one.

    Raises RcProbeError if a launcher has started another number of processes.
    """
    already = launched()
    if already is not None and already != processes:
        what = f"{processes} processes are wanted, and a launcher has started {already}"
        raise RcProbeError(what, where=OPTION, todo=f"Leave {OPTION} out under torchrun or accelerate launch")
    if already is not None or processes == 1:
        return
    if chosen.device_map is not None:
        what = f"each of {processes} processes would spread a whole model over all devices"
        raise RcProbeError(what, where=f"--device-map, {OPTION}", todo="Leave one of them out")
    raise SystemExit(start(processes, [sys.executable, "-m", "rc_probe", *sys.argv[1:]]))


def start(processes: int, command: list[str]) -> int:
    """Run `command` as `processes` processes by torch's elastic agent, which ends all when one ends badly.

    Returns the exit code of the first that ended badly, or 0. A process that a signal killed is reported by
    RcProbeError; whatever else went wrong, a process has said itself.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", local_addr="localhost", max_restarts=0, monitor_interval=0.1,
    )  # fmt: skip
    logging.disable(logging.CRITICAL)  # the agent's tables of what failed, which a process has said already
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return int(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        what = f"process {rank} of {processes} was killed ({name}), and the others were ended. Nothing was written"
        todo = (
            "Out of memory, perhaps: start fewer processes"
            if name == "SIGKILL"
            else "The same command starts anew"
        )
        raise RcProbeError(what, where=OPTION, todo=todo) from None
    except SignalException:  # Ctrl-C; the processes got it, too
        return 130
    finally:
        logging.disable(logging.NOTSET)
    return 0
