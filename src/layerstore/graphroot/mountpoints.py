"""``RUNROOT/overlay-layers/mountpoints.json``: which layers are mounted, where and how often.

``[{"id":...,"path":...,"count":n}]``, only counts above 0, under
``mountpoints.lock`` (taken inside ``layers.lock``) with the last writer's token
as everywhere else.  After a reboot the run root is empty, and so is the list.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from layerstore import limits
from layerstore.errors import CorruptStorage, MountError, StorageError
from layerstore.graphroot import atomic
from layerstore.graphroot.lockfile import LockFile
from layerstore.graphroot.records import dumps, load_json

_log = logging.getLogger(__name__)
_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8
_STACKED: Final = 16  # mounts on one mount point


class MountPoint(msgspec.Struct, frozen=True):
    """One mounted layer; ``count`` is how many users have mounted it."""

    id: str
    path: Path
    count: int


class MountPoints:
    """The list in ``directory`` (``RUNROOT/overlay-layers``).

    ``load`` and ``save`` want ``lock`` to be held.
    """

    def __init__(self, directory: Path, *, read_only: bool = False) -> None:
        self._path: Final = directory / "mountpoints.json"
        self.lock: Final = LockFile.at(directory / "mountpoints.lock", read_only=read_only)

    def load(self) -> tuple[MountPoint, ...]:
        """The list; raises ``CorruptStorage`` for a file that is none."""
        try:
            data, _ = atomic.read_file(self._path, limits.RECORDS_BYTES)
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise StorageError(
                f"cannot be read: {error.strerror}", subject=str(self._path)
            ) from error
        items = load_json(data, str(self._path)) if data else None
        if items is None:
            return ()
        if not isinstance(items, list):
            raise CorruptStorage("is no array", subject=str(self._path))
        return tuple(self._item(item) for item in items)

    def save(self, points: Sequence[MountPoint]) -> None:
        """Replace the list; the lock is held for writing."""
        self.lock.renew()
        atomic.write_file(
            self._path,
            dumps(
                [
                    {"id": point.id, "path": str(point.path), "count": point.count}
                    for point in points
                    if point.count > 0
                ]
            ),
            sync=False,
        )

    def _item(self, item: Any) -> MountPoint:
        try:
            found = MountPoint(item["id"], Path(item["path"]), item["count"])
        except (KeyError, TypeError) as error:
            raise CorruptStorage("has an item that is no mount", subject=str(self._path)) from error
        if not isinstance(found.id, str) or not isinstance(found.count, int):
            raise CorruptStorage("has an item that is no mount", subject=str(self._path))
        return found


def detach_mount(path: Path) -> None:
    """Unmount ``path``, which disappears at once and ends with its last user.

    A path where nothing is mounted is no error.  Raises ``MountError``.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(path), _MNT_DETACH | _UMOUNT_NOFOLLOW) != 0:
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOENT):
            raise MountError(f"cannot be unmounted: {os.strerror(number)}", subject=str(path))


def unmount_for_removal(directory: Path, layers: Mapping[str, Path]) -> None:
    """Unmount layers that are about to be deleted, however often they are mounted.

    ``layers`` says where each has its mount point, which counts may not know: whoever dies
    behind a mount does not write it down.  ``layers.lock`` is held for writing.  As for other
    tools, it is the images and containers that keep a layer from being deleted, not its mounts.
    """
    _forget(directory, layers)
    for path in layers.values():
        for _ in range(_STACKED):
            if not os.path.ismount(path):
                break
            detach_mount(path)


def _forget(directory: Path, layers: Collection[str]) -> None:
    if not os.path.lexists(directory / "mountpoints.json"):
        return
    points = MountPoints(directory)
    with points.lock.writing():
        try:
            known = points.load()
        except CorruptStorage as error:
            # It is not synced to disk. One that stopped a removal would stop every other change.
            _log.warning("nobody knows where layers are mounted: %s", error)
            return
        mounted = [point for point in known if point.id in layers]
        if not mounted:
            return
        for point in mounted:
            # The file says where; that it is a mount point of this layer is checked.
            if point.path.parts[-2:] == (point.id, "merged"):
                detach_mount(point.path)
            else:
                _log.warning("layer %s is mounted at %s: left there", point.id, point.path)
        points.save([point for point in known if point.id not in layers])
