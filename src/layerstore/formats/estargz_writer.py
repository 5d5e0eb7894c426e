"""Writing an eStargz blob from a tar stream.

The blob is a row of gzip members; a member begins at each non-empty payload and at each
chunk of a large one, so that a reader can take any chunk alone (stargz-snapshotter,
docs/estargz.md)::

    headers up to the first payload | payload, padding, headers | chunk | chunk, padding,
    headers | ... | TOC as a tar entry, end of archive | footer

With ``min_chunk_size`` several small payloads share a member and the TOC says where in
the member each begins (``innerOffset``).

With ``write_estargz_external`` the tar stream stays what it is, bit by bit, and with it the
diff ID: entries keep their order, no landmark and no TOC is put in.  The TOC is a blob of its
own, which is kept in another image; the footer of the layer says so.

The same input and options give the same bytes, whatever the number of threads: where a
member ends never depends on how it was compressed.  (ISA-L, levels 1 to 3, may compress
differently on processors with other vector units.)
"""

from __future__ import annotations

import hashlib
import io
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import BinaryIO, Final

import msgspec
from isal import igzip_lib

from layerstore import limits
from layerstore.errors import ContentError, InvalidLayer, LimitExceeded, UsageError
from layerstore.formats.estargz import (
    LANDMARK_CONTENT,
    NO_PREFETCH_LANDMARK,
    PREFETCH_LANDMARK,
    TOC_NAME,
)
from layerstore.formats.footer import EXTERNAL_FOOTER, build_footer
from layerstore.formats.gzipmember import GZIP_WBITS
from layerstore.formats.layerorder import LANDMARKS, Item, Order, clean_path, order_entries
from layerstore.formats.tarstream import BLOCK, TarEntry, TarReader
from layerstore.formats.toc import TocEntry
from layerstore.formats.tocentry import EntryNames, toc_entry
from layerstore.image import Digest
from layerstore.image.annotations import ESTARGZ_TOC_DIGEST, ESTARGZ_UNCOMPRESSED_SIZE

# Measured on 436 MiB of /usr, one core: level 3 (ISA-L) 43.9 % at 384 MB/s, level 5 40.5 % at
# 47 MB/s, level 6 40.2 % at 31 MB/s, level 9 39.9 % at 8 MB/s.  Beyond 5 time buys no bytes.
DEFAULT_LEVEL: Final = 5
DEFAULT_CHUNK_BYTES: Final = 4 * limits.MIB
_ISAL_LEVELS: Final = (1, 2, 3)
_BATCH_BYTES: Final = 1 * limits.MIB  # uncompressed bytes handed to a thread at once
_HEADER_RUN_BYTES: Final = 1 * limits.MIB  # headers without payload that stay in one member
_READ_BYTES: Final = 1 * limits.MIB

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class EstargzOptions:
    """How to write: compression level 1 (fast) to 9 (small), bytes of a chunk, early files.

    ``min_chunk_size`` > 0 lets payloads share a member until it holds that many bytes.
    """

    level: int = DEFAULT_LEVEL
    chunk_size: int = DEFAULT_CHUNK_BYTES
    min_chunk_size: int = 0
    prioritize: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.level <= 9:
            raise UsageError(f"compression level {self.level} is not between 1 and 9")
        if not BLOCK <= self.chunk_size <= limits.CHUNK_BYTES:
            raise UsageError(
                f"chunk size {self.chunk_size} is not between {BLOCK} and {limits.CHUNK_BYTES}"
            )
        if not 0 <= self.min_chunk_size <= limits.CHUNK_BYTES // 2:
            raise UsageError(
                f"minimal chunk size {self.min_chunk_size} is not between 0 and "
                f"{limits.CHUNK_BYTES // 2}"
            )
        for path in self.prioritize:
            try:
                clean_path(path.encode("utf-8", "surrogateescape"))
            except ContentError as error:
                raise UsageError(
                    "no path of a file in an image, to place it first", subject=repr(path)[:80]
                ) from error


@dataclass(frozen=True, slots=True)
class EstargzResult:
    """What was written; ``annotations`` belong on the layer's descriptor.

    ``prioritized`` are those of the wanted early files that the layer holds.
    """

    digest: Digest
    size: int
    diff_id: Digest
    uncompressed_size: int
    toc_digest: Digest
    annotations: dict[str, str]
    prioritized: tuple[str, ...] = ()


def write_estargz(
    tar: BinaryIO,
    out: BinaryIO,
    options: EstargzOptions | None = None,
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> EstargzResult:
    """Write the tar archive that seekable ``tar`` holds from its start as eStargz to ``out``.

    ``tar`` is read twice.  ``threads`` compress beside the calling one.  ``progress`` is
    called with numbers of uncompressed bytes as they are written.  Memory is bounded by
    chunk size and threads, but for about 300 bytes per entry.

    Raises ``InvalidLayer``, ``UnsupportedFormat`` or ``LimitExceeded`` for what the tar
    archive holds.  What has reached ``out`` by then is of no use.
    """
    options = options or EstargzOptions()
    tar.seek(0)
    order = order_entries(tar, options.prioritize)
    with ThreadPoolExecutor(max(1, threads), "estargz") as pool:
        blob = _Blob(out, options, pool, max(1, threads) + 2, progress or (lambda _: None))
        try:
            _write_entries(tar, order, options, blob)
            return blob.finish(order.found)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def write_estargz_external(
    tar: BinaryIO,
    out: BinaryIO,
    options: EstargzOptions | None = None,
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> tuple[EstargzResult, bytes]:
    """As ``write_estargz``, but lossless; also return the blob that holds the TOC.

    That is a tar archive, in gzip, of the TOC alone.  An entry with the name of a TOC stays in
    the stream and is not told.  Raises ``UsageError`` for files to be placed early.
    """
    options = options or EstargzOptions()
    if options.prioritize:
        raise UsageError("a layer whose tar stream stays what it is has no files placed first")
    with ThreadPoolExecutor(max(1, threads), "estargz") as pool:
        blob = _Blob(out, options, pool, max(1, threads) + 2, progress or (lambda _: None))
        try:
            _write_as_they_come(tar, options, blob)
            return blob.finish_external()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _write_as_they_come(tar: BinaryIO, options: EstargzOptions, blob: _Blob) -> None:
    names = EntryNames()
    offset = 0
    entries = 0
    while True:
        tar.seek(offset)
        reader = TarReader(tar, offset=offset)
        entry = reader.next()
        if entry is None:
            break
        entries += 1
        if entries > limits.TOC_ENTRIES:
            raise LimitExceeded(f"the layer has more than {limits.TOC_ENTRIES} entries")
        blob.headers(entry.headers)
        path = clean_path(entry.name)
        if path == TOC_NAME.encode():
            while data := reader.read(_READ_BYTES):
                blob.headers(data)
        else:
            own = path in LANDMARKS
            _write_payload(tar, reader, entry, options, toc_entry(entry, names), blob, own=own)
        offset = entry.payload_offset + entry.size
        tar.seek(offset)
        padding = tar.read(entry.padding)
        if len(padding) != entry.padding:
            raise InvalidLayer("the tar archive is truncated")
        blob.headers(padding)
        offset += entry.padding
    tar.seek(offset)
    while data := tar.read(_HEADER_RUN_BYTES):
        blob.headers(data)


def _write_entries(tar: BinaryIO, order: Order, options: EstargzOptions, blob: _Blob) -> None:
    names = EntryNames()
    if not order.prioritized:
        _write_landmark(NO_PREFETCH_LANDMARK, blob)
    for number, item in enumerate(order.items):
        _write_entry(tar, item, options, names, blob)
        if number + 1 == order.prioritized:
            _write_landmark(PREFETCH_LANDMARK, blob)


def _write_landmark(name: str, blob: _Blob) -> None:
    blob.headers(plain_header(name, len(LANDMARK_CONTENT)))
    digest = _sha256(LANDMARK_CONTENT)
    entry = TocEntry(name=name, type="reg", size=1, mode=0o644, digest=digest, chunk_digest=digest)
    blob.payload(entry, LANDMARK_CONTENT, own_member=True)
    blob.headers(bytes(BLOCK - 1))


def _write_entry(
    tar: BinaryIO, item: Item, options: EstargzOptions, names: EntryNames, blob: _Blob
) -> None:
    tar.seek(item.header_offset)
    reader = TarReader(tar, offset=item.header_offset)
    entry = reader.next()
    assert entry is not None, "the input changed while it was read"
    blob.headers(entry.headers)
    _write_payload(tar, reader, entry, options, toc_entry(entry, names), blob)
    blob.headers(bytes(entry.padding))


def _write_payload(
    tar: BinaryIO,
    reader: TarReader,
    entry: TarEntry,
    options: EstargzOptions,
    toc: TocEntry,
    blob: _Blob,
    *,
    own: bool = False,
) -> None:
    if toc.type != "reg":
        blob.entry(toc)
    elif entry.size <= options.chunk_size:
        data = _read_exactly(reader, entry.size)
        toc.digest = _sha256(data)
        if not data:
            blob.entry(toc)
            return
        toc.chunk_digest = toc.digest
        blob.payload(toc, data, own_member=own)
    else:
        toc.digest = _file_digest(reader)
        tar.seek(entry.payload_offset)
        _write_chunks(tar, entry, options.chunk_size, toc, blob)


def _write_chunks(
    tar: BinaryIO, entry: TarEntry, chunk_size: int, toc: TocEntry, blob: _Blob
) -> None:
    for offset in range(0, entry.size, chunk_size):
        data = tar.read(min(chunk_size, entry.size - offset))
        if offset:
            toc = TocEntry(name=toc.name, name_raw=toc.name_raw, type="chunk", chunk_offset=offset)
        if len(data) == chunk_size and offset + chunk_size < entry.size:
            toc.chunk_size = chunk_size  # absent on the last chunk: up to the end of the file
        toc.chunk_digest = _sha256(data)
        blob.payload(toc, data)


def _read_exactly(reader: TarReader, size: int) -> bytes:
    data = reader.read(size)
    if len(data) == size:
        return data
    pieces = [data]
    while more := reader.read(size):
        pieces.append(more)
    return b"".join(pieces)


def _sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _file_digest(reader: TarReader) -> str:
    digest = hashlib.sha256()
    while data := reader.read(_READ_BYTES):
        digest.update(data)
    return f"sha256:{digest.hexdigest()}"


def plain_header(name: str, size: int) -> bytes:
    """Return the USTAR header of a regular file of root, mode 0644, time 0."""
    header = bytearray(BLOCK)
    header[: len(name)] = name.encode()
    header[100:124] = b"0000644\0" + b"0000000\0" * 2
    header[124:148] = b"%011o\0" % size + b"00000000000\0"
    header[156:157] = b"0"
    header[257:265] = b"ustar\x0000"
    header[329:345] = b"0000000\0" * 2
    header[148:156] = b"%06o\0 " % (sum(header) + 8 * 0x20)
    return bytes(header)


@dataclass(slots=True)
class _Batch:
    """Consecutive members, and the TOC entries told since the batch before."""

    members: list[bytes] = field(default_factory=list)
    entries: list[tuple[TocEntry, int]] = field(default_factory=list)  # with member number or -1
    size: int = 0


class _Blob:
    """Collects headers and payloads into members, and writes them in order.

    Invariant: ``_open`` is the member being filled, and it begins with a payload
    (``_shared``) or with headers.
    """

    def __init__(
        self,
        out: BinaryIO,
        options: EstargzOptions,
        pool: ThreadPoolExecutor,
        ahead: int,
        progress: Progress,
    ) -> None:
        self._out = out
        self._options = options
        self._pool = pool
        self._ahead = ahead
        self._progress = progress
        self._open: list[bytes] = []
        self._open_size = 0
        self._run = 0  # bytes of headers since the last payload
        self._shared = False
        self._batch = _Batch()
        self._waiting: deque[tuple[Future[list[bytes]], _Batch]] = deque()
        self._toc = io.BytesIO()
        self._toc.write(b'{"version":1,"entries":[')
        self._encode = msgspec.json.Encoder().encode
        self._toc_entries = 0
        self._offset = 0
        self._digest = hashlib.sha256()
        self._diff_id = hashlib.sha256()
        self._uncompressed = 0

    def headers(self, data: bytes) -> None:
        """Add headers or padding to the member that is open."""
        if not data:
            return
        self._append(data)
        self._run += len(data)
        # Readers decompress a payload's whole member: a long run of headers must not be in it.
        if self._run >= _HEADER_RUN_BYTES:
            self._close_member()

    def entry(self, toc: TocEntry) -> None:
        """Tell an entry without payload."""
        self._batch.entries.append((toc, -1))

    def payload(self, toc: TocEntry, data: bytes, *, own_member: bool = False) -> None:
        """Add a chunk and tell its entry; it begins a member unless members are shared."""
        if own_member or not self._shared or self._open_size >= self._options.min_chunk_size:
            self._close_member()
        toc.inner_offset = self._open_size
        self._shared = True
        self._run = 0
        self._batch.entries.append((toc, len(self._batch.members)))
        self._append(data)

    def finish(self, prioritized: tuple[str, ...]) -> EstargzResult:
        """Write what is open, the TOC and the footer."""
        toc = self._finish_entries()
        toc_offset = self._offset
        self._append(_toc_archive(toc))
        self._close_member()
        self._hand_over()
        self._collect()
        self._write(build_footer(toc_offset))
        return self._result(Digest.of(toc), prioritized)

    def finish_external(self) -> tuple[EstargzResult, bytes]:
        """Write what is open and the footer; return the blob of the TOC, too."""
        toc = self._finish_entries()
        self._write(EXTERNAL_FOOTER)
        packed = compress_member(_toc_archive(toc), self._options.level)
        return self._result(Digest.of(toc), ()), packed

    def _finish_entries(self) -> bytes:
        """Write what is open; return the TOC."""
        self._close_member()
        self._hand_over()
        while self._waiting:
            self._collect()
        self._toc.write(b"\n]}\n" if self._toc_entries else b"]}\n")
        return self._toc.getvalue()

    def _result(self, toc_digest: Digest, prioritized: tuple[str, ...]) -> EstargzResult:
        return EstargzResult(
            digest=Digest(f"sha256:{self._digest.hexdigest()}"),
            size=self._offset,
            diff_id=Digest(f"sha256:{self._diff_id.hexdigest()}"),
            uncompressed_size=self._uncompressed,
            toc_digest=toc_digest,
            annotations={
                ESTARGZ_TOC_DIGEST: toc_digest,
                ESTARGZ_UNCOMPRESSED_SIZE: str(self._uncompressed),
            },
            prioritized=prioritized,
        )

    def _append(self, data: bytes) -> None:
        self._open.append(data)
        self._open_size += len(data)
        self._uncompressed += len(data)
        self._diff_id.update(data)

    def _close_member(self) -> None:
        self._shared = False
        self._run = 0
        if not self._open_size:
            return
        member = self._open[0] if len(self._open) == 1 else b"".join(self._open)
        self._open = []
        self._open_size = 0
        self._batch.members.append(member)
        self._batch.size += len(member)
        if self._batch.size >= _BATCH_BYTES:
            self._hand_over()

    def _hand_over(self) -> None:
        """Give the batch to a thread, after waiting for the oldest if enough are under way."""
        batch, self._batch = self._batch, _Batch()
        while len(self._waiting) >= self._ahead:
            self._collect()
        work = self._pool.submit(_compress_all, batch.members, self._options.level)
        self._waiting.append((work, batch))

    def _collect(self) -> None:
        """Write the oldest batch; with the offsets of its members its entries are complete."""
        work, batch = self._waiting.popleft()
        offsets = []
        for member in work.result():
            offsets.append(self._offset)
            self._write(member)
        for entry, member_number in batch.entries:
            if member_number >= 0:
                entry.offset = offsets[member_number]
            self._toc.write(b",\n" if self._toc_entries else b"\n")
            self._toc.write(self._encode(entry))
            self._toc_entries += 1
        if self._toc.tell() > limits.TOC_BYTES:
            raise LimitExceeded(
                f"the table of contents would have more than {limits.TOC_BYTES} bytes"
            )
        self._progress(batch.size)

    def _write(self, data: bytes) -> None:
        self._out.write(data)
        self._digest.update(data)
        self._offset += len(data)


def _toc_archive(toc: bytes) -> bytes:
    return plain_header(TOC_NAME, len(toc)) + toc + bytes(-len(toc) % BLOCK + 2 * BLOCK)


def _compress_all(members: list[bytes], level: int) -> list[bytes]:
    return [compress_member(member, level) for member in members]


def compress_member(data: bytes, level: int) -> bytes:
    """Return ``data`` as one gzip member without name and time."""
    if level in _ISAL_LEVELS:
        return igzip_lib.compress(data, level, igzip_lib.COMP_GZIP)
    packer = zlib.compressobj(level, wbits=GZIP_WBITS)
    return packer.compress(data) + packer.flush()
