"""The program and its surroundings: signals, its log, standard streams that are closed or full.

A signal that asks to end becomes an exception in the main thread, so that whatever is half made is
removed on the way out, and the status is the shell's for it: 128 and the signal's number.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Final, TextIO

_ENDING: Final = (signal.SIGTERM, signal.SIGHUP)


class Ended(KeyboardInterrupt):
    """A signal asks the program to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status: Final = 128 + number


@contextlib.contextmanager
def ending_by_signals() -> Iterator[None]:
    """Raise ``Ended`` on SIGTERM and SIGHUP, unless somebody decided otherwise (``nohup``)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    mine = [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]
    for number in mine:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # once is enough: the clean-up is to come to its end
    raise Ended(number)


class _Lines(logging.StreamHandler[TextIO]):
    """Lines as those of errors, with the weight of each."""

    def format(self, record: logging.LogRecord) -> str:
        return f"layerstore: {record.levelname.lower()}: {record.getMessage()}"

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - not ours to name
        """Nobody reads standard error any more: nothing that a verb could do better without."""


@contextlib.contextmanager
def log_to_stderr(*, debug: bool) -> Iterator[None]:
    """Print warnings, with ``debug`` everything that is logged, on standard error."""
    logger = logging.getLogger("layerstore")
    handler, level = _Lines(), logger.level
    logger.addHandler(handler)
    handler.setLevel(logging.DEBUG if debug else logging.WARNING)
    if debug:
        logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def open_missing_streams() -> None:
    """Put /dev/null where a standard stream is closed.

    Else the next file that is opened, perhaps one of the storage's, would be taken for it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - it stays open
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def forget_output() -> None:
    """Let what is still to be printed go nowhere: standard output takes no more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_broken_pipe(error: BaseException | None) -> bool:
    """Whether the reader of our output went away, be it said in other words."""
    while error is not None:
        if isinstance(error, BrokenPipeError):
            return True
        error = error.__cause__
    return False
