"""A server process, as its keeper sees it.

A server first prepares (imports everything, checks the configuration), says so, and waits.  Only
when it is told to serve does it touch state and mounts, so that a new one can be made ready beside
the old one.  From when it is prepared it gives signs of life: one that hangs while it waits, or on
its way to the mounts, is no more use than one that hangs while it serves.
"""

from __future__ import annotations

import enum
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

from layerstore import limits
from layerstore.errors import ServiceError
from layerstore.service import messages, systemd
from layerstore.service.inforce import MEMORY_FD, InForce

MODULE: Final = "layerstore.service.server"
LINK_FD: Final = 3  # the server's end of its socket


class Stage(enum.Enum):
    """How far a server is."""

    PREPARING = "preparing"
    PREPARED = "prepared"
    STARTING = "starting"  # told to serve
    SERVING = "serving"
    RETIRING = "retiring"  # told to stop, or not needed any more


class Leave(enum.StrEnum):
    """How a server is to leave its state."""

    NOW = "now"  # the next server waits, and who reads waits for it
    SYNCED = "synced"  # and the machine may be about to stop
    CLEAN = "clean"  # nobody waits


def interpreter(module: str, arguments: Sequence[str]) -> list[str]:
    """The command line of a module of ours in a fresh interpreter.

    ``-P``: without the working directory among the places of modules, which may be anybody's.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


@dataclass(slots=True)
class Child:
    """A running server: its process, and the keeper's end of the socket to it (non-blocking)."""

    pid: int
    link: socket.socket
    stage: Stage = Stage.PREPARING
    in_force: InForce | None = None  # the settings that it goes by
    deadline: float | None = None  # of its stage, by time.monotonic(): it is killed then
    served_since: float | None = None
    silent_seconds: float = 0.0  # so long it may give no sign of life; 0: it is not asked for any
    signs: bool = False  # it gives them from when it is prepared, not only while it serves
    next_sign: float | None = None  # by time.monotonic(): it is asked then
    sign_by: float | None = None  # it was asked, and is killed then
    failure: str = ""
    failure_status: int = 1
    prepared: Mapping[str, Any] = field(default_factory=dict)
    silent: bool = False  # its end of the socket is closed

    @classmethod
    def start(cls, arguments: Sequence[str], in_force: InForce) -> Self:
        """Start a server with the settings that are to be in force.  ServiceError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = interpreter(MODULE, ["--keeper", str(os.getpid()), *arguments])
            try:
                pid = os.posix_spawn(
                    command[0],
                    command,
                    in_force.named(systemd.without_ours(os.environ)),
                    file_actions=[  # in this order: the second one is never LINK_FD
                        (os.POSIX_SPAWN_DUP2, theirs.fileno(), LINK_FD),
                        (os.POSIX_SPAWN_DUP2, in_force.fd, MEMORY_FD),
                    ],
                    setsigmask=(),
                    setpgroup=0,  # what a terminal sends is the keeper's to obey
                )
            except OSError as error:
                ours.close()
                raise ServiceError(f"no server can be started: {error.strerror}") from error
        ours.setblocking(False)
        deadline = time.monotonic() + limits.SERVER_PREPARE_SECONDS
        return cls(pid, ours, in_force=in_force, deadline=deadline)

    def is_prepared(self, facts: Mapping[str, Any]) -> None:
        """It can serve, and waits."""
        self.stage, self.deadline, self.prepared = Stage.PREPARED, None, facts
        self.silent_seconds = float(facts["silent_seconds"])
        self.signs = bool(facts.get("signs"))  # servers of older releases do not
        self.gave_sign()

    def serve(self, order: Mapping[str, object], fds: Sequence[int]) -> None:
        """Tell it to serve.  One that is gone already is met by `reap`."""
        self.stage = Stage.STARTING
        self.deadline = time.monotonic() + limits.SERVER_START_SECONDS
        self.tell({"serve": order}, fds)

    def served(self) -> None:
        """It serves, and is to give signs of life from now on."""
        self.stage, self.served_since = Stage.SERVING, time.monotonic()
        self.deadline, self.signs = None, True
        self.gave_sign()

    def overdue(self, now: float) -> bool:
        """Whether it missed what it had to do by ``now``; asks for the next sign of life."""
        if self.next_sign is not None and self.next_sign <= now:
            self.next_sign = None
            self.sign_by = now + self.silent_seconds
            self.tell({"sign": True})
        if self.sign_by is not None and self.sign_by <= now:
            self.failure = f"no sign of life for {self.silent_seconds:g} s"
            return True
        return self.deadline is not None and self.deadline <= now

    @property
    def due(self) -> Iterator[float]:
        """When `overdue` is to be called, by time.monotonic()."""
        return (at for at in (self.deadline, self.next_sign, self.sign_by) if at is not None)

    def gave_sign(self) -> None:
        """It lives; the next question comes in a while."""
        if self.signs and self.silent_seconds and self.stage is not Stage.RETIRING:
            self.sign_by = None
            self.next_sign = time.monotonic() + self.silent_seconds / 3

    def retire(self, leave: Leave) -> None:
        """Tell it to let go of everything and end; it is killed if it does not."""
        if self.stage is not Stage.RETIRING:
            self.stage = Stage.RETIRING
            self.next_sign = self.sign_by = None
            self.deadline = time.monotonic() + limits.SERVER_STOP_SECONDS
            self.tell({"stop": leave.value})

    def tell(self, message: Mapping[str, object], fds: Sequence[int] = ()) -> None:
        """Send a message.  Who cannot take one is dead or was stopped, and is killed."""
        try:
            messages.send(self.link, message, fds)
        except OSError:
            self.kill()

    def dismiss(self) -> None:
        """End one that waits and is not needed any more."""
        self.stage = Stage.RETIRING
        self.kill()

    def kill(self) -> None:
        """End it by force."""
        os.kill(self.pid, signal.SIGKILL)
        self.deadline = self.next_sign = self.sign_by = None

    def said(self) -> list[dict[str, Any]]:
        """What it said since the last call."""
        found: list[dict[str, Any]] = []
        while True:
            try:
                received = messages.receive(self.link)
            except BlockingIOError:
                return found
            except ServiceError:
                continue
            if received is None:
                self.silent = True
                return found
            found.append(received[0])

    def reap(self) -> str | None:
        """How it ended, in words; None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0:
            return None
        code = os.waitstatus_to_exitcode(status)
        return f"status {code}" if code >= 0 else signal.Signals(-code).name
