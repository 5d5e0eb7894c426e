"""Where things lie: the default places, and the files of a root directory that processes share."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Final

from layerstore.errors import ServiceError, StorageError

DEFAULT_PATH: Final = Path("/etc/layerstore/config.toml")
DEFAULT_ROOT: Final = Path("/var/lib/layerstore")

CONTROL_SOCKET: Final = "control.sock"  # the server's
SERVER_LOCK: Final = "lock"  # held by whoever uses the state: the server, `layerstore fetch`
KEEPER_SOCKET: Final = "keeper.sock"
KEEPER_LOCK: Final = "keeper.lock"
STAND_INS: Final = "stand-ins.json"

_OWN: Final = frozenset(
    (
        "content", "layers", "state.sqlite", "used",
        CONTROL_SOCKET, SERVER_LOCK, KEEPER_SOCKET, KEEPER_LOCK, STAND_INS,
    )
)  # fmt: skip


def keep_apart(mountpoint: Path, root: Path) -> None:
    """Raises ServiceError if the service would find its own mount where it keeps its state.

    The mount point itself is not looked at: nobody may answer there yet.
    """
    root, above = root.resolve(), mountpoint.parent.resolve()
    mountpoint = above.parent if mountpoint.name == ".." else above / mountpoint.name
    if root == Path("/"):
        raise ServiceError("the root directory is a directory of its own, not /")
    below = mountpoint.relative_to(root).parts if mountpoint.is_relative_to(root) else ()
    if root.is_relative_to(mountpoint) or (below and below[0] in _OWN):
        raise ServiceError("root directory and mount point lie in each other's way")


def unusable(path: Path, error: OSError) -> StorageError:
    """The error for a file of a root directory that cannot be opened."""
    if error.errno in (errno.EACCES, errno.EPERM):
        advice = "run it as the owner of the root directory, or name another --root"
    else:
        advice = "see to the disk that the root directory is on, or name another --root"
    return StorageError(f"cannot open: {error.strerror}", subject=str(path), advice=advice)
