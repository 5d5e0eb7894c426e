"""From a blob to an extracted, verified layer that waits to be committed, in one pass.

The bytes of the blob pass through once: hashed as they come, decompressed, hashed again as a
tar stream (the diff ID), extracted, and what the files do not say written to the tar-split.
Three threads share the work, with short queues between them: one takes from the source, hashes
and decompresses, one hashes the tar stream, and the caller's makes the files.  Hashing and
decompression run without Python's lock; those who make files take turns.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from layerstore import limits
from layerstore.errors import LimitExceeded, StorageError, VerificationError
from layerstore.formats.compression import Compression, LayerStream, Readable
from layerstore.formats.tarstream import TarEntry, TarReader
from layerstore.graphroot.extract import ExtractOptions, Extractor
from layerstore.graphroot.removal import remove_tree
from layerstore.graphroot.staged import DIFF, TAR_SPLIT, StagedLayer
from layerstore.graphroot.tarsplit import TarSplitWriter, crc64
from layerstore.graphroot.whiteouts import WhiteoutStyle, in_user_namespace
from layerstore.image import Digest
from layerstore.turns import SMALL_FILES

_PIECE: Final = limits.STAGE_PIECE_BYTES
_POLL_SECONDS: Final = 0.05


def stage_layer(
    directory: Path,
    source: Readable,
    *,
    blob_digest: Digest | None,
    blob_size: int | None,
    diff_id: Digest | None,
    whiteouts: WhiteoutStyle,
    progress: Callable[[int], None] | None = None,
    ignore_chown_errors: bool = False,
) -> StagedLayer:
    """Extract the blob that ``source`` gives into ``directory/diff`` and verify it.

    ``directory`` exists and is the caller's.  Digests and sizes that are given are checked.
    ``progress`` is called with the number of bytes taken from the source, each time some are,
    from another thread.

    Raises VerificationError when a digest or size is not as announced, InvalidLayer,
    UnsupportedFormat and LimitExceeded for archives that cannot or must not be extracted,
    StorageError (disk full, no permission), and what ``source.read`` raises.  Nothing is left in
    ``directory`` then; the source, if it has ``close``, is closed when it was not read to its end.
    """
    options = ExtractOptions(whiteouts, ignore_chown_errors, in_user_namespace())
    blob = _Blob(source, blob_digest, blob_size, progress)
    try:
        with _Inflater(blob) as inflater, _TarHasher(diff_id) as hasher:
            stream = _Stream(inflater, hasher)
            try:
                (directory / DIFF).mkdir(mode=0o755)
                extractor = _extract(stream, directory, options)
            except OSError as error:
                raise StorageError(f"cannot extract: {error}", subject=str(directory)) from error
            blob.verify()
            found = hasher.verify()
    except BaseException:
        _discard(directory)
        raise
    return StagedLayer(
        directory=directory,
        diff_id=found,
        diff_size=stream.position,
        blob_digest=blob.digest,
        blob_size=blob.size,
        compression=inflater.compression,
        uids=tuple(sorted(extractor.uids)),
        gids=tuple(sorted(extractor.gids)),
        root_entry=extractor.root_entry,
    )


def _extract(stream: _Stream, directory: Path, options: ExtractOptions) -> Extractor:
    fd = os.open(directory / TAR_SPLIT, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with (
        open(fd, "wb") as out,
        Extractor(directory / DIFF, options) as extractor,
        SMALL_FILES.taken(),
    ):
        split = TarSplitWriter(out)
        reader = TarReader(stream, sparse=True)
        payload = _Payload(stream, reader, split)
        while (entry := reader.next()) is not None:
            split.segment(stream.raw())
            payload.begin(entry)
            if entry.size < limits.LARGE_FILE_BYTES:
                extractor.apply(entry, payload.read)
            else:
                with SMALL_FILES.left():
                    extractor.apply(entry, payload.read)
            while payload.read(_PIECE):
                pass
            split.file(entry.name, payload.size, payload.crc)
        split.segment(stream.raw())
        trailer = 0
        while data := stream.read(_PIECE):
            trailer += len(data)
            if trailer > limits.TAR_TRAILER_BYTES:
                raise LimitExceeded(
                    f"more than {limits.TAR_TRAILER_BYTES} bytes follow the end of the tar archive"
                )
            split.segment(stream.raw())
        split.close()
        extractor.finish()
    return extractor


def _discard(directory: Path) -> None:
    for name in (DIFF, TAR_SPLIT):
        # The error that brought us here says more than one of clearing up.
        with contextlib.suppress(OSError):
            remove_tree(directory / name)


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


def _hash_of(announced: Digest | None) -> tuple[str, _Hash]:
    algorithm = announced.algorithm if announced is not None else "sha256"
    return algorithm, hashlib.new(algorithm)


class _Blob:
    """The blob as it comes: counted, hashed, not more of it than announced."""

    def __init__(
        self,
        source: Readable,
        digest: Digest | None,
        size: int | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.size = 0
        self._source = source
        self._announced = digest
        self._announced_size = size
        self._progress = progress
        self._algorithm, self._hash = _hash_of(digest)
        self.ended = False

    def read(self, n: int, /) -> bytes:
        data = self._source.read(n)
        if not data:
            self.ended = True
            return data
        self.size += len(data)
        if self._announced_size is not None and self.size > self._announced_size:
            raise VerificationError(
                f"the blob is larger than the {self._announced_size} bytes announced",
                subject=self._announced or "",
            )
        self._hash.update(data)
        if self._progress is not None:
            self._progress(len(data))
        return data

    @property
    def digest(self) -> Digest:
        return Digest(f"{self._algorithm}:{self._hash.hexdigest()}")

    def close(self) -> None:
        """Make a read that waits in the other thread end."""
        close = getattr(self._source, "close", None)
        if close is not None and not self.ended:
            close()

    def verify(self) -> None:
        if self._announced_size not in (None, self.size):
            raise VerificationError(
                f"the blob has {self.size} bytes, announced were {self._announced_size}",
                subject=self._announced or "",
            )
        if self._announced not in (None, self.digest):
            raise VerificationError(
                f"the blob has the digest {self.digest}",
                subject=self._announced or "",
                advice="the content was damaged or replaced on its way",
            )


class _Inflater:
    """A thread that takes from the blob and gives pieces of the tar stream."""

    def __init__(self, blob: _Blob) -> None:
        self.compression = Compression.NONE
        self._blob = blob
        self._pieces: queue.Queue[bytes | BaseException] = queue.Queue(limits.STAGE_PIECES)
        self._given_up = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="stage-inflate", daemon=True)

    def __enter__(self) -> _Inflater:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._ended:
            self._given_up.set()
            self._blob.close()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._pieces.get_nowait()
            self._thread.join(_POLL_SECONDS)

    def next(self) -> bytes:
        """The next piece, ``b""`` at the end.  Raises what the thread met."""
        if self._ended:
            return b""
        piece = self._pieces.get()
        if isinstance(piece, BaseException):
            self._ended = True
            raise piece
        self._ended = not piece
        return piece

    def _run(self) -> None:
        try:
            stream = LayerStream(self._blob)
            self.compression = stream.compression
            while (piece := stream.read(_PIECE)) and not self._given_up.is_set():
                self._pieces.put(piece)
            # What follows the last member is no part of the archive, but of the blob.
            while not self._given_up.is_set() and self._blob.read(_PIECE):
                pass
            self._pieces.put(b"")
        except BaseException as error:  # handed to the one who waits for us
            self._pieces.put(error)


class _TarHasher:
    """A thread that hashes the tar stream."""

    def __init__(self, announced: Digest | None) -> None:
        self._announced = announced
        self._algorithm, self._hash = _hash_of(announced)
        self._pieces: queue.Queue[bytes] = queue.Queue(limits.STAGE_PIECES)
        self._thread = threading.Thread(target=self._run, name="stage-hash", daemon=True)

    def __enter__(self) -> _TarHasher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def put(self, piece: bytes) -> None:
        self._pieces.put(piece)

    def verify(self) -> Digest:
        """The digest, once everything is hashed.  Raises VerificationError."""
        self._end()
        found = Digest(f"{self._algorithm}:{self._hash.hexdigest()}")
        if self._announced not in (None, found):
            raise VerificationError(
                f"the uncompressed layer has the digest {found}, the image's configuration "
                f"announces {self._announced}",
                advice="the image is inconsistent; its publisher must rebuild it",
            )
        return found

    def _end(self) -> None:
        if self._thread.is_alive():
            self._pieces.put(b"")
            self._thread.join()

    def _run(self) -> None:
        while piece := self._pieces.get():
            self._hash.update(piece)


class _Stream:
    """The tar stream; keeps what was read of it, but for payloads, until it is asked for."""

    def __init__(self, inflater: _Inflater, hasher: _TarHasher) -> None:
        self.position = 0
        self.keeping = True
        self._inflater = inflater
        self._hasher = hasher
        self._piece = b""
        self._offset = 0
        self._kept: list[bytes] = []

    def read(self, n: int, /) -> bytes:
        piece, offset = self._piece, self._offset
        if offset == len(piece):
            with SMALL_FILES.left():
                piece = self._piece = self._inflater.next()
                if piece:
                    self._hasher.put(piece)
            self._offset = offset = 0
            if not piece:
                return b""
            self.position += len(piece)
            if self.position > limits.LAYER_BYTES:
                raise LimitExceeded(f"the layer has more than {limits.LAYER_BYTES} bytes")
        data = piece[offset : offset + n]
        self._offset = offset + len(data)
        if self.keeping:
            self._kept.append(data)
        return data

    def raw(self) -> bytes:
        """What was kept since the last call."""
        kept = self._kept[0] if len(self._kept) == 1 else b"".join(self._kept)
        self._kept.clear()
        return kept


class _Payload:
    """The payload of the entry at hand, with its CRC.

    That of a sparse file is not what the file will be read as: it goes into the tar-split, and for
    that the entry has no content.  (Podman notes the file as it reads it, and cannot give the
    layer back.)
    """

    def __init__(self, stream: _Stream, reader: TarReader, split: TarSplitWriter) -> None:
        self.crc = 0
        self.size = 0
        self._stream = stream
        self._reader = reader
        self._split = split
        self._kept = False

    def begin(self, entry: TarEntry) -> None:
        """Go on to the next entry."""
        self._kept = entry.sparse is not None
        self.crc, self.size = 0, 0 if self._kept else entry.size

    def read(self, n: int) -> bytes:
        self._stream.keeping = self._kept
        try:
            data = self._reader.read(n)
        finally:
            self._stream.keeping = True
        if self._kept:
            self._split.segment(self._stream.raw())
        elif data:
            self.crc = crc64(data, self.crc)
        return data
