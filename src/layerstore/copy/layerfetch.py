"""Layers on their way into a graph root: taken from the source, extracted, verified.

Nothing here changes the storage: a layer is staged in a private directory, and
``storage_destination`` commits it.  What has come of large blobs is kept until then
(``spool``), so that neither a broken pull nor a lost staging directory costs it twice.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Final, Self

import msgspec
from msgspec.structs import replace

from layerstore import limits
from layerstore.copy.docker import RegistryImage
from layerstore.copy.progress import Item, PullItem
from layerstore.copy.reuse import WantedLayer
from layerstore.copy.spool import PartialBlob, Spool
from layerstore.copy.storage_source import Pieced
from layerstore.copy.transport import BlobStream, ImageSource
from layerstore.errors import ContentError, LayerstoreError, NetworkError, StorageError
from layerstore.formats import Compression
from layerstore.graphroot.layers import Layer
from layerstore.graphroot.staged import StagedLayer
from layerstore.graphroot.staging import Staging, StagingLost
from layerstore.graphroot.store import Store

_COMPRESSION: Final = {0: Compression.NONE, 2: Compression.GZIP, 4: Compression.ZSTD}


class FetchedLayer(msgspec.Struct, frozen=True):
    """A staged layer, and what was kept of its blob until it is committed."""

    staged: StagedLayer
    partial: PartialBlob | None = None

    def committed(self) -> None:
        """The storage has the layer: the blob is of no more use."""
        if self.partial is not None:
            self.partial.remove()

    def abandoned(self) -> None:
        """The layer was not committed: another pull may need the blob."""
        if self.partial is not None:
            self.partial.close()


class LayerFetcher:
    """Stages layers of one image, in several threads at once; a context manager.

    At its end everything that was staged and not committed is removed.
    """

    def __init__(self, store: Store, source: ImageSource, spool: Spool | None) -> None:
        """``spool`` None keeps nothing of blobs."""
        self._store = store
        self._source = source
        self._spool = spool if isinstance(source, RegistryImage) else None
        self._lock = threading.Lock()
        self._open: set[_Stoppable] = set()
        self._stopped = False
        self._staging: list[Staging] = [store.staging()]

    def pull(self, wanted: WantedLayer, item: PullItem) -> FetchedLayer:
        """Take the layer from the source, verified by all that manifest and config say of it.

        Raises ``VerificationError``, ``InvalidLayer``, ``LimitExceeded``, ``StorageError`` and
        the errors of the source.
        """
        blob = wanted.descriptor
        if not self._source.gives_blob(blob.digest):
            tar = _Stoppable(self._source.layer_diff(blob, wanted.diff_id))
            return FetchedLayer(self._stage(tar, wanted, item, is_blob=False))
        partial = self._spool.open(blob.digest, blob.size) if self._spool is not None else None
        try:
            for _ in range(limits.STAGE_ATTEMPTS):
                kept = 0 if partial is None else partial.size
                stream = _Stoppable(_Kept(self._source, wanted, partial))
                try:
                    return FetchedLayer(self._stage(stream, wanted, item, is_blob=True), partial)
                except ContentError:
                    if partial is not None:
                        partial.clear()
                    if not kept:
                        raise
                    # What was kept may be what is wrong: after a power failure, say.
                except StagingLost:
                    continue
                finally:
                    item.at(0, blob.size)
            raise StorageError("the staging directories are removed again and again")
        except BaseException:
            if partial is not None:
                partial.close()
            raise

    def copy(self, wanted: WantedLayer, layer: Layer) -> FetchedLayer:
        """Make the layer anew from one of the storage with the same content, which is verified.

        Raises ``CorruptStorage`` and other errors if that one is not what it should be.
        """
        for _ in range(limits.STAGE_ATTEMPTS):
            with contextlib.suppress(StagingLost):
                staged = self._stage(_Stoppable(Pieced(layer.tar())), wanted, Item(), is_blob=False)
                return FetchedLayer(_as_it_came(staged, layer))
        raise StorageError("the staging directories are removed again and again")

    def stop(self) -> None:
        """Make everything that is under way fail soon."""
        with self._lock:
            self._stopped = True
            streams = list(self._open)
        for stream in streams:
            stream.close()

    def close(self) -> None:
        """Remove what was staged and is still there."""
        for staging in self._staging:
            staging.close()

    def _stage(
        self, stream: _Stoppable, wanted: WantedLayer, item: PullItem, *, is_blob: bool
    ) -> StagedLayer:
        # a pull whose layers are all there needs none of it
        from layerstore.graphroot.stage import stage_layer  # noqa: PLC0415

        blob = wanted.descriptor
        with stream, self._stoppable(stream):
            staging = self._staging[-1]
            try:
                directory = staging.new()
            except StagingLost:
                self._renew(staging)
                raise
            try:
                return stage_layer(
                    directory,
                    stream,
                    blob_digest=blob.digest if is_blob else None,
                    blob_size=blob.size if is_blob else None,
                    diff_id=wanted.diff_id,
                    whiteouts=self._store.whiteouts,
                    progress=item.advance,
                    ignore_chown_errors=self._store.config.ignore_chown_errors,
                )
            except (StorageError, ContentError) as error:
                if directory.exists():
                    raise
                self._renew(staging)
                raise StagingLost("the directory was removed", subject=str(directory)) from error

    def _renew(self, lost: Staging) -> None:
        with self._lock:
            if self._staging[-1] is lost:
                self._staging.append(self._store.staging())

    @contextlib.contextmanager
    def _stoppable(self, stream: _Stoppable) -> Iterator[None]:
        with self._lock:
            if self._stopped:
                stream.close()
            self._open.add(stream)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Stoppable:
    """A stream whose reads fail after ``close``, which any thread may call."""

    def __init__(self, stream: BlobStream) -> None:
        self._stream = stream
        self._closed = False

    def read(self, n: int, /) -> bytes:
        if self._closed:
            raise NetworkError("the pull was given up")
        return self._stream.read(n)

    def close(self) -> None:
        self._closed = True
        close = getattr(self._stream, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> Self:
        self._stream.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.__exit__(kind, error, trace)


class _Kept:
    """A blob: first what was kept of it, then the rest from the source, which is kept too."""

    def __init__(
        self, source: ImageSource, wanted: WantedLayer, partial: PartialBlob | None
    ) -> None:
        self._source = source
        self._blob = wanted.descriptor
        self._partial = partial
        self._given = 0
        self._stream: BlobStream | None = None
        self._closed = False

    def read(self, n: int, /) -> bytes:
        if self._stream is None:
            if self._partial is not None and self._given < self._partial.size:
                data = self._partial.read_at(self._given, min(n, self._partial.size - self._given))
                if data:
                    self._given += len(data)
                    return data
                self._partial.remove()
            if self._given >= self._blob.size > 0:
                return b""
            self._stream = self._rest()
            if self._closed:
                raise NetworkError("the pull was given up")
        data = self._stream.read(n)
        self._given += len(data)
        if self._partial is not None:
            self._partial.append(data)
        return data

    def close(self) -> None:
        self._closed = True
        close = getattr(self._stream, "close", None)
        if close is not None:
            close()

    def _rest(self) -> BlobStream:
        if isinstance(self._source, RegistryImage):
            return self._source.open_blob(self._blob.digest, self._blob.size, self._given)
        return self._source.open_blob(self._blob.digest, self._blob.size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            self._stream.__exit__(kind, error, trace)


def _as_it_came(staged: StagedLayer, layer: Layer) -> StagedLayer:
    """With what was found out about the blob when the content came for the first time."""
    record = layer.record
    compression = _COMPRESSION.get(record.compression)
    if record.compressed_diff_digest is None or compression is None:
        return staged
    return replace(
        staged,
        blob_digest=record.compressed_diff_digest,
        blob_size=record.compressed_size,
        compression=compression,
    )


def given_up(error: LayerstoreError) -> bool:
    """Whether an error only says that the pull ended before."""
    return isinstance(error, NetworkError) and error.what == "the pull was given up"
