"""The configuration in force, in memory that a keeper shares with the servers that it starts.

The first server, and the candidate of a reload, find it empty: they read the files, and write here
what they read.  The others read it here, so that a file that was changed meanwhile means nothing
before a reload.  The keeper itself only hands it on.

It is named by a variable, not by an argument: servers of older releases do not know it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Mapping, MutableMapping
from typing import Final, Self

MEMORY_FD: Final = 4  # in the server
_VARIABLE: Final = "LAYERSTORE_IN_FORCE_FD"
_KEPT_FD: Final = 10  # in the keeper at least: above what a server is given


class InForce:
    """The keeper's end: ``fd`` is open as long as this object is there."""

    def __init__(self, fd: int) -> None:
        self.fd: Final = fd

    @classmethod
    def empty(cls) -> Self:
        """One that the first server to get it fills."""
        memory = os.memfd_create("layerstore-in-force", os.MFD_CLOEXEC)
        try:
            return cls(fcntl.fcntl(memory, fcntl.F_DUPFD_CLOEXEC, _KEPT_FD))
        finally:
            os.close(memory)

    def named(self, environment: Mapping[str, str]) -> dict[str, str]:
        """The environment for a server that has it as ``MEMORY_FD``."""
        return {**environment, _VARIABLE: str(MEMORY_FD)}

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.fd)


def given(environment: MutableMapping[str, str]) -> int | None:
    """The server's end: the descriptor that its keeper gave it, if it did.  To be called once."""
    text = environment.pop(_VARIABLE, "")
    if text != str(MEMORY_FD):
        return None
    os.set_inheritable(MEMORY_FD, False)
    return MEMORY_FD


def read(memory: int) -> bytes:
    """What was written there; empty if nothing was."""
    return os.pread(memory, os.fstat(memory).st_size, 0)


def write(memory: int, data: bytes) -> None:
    """Fill it."""
    while data:
        data = data[os.write(memory, data) :]
