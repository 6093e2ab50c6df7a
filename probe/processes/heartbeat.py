"""Who is alive, and what went wrong elsewhere: a thread in each process of a run, over the store that they share.

Each process counts up a number in the store, and watches the number of the next one: a ring. So one that was killed, or
whose machine is gone, is found without a launcher's help, and no wait needs a time limit: a long load or an
uneven share trips nothing. The main thread only reads `trouble`, which costs nothing.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

from rc_probe.hooks.errors import RcProbeError

BEAT = 1.0  # seconds between two looks
LOST = 40.0  # seconds without a sign of life; what holds Python's lock that long is not foreseen
JOIN = 600.0  # seconds that processes may start apart
LAST = 10.0  # seconds that processes wait for others to leave; a third of them after an error


class ElsewhereError(RcProbeError):
    """What went wrong in another process of the run."""


class Pulse:
    """The thread. `trouble` is why the run cannot go on, None while it can.

    store: of torch.distributed, with a prefix of its own; rank, local, size: see World
    """

    def __init__(self, store: Any, rank: int, local: int, size: int) -> None:
        self.store, self.rank, self.local, self.size = store, rank, local, size
        self.trouble: ElsewhereError | None = None
        self.posted = False  # an error, by this process
        self._speaks: bool | None = None  # whether this process says it on the terminal
        self._over = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="rc-probe pulse", daemon=True)
        self._thread.start()

    def post(self, what: str) -> bool:
        """Tell the other processes why the run ends; whether this one is to say it on the terminal.

        One process of each machine does. The first error of several counts.
        """
        if not self.posted and self.trouble is None:
            try:
                self.store.compare_set("error", "", json.dumps({"rank": self.rank, "what": what}))
                self._claim()
            except Exception:  # the store went with the process that held it
                self._alone()
        self.posted = True
        return self._speaks is not False

    def leave(self) -> None:
        """End the thread. Process 0 waits a little for the others, who may still read the store.

        Who has nothing to say waits for the one that speaks: launchers end all when one has ended.
        """
        self._over.set()
        self._thread.join(timeout=LAST)
        if self._speaks is False:
            time.sleep(LAST / 3)
        try:
            self.store.set(f"left/{self.rank}", "")
            left = self.store.add("left", 1)
            failed = self.posted or self.trouble is not None  # they need a beat to read of it
            until = time.monotonic() + (LAST / 3 if failed else LAST)
            while self.rank == 0 and left < self.size and time.monotonic() < until:
                time.sleep(0.05)
                left = self.store.add("left", 0)
        except Exception:  # the store is gone, and nobody waits any more
            return

    def _run(self) -> None:
        follows = (self.rank + 1) % self.size
        last, seen = b"", time.monotonic()
        while not self._over.wait(BEAT):
            try:
                self._beat()
                found = self.store.get(f"beat/{follows}") if self.store.check([f"beat/{follows}"]) else b""
                if found != last or self.store.check([f"left/{follows}"]):
                    last, seen = found, time.monotonic()
                elif time.monotonic() - seen > LOST:
                    what = f"process {follows} died or hangs: no sign of life for {LOST:.0f} s"
                    self.store.compare_set("error", "", json.dumps({"rank": follows, "what": what}))
                if self.store.check(["error"]):
                    self._read()
                    return
            except Exception:
                if not self._over.is_set():
                    self._alone()
                    self.trouble = ElsewhereError(
                        "the process that held the run together is gone, so the run ends", where=f"process {self.rank}",
                        todo="See its own message; the same command starts anew",
                    )  # fmt: skip
                return

    def _beat(self) -> None:
        self.store.set(f"beat/{self.rank}", str(time.monotonic_ns()))

    def _read(self) -> None:
        found = json.loads(self.store.get("error"))
        if self._speaks is None:
            self._claim()
        self.trouble = ElsewhereError(found["what"])

    def _claim(self) -> None:
        """Speak if no other process of this machine does."""
        if self._speaks is None:
            self._speaks = self.store.add(f"told/{socket.gethostname()}", 1) == 1

    def _alone(self) -> None:
        """Without the store: the lowest process of each machine speaks; process 0 is the one that is gone."""
        if self._speaks is None:
            self._speaks = self.local == (1 if self.rank == self.local else 0)
