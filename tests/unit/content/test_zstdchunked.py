"""Contents of zstd:chunked layers: frames, holes, frames too long to be held."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest

from lab import tars
from layerstore import limits
from layerstore.content import ContentStats, LayerContent, ObjectStore, Outages, Scheduler
from layerstore.errors import NetworkError
from layerstore.formats import TocEntry, iter_toc
from layerstore.formats.announced import Form, announced
from layerstore.formats.members import Packing, codec
from layerstore.formats.zstdchunked import read_zstd_toc
from layerstore.formats.zstdchunked_writer import ZstdChunkedOptions, write_zstd_chunked
from layerstore.image import Descriptor, media_types
from layerstore.layertree import LayerIndex, build_index

NOISE = hashlib.shake_256(b"noise").digest(1_000_000)
FILES = {
    b"small": b"a few bytes",
    b"empty": b"",
    b"chunks": NOISE[:700_000],
    b"holes": bytes(50_000) + NOISE[:200_000] + bytes(300_000) + NOISE[200_000:300_000],
    b"only-a-hole": bytes(400_000),
    b"ends-in-a-hole": NOISE[:1000] + bytes(100_000),
}


class Response:
    def __init__(self, start: int, data: bytes) -> None:
        self.start = start
        self._data = data

    def read_some(self, limit: int) -> bytes:
        piece, self._data = self._data[:limit], self._data[limit:]
        return piece

    def close(self) -> None:
        pass


def _with_a_hole(entry: TocEntry) -> TocEntry:
    """Real writers give a file of one chunk no chunk type; others may."""
    if entry.name != "only-a-hole":
        return entry
    return msgspec.structs.replace(entry, chunk_type="zeros")


def _finish(done: threading.Event, _: Exception | None) -> None:
    done.set()


class Layer:
    """A layer with these files, and what was asked of its registry."""

    def __init__(self, root: Path, scheduler: Scheduler, chunk_size: int = 16_384) -> None:
        tar, out = io.BytesIO(), io.BytesIO()
        tars.write_tar(tar, [tars.regular(name, data) for name, data in FILES.items()])
        written = write_zstd_chunked(tar, out, ZstdChunkedOptions(chunk_size=chunk_size))
        self.blob = out.getvalue()
        said = announced(
            Descriptor(
                media_type=media_types.OCI_LAYER_ZSTD,
                digest=written.digest,
                size=written.size,
                annotations=written.annotations,
            )
        )
        assert said.form is Form.ZSTD_CHUNKED
        place, toc_digest = said.toc, said.toc_digest
        assert place is not None
        assert toc_digest is not None
        packed = self.blob[place.offset : place.offset + place.size]
        toc = read_zstd_toc(packed, toc_digest, compressed_digest=True)
        index = io.BytesIO()
        build_index(
            map(_with_a_hole, iter_toc(toc)), index, blob_size=len(self.blob), toc_offset=place.offset,
            packing=Packing.ZSTD,
        )  # fmt: skip
        self.index = LayerIndex.from_bytes(index.getvalue())
        self.requests: list[tuple[int, int]] = []
        self.offline = False
        self.content = LayerContent(
            "test",
            self.index,
            root / "blob",
            digest=written.digest.hex,
            size=written.size,
            toc_offset=place.offset,
            codec=codec(self.index.packing),
            objects=ObjectStore(root / "content"),
            scheduler=scheduler,
            source=self.source,
            stats=ContentStats(),
            outages=Outages(),
            patience=lambda: 1.0,
        )

    def source(self, offset: int, length: int, seconds: float) -> Response:
        if self.offline:
            raise NetworkError("no route to host")
        self.requests.append((offset, length))
        return Response(offset, self.blob[offset : offset + length])

    def entry(self, name: bytes) -> int:
        entry = self.index.lookup(0, name)
        assert entry is not None
        return entry

    def read(self, name: bytes, offset: int = 0, size: int = 1 << 20) -> bytes:
        entry = self.entry(name)
        for _ in range(2):
            data = self.content.read_cached(entry, offset, size)
            if data is None:
                data = self.content.read_stored(entry, offset, size)
            if data is not None:
                return bytes(data)
            done = threading.Event()
            self.content.fetch(entry, offset, size, partial(_finish, done))
            assert done.wait(20)
        found = self.content.read_stored(entry, offset, size)
        assert found is not None
        return bytes(found)


@pytest.fixture
def make_layer(tmp_path: Path) -> Iterator[Callable[..., Layer]]:
    scheduler = Scheduler(quiet_seconds=0.05)
    yield lambda **options: Layer(tmp_path, scheduler, **options)
    scheduler.close()


def test_every_file_reads_as_it_was_written(make_layer: Callable[..., Layer]):
    layer = make_layer()
    for name, data in FILES.items():
        assert layer.read(name) == data, name
        assert layer.read(name) == data, name
    assert layer.index.content_bytes == sum(map(len, FILES.values()))


def test_reads_of_any_range(make_layer: Callable[..., Layer]):
    layer = make_layer()
    data = FILES[b"holes"]
    for offset in range(0, len(data) + 5000, 41_000):
        for size in (1, 4096, 131_072):
            assert layer.read(b"holes", offset, size) == data[offset : offset + size]


def test_holes_need_no_registry(make_layer: Callable[..., Layer]):
    layer = make_layer()
    layer.offline = True
    assert layer.read(b"only-a-hole") == FILES[b"only-a-hole"]
    assert layer.read(b"holes", 0, 10_000) == bytes(10_000)
    assert layer.read(b"holes", 300_000, 131_072) == bytes(131_072)
    content = layer.index.content(layer.entry(b"only-a-hole"))
    assert content is not None
    assert not content.plain
    assert all(
        layer.index.chunk(content.first_chunk + number).hole
        for number in range(content.chunk_count)
    )


def test_a_file_with_holes_becomes_an_object_once_its_data_are_there(
    make_layer: Callable[..., Layer], tmp_path: Path
):
    layer = make_layer()
    layer.read(b"holes")
    digest = hashlib.sha256(FILES[b"holes"]).hexdigest()
    path = tmp_path / "content" / "objects" / digest[:2] / digest[2:]
    for _ in range(200):
        if path.exists():
            break
        threading.Event().wait(0.05)
    assert path.read_bytes() == FILES[b"holes"]
    assert layer.read(b"holes", 40_000, 30_000) == FILES[b"holes"][40_000:70_000]


def test_the_whole_blob_is_brought_and_verified(make_layer: Callable[..., Layer]):
    layer = make_layer()
    layer.read(b"chunks", 100_000, 1000)
    while layer.content.complete_step():
        pass
    assert layer.content.complete
    layer.offline = True
    for name, data in FILES.items():
        assert layer.read(name) == data


def test_a_frame_too_long_to_be_held_is_read_as_a_stream(
    make_layer: Callable[..., Layer], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(limits, "MEMBER_HELD_BYTES", 10_000)
    layer = make_layer()
    for name, data in FILES.items():
        assert layer.read(name) == data, name
