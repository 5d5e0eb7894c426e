"""Which processes have to do with something, by their command lines."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def command_lines() -> Iterator[tuple[int, list[str]]]:
    """The process ids and the arguments of all processes."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (process / "cmdline").read_bytes()
            yield int(process.name), os.fsdecode(line).split("\0")


def naming(text: str | Path) -> dict[int, str]:
    """The other processes with ``text`` in their command line; pid to command line."""
    lines = ((pid, " ".join(words)) for pid, words in command_lines() if pid != os.getpid())
    return {pid: line for pid, line in lines if str(text) in line}
