"""`kill -9` of a running store's server at the moments that hurt, and what shows that they did.

| moment     | when                                                                     |
|------------|--------------------------------------------------------------------------|
| `any`      | so and so long after it began to serve                                   |
| `waiting`  | the kernel has requests for it that have no answer yet                   |
| `lookup`   | a client is pulling a reference that the store may never have heard of   |
| `fetching` | a layer comes in: on demand, ahead of need or in the background          |
| `starting` | it was started because the last one died, and does not serve yet         |
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from lab.fusectl import FuseControl
from lab.loadcrew import Crew
from lab.store import LayerstoreService
from layerstore import limits, service
from layerstore.errors import LayerstoreError

Moment = Literal["any", "waiting", "lookup", "fetching", "starting"]
_WEIGHTS: Final[dict[Moment, int]] = {
    "any": 3, "waiting": 3, "lookup": 2, "fetching": 2, "starting": 2,
}  # fmt: skip

SERVE_SECONDS: Final = 30.0
"""A new server serves by then, whatever the machine has to do beside; the rule is one second."""

_MOMENT_SECONDS: Final = 2.0  # then it is killed though the moment did not come
_POLL_SECONDS: Final = 0.005
_EARLY: Final = 2  # servers in a row that die young; more, and their keeper takes its time


@dataclass(frozen=True, slots=True)
class Kill:
    """One death.

    ``waiting``: requests that the kernel had for the server; ``requests``: those that it had read
    in its life; ``restart_seconds``: since the death before, until it served (None: it never did).
    """

    moment: Moment
    pid: int
    waiting: int
    requests: int
    restart_seconds: float | None


class ServerKiller:
    """Kills the server of ``store`` again and again; moments are chosen by ``choice``."""

    def __init__(
        self, store: LayerstoreService, control: FuseControl, crew: Crew, choice: random.Random
    ) -> None:
        self._store: Final = store
        self._control: Final = control
        self._crew: Final = crew
        self._random: Final = choice
        self._last: int = 0
        self._died = time.monotonic()
        self._early = 0
        self._start_seconds = 0.3

    def kill(self) -> Kill:
        """Wait for a server and a moment, and kill it.  AssertionError if none comes up."""
        while True:
            (moment,) = self._random.choices([*_WEIGHTS], [*_WEIGHTS.values()])
            if self._early >= _EARLY:
                moment = "any"
            try:
                return self._starting() if moment == "starting" else self._serving(moment)
            except ProcessLookupError:
                continue  # a reload has ended it first

    def serving(self) -> dict[str, Any]:
        """Wait until the server that comes after the last one answers; its status."""
        end = time.monotonic() + SERVE_SECONDS
        while time.monotonic() < end:
            status = self._status()
            if status is not None and status["pid"] != self._last:
                return status
            time.sleep(_POLL_SECONDS)
        raise AssertionError(f"no new server in {SERVE_SECONDS} s:\n{self._store.log()[-4000:]}")

    def _serving(self, moment: Moment) -> Kill:
        self.serving()
        restart = time.monotonic() - self._died if self._last else None
        self._start_seconds = (self._start_seconds + (restart or 0.3)) / 2
        if self._early >= _EARLY:
            time.sleep(limits.SERVER_STEADY_SECONDS)
            self._early = 0
        else:
            self._early += 1
        if moment == "any":
            time.sleep(self._random.random() * 0.5)
        else:
            self._wait_for(self._moments()[moment])
            if moment != "waiting":
                time.sleep(self._random.random() * 0.1)
        status = self.serving()
        requests = sum(status["fuse"]["requests"].values())
        return self._strike(moment, status["pid"], requests, restart)

    def _starting(self) -> Kill:
        end = time.monotonic() + SERVE_SECONDS
        while not (pids := self._children() - {self._last}):
            assert time.monotonic() < end, self._store.log()[-4000:]
            time.sleep(_POLL_SECONDS)
        self._early += 1
        time.sleep(self._random.random() * self._start_seconds)
        return self._strike("starting", pids.pop(), 0, None)

    def _strike(self, moment: Moment, pid: int, requests: int, restart: float | None) -> Kill:
        waiting = self._control.waiting()
        os.kill(pid, signal.SIGKILL)
        self._died = time.monotonic()
        self._last = pid
        return Kill(moment, pid, waiting, requests, restart)

    # -- moments -----------------------------------------------------------------------

    def _moments(self) -> dict[Moment, Callable[[], bool]]:
        return {
            "waiting": lambda: self._control.waiting() > 0,
            "lookup": lambda: any(
                done.since and done.doing.startswith("pull ")
                for done in self._crew.progress().values()
            ),
            "fetching": self._is_fetching,
        }

    def _wait_for(self, moment: Callable[[], bool]) -> None:
        end = time.monotonic() + _MOMENT_SECONDS
        while time.monotonic() < end and not moment():
            time.sleep(_POLL_SECONDS)

    def _is_fetching(self) -> bool:
        status = self._status()
        return status is not None and any(not layer["complete"] for layer in status["layers"])

    def _status(self) -> dict[str, Any] | None:
        try:
            return service.request(self._store.root, "status")
        except LayerstoreError:
            return None

    def _children(self) -> set[int]:
        """The processes that the keeper has started."""
        keeper = self._store.keeper_pid
        found = ""
        with contextlib.suppress(OSError):
            found = Path(f"/proc/{keeper}/task/{keeper}/children").read_text()
        return set(map(int, found.split()))
