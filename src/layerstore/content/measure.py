"""What lies on the disk below a store's root, in whole blocks, as ``du`` counts.

Only what the store made itself is looked at: the mount point may lie below the root.
An object or partial object is known here by its *mark*, the first eight bytes of its name.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

_MARK_DIGITS: Final = 16
_BLOCK: Final = 512  # the unit of st_blocks, whatever the file system


def mark_of(name: str) -> int:
    """The mark of an object's name in hex, in the byte order of this machine."""
    return int.from_bytes(bytes.fromhex(name[:_MARK_DIGITS]), sys.byteorder)


@dataclass(frozen=True, slots=True)
class StoredObject:
    """A file of an object or partial object (or its map); ``size`` in bytes on disk."""

    path: str
    mark: int
    size: int
    changed: float
    """When it last was written or renamed (ctime: its mtime is no time), in seconds since 1970."""


@dataclass(slots=True)
class Usage:
    """Bytes on disk; objects by who owns them, blobs (with their maps) by slot."""

    objects: dict[int | None, int] = field(default_factory=dict)
    blobs: dict[int, int] = field(default_factory=dict)
    metadata: dict[int, int] = field(default_factory=dict)
    other: int = 0
    files: int = 0
    """How many objects there are."""

    @property
    def total(self) -> int:
        """All of it."""
        parts = (self.objects, self.blobs, self.metadata)
        return sum(sum(part.values()) for part in parts) + self.other


def measure(root: Path, owner: Callable[[int], int | None] = lambda _: None) -> Usage:
    """Look at everything; ``owner`` says who owns an object by its mark."""
    usage = Usage()
    for found in stored_objects(root / "content"):
        name = owner(found.mark)
        usage.objects[name] = usage.objects.get(name, 0) + found.size
        usage.files += 1
    usage.other += _disk_bytes(os.fspath(root)) + _fixed(root / "content")
    for entry in _scan(os.fspath(root)):
        if not entry.is_dir(follow_symlinks=False):
            usage.other += _size(entry)
    layers = root / "layers"
    usage.other += _disk_bytes(os.fspath(layers))
    for entry in _scan(os.fspath(layers)):
        if entry.name.isdigit():
            slot = int(entry.name)
            usage.metadata[slot] = _size(entry)
            for file in _scan(entry.path):
                part = usage.blobs if file.name.startswith("blob") else usage.metadata
                part[slot] = part.get(slot, 0) + _size(file)
        else:  # a layer on its way
            usage.other += _size(entry) + sum(map(_size, _scan(entry.path)))
    return usage


def stored_objects(content: Path) -> Iterator[StoredObject]:
    """All objects and partial objects, with the maps of the latter."""
    objects = os.fspath(content / "objects")
    for directory in _scan(objects):
        for entry in _scan(directory.path):
            yield from _object(entry, directory.name + entry.name)
    for entry in _scan(os.fspath(content / "partial")):
        yield from _object(entry, entry.name)


def _object(entry: os.DirEntry[str], name: str) -> Iterator[StoredObject]:
    try:
        found = entry.stat(follow_symlinks=False)
        mark = mark_of(name)
    except (OSError, ValueError):
        return  # it was removed meanwhile, or is none of ours
    if stat.S_ISREG(found.st_mode):
        yield StoredObject(entry.path, mark, found.st_blocks * _BLOCK, found.st_ctime)


def _fixed(content: Path) -> int:
    """Directories, and what is on its way."""
    total = _disk_bytes(os.fspath(content))
    for entry in _scan(os.fspath(content)):
        total += _size(entry)
        if entry.name in ("objects", "tmp"):
            total += sum(map(_size, _scan(entry.path)))
    return total


def _scan(directory: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            yield from entries
    except (FileNotFoundError, NotADirectoryError):
        return


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_blocks * _BLOCK
    except OSError:
        return 0


def _disk_bytes(path: str) -> int:
    try:
        return os.lstat(path).st_blocks * _BLOCK
    except OSError:
        return 0
