"""Re-checking a static layer store: everything that is there against the blobs' digests.

A blob is hashed and extracted once more, outside the store if that is read only, and the
tree compared with the one that is there, file by file.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from layerstore.copy.progress import PullListener, Quiet
from layerstore.copy.staticstore import (
    BLOB,
    LayerFile,
    Name,
    StaticStore,
    finish_tree,
    read_record,
    whiteout_style,
)
from layerstore.copy.statictoc import check_toc
from layerstore.errors import ContentError, LayerstoreError, StorageError
from layerstore.formats import Compression
from layerstore.graphroot.removal import remove_tree
from layerstore.graphroot.stage import stage_layer
from layerstore.graphroot.staged import DIFF
from layerstore.graphroot.treecheck import tree_differences
from layerstore.image import Digest

WAITING: Final = "Waiting for a run that changes the directory..."
_DIFFERENCES: Final = 20  # told of one layer
_CLOCK_SECONDS: Final = 2  # by which the times of a file system may lag behind ours


@dataclass(frozen=True, slots=True)
class Damage:
    """What is wrong at a path, relative to the store."""

    path: Path
    what: str
    layer: Digest | None = None


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """How much was checked, and what was found."""

    layers: int
    names: int
    damage: tuple[Damage, ...]


def verify(
    directory: Path, listener: PullListener | None = None, *, scratch: Path | None = None
) -> VerifyResult:
    """Check every layer and name of the store; it is not changed.

    ``scratch`` takes one extracted layer at a time (default: the system's place for temporary
    files).  The caller needs the rights that unpacking needs.  Raises ``UsageError`` for a
    directory that is no static store; ``StorageError`` when checking is not possible.
    """
    listener = listener or Quiet()
    store = StaticStore(directory)
    damage: list[Damage] = []
    with store.reading(lambda: listener.message(WAITING)):
        try:
            layers, names = store.layers(), store.names()
        except OSError as error:
            raise StorageError(
                f"cannot be read: {error.strerror}", subject=str(directory)
            ) from error
        for digest in layers:
            for one in _layer_damage(store, digest, listener, scratch):
                listener.message(f"{one.path}: {one.what}")
                damage.append(one)
        for name in names:
            what = _name_damage(store, name)
            if what is not None:
                listener.message(f"{name.path}: {what}")
                damage.append(Damage(name.path, what))
    return VerifyResult(len(layers), len(names), tuple(damage))


def _name_damage(store: StaticStore, name: Name) -> str | None:
    digest = store.layer_of(name)
    if digest is None:
        return "leads to no layer of this store"
    record = store.layer(digest)
    if record is None:
        return f"leads to the layer {digest}, which is damaged or not there"
    if name.digest not in (record.digest, *record.tocs):
        return f"is no name of the layer {digest}"
    return None if store.is_right(name) else "info is damaged"


def _layer_damage(
    store: StaticStore, digest: str, listener: PullListener, scratch: Path | None
) -> Iterator[Damage]:
    directory = store.layer_directory(digest)
    path = directory.relative_to(store.directory)
    try:
        record = read_record(directory)
    except OSError as error:
        yield Damage(path, f"layer.json cannot be read: {error.strerror}", Digest(digest))
        return
    except StorageError as error:
        yield Damage(path, f"layer.json {error.what}", Digest(digest))
        return
    if record.digest != digest:
        yield Damage(path, f"layer.json is that of {record.digest}", Digest(digest))
        return
    listener.message(f"Checking layer {digest}")
    try:
        with (directory / BLOB).open("rb") as blob, _scratch(scratch) as work:
            began = time.time_ns() - _CLOCK_SECONDS * 10**9
            staged = stage_layer(
                work,
                blob,
                blob_digest=Digest(record.digest),
                blob_size=record.size,
                diff_id=Digest(record.diff_id),
                whiteouts=whiteout_style(),
            )
            if (staged.diff_size, staged.compression.value) != (
                record.diff_size,
                record.compression,
            ):
                yield Damage(path, "layer.json states another size", Digest(digest))
            os.symlink(directory.absolute() / BLOB, work / BLOB)
            finish_tree(work, root_entry=staged.root_entry)
            differences = tree_differences(work / DIFF, directory / DIFF, made_after_ns=began)
            for number, what in enumerate(differences):
                if number == _DIFFERENCES:
                    yield Damage(path / DIFF, "and more", Digest(digest))
                    break
                yield Damage(path / DIFF, what, Digest(digest))
        yield from _toc_damage(record, directory, path)
    except ContentError as error:
        yield Damage(path / BLOB, error.what, Digest(digest))
    except OSError as error:
        yield Damage(path, f"cannot be read: {error.strerror}", Digest(digest))
    except StorageError as error:
        if not error.subject.startswith(str(directory)):
            raise  # the scratch directory's trouble
        yield Damage(path, error.what, Digest(digest))


def _toc_damage(record: LayerFile, directory: Path, path: Path) -> Iterator[Damage]:
    for toc, notes in record.tocs.items():
        what = "layer.json names a TOC that it does not describe"
        try:
            found = check_toc(
                directory / BLOB, directory / DIFF, notes, Compression(record.compression)
            )
            if found == toc:
                continue
        except LayerstoreError as error:
            what = error.what
        yield Damage(path, f"not the layer of the TOC {toc}: {what}", Digest(record.digest))


@contextlib.contextmanager
def _scratch(parent: Path | None) -> Iterator[Path]:
    try:
        work = Path(tempfile.mkdtemp(prefix="layerstore-verify-", dir=parent))
    except OSError as error:
        raise StorageError(
            f"no place for temporary files: {error.strerror}", subject=str(parent or "")
        ) from error
    try:
        yield work
    finally:
        remove_tree(work)
