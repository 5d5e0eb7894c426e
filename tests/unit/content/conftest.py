"""A made-up layer: files cut into chunks, chunks into gzip members, and a source of its bytes."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from layerstore.content import ContentStats, LayerContent, ObjectStore, Outages, Scheduler
from layerstore.errors import ContentError, NetworkError
from layerstore.formats.members import Packing, codec


@dataclasses.dataclass(frozen=True)
class Member:
    offset: int
    end: int


@dataclasses.dataclass(frozen=True)
class Chunk:
    file_offset: int
    size: int
    digest: bytes
    member: int
    inner_offset: int
    hole: bool = False


@dataclasses.dataclass(frozen=True)
class Content:
    size: int
    digest: bytes | None
    key: bytes
    first_chunk: int
    chunk_count: int

    @property
    def plain(self) -> bool:
        return self.chunk_count == 1


class FakeLayer:
    """Implements the LayerMap protocol over files given as bytes; entry n is file n."""

    HEAD = b"head" * 8
    TAIL = b"tail" * 16

    def __init__(self, files: Sequence[bytes], chunk_size: int) -> None:
        blob = bytearray(self.HEAD)
        self.files = files
        self._members: list[Member] = []
        self._chunks: list[Chunk] = []
        self._owners: list[int] = []
        self._contents: list[Content | None] = []
        for number, data in enumerate(files):
            first = len(self._chunks)
            for start in range(0, len(data), chunk_size):
                piece = data[start : start + chunk_size]
                packed = gzip.compress(piece + b"padding and headers", 1)
                self._members.append(Member(len(blob), len(blob) + len(packed)))
                blob += packed
                self._chunks.append(
                    Chunk(
                        start, len(piece), hashlib.sha256(piece).digest(), len(self._members) - 1, 0
                    )
                )
                self._owners.append(number)
            count = len(self._chunks) - first
            digest = hashlib.sha256(data).digest()
            listed = b"".join(c.digest for c in self._chunks[first:])
            key = digest if count == 1 else hashlib.sha256(b"list" + listed).digest()
            self._contents.append(Content(len(data), digest, key, first, count) if data else None)
        self.toc_offset = len(blob)
        self.blob = bytes(blob + self.TAIL)

    @property
    def members(self) -> int:
        return len(self._members)

    def member(self, number: int) -> Member:
        return self._members[number]

    def member_chunks(self, number: int) -> Sequence[int]:
        return [n for n, chunk in enumerate(self._chunks) if chunk.member == number]

    def chunk(self, number: int) -> Chunk:
        return self._chunks[number]

    def chunk_owner(self, number: int) -> int:
        return self._owners[number]

    def chunks_between(self, entry: int, offset: int, end: int) -> Sequence[int]:
        return [
            number
            for number, chunk in enumerate(self._chunks)
            if self._owners[number] == entry
            and chunk.file_offset < end
            and chunk.file_offset + chunk.size > offset
        ]

    def content(self, entry: int) -> Content | None:
        return self._contents[entry]

    def lie_about(self, entry: int, digest: bytes) -> None:
        content = self._contents[entry]
        assert content is not None
        self._contents[entry] = dataclasses.replace(content, digest=digest)


class Response:
    def __init__(self, source: Source, start: int, data: bytes) -> None:
        self.start = start
        self._source = source
        self._data = data

    def read_some(self, limit: int) -> bytes:
        source = self._source
        source.gate.wait(10)
        if source.pause:
            time.sleep(source.pause)
        piece, self._data = self._data[:limit], self._data[limit:]
        source.sent += len(piece)
        if source.break_after is not None and source.sent > source.break_after:
            source.break_after = None
            raise NetworkError("connection reset")
        return piece

    def close(self) -> None:
        self._source.closed += 1


class Source:
    """Opens ranges of a blob, as a registry would; faults are switched on by its attributes."""

    def __init__(self, blob: bytes) -> None:
        self.blob = blob
        self.requests: list[tuple[int, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.ignore_ranges = False
        self.broken = False
        self.error: Exception | None = None
        self.break_after: int | None = None
        self.pause = 0.0
        self.sent = 0
        self.closed = 0

    def __call__(self, offset: int, length: int, seconds: float) -> Response:
        self.requests.append((offset, length))
        if self.broken:
            raise NetworkError("no route to host")
        if self.error is not None:
            raise self.error
        if self.ignore_ranges:
            return Response(self, 0, self.blob)
        return Response(self, offset, self.blob[offset : offset + length])


@dataclasses.dataclass
class Lab:
    layer: FakeLayer
    source: Source
    objects: ObjectStore
    content: LayerContent
    stats: ContentStats
    reopen: Callable[[], LayerContent]

    def read(self, entry: int, offset: int = 0, size: int | None = None) -> bytes:
        """Read as the file system does: what is here, else fetch and read before it may go."""
        size = len(self.layer.files[entry]) if size is None else size
        try:
            data = self.content.read_stored(entry, offset, size)
        except ContentError:
            data = None
        for last in (False, True):
            if data is not None:
                return bytes(data)
            results: list[bytes | bytearray | Exception | None] = []
            ended = threading.Event()

            def finish(
                error: Exception | None,
                results: list[bytes | bytearray | Exception | None] = results,
                ended: threading.Event = ended,
            ) -> None:
                try:
                    results.append(error or self.content.read_stored(entry, offset, size))
                except ContentError as wrong:
                    results.append(wrong)
                ended.set()

            self.content.fetch(entry, offset, size, finish)
            assert ended.wait(20), "the fetch never ended"
            (result,) = results
            if isinstance(result, Exception):
                if last or not isinstance(result, ContentError):
                    raise result
            else:
                data = result
        if data is None:
            raise AssertionError("fetched, but not there")
        return bytes(data)

    def fetch(self, entry: int, offset: int = 0, size: int = 1) -> Exception | None:
        done = threading.Event()
        errors: list[Exception | None] = []

        def finish(error: Exception | None) -> None:
            errors.append(error)
            done.set()

        self.content.fetch(entry, offset, size, finish)
        assert done.wait(20), "the fetch never ended"
        assert len(errors) == 1
        return errors[0]


@pytest.fixture
def make_lab(tmp_path: Path) -> Iterator[Callable[..., Lab]]:
    schedulers: list[Scheduler] = []
    outages = Outages()

    def make(files: Sequence[bytes], chunk_size: int = 1000, patience: float = 1.0) -> Lab:
        layer = FakeLayer(files, chunk_size)
        source = Source(layer.blob)
        scheduler = Scheduler(quiet_seconds=0.05)
        schedulers.append(scheduler)
        stats = ContentStats()
        objects = ObjectStore(tmp_path / "content")
        (tmp_path / "layer").mkdir(exist_ok=True)

        def open_content(objects: ObjectStore) -> LayerContent:
            return LayerContent(
                "test",
                layer,
                tmp_path / "layer" / "blob",
                digest=hashlib.sha256(layer.blob).hexdigest(),
                size=len(layer.blob),
                toc_offset=layer.toc_offset,
                codec=codec(Packing.GZIP),
                objects=objects,
                scheduler=scheduler,
                source=source,
                stats=stats,
                outages=outages,
                patience=lambda: patience,
            )

        return Lab(
            layer,
            source,
            objects,
            open_content(objects),
            stats,
            lambda: open_content(ObjectStore(tmp_path / "content")),
        )

    yield make
    for scheduler in schedulers:
        scheduler.close()
    outages.close()
