"""From a layer descriptor to a verified, indexed layer on disk.

What the descriptor announces leads to the TOC (``formats.announced``): the footer of an
eStargz blob, the annotations of a zstd:chunked one, or an image of TOCs.  One range request
brings the end of the blob, TOC and all, where its size was guessed well.  The TOC's digest
must be the one that the manifest announces, and only then is it parsed and compiled into an
index.  Beside the index are kept the TOC, so that the index can be built anew without a
registry, and the end of the blob (file ``end``), so that it is not fetched again.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from layerstore import limits
from layerstore.content import ObjectStore
from layerstore.errors import (
    ContentError,
    DeadlineExceeded,
    InvalidLayer,
    LayerstoreError,
    LimitExceeded,
    NetworkError,
    RangeNotSupported,
    StorageError,
)
from layerstore.formats import FOOTER_BYTES, iter_toc, parse_footer, read_toc
from layerstore.formats.announced import Announced, Form, Place, announced
from layerstore.formats.compression import zstd
from layerstore.formats.footer import EXTERNAL_FOOTER_BYTES
from layerstore.formats.members import Packing
from layerstore.formats.zstdchunked import read_zstd_toc, tar_length, tar_split_digest
from layerstore.image import Descriptor, Digest, Reference, media_types
from layerstore.image.annotations import ESTARGZ_TOC_DIGEST, TOC_NOTES
from layerstore.layertree import build_index
from layerstore.provider import memory
from layerstore.provider.external import ExternalTocs
from layerstore.provider.misplaced import make_way
from layerstore.provider.refusal import BAD_TOC, NO_TOC, Refusal
from layerstore.provider.state import LayerRecord, State
from layerstore.registry import RegistryClient

_FRAME_HEADER_BYTES = 8  # of the skippable frame that holds a TOC
_NEAR_BYTES = 8 * limits.MIB  # the end of a blob is fetched whole if it is no longer


def announced_toc(descriptor: Descriptor) -> Announced:
    """What a descriptor announces of a layer with a TOC; Refusal if there is none."""
    promised = announced(descriptor)
    if promised.toc_digest is None:
        if promised.problem:
            raise Refusal(BAD_TOC, f"layer {descriptor.digest}: {promised.problem}")
        raise Refusal(NO_TOC, f"layer {descriptor.digest} has no TOC annotation")
    return promised


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedToc:
    """A verified TOC: ``document`` is its JSON, ``end`` the last bytes of the blob, if they came.

    ``toc_offset`` is where the contents of the blob end; ``packed`` the compressed bytes that the
    announced digest covers, where it does.
    """

    document: bytes
    toc_offset: int
    end: bytes = b""
    packed: bytes = b""
    tar_length: int | None = None
    external: bool = False


class Loader:
    """Loads TOCs into indexes below ``root`` (one directory a slot).  Thread-safe."""

    def __init__(
        self, root: Path, state: State, client: RegistryClient, objects: ObjectStore
    ) -> None:
        self._root = root
        self._disk = objects.disk
        self._ledger = objects.ledger
        self._room = objects.room
        self._state = state
        self._client = client
        self._external = ExternalTocs(client)
        self._lock = threading.Lock()
        self._loading: dict[tuple[Digest, Digest, Digest], threading.Lock] = {}
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for stale in root.glob("new-*"):
                shutil.rmtree(stale)
        except OSError as error:
            raise StorageError(f"cannot prepare: {error.strerror}", subject=str(root)) from error

    def directory(self, slot: int) -> Path:
        """Where the files of a layer live."""
        return self._root / str(slot)

    def load(
        self, reference: Reference, descriptor: Descriptor, diff_id: Digest, deadline: float
    ) -> LayerRecord:
        """The record of the layer; its index is on disk when this returns.

        ``diff_id`` is the one that the image's config states.

        Raises Refusal, errors of the content, of the registry and of the disk.
        """
        promised = announced_toc(descriptor)
        toc = promised.toc_digest
        assert toc is not None
        key = (descriptor.digest, toc, diff_id)
        with self._lock:
            loading = self._loading.setdefault(key, threading.Lock())
        if not loading.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise DeadlineExceeded("the layer's TOC did not arrive in time", subject=toc)
        try:
            record = self._state.find_layer(*key)
            if record is not None and record.size != descriptor.size:
                # neither digest was checked against the size, and one of the two images lies
                raise InvalidLayer(
                    f"layer has {descriptor.size} bytes here and {record.size} in another image",
                    subject=descriptor.digest,
                )
            if record is None or not (self.directory(record.slot) / "index").exists():
                loaded = self.read(reference, descriptor, promised, deadline)
                record = self._keep(descriptor, promised, diff_id, loaded)
                memory.give_back()
            return record
        finally:
            loading.release()
            with self._lock:
                self._loading.pop(key, None)

    def read(
        self, reference: Reference, descriptor: Descriptor, promised: Announced, deadline: float
    ) -> LoadedToc:
        """Fetch and verify the TOC of a layer."""
        if promised.toc is not None:
            return self._read_zstd(reference, descriptor, promised, deadline)
        size = descriptor.size
        if size < EXTERNAL_FOOTER_BYTES:  # the shortest there is
            raise InvalidLayer(
                f"{size} bytes are too short for a footer", subject=descriptor.digest
            )
        guess = _tail_guess(size)
        end = self._read(reference, descriptor, size - guess, guess, deadline)
        footer = parse_footer(end[-FOOTER_BYTES:], size)
        if footer.external:
            toc = promised.toc_digest
            assert toc is not None
            document = self._external.toc(reference, descriptor.digest, toc, deadline)
            return LoadedToc(document, footer.toc_offset, end, external=True)
        if size - footer.toc_offset > limits.TOC_BYTES:
            raise LimitExceeded("TOC is too large", subject=descriptor.digest)
        missing = size - len(end) - footer.toc_offset
        if missing > 0:
            end = self._read(reference, descriptor, footer.toc_offset, missing, deadline) + end
        return _estargz_toc(descriptor, promised, end)

    def _read_zstd(
        self, reference: Reference, descriptor: Descriptor, promised: Announced, deadline: float
    ) -> LoadedToc:
        """TOC and tar-split lie side by side at the end, where writers put them."""
        toc, split = promised.toc, promised.tar_split
        assert toc is not None
        if max(toc.size, split.size if split else 0) > limits.TOC_BYTES:
            raise LimitExceeded("TOC is too large", subject=descriptor.digest)
        start = max(0, toc.offset - _FRAME_HEADER_BYTES)
        stop = max(place.offset + place.size for place in (toc, split) if place is not None)
        if descriptor.size - start <= stop - start + _NEAR_BYTES:
            stop = descriptor.size
        if split is not None and (split.offset < start or stop - start > 2 * limits.TOC_BYTES):
            stop, split = toc.offset + toc.size, None
        data = self._read(reference, descriptor, start, stop - start, deadline)
        start = stop - len(data)  # all from byte 0 where the registry ignores ranges

        def part(place: Place) -> bytes:
            return data[place.offset - start : place.offset - start + place.size]

        packed = part(toc)
        document = _verified_zstd(packed, descriptor, promised)
        length = None
        if split is not None and (expected := tar_split_digest(document)) is not None:
            length = tar_length(part(split), expected)
        contents = max(0, toc.offset - _FRAME_HEADER_BYTES)
        at_end = stop == descriptor.size
        return LoadedToc(document, contents, data if at_end else b"", packed, length)

    def rebuild(self, record: LayerRecord, references: Sequence[Reference]) -> None:
        """Make the index of a known layer anew: from what is stored, else from a registry.

        Raises StorageError if neither works.
        """
        descriptor = _descriptor(record)
        promised = announced(descriptor)
        try:
            self._keep(descriptor, promised, record.diff_id, self._stored(record, promised))
        except (OSError, LayerstoreError) as error:
            failure: Exception = error
        else:
            return
        deadline = time.monotonic() + limits.RESOLVE_SECONDS
        for reference in references:
            try:
                loaded = self.read(reference, descriptor, promised, deadline)
                self._keep(descriptor, promised, record.diff_id, loaded)
            except LayerstoreError as error:
                failure = error
            else:
                return
        raise StorageError(
            "the layer's index is damaged and cannot be built anew now",
            subject=record.blob_digest,
            advice="it is tried again at the next use",
        ) from failure

    def check_stored(self, record: LayerRecord) -> None:
        """Verify the TOC that is kept beside the index, where one is.

        Raises StorageError and errors of the content.
        """
        path = self.directory(record.slot) / "toc.zst"
        if not record.form.lazy or not path.exists():
            return
        try:
            packed = path.read_bytes()
        except OSError as error:
            raise StorageError(f"cannot read: {error.strerror}", subject=str(path)) from error
        descriptor = _descriptor(record)
        _verified_zstd(packed, descriptor, announced(descriptor))

    def _stored(self, record: LayerRecord, promised: Announced) -> LoadedToc:
        """The TOC as it was kept, or as the stored blob has it."""
        directory = self.directory(record.slot)
        descriptor = _descriptor(record)
        try:
            packed = (directory / "toc.zst").read_bytes()
            document = _verified_zstd(packed, descriptor, promised)
        except (OSError, ContentError):
            with (directory / "blob").open("rb") as blob:
                blob.seek(record.toc_offset)
                return _estargz_toc(descriptor, promised, blob.read())
        return LoadedToc(document, record.toc_offset, packed=packed, tar_length=record.tar_length)

    def new_directory(self) -> Path:
        """A fresh directory beside those of the layers; removed at the next start if left."""
        fresh = self._root / f"new-{os.getpid()}-{threading.get_ident()}"
        fresh.mkdir(mode=0o700)
        return fresh

    def _keep(
        self,
        descriptor: Descriptor,
        promised: Announced,
        diff_id: Digest | None,
        loaded: LoadedToc,
    ) -> LayerRecord:
        """Compile the index and publish it; what was of another try is replaced."""
        notes = {
            key: descriptor.annotations[key] for key in TOC_NOTES & descriptor.annotations.keys()
        }
        try:
            fresh = self.new_directory()
            try:
                with (fresh / "index").open("wb") as out:
                    build_index(
                        iter_toc(loaded.document),
                        out,
                        blob_size=descriptor.size,
                        toc_offset=loaded.toc_offset,
                        packing=Packing.GZIP if promised.form is Form.ESTARGZ else Packing.ZSTD,
                    )
                (fresh / "toc.zst").write_bytes(loaded.packed or zstd.compress(loaded.document, 1))
                with (fresh / "end").open("wb") as end:
                    end.write(loaded.end)
                    end.flush()
                    self._ledger.stamp(end.fileno())
                self._room.count(sum(file.stat().st_size for file in fresh.iterdir()))
                record = self._state.add_layer(
                    descriptor.digest,
                    promised.toc_digest,
                    diff_id,
                    size=descriptor.size,
                    toc_offset=loaded.toc_offset,
                    form=promised.form,
                    notes=msgspec.json.encode(notes).decode(),
                    tar_length=loaded.tar_length,
                )
                target = self.directory(record.slot)
                make_way(target)
                if target.exists():
                    for name in ("toc.zst", "end", "index"):
                        os.replace(fresh / name, target / name)
                else:
                    fresh.rename(target)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
        except OSError as error:
            raise self._disk.failed(error, "cannot store the index", self._root) from error
        return record

    def _read(
        self,
        reference: Reference,
        descriptor: Descriptor,
        offset: int,
        length: int,
        deadline: float,
    ) -> bytes:
        """The range; or, where the registry ignores ranges, all from byte 0 up to its end."""
        with self._client.open_blob(
            reference,
            descriptor.digest,
            offset=offset,
            length=length,
            size=descriptor.size,
            deadline=deadline,
        ) as reader:
            length += offset - reader.start
            if reader.start != offset and length > limits.WHOLE_BLOB_BYTES:
                raise RangeNotSupported(
                    "the registry sends the whole blob instead of a range",
                    subject=f"{reference} layer {descriptor.digest}",
                    advice="use a registry or mirror that supports range requests",
                )
            data = bytearray()
            while len(data) < length:
                if time.monotonic() > deadline:
                    raise DeadlineExceeded("the TOC did not arrive in time")
                piece = reader.read(min(limits.STREAM_BYTES, length - len(data)))
                if not piece:
                    raise NetworkError("the body ended early")
                data += piece
            return bytes(data)


def _tail_guess(size: int) -> int:
    """Bytes to ask for first: TOCs are mostly below one percent of the blob."""
    return min(size, max(limits.TOC_TAIL_MIN_BYTES, min(size // 64, limits.TOC_TAIL_MAX_BYTES)))


def _estargz_toc(descriptor: Descriptor, promised: Announced, end: bytes) -> LoadedToc:
    """Verify the TOC in the last bytes of an eStargz blob."""
    footer = parse_footer(end[-FOOTER_BYTES:], descriptor.size)
    start = footer.toc_offset - (descriptor.size - len(end))
    document = read_toc(memoryview(end)[start : start + footer.toc_size])
    assert promised.toc_digest is not None
    promised.toc_digest.verify(document, subject=f"TOC of layer {descriptor.digest}")
    return LoadedToc(document, footer.toc_offset, end)


def _verified_zstd(packed: bytes, descriptor: Descriptor, promised: Announced) -> bytes:
    """The JSON of a TOC in zstd: of a layer, or as this module keeps it."""
    assert promised.toc_digest is not None
    covers_json = promised.form is not Form.ZSTD_CHUNKED and (
        promised.form is Form.ESTARGZ or ESTARGZ_TOC_DIGEST in descriptor.annotations
    )
    return read_zstd_toc(packed, promised.toc_digest, compressed_digest=not covers_json)


def _descriptor(record: LayerRecord) -> Descriptor:
    """The descriptor of a known layer, as far as it leads to the TOC."""
    notes = msgspec.json.decode(record.notes or "{}", type=dict[str, str])
    if not notes:  # a state of the first version
        notes = {ESTARGZ_TOC_DIGEST: str(record.toc_digest)}
    return Descriptor(
        media_type=(
            media_types.OCI_LAYER_GZIP
            if record.form is Form.ESTARGZ
            else media_types.OCI_LAYER_ZSTD
        ),
        digest=record.blob_digest,
        size=record.size,
        annotations=notes,
    )
