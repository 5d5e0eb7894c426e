"""Looking for damage in the object store: everything in it is read and hashed.

What is found wrong is never used again: a damaged object stays in its place as suspect
(``content.ledger``), which makes whoever opens it verify it and have it made anew; a damaged chunk
of a partial object is forgotten.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from layerstore.content.layermap import FileContent, LayerMap, chunks_of
from layerstore.content.objects import ObjectStore

_HEX = frozenset("0123456789abcdef")


@dataclasses.dataclass(frozen=True, slots=True)
class StoredFile:
    """A file below ``objects``; ``digest`` is None for one that has no business there."""

    path: str
    size: int
    digest: bytes | None


def stored_files(root: Path) -> Iterator[StoredFile]:
    """All files below the directory ``objects`` of an object store."""
    for first in sorted(os.scandir(root / "objects"), key=lambda entry: entry.name):
        # all at once: whoever stops in the middle would leave a directory open
        for entry in list(os.scandir(first.path)) if first.is_dir() else [first]:
            try:
                size = entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:
                continue  # it was renewed, or went, meanwhile
            name = first.name + entry.name
            right = len(name) == 64 and len(first.name) == 2 and _HEX.issuperset(name)
            yield StoredFile(entry.path, size, bytes.fromhex(name) if right else None)


def forget_wrong_chunks(objects: ObjectStore, layer: LayerMap, content: FileContent) -> int:
    """Verify what is there of a partial object; how many chunks were wrong.

    Raises StorageError, OSError where the disk gives no bytes.
    """
    partial = objects.partial(
        content.key, content.size, content.chunk_count, content.digest, create=False
    )
    if partial is None:
        return 0
    return partial.forget_wrong(chunks_of(layer, content))
