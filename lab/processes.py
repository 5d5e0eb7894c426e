"""Which processes have to do with something, by their command lines."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def naming(text: str | Path) -> dict[int, str]:
    """The other processes with ``text`` in their command line; pid to command line."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ")
            if os.fsencode(text) in line and int(process.name) != os.getpid():
                found[int(process.name)] = os.fsdecode(line)
    return found
