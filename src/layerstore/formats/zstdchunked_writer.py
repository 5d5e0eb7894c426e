"""Writing a zstd:chunked layer from a tar stream.

Form and annotations are those of containers/storage (pkg/chunked/internal/minimal,
pkg/chunked/compressor)::

    headers | payload | padding, headers | chunk | chunk | padding, headers ... end of archive
    skippable frame: TOC, a JSON document in zstd
    skippable frame: tar-split, in zstd
    skippable frame: footer of 64 bytes

Each part of the first line is a zstd frame.  A zstd decoder skips the others and gives the tar
stream back bit by bit, so the diff ID stays what it was; a lazy reader takes a frame alone.

containers/storage compares the TOC with the headers in the tar-split, as Go's
``archive/tar`` reads them, and refuses the layer when they differ.  Where JSON cannot hold
what Go reads there (a name that is no UTF-8), or a partial pull would give another tree than
an ordinary one, the tar-split is left out: then the client fetches the whole layer, as it
does of any other image, and lazy readers lose nothing.  Partial pulls of Podman 5.4.2 do so
with the layers that it wrote itself: they leave out pipes and devices, and fail on hard links
to them and on a file beside its own whiteout; a directory that has no entry gets the mode
0000; capabilities are lost when the file has a hard link.

The same input and options give the same bytes, whatever the number of threads.
"""

from __future__ import annotations

import hashlib
import io
import posixpath
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import BinaryIO, Final

import msgspec

from layerstore import limits
from layerstore.errors import LimitExceeded, UsageError
from layerstore.formats.chunking import DEFAULT_CHUNK_BYTES, Chunker
from layerstore.formats.tarsplit import TarSplitWriter, crc64
from layerstore.formats.tarstream import (
    BLOCK,
    BLOCK_DEVICE,
    CHARACTER,
    FIFO,
    HARD_LINK,
    TarEntry,
    TarReader,
)
from layerstore.formats.zstdentry import ZstdEntry, go_reads_the_same, zstd_entry
from layerstore.image import Digest
from layerstore.image.annotations import (
    ESTARGZ_UNCOMPRESSED_SIZE,
    ZSTD_TARSPLIT_POSITION,
    ZSTD_TOC_DIGEST,
    ZSTD_TOC_POSITION,
)

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

# Measured on 64 KiB of /usr/bin/podman at a time, one core: level 3 36.5 % at 410 MB/s, level 6
# 34.2 % at 124 MB/s, level 9 33.8 % at 78 MB/s, level 12 33.7 % at 30 MB/s.
DEFAULT_LEVEL: Final = 6
_LEVELS: Final = range(1, 20)

_SKIPPABLE: Final = 0x184D2A50
_FRAME: Final = struct.Struct("<II")  # magic, bytes that follow
_FOOTER: Final = struct.Struct("<7Q8s")
_MAGIC: Final = b"GNUlInUx"
_CRFS: Final = 1  # the type of the TOC, the only one there is

_BATCH_BYTES: Final = 1 * limits.MIB  # uncompressed bytes handed to a thread at once
_HEADER_RUN_BYTES: Final = 1 * limits.MIB  # of headers in one frame
_TRAILER_BYTES: Final = 1 * limits.MIB
_CLOSE: Final = -1
_CAPABILITY: Final = b"security.capability"
_WHITEOUT: Final = b".wh."
_SPECIAL: Final = (CHARACTER, BLOCK_DEVICE, FIFO)

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class ZstdChunkedOptions:
    """How to write: compression level 1 (fast) to 19 (small), bytes of a chunk on average."""

    level: int = DEFAULT_LEVEL
    chunk_size: int = DEFAULT_CHUNK_BYTES

    def __post_init__(self) -> None:
        if self.level not in _LEVELS:
            raise UsageError(f"compression level {self.level} is not between 1 and 19")
        Chunker(self.chunk_size)


@dataclass(frozen=True, slots=True)
class ZstdChunkedResult:
    """What was written; ``annotations`` belong on the layer's descriptor.

    ``toc_digest`` is that of the compressed TOC.  Without ``tar_split`` clients of
    containers/storage fetch the layer whole.
    """

    digest: Digest
    size: int
    diff_id: Digest
    uncompressed_size: int
    toc_digest: Digest
    annotations: dict[str, str]
    tar_split: bool


def write_zstd_chunked(
    tar: BinaryIO,
    out: BinaryIO,
    options: ZstdChunkedOptions | None = None,
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> ZstdChunkedResult:
    """Write the tar stream that ``tar`` gives from its start as zstd:chunked to ``out``.

    ``tar`` is read once.  ``threads`` compress beside the calling one.  ``progress`` is
    called with numbers of uncompressed bytes as they are written.  Memory is bounded by
    chunk size and threads, but for about 500 bytes per entry and chunk.

    Raises ``InvalidLayer``, ``UnsupportedFormat`` or ``LimitExceeded`` for what the tar
    archive holds.  What has reached ``out`` by then is of no use.
    """
    options = options or ZstdChunkedOptions()
    tar.seek(0)
    with ThreadPoolExecutor(max(1, threads), "zstdchunked") as pool:
        blob = _Blob(out, options.level, pool, max(1, threads) + 2, progress or (lambda _: None))
        try:
            return _Writer(_Tap(tar), Chunker(options.chunk_size), blob, options.level).run()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


class _Tap:
    """The tar stream; hashes it, and keeps what is read but for payloads."""

    def __init__(self, tar: BinaryIO) -> None:
        self.keeping = True
        self.position = 0
        self._tar = tar
        self._kept: list[bytes] = []
        self._hash = hashlib.sha256()

    def read(self, n: int, /) -> bytes:
        data = self._tar.read(n)
        self._hash.update(data)
        self.position += len(data)
        if self.position > limits.LAYER_BYTES:
            raise LimitExceeded(f"the layer has more than {limits.LAYER_BYTES} bytes")
        if self.keeping:
            self._kept.append(data)
        return data

    def raw(self) -> bytes:
        """What was kept since the last call."""
        kept = self._kept[0] if len(self._kept) == 1 else b"".join(self._kept)
        self._kept.clear()
        return kept

    def digest(self) -> Digest:
        return Digest(f"sha256:{self._hash.hexdigest()}")


class _Writer:
    def __init__(self, tap: _Tap, chunker: Chunker, blob: _Blob, level: int) -> None:
        self._tap = tap
        self._chunker = chunker
        self._blob = blob
        self._level = level
        self._reader = TarReader(tap)
        self._split_bytes = io.BytesIO()
        self._split = TarSplitWriter(self._split_bytes, zstd.ZstdCompressor(level=level))
        self._splits = True  # whether containers/storage will find TOC and tar-split the same
        self._entries = 0
        self._whiteouts: list[bytes] = []  # paths that are whited out
        self._parents: set[bytes] = set()
        self._capable: set[bytes] = set()  # paths of files with capabilities

    def run(self) -> ZstdChunkedResult:
        while (entry := self._reader.next()) is not None:
            self._entries += 1
            if self._entries > limits.TOC_ENTRIES:
                raise LimitExceeded(f"the layer has more than {limits.TOC_ENTRIES} entries")
            raw = self._tap.raw()
            self._blob.headers(raw)
            self._split.segment(raw)
            self._splits = (
                self._splits
                and go_reads_the_same(entry)
                and entry.type not in _SPECIAL
                and not self._links_capable(entry)
            )
            directory, slash, name = entry.name.rpartition(b"/")
            if name.startswith(_WHITEOUT):
                self._whiteouts.append(directory + slash + name.removeprefix(_WHITEOUT))
            self._parents.add(directory if name else directory.rpartition(b"/")[0])
            self._entry(entry)
        self._trailer()
        self._split.close()
        self._parents -= {b"", b"."}
        has = self._split.has
        if any(map(has, self._whiteouts)) or not all(map(has, self._parents)):
            self._splits = False
        self._splits = self._splits and self._split.size <= limits.TOC_BYTES
        split = self._split_bytes.getvalue() if self._splits else None
        return self._blob.finish(self._tap, split, self._split.size, self._level)

    def _links_capable(self, entry: TarEntry) -> bool:
        """Whether this is a hard link to a file with capabilities."""
        if _CAPABILITY in entry.xattrs:
            self._capable.add(_absolute(entry.name))
        return (
            entry.type == HARD_LINK
            and bool(self._capable)
            and _absolute(entry.link_name) in self._capable
        )

    def _entry(self, entry: TarEntry) -> None:
        toc = zstd_entry(entry)
        crc = 0
        if not entry.size:
            self._blob.entry(toc)
        else:
            self._tap.keeping = False
            whole = hashlib.sha256()
            offset = 0
            for data, hole in self._chunker.chunks(self._reader.read, entry.size):
                whole.update(data)
                crc = crc64(data, crc)
                self._blob.chunk(toc, data, offset, hole=hole)
                offset += len(data)
            self._tap.keeping = True
            toc.digest = f"sha256:{whole.hexdigest()}"
            self._blob.file(toc)
        self._split.file(entry.name, entry.size, crc)

    def _trailer(self) -> None:
        """What follows the last entry: the end of the archive, and whatever is behind it."""
        raw = self._tap.raw()
        length = 0
        while True:
            self._blob.headers(raw)
            self._split.segment(raw)
            length += len(raw)
            # Go's reader looks for one more header in these.
            self._splits = self._splits and not raw.strip(b"\0")
            if length > limits.TAR_TRAILER_BYTES:
                raise LimitExceeded(
                    f"more than {limits.TAR_TRAILER_BYTES} bytes follow the end of the tar archive"
                )
            if not self._tap.read(_TRAILER_BYTES):
                break
            raw = self._tap.raw()
        self._splits = self._splits and self._tap.position % BLOCK == 0


def _absolute(name: bytes) -> bytes:
    return posixpath.normpath(b"/" + name.lstrip(b"/"))


@dataclass(slots=True)
class _Batch:
    """Frames to be made, and what is told of entries between them.

    ``events``: an entry, and the number of the frame that holds a chunk of it with the chunk's
    place in the file and whether it is a hole; or ``_CLOSE`` when the entry is complete.
    """

    frames: list[bytes] = field(default_factory=list)
    events: list[tuple[ZstdEntry, int, int, bool]] = field(default_factory=list)
    size: int = 0


@dataclass(frozen=True, slots=True)
class _Chunk:
    offset: int
    end: int
    place: int
    size: int
    digest: str
    hole: bool


class _Blob:
    """Collects headers and chunks into frames, and writes them in order."""

    def __init__(
        self,
        out: BinaryIO,
        level: int,
        pool: ThreadPoolExecutor,
        ahead: int,
        progress: Progress,
    ) -> None:
        self._out = out
        self._pool = pool
        self._ahead = ahead
        self._progress = progress
        self._packers = _Packers(level)
        self._headers: list[bytes] = []
        self._headers_size = 0
        self._batch = _Batch()
        self._waiting: deque[tuple[Future[list[tuple[bytes, str]]], _Batch]] = deque()
        self._chunks: list[_Chunk] = []
        self._toc = io.BytesIO()
        self._toc.write(b'{"version":1,"entries":[')
        self._encode = msgspec.json.Encoder().encode
        self._toc_entries = 0
        self._offset = 0
        self._digest = hashlib.sha256()

    def headers(self, data: bytes) -> None:
        """Add headers, padding or the end of the archive."""
        if data:
            self._headers.append(data)
            self._headers_size += len(data)
            if self._headers_size >= _HEADER_RUN_BYTES:
                self._close_headers()

    def entry(self, toc: ZstdEntry) -> None:
        """Tell an entry without payload."""
        self.file(toc)

    def chunk(self, toc: ZstdEntry, data: bytes, place: int, *, hole: bool) -> None:
        """Add a chunk of the file ``toc`` that begins at ``place`` in it."""
        self._close_headers()
        self._batch.events.append((toc, len(self._batch.frames), place, hole))
        self._frame(data)

    def file(self, toc: ZstdEntry) -> None:
        """Tell an entry after its chunks."""
        self._batch.events.append((toc, _CLOSE, 0, False))

    def finish(
        self, tap: _Tap, split: bytes | None, split_size: int, level: int
    ) -> ZstdChunkedResult:
        """Write what is open, and the frames that a decoder skips."""
        if not tap.position:
            self._frame(b"")  # a stream needs at least one frame
        self._close_headers()
        self._hand_over()
        while self._waiting:
            self._collect()
        self._toc.write(b"]")
        if split is not None:
            self._toc.write(b',"tarSplitDigest":"%b"' % Digest.of(split).encode())
        self._toc.write(b"}")
        toc = self._toc.getvalue()
        if len(toc) > limits.TOC_BYTES:
            raise _too_large()
        packed = zstd.compress(toc, level=level)
        toc_digest = Digest.of(packed)
        place = self._skippable(packed)
        notes = {
            ZSTD_TOC_DIGEST: str(toc_digest),
            ZSTD_TOC_POSITION: f"{place}:{len(packed)}:{len(toc)}:{_CRFS}",
        }
        numbers = [place, len(packed), len(toc), _CRFS, 0, 0, 0]
        if split is not None:
            numbers[4:] = self._skippable(split), len(split), split_size
            notes[ZSTD_TARSPLIT_POSITION] = ":".join(str(number) for number in numbers[4:])
        else:
            # Otherwise the tar-split tells it.
            notes[ESTARGZ_UNCOMPRESSED_SIZE] = str(tap.position)
        self._skippable(_FOOTER.pack(*numbers, _MAGIC))
        return ZstdChunkedResult(
            digest=Digest(f"sha256:{self._digest.hexdigest()}"),
            size=self._offset,
            diff_id=tap.digest(),
            uncompressed_size=tap.position,
            toc_digest=toc_digest,
            annotations=notes,
            tar_split=split is not None,
        )

    def _skippable(self, data: bytes) -> int:
        """Write a frame that decoders skip; return where its data begin."""
        self._write(_FRAME.pack(_SKIPPABLE, len(data)))
        place = self._offset
        self._write(data)
        return place

    def _close_headers(self) -> None:
        if self._headers:
            data = self._headers[0] if len(self._headers) == 1 else b"".join(self._headers)
            self._headers = []
            self._headers_size = 0
            self._frame(data)

    def _frame(self, data: bytes) -> None:
        self._batch.frames.append(data)
        self._batch.size += len(data)
        if self._batch.size >= _BATCH_BYTES:
            self._hand_over()

    def _hand_over(self) -> None:
        """Give the batch to a thread, after waiting for the oldest if enough are under way."""
        batch, self._batch = self._batch, _Batch()
        while len(self._waiting) >= self._ahead:
            self._collect()
        numbers = {event[1] for event in batch.events}
        work = self._pool.submit(self._packers.pack, batch.frames, numbers)
        self._waiting.append((work, batch))

    def _collect(self) -> None:
        """Write the oldest batch; with the offsets of its frames its entries are complete."""
        work, batch = self._waiting.popleft()
        made = work.result()
        offsets = [self._offset]
        for frame, _ in made:
            self._write(frame)
            offsets.append(self._offset)
        for toc, number, place, hole in batch.events:
            if number == _CLOSE:
                self._tell(toc)
                continue
            size = len(batch.frames[number])
            digest = made[number][1]
            self._chunks.append(
                _Chunk(offsets[number], offsets[number + 1], place, size, digest, hole)
            )
        if self._toc.tell() > limits.TOC_BYTES:
            raise _too_large()
        self._progress(batch.size)

    def _tell(self, toc: ZstdEntry) -> None:
        """Write a complete entry and those of its chunks."""
        chunks, self._chunks = self._chunks, []
        entries = [toc]
        if chunks:
            toc.offset, toc.end_offset = chunks[0].offset, chunks[-1].end
        if len(chunks) > 1:
            entries += [ZstdEntry(type="chunk", name=toc.name) for _ in chunks[1:]]
            for entry, chunk in zip(entries, chunks, strict=True):
                entry.offset = chunk.offset
                entry.chunk_size = chunk.size
                entry.chunk_offset = chunk.place
                entry.chunk_digest = chunk.digest
                entry.chunk_type = "zeros" if chunk.hole else ""
        for entry in entries:
            if self._toc_entries:
                self._toc.write(b",")
            self._toc.write(self._encode(entry))
            self._toc_entries += 1

    def _write(self, data: bytes) -> None:
        self._out.write(data)
        self._digest.update(data)
        self._offset += len(data)


class _Packers:
    """Makes frames; each thread has a compressor of its own, which is costly to set up."""

    def __init__(self, level: int) -> None:
        self._level = level
        self._own = threading.local()

    def pack(self, frames: list[bytes], chunks: set[int]) -> list[tuple[bytes, str]]:
        """Each frame, and the digest of what is in it for those that are chunks."""
        packer = getattr(self._own, "packer", None)
        if packer is None:
            packer = self._own.packer = zstd.ZstdCompressor(level=self._level)
        return [
            (
                packer.compress(data, zstd.ZstdCompressor.FLUSH_FRAME),
                f"sha256:{hashlib.sha256(data).hexdigest()}" if number in chunks else "",
            )
            for number, data in enumerate(frames)
        ]


def _too_large() -> LimitExceeded:
    return LimitExceeded(f"the table of contents would have more than {limits.TOC_BYTES} bytes")
