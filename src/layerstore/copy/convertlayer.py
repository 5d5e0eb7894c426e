"""One layer on its way from source to destination, written in another form or kept.

The layer is fetched once: its blob digest and the diff ID that the config states are
checked while the tar stream is written to a temporary file, from which the new blob
is built.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from layerstore.copy.layerform import LayerForm
from layerstore.copy.manifestedit import Family, layer_kind, layer_type, stale
from layerstore.copy.readable import why_unreadable
from layerstore.copy.recompress import blob_pieces, wrong_diff_id
from layerstore.copy.tocimage import TocImage
from layerstore.copy.transport import (
    PIECE_BYTES,
    HashedStream,
    ImageDestination,
    ImageSource,
)
from layerstore.copy.unnamed import descriptor_pieces
from layerstore.errors import (
    ContentError,
    LayerstoreError,
    StorageError,
    UnsupportedFormat,
)
from layerstore.formats import LayerStream
from layerstore.formats.compression import Readable
from layerstore.image import Descriptor, Digest
from layerstore.image.annotations import layer_toc


@dataclass(frozen=True, slots=True)
class LayerProgress:
    """Where a layer stands: ``phase`` is fetch, write, push, kept or done; counts in bytes."""

    layer: Digest
    phase: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class ConvertedLayer:
    """What became of a layer; ``kept`` says that its bytes are the source's.

    Sizes are bytes of the compressed blobs.  ``prioritized`` are the early files it holds,
    ``external_toc`` digest and size of the blob with its TOC, if that is kept apart;
    ``problem`` says what keeps the layer from being read lazily in any form.
    """

    source: Digest
    source_size: int
    digest: Digest
    size: int
    diff_id: Digest
    toc_digest: Digest | None
    media_type: str
    annotations: dict[str, str]
    kept: bool
    prioritized: tuple[str, ...] = ()
    external_toc: tuple[Digest, int] | None = None
    problem: str = ""


class LayerConverter:
    """Converts layers with one set of options; its method may run in several threads."""

    def __init__(
        self,
        source: ImageSource,
        destination: ImageDestination,
        form: LayerForm,
        *,
        rebuild: bool,
        threads: int,
        scratch: Path | None,
        progress: Callable[[LayerProgress], None],
        toc_image: TocImage | None = None,
    ) -> None:
        """``toc_image`` takes the TOCs of a form that keeps them apart."""
        self._source = source
        self._destination = destination
        self._form = form
        self._rebuild = rebuild
        self._threads = threads
        self._scratch = scratch
        self._progress = progress
        self._toc_image = toc_image
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Make running conversions end soon, with an error nobody will see."""
        self._stopped.set()

    def convert(self, layer: Descriptor, diff_id: Digest) -> ConvertedLayer:
        """Bring the layer to the destination.

        Raises ``VerificationError`` for wrong content, the errors of the transports and
        of writing, all naming the layer.
        """
        try:
            kind = layer_kind(layer.media_type)
            if kind is None:
                raise UnsupportedFormat(f"layers of type {layer.media_type} are not converted")
            if not kind.distributed:
                return _unchanged(layer, diff_id)
            if not self._rebuild and self._form.has(layer, self._source):
                self._copy(layer, diff_id)
                return _unchanged(layer, diff_id)
            return self._convert(layer, diff_id)
        except OSError as error:
            raise StorageError(
                error.strerror or str(error), subject=f"layer {layer.digest}"
            ) from error
        except LayerstoreError as error:
            if not error.subject:
                error.subject = f"layer {layer.digest}"
            raise

    def copy_blob(self, blob: Descriptor) -> None:
        """Move a blob that is no layer as it is, verified on the way."""
        pieces = blob_pieces(self._source, blob, lambda _: self._check())
        try:
            self._destination.put_blob(blob.digest, pieces, blob.size)
        except OSError as error:
            raise StorageError(
                error.strerror or str(error), subject=f"blob {blob.digest}"
            ) from error

    def _copy(self, layer: Descriptor, diff_id: Digest) -> None:
        """Move a blob as it is, verified on the way, unless the destination has it."""
        self._tell(layer, "kept", 0)
        if not self._destination.has_blob(
            layer.digest, layer.size
        ) and not self._destination.take_over(self._source, layer.digest):
            with tempfile.TemporaryFile(dir=self._scratch) as file:
                self._fetch(layer, diff_id, compressed=file)
                file.flush()
                pieces = descriptor_pieces(file.fileno(), layer.size, f"layer {layer.digest}")
                self._destination.put_blob(layer.digest, pieces, layer.size)
        self._tell(layer, "done", layer.size)

    def _convert(self, layer: Descriptor, diff_id: Digest) -> ConvertedLayer:
        """Write the layer in the form; one that nobody could read lazily then stays as it is."""
        with tempfile.TemporaryFile(dir=self._scratch) as blob:
            with tempfile.TemporaryFile(dir=self._scratch) as tar:
                total = self._fetch(layer, diff_id, tar=tar)
                written = 0

                def count(size: int) -> None:
                    nonlocal written
                    written += size
                    self._check()
                    self._tell(layer, "write", min(written, total), total)

                result = self._form.write(tar, blob, self._threads, count)
            blob.flush()
            self._check()
            problem = why_unreadable(result, self._form.media_type, blob)
            if problem and self._source.gives_blob(layer.digest):
                self._copy(layer, diff_id)
                return replace(_unchanged(layer, diff_id), problem=problem)
            self._tell(layer, "push", 0, result.size)
            if not self._destination.has_blob(result.digest, result.size):
                pieces = descriptor_pieces(blob.fileno(), result.size, f"layer {layer.digest}")
                self._destination.put_blob(result.digest, pieces, result.size)
        toc = None
        if self._toc_image is not None and result.external_toc is not None:
            toc = self._toc_image.put(result.external_toc)
        self._tell(layer, "done", result.size, result.size)
        kept = {key: value for key, value in layer.annotations.items() if not stale(key)}
        return ConvertedLayer(
            source=layer.digest,
            source_size=layer.size,
            digest=result.digest,
            size=result.size,
            diff_id=result.diff_id,
            toc_digest=result.toc_digest,
            media_type=self._form.media_type,
            annotations=kept | result.annotations,
            kept=False,
            prioritized=result.prioritized,
            external_toc=toc,
            problem=problem,
        )

    def _fetch(
        self,
        layer: Descriptor,
        diff_id: Digest,
        *,
        tar: BinaryIO | None = None,
        compressed: BinaryIO | None = None,
    ) -> int:
        """Read the layer once, checking both digests; return the length of the tar stream."""
        fetched = 0

        def count(size: int) -> None:
            nonlocal fetched
            fetched += size
            self._check()
            self._tell(layer, "fetch", min(fetched, layer.size))

        subject = f"layer {layer.digest}"
        from_files = not self._source.gives_blob(layer.digest)
        if from_files:
            with self._source.layer_diff(layer, diff_id) as stream:
                length, found = _drain(stream, tar, diff_id.algorithm, self._check)
        else:
            with self._source.open_blob(layer.digest, layer.size) as stream:
                hashed = HashedStream(stream, layer.digest, count)
                source = hashed if compressed is None else _Tee(hashed, compressed)
                try:
                    plain = LayerStream(source)
                    length, found = _drain(plain, tar, diff_id.algorithm, self._check)
                    while source.read(PIECE_BYTES):
                        pass
                except ContentError:
                    # Damage on the way and a bad image are different faults: see which it is.
                    hashed.verify(layer.size, subject)
                    raise
                hashed.verify(layer.size, subject)
        if found != diff_id:
            raise wrong_diff_id(diff_id, found, subject, from_files=from_files)
        return length

    def _check(self) -> None:
        if self._stopped.is_set():
            raise StorageError("stopped because another layer failed")

    def _tell(self, layer: Descriptor, phase: str, done: int, total: int | None = None) -> None:
        self._progress(
            LayerProgress(layer.digest, phase, done, layer.size if total is None else total)
        )


def _drain(
    plain: Readable, tar: BinaryIO | None, algorithm: str, check: Callable[[], None]
) -> tuple[int, Digest]:
    """Write a tar stream to ``tar``; return its length and digest."""
    digest = hashlib.new(algorithm)
    length = 0
    while data := plain.read(PIECE_BYTES):
        check()
        digest.update(data)
        length += len(data)
        if tar is not None:
            tar.write(data)
    return length, Digest(f"{algorithm}:{digest.hexdigest()}")


class _Tee:
    def __init__(self, stream: HashedStream, copy: BinaryIO) -> None:
        self._stream = stream
        self._copy = copy

    def read(self, n: int, /) -> bytes:
        data = self._stream.read(n)
        self._copy.write(data)
        return data


def _unchanged(layer: Descriptor, diff_id: Digest) -> ConvertedLayer:
    return ConvertedLayer(
        source=layer.digest,
        source_size=layer.size,
        digest=layer.digest,
        size=layer.size,
        diff_id=diff_id,
        toc_digest=layer_toc(layer.annotations),
        media_type=layer_type(layer.media_type, Family.OCI),
        annotations=dict(layer.annotations),
        kept=True,
    )
