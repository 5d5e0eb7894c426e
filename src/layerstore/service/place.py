"""A keeper's place in the root directory: a lock, so that there is one, and a socket to ask it.

Two keepers never have one root directory.  One that only waits for the last users of an unmounted
store makes way for another, and gives it what it holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import time
from pathlib import Path

from layerstore import limits
from layerstore.errors import NoServiceError, ServiceError
from layerstore.service import held, keepersocket, messages
from layerstore.service.held import HeldMount
from layerstore.service.places import KEEPER_LOCK, KEEPER_SOCKET, unusable

_log = logging.getLogger(__name__)


class Place:
    """``lock`` and ``listener`` (non-blocking) are there between `claim` and `leave`."""

    def __init__(
        self, root: Path | None = None, lock: int = -1, listener: socket.socket | None = None
    ) -> None:
        """With arguments: a place that this process has already."""
        self._root = root
        self.lock = lock
        self._listener = listener
        if listener is not None:
            listener.setblocking(False)

    @property
    def listener(self) -> socket.socket:
        """Where verbs and other keepers ask."""
        assert self._listener is not None
        return self._listener

    @property
    def claimed(self) -> bool:
        """Whether this process is the keeper of a root directory."""
        return self.lock >= 0

    def claim(self, root: Path) -> tuple[socket.socket, list[HeldMount]] | None:
        """Be the keeper of ``root``.

        If another one made way: the connection to it, where it waits for our word, and its mounts.
        ServiceError if there is one that does not, StorageError.
        """
        self._root = root
        try:
            self.lock = os.open(root / KEEPER_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise unusable(root / KEEPER_LOCK, error) from error
        taken = None
        try:
            if not self._locked(0):
                taken = _taken_over(root)
                if not self._locked(limits.SERVER_LOCK_SECONDS):
                    raise _in_use(root)
            self._listener = messages.listen(root, KEEPER_SOCKET, socket.SOCK_SEQPACKET)
        except BaseException as error:
            os.close(self.lock)
            self.lock = -1
            if not isinstance(error, OSError):
                raise
            raise ServiceError(
                f"cannot listen: {error.strerror}", subject=str(root / KEEPER_SOCKET)
            ) from error
        self._listener.setblocking(False)
        return taken

    def leave(self) -> None:
        """Give the place up."""
        self.listener.close()
        if self._root is not None:
            with contextlib.suppress(OSError):
                (self._root / KEEPER_SOCKET).unlink()
        os.close(self.lock)
        self.lock = -1

    def _locked(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= end:
                    return False
                time.sleep(limits.LOCK_RETRY_SECONDS)
            else:
                return True


def _taken_over(root: Path) -> tuple[socket.socket, list[HeldMount]] | None:
    """What the keeper that has the place gives us; None if it is just ending.  ServiceError."""
    try:
        link = keepersocket.connect(root, limits.HANDOVER_SECONDS)
    except NoServiceError:
        return None
    try:
        answer, fds = keepersocket.ask(link, "take-over")
        mounts = held.unpack(answer["mounts"], fds)
    except ServiceError as error:
        link.close()
        raise _in_use(root) from error
    _log.info("event=taken-over mounts=%d pid=%d", len(mounts), answer["pid"])
    return link, mounts


def _in_use(root: Path) -> ServiceError:
    return ServiceError("another layerstore service uses this root directory", subject=str(root))
