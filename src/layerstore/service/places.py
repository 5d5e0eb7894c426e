"""Where things lie: the default places, and the files of a root directory that processes share."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Final

from layerstore.errors import StorageError

DEFAULT_PATH: Final = Path("/etc/layerstore/config.toml")
DEFAULT_ROOT: Final = Path("/var/lib/layerstore")

CONTROL_SOCKET: Final = "control.sock"  # the server's
SERVER_LOCK: Final = "lock"  # held by whoever uses the state: the server, `layerstore fetch`
KEEPER_SOCKET: Final = "keeper.sock"
KEEPER_LOCK: Final = "keeper.lock"
STAND_INS: Final = "stand-ins.json"


def unusable(path: Path, error: OSError) -> StorageError:
    """The error for a file of a root directory that cannot be opened."""
    if error.errno in (errno.EACCES, errno.EPERM):
        advice = "run it as the owner of the root directory, or name another --root"
    else:
        advice = "see to the disk that the root directory is on, or name another --root"
    return StorageError(f"cannot open: {error.strerror}", subject=str(path), advice=advice)
