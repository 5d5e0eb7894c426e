"""``layerstore unmount``: a plain directory where the mount of a service that is gone was left."""

from __future__ import annotations

from pathlib import Path

from layerstore import fuse
from layerstore.provider import open_state, unsized
from layerstore.service import standins
from layerstore.service.opening import locked


def unmount(mountpoint: Path, root: Path) -> bool:
    """Take the mount off, whoever uses it, and leave stand-ins; whether there was one.

    Raises MountError; ServiceError if a service uses ``root``, StorageError.
    """
    with locked(root):
        there = fuse.unmount(mountpoint)
        state = open_state(root)
        try:
            standins.leave(mountpoint, root, unsized(state.views()))
        finally:
            state.close()
    return there
