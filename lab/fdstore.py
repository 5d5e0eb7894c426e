"""A stand-in for systemd: the notify socket with its store of descriptors, and starts with them.

As sd_notify(3), sd_listen_fds(3) and systemd.service(5) say: what a service gave with ``FDSTORE=1``
comes back at its next start as descriptors 3 and up, with names, until ``FDSTOREREMOVE=1``.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

_FDS: Final = 16  # in one message
# In the process itself: sd_listen_fds(3) wants its own process id.  Low numbers may be in use as
# long as not all are in place, so what is inherited lies above.
_LAUNCH: Final = """
import json, os, sys
fds, command = json.loads(sys.argv[1]), sys.argv[2:]
for place, fd in enumerate(fds):
    os.dup2(fd, 3 + place)
    os.close(fd)
os.environ["LISTEN_PID"] = os.environ["WATCHDOG_PID"] = str(os.getpid())
os.execvp(command[0], command)
"""
_ABOVE: Final = 200


class FdStore:
    """Listens on ``directory/notify``.  A context manager; `start` may be called again and again.

    ``states`` are the messages without descriptors, oldest first, each a dictionary.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._lock = threading.Condition()
        self.states: list[dict[str, str]] = []
        self._kept: list[tuple[str, int]] = []
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def names(self) -> list[str]:
        """The names of what is kept, sorted."""
        with self._lock:
            return sorted(name for name, _ in self._kept)

    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        watchdog_seconds: float | None = None,
        **options: Any,
    ) -> subprocess.Popen[bytes]:
        """Start the service with what is kept; ``options`` are those of Popen."""
        given = dict(os.environ if environment is None else environment)
        given |= {"NOTIFY_SOCKET": str(self._path), "FDSTORE": "64"}
        if watchdog_seconds is not None:
            given["WATCHDOG_USEC"] = str(int(watchdog_seconds * 1e6))
        with self._lock:
            kept = list(self._kept)
        copies = [_above(fd) for _, fd in kept]
        if kept:
            given["LISTEN_FDS"] = str(len(kept))
            given["LISTEN_FDNAMES"] = ":".join(name for name, _ in kept)
        try:
            return subprocess.Popen(
                [sys.executable, "-c", _LAUNCH, json.dumps(copies), *command],
                env=given,
                pass_fds=copies,
                **options,
            )
        finally:
            for fd in copies:
                os.close(fd)

    def wait_for(self, key: str, seconds: float = 20.0, *, after: int = 0) -> dict[str, str]:
        """The first message with ``key`` after the first ``after`` ones."""
        end = time.monotonic() + seconds
        with self._lock:
            while True:
                found = [state for state in self.states[after:] if key in state]
                if found:
                    return found[0]
                if not self._lock.wait(end - time.monotonic()):
                    raise TimeoutError(f"no {key} in {seconds} s: {self.states}")

    def stop(self) -> None:
        """Close all that is kept, as systemd does when a service is stopped for good."""
        with self._lock:
            for _, fd in self._kept:
                os.close(fd)
            self._kept = []

    def __enter__(self) -> Self:
        self._socket.bind(str(self._path))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()
        self._path.unlink()
        self.stop()

    def _listen(self) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(self._socket, 4096, _FDS)
            if not data:
                return
            said = dict(line.partition("=")[::2] for line in data.decode().splitlines())
            with self._lock:
                self._take(said, fds)
                self._lock.notify_all()

    def _take(self, said: dict[str, str], fds: list[int]) -> None:
        name = said.get("FDNAME", "stored")
        if said.get("FDSTORE") == "1":
            self._kept += [(name, fd) for fd in fds]
            return
        for fd in fds:
            os.close(fd)
        if said.get("FDSTOREREMOVE") == "1":
            for _, fd in [one for one in self._kept if one[0] == name]:
                with contextlib.suppress(OSError):
                    os.close(fd)
            self._kept = [one for one in self._kept if one[0] != name]
        self.states.append(said)


def _above(fd: int) -> int:
    """A copy of ``fd`` with a number that is out of the way."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD, _ABOVE)
