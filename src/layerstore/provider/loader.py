"""From a layer descriptor to a verified, indexed layer on disk.

The end of the blob holds footer and TOC.  One range request brings both where
its size was guessed well; the TOC's digest must be the one that the manifest
announces, and only then is it parsed and compiled into an index.  What was read
is kept beside the index (file ``end``), so that it is not fetched again.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from layerstore import limits
from layerstore.errors import (
    DeadlineExceeded,
    InvalidLayer,
    LayerstoreError,
    LimitExceeded,
    NetworkError,
    RangeNotSupported,
    StorageError,
    UnsupportedFormat,
)
from layerstore.formats import FOOTER_BYTES, iter_toc, parse_footer, read_toc
from layerstore.formats.announced import Form
from layerstore.image import Descriptor, Digest, Reference, media_types, toc_digest
from layerstore.layertree import build_index
from layerstore.provider import memory
from layerstore.provider.refusal import MEDIA_TYPE, NO_TOC, Refusal
from layerstore.provider.state import LayerRecord, State
from layerstore.registry import RegistryClient

_GZIP_TYPES = (media_types.OCI_LAYER_GZIP, media_types.DOCKER_LAYER_GZIP)


def announced_toc(descriptor: Descriptor) -> Digest:
    """The TOC digest that a layer's descriptor announces; Refusal if it cannot be served."""
    digest = toc_digest(descriptor.annotations)
    if digest is None:
        raise Refusal(NO_TOC, f"layer {descriptor.digest} has no TOC annotation")
    if descriptor.media_type not in _GZIP_TYPES:
        raise Refusal(MEDIA_TYPE, f"layer {descriptor.digest} is {descriptor.media_type}")
    return digest


class Loader:
    """Loads TOCs into indexes below ``root`` (one directory a slot).  Thread-safe."""

    def __init__(self, root: Path, state: State, client: RegistryClient) -> None:
        self._root = root
        self._state = state
        self._client = client
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
        toc = announced_toc(descriptor)
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
                record = self._load(reference, descriptor, toc, diff_id, deadline)
                memory.give_back()
            return record
        finally:
            loading.release()
            with self._lock:
                self._loading.pop(key, None)

    def _load(
        self,
        reference: Reference,
        descriptor: Descriptor,
        toc: Digest,
        diff_id: Digest | None,
        deadline: float,
    ) -> LayerRecord:
        size = descriptor.size
        if size < FOOTER_BYTES:
            raise InvalidLayer(
                f"{size} bytes are too short for a footer", subject=descriptor.digest
            )
        guess = _tail_guess(size)
        end = self._read(reference, descriptor, size - guess, guess, deadline)
        footer = parse_footer(end[-FOOTER_BYTES:], size)
        if footer.external:
            raise UnsupportedFormat("the layer keeps its table of contents in another image")
        if size - footer.toc_offset > limits.TOC_BYTES:
            raise LimitExceeded("TOC is too large", subject=descriptor.digest)
        missing = size - len(end) - footer.toc_offset
        if missing > 0:
            end = self._read(reference, descriptor, footer.toc_offset, missing, deadline) + end
        return self._index(descriptor, toc, diff_id, end)

    def rebuild(self, record: LayerRecord, references: Sequence[Reference]) -> None:
        """Make the index of a known layer anew: from what is stored, else from a registry.

        Raises StorageError if neither works.
        """
        toc = record.toc_digest
        assert toc is not None
        descriptor = Descriptor(
            media_type=media_types.OCI_LAYER_GZIP, digest=record.blob_digest, size=record.size
        )
        try:
            with (self.directory(record.slot) / "blob").open("rb") as blob:
                blob.seek(record.toc_offset)
                self._index(descriptor, toc, record.diff_id, blob.read())
        except (OSError, LayerstoreError) as error:
            failure: Exception = error
        else:
            return
        deadline = time.monotonic() + limits.RESOLVE_SECONDS
        for reference in references:
            try:
                self._load(reference, descriptor, toc, record.diff_id, deadline)
            except LayerstoreError as error:
                failure = error
            else:
                return
        raise StorageError(
            "the layer's index is damaged and cannot be built anew now",
            subject=record.blob_digest,
            advice="it is tried again at the next use",
        ) from failure

    def _index(
        self, descriptor: Descriptor, toc: Digest, diff_id: Digest | None, end: bytes
    ) -> LayerRecord:
        """Verify and index the TOC in the last bytes of a blob."""
        footer = parse_footer(end[-FOOTER_BYTES:], descriptor.size)
        start = footer.toc_offset - (descriptor.size - len(end))
        document = read_toc(memoryview(end)[start : start + footer.toc_size])
        toc.verify(document, subject=f"TOC of layer {descriptor.digest}")
        return self._keep(descriptor, toc, diff_id, footer.toc_offset, document, end)

    def new_directory(self) -> Path:
        """A fresh directory beside those of the layers; removed at the next start if left."""
        fresh = self._root / f"new-{os.getpid()}-{threading.get_ident()}"
        fresh.mkdir(mode=0o700)
        return fresh

    def _keep(
        self,
        descriptor: Descriptor,
        toc: Digest,
        diff_id: Digest | None,
        toc_offset: int,
        document: bytes,
        end: bytes,
    ) -> LayerRecord:
        try:
            fresh = self.new_directory()
            try:
                with (fresh / "index").open("wb") as out:
                    build_index(
                        iter_toc(document), out, blob_size=descriptor.size, toc_offset=toc_offset
                    )
                    out.flush()
                    os.fsync(out.fileno())
                (fresh / "end").write_bytes(end)
                record = self._state.add_layer(
                    descriptor.digest,
                    toc,
                    diff_id,
                    size=descriptor.size,
                    toc_offset=toc_offset,
                    form=Form.ESTARGZ,
                )
                target = self.directory(record.slot)
                if target.exists():
                    os.replace(fresh / "end", target / "end")
                    os.replace(fresh / "index", target / "index")
                else:
                    fresh.rename(target)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
        except OSError as error:
            raise StorageError(
                f"cannot store the index: {error.strerror}", subject=str(self._root)
            ) from error
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
