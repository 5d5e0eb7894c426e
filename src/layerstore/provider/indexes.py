"""Indexes of ordinary layers, handed from node to node.

What makes an ordinary layer readable by ranges is found by reading all of it, once: its index and,
of gzip, its checkpoints.  A node that is given these serves the layer lazily like one with a TOC,
and on the same terms: each chunk is checked against the index before it is shown, and once all of
the layer is here the index is checked against the tar stream, and blob digest and diff ID with it.

The file is a tar archive in zstd: ``layers.json``, and of each layer in turn ``N/index`` and
``N/checkpoints``.
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Final

import msgspec

from layerstore import limits
from layerstore.errors import (
    InvalidDigest,
    InvalidLayer,
    LayerstoreError,
    LimitExceeded,
    StorageError,
)
from layerstore.formats.announced import Form
from layerstore.formats.checkpoints import Checkpoints
from layerstore.formats.compression import zstd
from layerstore.formats.members import Packing
from layerstore.image import Descriptor, Digest
from layerstore.layertree import LayerIndex
from layerstore.provider.loader import Loader
from layerstore.provider.refuted import refuted
from layerstore.provider.state import LayerRecord, State

_VERSION: Final = 1
_LAYERS: Final = "layers.json"
_PACKINGS: Final = {
    Form.TAR: Packing.TAR,
    Form.TAR_GZIP: Packing.CHECKPOINTS,
    Form.TAR_ZSTD: Packing.ZSTD,
}


class GivenLayer(msgspec.Struct, frozen=True):
    """What is said of a layer; ``size`` is that of the blob, ``diff_size`` of the tar stream."""

    blob_digest: str
    diff_id: str
    size: int
    diff_size: int
    form: str


class _Head(msgspec.Struct, frozen=True):
    version: int
    layers: tuple[GivenLayer, ...]


class Indexes:
    """Saves and loads indexes of a store's ordinary layers.  Thread-safe."""

    def __init__(self, state: State, loader: Loader) -> None:
        self._state = state
        self._loader = loader
        self._lock = threading.Lock()

    def given(self, descriptor: Descriptor, diff_id: Digest) -> LayerRecord | None:
        """The layer of which an index was loaded and that nothing was found wrong with."""
        record = self._state.find_layer(descriptor.digest, None, diff_id)
        if record is None or record.tar_length is None or record.size != descriptor.size:
            return None
        if refuted(self._state, record.blob_digest, None, diff_id) is not None:
            return None
        return record if (self._loader.directory(record.slot) / "index").exists() else None

    def save(self, layers: Iterable[tuple[Digest, Digest]], path: Path) -> list[GivenLayer]:
        """Write the indexes of ordinary layers, by blob digest and diff ID.

        Raises StorageError, also for a layer that was not verified here.
        """
        records = [self._verified(*names) for names in layers]
        said = [
            GivenLayer(
                str(record.blob_digest),
                str(record.diff_id),
                record.size,
                record.diff_size,
                record.form.value,
            )
            for record in records
        ]
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
        try:
            with (
                zstd.open(temporary, "wb", level=3) as packed,
                tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as archive,
            ):
                head = msgspec.json.encode(_Head(_VERSION, tuple(said)))
                _add(archive, _LAYERS, io.BytesIO(head), len(head))
                for number, record in enumerate(records):
                    directory = self._loader.directory(record.slot)
                    for name in _names(record.form):
                        with (directory / name).open("rb") as file:
                            size = os.fstat(file.fileno()).st_size
                            _add(archive, f"{number}/{name}", file, size)
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StorageError(f"cannot write: {error.strerror}", subject=str(path)) from error
        return said

    def _verified(self, digest: Digest, diff_id: Digest) -> LayerRecord:
        record = self._state.find_layer(digest, None, diff_id)
        if record is not None and record.quarantine:
            raise StorageError(
                f"the layer is in quarantine: {record.quarantine}", subject=f"layer {digest}"
            )
        if (
            record is None
            or not record.verified
            or not (self._loader.directory(record.slot) / "index").exists()
        ):
            raise StorageError(
                "the layer was not taken in and verified here",
                subject=f"layer {digest}",
                advice="layerstore fetch brings it here, or says why it cannot",
            )
        return record

    def load(self, path: Path) -> list[GivenLayer]:
        """Take over the indexes of a file; those that were news.

        Raises InvalidLayer, LimitExceeded and StorageError; layers before the fault are kept.
        """
        news = []
        with self._lock:
            try:
                with (
                    path.open("rb") as file,
                    zstd.open(file, "rb") as packed,
                    tarfile.open(fileobj=packed, mode="r|") as archive,
                ):
                    for number, said in enumerate(_head(archive)):
                        if self._take(archive, number, said):
                            news.append(said)
            except OSError as error:
                raise StorageError(f"cannot read: {error.strerror}", subject=str(path)) from error
            except (tarfile.TarError, zstd.ZstdError, EOFError, ValueError) as error:
                raise InvalidLayer(f"no file of indexes: {error}", subject=str(path)) from error
            except LayerstoreError as error:
                error.subject = error.subject or str(path)
                raise
        return news

    def _take(self, archive: tarfile.TarFile, number: int, said: GivenLayer) -> bool:
        """Whether the next layer of the archive was not known here."""
        try:
            digest, diff_id = Digest.parse(said.blob_digest), Digest.parse(said.diff_id)
            form = Form(said.form)
            packing = _PACKINGS[form]
        except (InvalidDigest, ValueError, KeyError) as error:
            raise InvalidLayer(f"an index of a layer that is none: {error}") from None
        if not (0 < said.size <= limits.LAYER_BYTES and 0 <= said.diff_size <= limits.LAYER_BYTES):
            raise InvalidLayer("an index of a layer of no possible size", subject=digest)
        fresh = self._loader.new_directory()
        try:
            for name in _names(form):
                _extract(archive, f"{number}/{name}", fresh / name)
            _check(fresh, said, packing)
            if self._state.find_layer(digest, None, diff_id) is not None:
                return False
            record = self._state.add_layer(
                digest,
                None,
                diff_id,
                size=said.size,
                toc_offset=said.size,
                form=form,
                tar_length=said.diff_size,
            )
            target = self._loader.directory(record.slot)
            if target.exists():
                shutil.rmtree(target)
            fresh.rename(target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        return True


def _names(form: str) -> tuple[str, ...]:
    return ("index", "checkpoints") if form == Form.TAR_GZIP else ("index",)


def _add(archive: tarfile.TarFile, name: str, data: IO[bytes], size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    archive.addfile(member, data)


def _next(archive: tarfile.TarFile, name: str, most: int) -> tuple[IO[bytes], int]:
    member = archive.next()
    data = None if member is None else archive.extractfile(member)
    if member is None or data is None or member.name != name:
        raise InvalidLayer(f"a file of indexes has no {name} where it should be")
    if member.size > most:
        raise LimitExceeded(f"{name} has {member.size} bytes in a file of indexes")
    return data, member.size


def _head(archive: tarfile.TarFile) -> tuple[GivenLayer, ...]:
    data, _ = _next(archive, _LAYERS, limits.MANIFEST_BYTES)
    try:
        head = msgspec.json.decode(data.read(), type=_Head)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise InvalidLayer(f"no file of indexes: {error}") from None
    if head.version != _VERSION:
        raise InvalidLayer(f"a file of indexes of version {head.version}")
    return head.layers


def _extract(archive: tarfile.TarFile, name: str, target: Path) -> None:
    data, left = _next(archive, name, limits.INDEX_FILE_BYTES)
    with target.open("wb") as out:
        while left and (piece := data.read(min(left, limits.MIB))):
            out.write(piece)
            left -= len(piece)
    if left:
        raise InvalidLayer(f"a file of indexes ends in the middle of {name}")


def _check(directory: Path, said: GivenLayer, packing: Packing) -> None:
    """Both files are whole, and belong to a layer of this size and form."""
    with LayerIndex.open(directory / "index") as index:
        if index.blob_size != said.size or index.packing is not packing:
            raise InvalidLayer("an index belongs to another layer", subject=said.blob_digest)
        if packing is Packing.CHECKPOINTS:
            Checkpoints.open(directory / "checkpoints", lambda member: index.member(member).offset)
