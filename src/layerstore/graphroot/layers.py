"""``overlay-layers`` with ``overlay``: the layers of one graph root.

A layer is a record in ``layers.json`` (or its volatile twin), a directory in
``overlay/``, and, if it was unpacked from a tar stream, a file
``<id>.tar-split.gz`` with which that stream can be put together again.

A crash may happen between any two steps, so the record comes first, flagged
``incomplete``, and the flag goes when everything is there; at a deletion it
comes back before anything is taken away.  Whoever holds the write lock and
finds an incomplete layer deletes it: nobody works on it any more, because the
lock is held for as long as a layer is incomplete.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

import msgspec

from layerstore import limits
from layerstore.errors import CorruptStorage, StorageError, UnknownObject
from layerstore.formats import LayerStream
from layerstore.graphroot import als, atomic
from layerstore.graphroot.mountpoints import unmount_for_removal
from layerstore.graphroot.overlay import (
    Overlay,
    RootAttributes,
    checked_component,
    has_additional_layer,
)
from layerstore.graphroot.records import INCOMPLETE, LayerRecord
from layerstore.graphroot.removal import remove_tree
from layerstore.graphroot.staging import StagingLost, TempDirectory
from layerstore.graphroot.table import Table
from layerstore.image import Digest

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

_log = logging.getLogger(__name__)
_TAR_SPLIT: Final = ".tar-split.gz"


class LayerArea:
    """The layers of one graph root: its own, or those of an additional image store.

    ``others`` are the areas on whose layers ours may stand; ``additional`` says that this is
    one of an additional image store.
    """

    def __init__(
        self,
        graph_root: Path,
        run_root: Path,
        *,
        read_only: bool = False,
        additional: bool = False,
        others: tuple[LayerArea, ...] = (),
    ) -> None:
        self.directory: Final = graph_root / "overlay-layers"
        self.run_directory: Final = run_root / "overlay-layers"
        self.read_only: Final = read_only
        self.additional: Final = additional
        self.overlay: Final[Overlay] = Overlay(graph_root, [other.overlay for other in others])
        self.table: Final = Table(self.directory, "layers", LayerRecord, read_only=read_only)
        self._swept = False

    def records(self) -> tuple[LayerRecord, ...]:
        """The complete layers at this moment.

        What a crash left incomplete is deleted on the way, unless this is read-only
        or the lock is held for reading.
        """
        found = self.table.snapshot()
        if any(record.incomplete for record in found):
            if self.read_only or self.table.lock.held:
                found = tuple(record for record in found if not record.incomplete)
            else:
                try:
                    with self.editing() as edit:
                        found = edit.records
                except StorageError as error:
                    _log.warning("incomplete layers cannot be deleted: %s", error)
                    found = tuple(record for record in found if not record.incomplete)
        return found

    def mount_path(self, layer: str) -> Path:
        """Where the layer is mounted when it is: not in a store that may be read-only."""
        if self.additional:
            return self.run_directory.parent / "overlay" / checked_component(layer) / "merged"
        return self.overlay.directory(layer) / "merged"

    @contextlib.contextmanager
    def editing(self) -> Iterator[LayerEdit]:
        """Hold the write lock and change layers; not to be nested.

        Large trees are deleted, and layer stores told, after the lock is released.
        """
        with (
            atomic.storage_errors(self.directory),
            TempDirectory(self.overlay.tempdirs) as bin_,
        ):
            released: list[Path] = []
            try:
                with self.table.lock.writing():
                    if not self._swept:
                        atomic.sweep(self.directory)
                        self._swept = True
                    edit = LayerEdit(self, bin_, released)
                    edit.delete_incomplete()
                    yield edit
            finally:
                for path in released:
                    als.release_path(path)

    def tar_split(self, layer: str) -> Path | None:
        """The layer's tar-split file, if it has one."""
        path = self._tar_split(layer)
        with atomic.storage_errors(path):
            return path if path.exists() else None

    def big_data_directory(self, layer: str) -> Path:
        """Where big data of the layer lie."""
        return self.directory / checked_component(layer)

    def _tar_split(self, layer: str) -> Path:
        return self.directory / f"{checked_component(layer)}{_TAR_SPLIT}"


class Addition(msgspec.Struct, frozen=True):
    """A layer to be made; see ``Overlay.create`` for the fields.  ``tar_split`` is copied."""

    record: LayerRecord
    attributes: RootAttributes
    content: Path | None = None
    own_attributes: bool = False
    tar_split: Path | None = None
    additional: Path | None = None

    def is_like(self, record: LayerRecord) -> bool:
        """Whether ``record`` is of the same layer, as far as what identifies it goes."""
        mine = self.record
        return (
            record.parent == mine.parent
            and record.diff_digest == mine.diff_digest
            and record.toc_digest == mine.toc_digest
        )


class LayerEdit:
    """The layers while the write lock is held; made by ``LayerArea.editing``."""

    def __init__(self, area: LayerArea, bin_: TempDirectory, released: list[Path]) -> None:
        self.area: Final = area
        self.bin: Final = bin_
        self._released: Final = released
        self._records: Final = {record.id: record for record in area.table.load()}

    @property
    def records(self) -> tuple[LayerRecord, ...]:
        """All layers as they are now, the oldest first."""
        return tuple(self._records.values())

    def get(self, layer: str) -> LayerRecord | None:
        """The record of ``layer``."""
        return self._records.get(layer)

    def put(self, record: LayerRecord) -> None:
        """Add a record or replace that of the same id; its names leave other layers."""
        taken = set(record.names)
        for other in self.records:
            if other.id != record.id and taken.intersection(other.names):
                kept = tuple(name for name in other.names if name not in taken)
                self._records[other.id] = replace(other, names=kept)
        self._records[record.id] = record

    def save(self) -> None:
        """Write the records down."""
        self.area.table.save(self.records)

    def add(self, *additions: Addition) -> None:
        """Make layers, each parent before its child, so that a crash leaves all or nothing.

        Raises ``StagingLost`` when what was staged is gone, ``StorageError``; then none is made.
        """
        for addition in additions:
            record = addition.record
            self.put(replace(record, flags={**record.flags, INCOMPLETE: True}))
        if additions:
            self.save()
        try:
            for addition in additions:
                self._create(addition)
        except BaseException:
            self._drop([addition.record.id for addition in additions], release=False)
            raise
        for addition in additions:
            self.put(addition.record)
        if additions:
            self.save()

    def _create(self, addition: Addition) -> None:
        layer = addition.record.id
        self.area.overlay.create(
            layer,
            addition.record.parent,
            addition.attributes,
            self.bin,
            content=addition.content,
            own_attributes=addition.own_attributes,
            additional=addition.additional,
        )
        target = self.area._tar_split(layer)
        target.unlink(missing_ok=True)
        if addition.tar_split is not None:
            _copy(addition.tar_split, target)

    def localize(
        self,
        record: LayerRecord,
        content: Path,
        attributes: RootAttributes | None,
        tar_split: Path | None,
    ) -> None:
        """Make a lazy layer one of this graph root alone; see ``Overlay.localize``.

        The record, which ``record`` replaces, comes first: it is true of the lazy layer as well.
        The layer store is told once the lock is released.
        """
        additional = self.area.overlay.additional_layer(record.id)
        if tar_split is not None:
            _copy(tar_split, self.area._tar_split(record.id))
        self.put(record)
        self.save()
        self.area.overlay.localize(record.id, content, attributes)
        if additional is not None:
            self._released.append(additional)

    def delete(self, layers: Iterable[str]) -> None:
        """Delete layers, whoever may need them; those that do not exist are no error."""
        self._drop([layer for layer in layers if layer in self._records], release=True)

    def delete_incomplete(self) -> None:
        """Delete what a crash left behind."""
        found = [record.id for record in self.records if record.incomplete]
        for layer in found:
            _log.warning("found incomplete layer %s: deleted", layer)
        self._drop(found, release=True)

    def _drop(self, layers: list[str], *, release: bool) -> None:
        if not layers:
            return
        flagged = [self._records[layer] for layer in layers]
        for record in flagged:
            flags = {**record.flags, INCOMPLETE: True}
            self._records[record.id] = replace(record, flags=flags)
        if not all(record.incomplete for record in flagged):
            self.save()
        places = {layer: self.area.overlay.home / layer / "merged" for layer in layers}
        unmount_for_removal(self.area.run_directory, places)
        for layer in layers:
            additional = self._to_release(layer) if release else None
            self.area.overlay.detach(layer, self.bin)
            self.area._tar_split(layer).unlink(missing_ok=True)
            remove_tree(self.area.big_data_directory(layer))
            if additional is not None:
                self._released.append(additional)
        for layer in layers:
            del self._records[layer]
        self.save()

    def _to_release(self, layer: str) -> Path | None:
        try:
            return self.area.overlay.additional_layer(layer)
        except CorruptStorage as error:
            # A power failure leaves empty files. One that stopped the removal would stop every
            # other change, too.
            _log.warning("no layer store is told that a layer goes: %s", error)
            return None


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer as it was when it was asked for.

    What it reads from disk later may be gone by then: ``StorageError`` or
    ``CorruptStorage``.
    """

    record: LayerRecord
    area: LayerArea = field(repr=False, compare=False)

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def names(self) -> tuple[str, ...]:
        return self.record.names

    @property
    def parent(self) -> str:
        """The id of the layer below, "" for a base layer."""
        return self.record.parent

    @property
    def diff_id(self) -> Digest | None:
        """The verified digest of the uncompressed tar stream."""
        return self.record.diff_digest

    @property
    def blob_digest(self) -> Digest | None:
        """The digest of the blob that the layer came as."""
        return self.record.compressed_diff_digest

    @property
    def toc_digest(self) -> Digest | None:
        return self.record.toc_digest

    @property
    def read_only(self) -> bool:
        """Whether the layer belongs to an additional image store."""
        return self.area.additional

    @property
    def diff_path(self) -> Path:
        """The directory of what the layer adds; a symbolic link if ``is_lazy``."""
        return self.area.overlay.diff_path(self.id)

    @property
    def lower_dirs(self) -> tuple[Path, ...]:
        """The contents of the layers below, the nearest first, by their short links."""
        return self.area.overlay.lower_dirs(self.id)

    @property
    def additional_layer(self) -> Path | None:
        """The layer's directory in its additional layer store."""
        return self.area.overlay.additional_layer(self.id)

    @property
    def is_lazy(self) -> bool:
        """Whether an additional layer store has the content, as far as this graph root says."""
        return has_additional_layer(self.area.overlay.directory(self.id))

    def size(self) -> int:
        """Bytes of the tar stream; if nobody knows them, of the files, each inode once."""
        if self.record.diff_digest is not None and self.record.diff_size >= 0:
            return self.record.diff_size
        if self.is_lazy and self.record.diff_size > 0:
            return self.record.diff_size
        return _files_size(self.diff_path)

    def tar(self) -> Iterator[bytes]:
        """The uncompressed tar stream.

        Byte for byte the one the layer came as, where it came as one; verifying the
        digest is the caller's part, for a lazy layer in any case.
        """
        additional = self.additional_layer
        if additional is None:
            from layerstore.graphroot.export import export_diff  # noqa: PLC0415

            yield from export_diff(self.diff_path, self.lower_dirs, self.area.tar_split(self.id))
            return
        with als.open_blob(additional) as (stream, _):
            unpacked = LayerStream(stream)
            while data := unpacked.read(limits.STREAM_BYTES):
                yield data

    def blob(self) -> AbstractContextManager[tuple[BinaryIO, als.LayerFacts]]:
        """The compressed blob of a lazy layer; it is in use until the context is left.

        Raises ``UnknownObject`` for other layers: they keep no blob.
        """
        additional = self.additional_layer
        if additional is None:
            raise UnknownObject("the blob of an unpacked layer is not kept", subject=self.id)
        return als.open_blob(additional)


def _copy(source: Path, target: Path) -> None:
    # overlay/ may be a mount of its own, so that this cannot be a rename.
    partial = target.with_name(f".tmp-{target.name}")  # atomic.sweep knows it
    try:
        with open(source, "rb") as from_, open(partial, "wb") as to:
            os.fchmod(to.fileno(), 0o600)
            shutil.copyfileobj(from_, to, limits.STREAM_BYTES)
            to.flush()
            os.fsync(to.fileno())
        partial.rename(target)
    except FileNotFoundError as error:
        raise StagingLost("the staged layer was removed", subject=str(source)) from error
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror}", subject=str(target)) from error


def _files_size(directory: Path) -> int:
    total = 0
    seen: set[tuple[int, int]] = set()
    pending = [directory]
    try:
        while pending:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(Path(entry.path))
                        continue
                    found = entry.stat(follow_symlinks=False)
                    if found.st_nlink > 1 and (found.st_dev, found.st_ino) in seen:
                        continue
                    seen.add((found.st_dev, found.st_ino))
                    total += found.st_size
    except OSError as error:
        raise CorruptStorage(
            f"the layer's files cannot be read: {error.strerror}", subject=str(directory)
        ) from error
    return total
