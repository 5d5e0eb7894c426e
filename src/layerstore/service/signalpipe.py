"""Signals as something to read: a loop that waits for descriptors hears them there."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Final

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


class SignalPipe:
    """Catches the signals that a keeper obeys, from here on and for good; ``fd`` tells of them."""

    def __init__(self) -> None:
        self.fd, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._noted: list[int] = []
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, _note)
        self.unblock()  # a program that executed itself anew has blocked them

    def taken(self) -> list[int]:
        """The numbers that came since the last call."""
        self.pending()
        noted, self._noted = self._noted, []
        return noted

    def pending(self) -> bool:
        """Whether one waits that asks for something (not SIGCHLD)."""
        with contextlib.suppress(BlockingIOError):
            self._noted += os.read(self.fd, 4096)
        return any(number != signal.SIGCHLD for number in self._noted)

    @staticmethod
    def block() -> None:
        """Have them wait, also while another program begins in this process."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)

    @staticmethod
    def unblock() -> None:
        """End `block`."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _note(number: int, frame: object) -> None:
    """The loop hears of it through the descriptor."""
