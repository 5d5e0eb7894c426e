"""New directories for tests, with names that may be part of an image reference."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Final

SCRATCH: Final = Path("/var/tmp")  # on a real file system, unlike /tmp at times


def fresh(prefix: str, parent: Path = SCRATCH) -> Path:
    """A new directory, mode 0700, ``parent/prefix<random>``.

    Only the prefix and hexadecimal digits: `podman load` takes the path of a layout for the name
    of its image (4.3.1), and some of the underscores that tempfile gives are no valid ones.
    """
    path = parent / f"{prefix}{secrets.token_hex(4)}"
    path.mkdir(0o700)
    return path
