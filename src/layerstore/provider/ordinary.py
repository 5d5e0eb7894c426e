"""Taking in an ordinary layer: its blob is streamed once, and is a lazily readable layer then.

Three threads share the work: one brings the blob, hashes and stores it, one decompresses
and hashes the tar stream, and the caller's turns the archive into objects and an index.
What is published was checked over the whole stream: the blob's digest and size, and the
diff ID.

Nothing is synced: after a power failure blob and objects are suspect (``content.ledger``), an
index or checkpoints are known by their checksums.

The index cuts files where the compressed stream can be entered: at checkpoints (gzip), at
frames (zstd), anywhere (tar).  So when objects and blob are gone, a file is fetched again by
a range, where the stream permits it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

from layerstore import limits
from layerstore.content import ObjectStore
from layerstore.content.blob import BlobFile
from layerstore.errors import (
    ContentError,
    DiskFull,
    LimitExceeded,
    NetworkError,
    VerificationError,
)
from layerstore.formats import Compression, LayerStream, TarEntry, TarReader
from layerstore.formats.checkpoints import Checkpoint, CheckpointReader, write_checkpoints
from layerstore.formats.compression import Prefixed, Readable, detect
from layerstore.formats.members import Packing
from layerstore.formats.tartoc import FileRead, Piece, tar_entries
from layerstore.formats.toc import TocEntry
from layerstore.formats.zstdframes import FrameReader
from layerstore.image import Digest
from layerstore.layertree import LayerIndex, build_index
from layerstore.provider.pieces import Pieces, StoppedError
from layerstore.turns import SMALL_FILES

_PIECE_BYTES: Final = 1 * limits.MIB  # handed from thread to thread
_DIGEST_BYTES: Final = 32
_CHUNK_BYTES: Final = 4 * limits.MIB
_SPACING: Final = 4 * limits.MIB  # a window costs 14 KiB: a third of a percent
_PACKINGS: Final = {
    Compression.NONE: Packing.TAR,
    Compression.GZIP: Packing.CHECKPOINTS,
    Compression.ZSTD: Packing.ZSTD,
}


class Source(Protocol):
    """The blob from byte ``start`` on; ``read`` gives b"" at its end."""

    @property
    def start(self) -> int: ...
    def read(self, n: int, /) -> bytes: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class IngestedLayer:
    """What was found; ``diff_size`` is the length of the tar stream in bytes."""

    diff_id: Digest
    diff_size: int
    compression: Compression
    entries: int


def ingest_layer(
    open_at: Callable[[int], Source],
    directory: Path,
    objects: ObjectStore,
    *,
    digest: Digest,
    size: int,
    diff_id: Digest | None,
    progress: Callable[[int], None] = lambda _: None,
    ahead: Callable[[], bool] = lambda: False,
    check: Callable[[], None] = lambda: None,
) -> IngestedLayer:
    """Stream a blob into ``directory`` (``blob``, ``index``, ``checkpoints``) and ``objects``.

    ``open_at`` opens the blob from an offset on, again after a connection broke; ``progress``
    is told numbers of its bytes; ``ahead`` says whether nobody waits for the layer, so that it must
    leave the disk more room; ``check`` is called often and stops the work by raising.

    Raises VerificationError for wrong bytes, other errors of the content, NetworkError and
    what ``open_at`` and ``check`` raise, and StorageError.  The directory is of no use then;
    objects that were stored by then are right, whatever became of the layer.  Where the disk has
    no room (DiskFull) they are removed again, so that others have it.
    """
    path = directory / "blob"
    made = bytearray()
    try:
        with path.open("xb", buffering=0) as out:

            def charge(size: int) -> None:
                objects.room.charge(size, ahead=ahead())

            blob = _Blob(open_at, out.fileno(), digest, size, progress, check, charge)
            with blob, _Plain(blob, check) as plain:
                archive = _Archive(plain, objects, made, ahead)
                try:
                    with (
                        (directory / "index").open("wb") as index,
                        contextlib.closing(archive.entries()) as entries,
                    ):
                        summary = build_index(
                            entries,
                            index,
                            blob_size=size,
                            toc_offset=size,
                            packing=_PACKINGS[plain.compression()],
                            member_bytes=limits.LAYER_BYTES,
                        )
                    while plain.read(_PIECE_BYTES):
                        pass
                except ContentError:
                    plain.drain()
                    blob.verify()  # damage on the way is another fault than a bad image
                    raise
                blob.verify()
        found = Digest(f"sha256:{plain.hash.hexdigest()}")
        if diff_id not in (None, found):
            raise VerificationError(
                f"the config states diff ID {diff_id}, the layer has {found}",
                subject=f"layer {digest}",
                advice="the image contradicts itself: build or push it anew",
            )
        if plain.compression() is Compression.GZIP:
            write_checkpoints(plain.points(), directory / "checkpoints")
        with LayerIndex.open(directory / "index") as opened:
            stored = BlobFile(path, opened, size, size, objects)
            for unit in range(stored.units):
                stored.mark(unit)
            objects.ledger.stamp(stored.file.fd)
    except (OSError, DiskFull) as error:
        for at in range(0, len(made), _DIGEST_BYTES):
            objects.discard(bytes(made[at : at + _DIGEST_BYTES]))
        if isinstance(error, OSError):
            raise objects.disk.failed(error, "cannot store", directory) from error
        raise
    return IngestedLayer(found, plain.size, plain.compression(), summary.entries)


class _Blob:
    """Brings the blob in a thread: stored, hashed, and handed on."""

    def __init__(
        self,
        open_at: Callable[[int], Source],
        descriptor: int,
        digest: Digest,
        size: int,
        progress: Callable[[int], None],
        check: Callable[[], None],
        charge: Callable[[int], None],
    ) -> None:
        self._charge = charge
        self._open_at = open_at
        self._descriptor = descriptor
        self._digest = digest
        self.announced = size
        self._progress = progress
        self._check = check
        self._hash = hashlib.sha256()
        self._size = 0
        self._failed: BaseException | None = None
        self.pieces = Pieces()
        self._thread = threading.Thread(target=self._run, name="ingest-blob", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.pieces.stop()
        self._thread.join()

    def verify(self) -> None:
        """Wait for the end of the blob; VerificationError unless it is the announced one."""
        while self.pieces.read(_PIECE_BYTES):
            pass
        actual = f"sha256:{self._hash.hexdigest()}"
        if actual != self._digest:
            raise VerificationError(
                f"the blob has the digest {actual}", subject=f"layer {self._digest}"
            )

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            self._bring()
        except StoppedError:
            pass
        except BaseException as error:
            failure = error
        self.pieces.finish(failure)

    def _bring(self) -> None:
        attempt = 0
        while self._size < self.announced:
            before = self._size
            try:
                self._stream()
            except NetworkError:
                attempt = 1 if self._size > before else attempt + 1
                if attempt >= limits.FETCH_ATTEMPTS:
                    raise
                pause = limits.BACKOFF_FIRST_SECONDS * 2**attempt
                time.sleep(random.uniform(pause / 2, pause))

    def _stream(self) -> None:
        source = self._open_at(self._size)
        try:
            skip = self._size - source.start
            while self._size < self.announced:
                self._check()
                data = source.read(_PIECE_BYTES)
                if not data:
                    raise NetworkError(f"the body ended {self.announced - self._size} bytes early")
                if skip:
                    data, skip = data[skip:], max(0, skip - len(data))
                    if not data:
                        continue
                data = data[: self.announced - self._size]
                self._hash.update(data)
                self._charge(len(data))
                _write(self._descriptor, data)
                self._size += len(data)
                self._progress(len(data))
                self.pieces.put(data)
        finally:
            source.close()


class _Plain:
    """Decompresses in a thread: hashed, and handed on."""

    def __init__(self, blob: _Blob, check: Callable[[], None]) -> None:
        self._blob = blob
        self._check = check
        self._pieces = Pieces()
        self._known = threading.Event()
        self._compression = Compression.NONE
        self._points: list[Checkpoint] = []
        self.hash = hashlib.sha256()
        self.size = 0
        self._thread = threading.Thread(target=self._run, name="ingest-plain", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pieces.stop()
        self._thread.join()

    def compression(self) -> Compression:
        """Waits for the first bytes."""
        self._known.wait()
        return self._compression

    def read(self, n: int, /) -> bytes:
        """The tar stream."""
        return self._pieces.read(n, self._check)

    def drain(self) -> None:
        """Let the rest of the blob come by; nothing of it matters any more."""
        with contextlib.suppress(ContentError):
            while self._pieces.read(_PIECE_BYTES):
                pass

    def points(self) -> list[Checkpoint]:
        """Where the compressed stream can be entered; it grows while the stream is read.

        All that lie before the end of what ``read`` gave are there.
        """
        return self._points

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            stream = self._open()
            self._known.set()
            while data := stream.read(_PIECE_BYTES):
                self.hash.update(data)
                self.size += len(data)
                if self.size > limits.LAYER_BYTES:
                    raise LimitExceeded("the layer's tar stream is too long")
                self._pieces.put(data)
        except StoppedError:
            pass
        except BaseException as error:
            failure = error
        self._known.set()
        self._pieces.finish(failure)

    def _open(self) -> Readable:
        pieces = self._blob.pieces
        head = b""
        while len(head) < 4 and (more := pieces.read(_PIECE_BYTES)):
            head += more
        source = Prefixed(head, pieces)
        self._compression = detect(head)
        if self._compression is Compression.NONE:
            return source
        if self._compression is Compression.ZSTD:
            frames = FrameReader(source, _SPACING)
            self._points = frames.points
            return frames
        if self._blob.announced < limits.CHECKPOINT_MIN_BYTES:
            self._points = [Checkpoint(0, 0, b"")]
            return LayerStream(source)
        reader = CheckpointReader(source, _SPACING)
        self._points = reader.points
        return reader


class _Archive:
    """The tar archive: each file an object, cut where the blob can be entered.

    The digests of objects that were not there before are added to ``made``; ``ahead`` says whether
    nobody waits for them.
    """

    def __init__(
        self,
        plain: _Plain,
        objects: ObjectStore,
        made: bytearray,
        ahead: Callable[[], bool],
    ) -> None:
        self._made = made
        self._ahead = ahead
        self._plain = plain
        self._objects = objects
        self._point = 0
        self._reader = TarReader(plain)

    def entries(self) -> Generator[TocEntry]:
        """What is in the archive; to be closed by who does not take all of it."""
        with SMALL_FILES.taken():
            yield from tar_entries(self._reader, self._read_file)

    def _read_file(self, entry: TarEntry) -> FileRead:
        """Read and store the payload of the entry at hand."""
        if entry.size < limits.LARGE_FILE_BYTES:
            return self._read_at_once(entry)
        with SMALL_FILES.left():
            if entry.size <= _CHUNK_BYTES:
                return self._read_at_once(entry)
            return self._read_in_pieces(entry)

    def _read_at_once(self, entry: TarEntry) -> FileRead:
        data = self._reader.read(entry.size)
        if len(data) < entry.size:
            pieces = [data]
            missing = entry.size - len(data)
            while missing:
                pieces.append(self._reader.read(missing))
                missing -= len(pieces[-1])
            data = b"".join(pieces)
        digest = hashlib.sha256(data).digest()
        if self._objects.put(digest, data, ahead=self._ahead()):
            self._made += digest
        return FileRead(digest, self._cut(entry.payload_offset, data, digest))

    def _read_in_pieces(self, entry: TarEntry) -> FileRead:
        running = hashlib.sha256()
        pieces: list[Piece] = []
        offset = entry.payload_offset
        with self._objects.writer(ahead=self._ahead()) as writer:
            left = entry.size
            while left:
                data = self._reader.read(min(_CHUNK_BYTES, left))
                left -= len(data)
                running.update(data)
                writer.write(data)
                pieces += self._cut(offset, data, None)
                offset += len(data)
            digest = running.digest()
            if writer.publish(digest):
                self._made += digest
        return FileRead(digest, tuple(pieces))

    def _cut(self, start: int, data: bytes, digest: bytes | None) -> tuple[Piece, ...]:
        """Pieces of a file that begins ``start`` bytes into the tar stream."""
        offset, plain_offset, end = self._span(start)
        if start + len(data) <= end:
            whole = digest or hashlib.sha256(data).digest()
            return (Piece(len(data), whole, offset, start - plain_offset),)
        pieces = []
        view = memoryview(data)
        while view:
            offset, plain_offset, end = self._span(start)
            piece = view[: end - start]
            found = hashlib.sha256(piece).digest()
            pieces.append(Piece(len(piece), found, offset, start - plain_offset))
            start += len(piece)
            view = view[len(piece) :]
        return tuple(pieces)

    def _span(self, at: int) -> tuple[int, int, int]:
        """The member that holds byte ``at`` of the tar stream: where it begins, in the blob and
        in the stream, and where it ends in the stream.
        """
        points = self._plain.points()
        if not points:
            start = at - at % _SPACING
            return start, start, start + _SPACING
        number = self._point
        while number + 1 < len(points) and points[number + 1].plain_offset <= at:
            number += 1
        self._point = number
        point = points[number]
        end = points[number + 1].plain_offset if number + 1 < len(points) else limits.LAYER_BYTES
        return point.offset, point.plain_offset, end


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
