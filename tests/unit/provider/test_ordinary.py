"""Taking in ordinary layers: streamed once, verified, read again by ranges."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import tars
from layerstore import limits
from layerstore.content import ContentStats, LayerContent, ObjectStore, Outages, Scheduler
from layerstore.errors import (
    DiskFull,
    InvalidLayer,
    NetworkError,
    ServiceError,
    VerificationError,
)
from layerstore.formats import Compression
from layerstore.formats.checkpoints import Checkpoints
from layerstore.formats.compression import zstd
from layerstore.formats.members import MemberCodec, Packing, codec
from layerstore.image import Digest
from layerstore.layertree import LayerIndex
from layerstore.provider import ordinary
from layerstore.provider.agreement import check_agreement
from layerstore.provider.ordinary import IngestedLayer, ingest_layer

NOISE = hashlib.shake_256(b"noise").digest(400_000)
TEXT = b"".join(b"line %d of a file that compresses\n" % number for number in range(60_000))
FILES = {
    b"empty": b"",
    b"small": b"a few bytes",
    b"same": b"a few bytes",
    b"noise": NOISE,
    b"text": TEXT,
    b"large": TEXT * 3 + NOISE,
    **{b"many/%d" % number: b"file %d" % number * 50 for number in range(300)},
}


def tar(files: dict[bytes, bytes] | None = None) -> bytes:
    out = io.BytesIO()
    members = [tars.regular(name, data) for name, data in (files or FILES).items()]
    tars.write_tar(
        out, [*members, tars.hard_link(b"link", b"text"), tars.whiteout(b"gone"),
              tars.symlink(b"sym", b"text")],
    )  # fmt: skip
    return out.getvalue()


PLAIN = tar()


def frames(plain: bytes) -> bytes:
    return b"".join(zstd.compress(plain[at : at + 100_000]) for at in range(0, len(plain), 100_000))


BLOBS = {
    "tar": (PLAIN, Compression.NONE),
    "gzip": (gzip.compress(PLAIN), Compression.GZIP),
    "gzip of many members": (
        b"".join(gzip.compress(PLAIN[at : at + 90_000]) for at in range(0, len(PLAIN), 90_000)),
        Compression.GZIP,
    ),
    "zstd": (zstd.compress(PLAIN), Compression.ZSTD),
    "zstd of many frames": (frames(PLAIN), Compression.ZSTD),
}


class Source:
    def __init__(self, data: bytes, start: int, breaks_after: int | None = None) -> None:
        self.start = start
        self.closed = False
        self._stream = io.BytesIO(data[start:])
        self._breaks_after = breaks_after

    def read(self, n: int, /) -> bytes:
        if self._breaks_after is not None:
            if self._breaks_after <= 0:
                raise NetworkError("connection reset")
            n = min(n, self._breaks_after, 10_000)
            self._breaks_after -= n
        return self._stream.read(n)

    def close(self) -> None:
        self.closed = True


class Ingest:
    """An ingest into a directory, and its result read again."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.objects = ObjectStore(root / "content")
        self.layers = 0

    def __call__(
        self,
        blob: bytes,
        open_at: Callable[[int], Source] | None = None,
        *,
        digest: Digest | None = None,
        size: int | None = None,
        diff_id: Digest | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> IngestedLayer:
        self.layers += 1
        self.directory = self.root / f"layer-{self.layers}"
        self.directory.mkdir()
        return ingest_layer(
            open_at or (lambda offset: Source(blob, offset)),
            self.directory,
            self.objects,
            digest=digest or Digest.of(blob),
            size=len(blob) if size is None else size,
            diff_id=diff_id,
            check=check,
        )


@pytest.fixture
def ingest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ingest:
    monkeypatch.setattr(ordinary, "_SPACING", 300_000)
    monkeypatch.setattr(ordinary, "_CHUNK_BYTES", 1_000_000)
    monkeypatch.setattr(limits, "CHECKPOINT_MIN_BYTES", 1)
    monkeypatch.setattr(limits, "BACKOFF_FIRST_SECONDS", 0.001)
    return Ingest(tmp_path)


class Reader:
    """A layer that was taken in, read as the file system does."""

    def __init__(self, ingest: Ingest, blob: bytes, scheduler: Scheduler) -> None:
        self.blob = blob
        self.ranges: list[tuple[int, int]] = []
        self.index = LayerIndex.open(ingest.directory / "index")
        take: MemberCodec
        if self.index.packing is Packing.CHECKPOINTS:
            take = Checkpoints.open(
                ingest.directory / "checkpoints", lambda member: self.index.member(member).offset
            )
        else:
            take = codec(self.index.packing)
        self.content = LayerContent(
            "test", self.index, ingest.directory / "blob",
            digest=hashlib.sha256(blob).hexdigest(), size=len(blob), toc_offset=len(blob),
            codec=take, objects=ingest.objects, scheduler=scheduler, source=self._source,
            stats=ContentStats(), outages=Outages(), verified=True,
        )  # fmt: skip

    def _source(self, offset: int, length: int, seconds: float) -> Range:
        self.ranges.append((offset, length))
        return Range(offset, self.blob[offset : offset + length])

    def read(self, name: bytes, offset: int = 0, size: int = 1 << 30) -> bytes:
        entry = self.index.entry_of_path(name)
        assert entry is not None
        for _ in range(2):
            data = self.content.read_stored(entry, offset, size)
            if data is not None:
                return bytes(data)
            done = threading.Event()
            self.content.fetch(entry, offset, size, Finisher(done))
            assert done.wait(20)
        found = self.content.read_stored(entry, offset, size)
        assert found is not None
        return bytes(found)


class Finisher:
    def __init__(self, done: threading.Event) -> None:
        self._done = done

    def __call__(self, error: Exception | None) -> None:
        self._done.set()


class Range:
    def __init__(self, start: int, data: bytes) -> None:
        self.start = start
        self._data = data

    def read_some(self, limit: int) -> bytes:
        piece, self._data = self._data[:limit], self._data[limit:]
        return piece

    def close(self) -> None:
        pass


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    scheduler = Scheduler(quiet_seconds=0.05)
    yield scheduler
    scheduler.close()


@pytest.mark.parametrize("kind", BLOBS)
def test_what_was_found_is_exact(ingest: Ingest, kind: str):
    blob, compression = BLOBS[kind]
    found = ingest(blob, diff_id=Digest.of(PLAIN))
    assert found.diff_id == Digest.of(PLAIN)
    assert found.diff_size == len(PLAIN)
    assert found.compression is compression
    assert (ingest.directory / "blob").read_bytes() == blob
    index = LayerIndex.open(ingest.directory / "index")
    assert check_agreement(index, io.BytesIO(blob)).diff_id == found.diff_id
    assert found.entries == index.entries


@pytest.mark.parametrize("kind", BLOBS)
def test_everything_is_read_from_objects(ingest: Ingest, scheduler: Scheduler, kind: str):
    blob, _ = BLOBS[kind]
    ingest(blob)
    reader = Reader(ingest, blob, scheduler)
    assert reader.content.complete
    (ingest.directory / "blob").write_bytes(b"")  # nobody looks at it
    for name, data in FILES.items():
        assert reader.read(name) == data, name
        assert reader.read(name, len(data) // 2, 5000) == data[len(data) // 2 :][:5000]
    assert reader.read(b"link", 1000, 70_000) == TEXT[1000:71_000]
    assert reader.index.entry_of_path(b"gone") is not None
    assert not reader.ranges


@pytest.mark.parametrize("kind", BLOBS)
def test_lost_objects_come_back_from_the_blob(ingest: Ingest, scheduler: Scheduler, kind: str):
    blob, _ = BLOBS[kind]
    ingest(blob)
    lose_objects(ingest)
    reader = Reader(ingest, blob, scheduler)
    for name, data in FILES.items():
        assert reader.read(name) == data, name
    assert not reader.ranges


def lose_objects(ingest: Ingest) -> None:
    for path in ingest.root.glob("content/objects/*/*"):
        path.unlink()
    ingest.objects = ObjectStore(ingest.root / "content")


@pytest.mark.parametrize("kind", BLOBS)
def test_where_all_is_lost_a_file_costs_its_range_only(
    ingest: Ingest, scheduler: Scheduler, kind: str
):
    blob, _ = BLOBS[kind]
    ingest(blob)
    lose_objects(ingest)
    for lost in ("blob", "blob.map"):
        (ingest.directory / lost).unlink()
    reader = Reader(ingest, blob, scheduler)
    # a few bytes near the end of the largest file
    assert reader.read(b"large", len(FILES[b"large"]) - 1000, 1000) == FILES[b"large"][-1000:]
    asked = sum(length for _, length in reader.ranges)
    if kind != "zstd":  # one frame has no place to enter it
        assert asked < len(blob) // 2
    for name, data in FILES.items():
        assert reader.read(name) == data, name


@pytest.mark.parametrize("kind", BLOBS)
@pytest.mark.parametrize("long", [False, True])
def test_where_all_is_lost_and_the_disk_takes_nothing_it_comes_through_memory(
    ingest: Ingest, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, kind: str, long: bool
):
    blob, _ = BLOBS[kind]
    ingest(blob)
    lose_objects(ingest)
    for lost in ("blob", "blob.map"):
        (ingest.directory / lost).unlink()
    if long:
        monkeypatch.setattr(limits, "HELD_UNIT_BYTES", 100_000)
        monkeypatch.setattr(limits, "MEMBER_HELD_BYTES", 100_000)
    reader = Reader(ingest, blob, scheduler)
    no_room(ingest.objects)
    for name, data in FILES.items():
        assert reader.read(name) == data, name
    large = FILES[b"large"]
    for offset in range(0, len(large), 200_000):
        assert reader.read(b"large", offset, 1000) == large[offset : offset + 1000]
    assert not list(ingest.root.glob("content/objects/*/*"))
    assert reader.content.stored_bytes == 0


def no_room(objects: ObjectStore) -> None:
    objects.disk.failed(OSError(errno.ENOSPC, "No space left on device"), "cannot write", "it")
    assert objects.disk.full


def test_what_was_taken_in_before_the_disk_was_full_is_removed(
    ingest: Ingest, monkeypatch: pytest.MonkeyPatch
):
    blob = BLOBS["gzip"][0]
    put = ingest.objects.put
    stored: list[bytes] = []

    def full(digest: bytes, data: bytes | memoryview, **options: bool) -> bool:
        if len(stored) == 3:
            no_room(ingest.objects)
        stored.append(digest)
        return put(digest, data, **options)

    monkeypatch.setattr(ingest.objects, "put", full)
    with pytest.raises(DiskFull):
        ingest(blob)
    assert len(stored) == 4
    assert not list(ingest.root.glob("content/objects/*/*"))
    assert not list(ingest.root.glob("content/tmp/*"))


def test_a_second_layer_stores_no_file_twice(ingest: Ingest):
    ingest.objects.ledger.sync()
    ingest(BLOBS["gzip"][0])
    before = {path: path.stat().st_ino for path in ingest.root.glob("content/objects/*/*")}
    assert len(before) == len({bytes(data) for data in FILES.values() if data})
    ingest(BLOBS["zstd"][0])
    after = {path: path.stat().st_ino for path in ingest.root.glob("content/objects/*/*")}
    assert before == after
    assert not list(ingest.root.glob("content/tmp/*"))


def test_a_broken_connection_is_taken_up_where_it_broke(ingest: Ingest):
    blob = BLOBS["gzip"][0]
    opened: list[int] = []

    def open_at(offset: int) -> Source:
        opened.append(offset)
        return Source(blob, offset, breaks_after=100_000)

    assert ingest(blob, open_at).diff_id == Digest.of(PLAIN)
    assert opened == list(range(0, len(blob), 100_000))


def test_a_registry_that_ignores_ranges_begins_at_0_again(ingest: Ingest):
    blob = BLOBS["gzip"][0]
    opened: list[int] = []

    def open_at(offset: int) -> Source:
        opened.append(offset)
        return Source(blob, 0, breaks_after=None if len(opened) > 1 else 100_000)

    assert ingest(blob, open_at).diff_id == Digest.of(PLAIN)
    assert opened == [0, 100_000]
    assert (ingest.directory / "blob").read_bytes() == blob


def test_a_connection_that_never_gives_anything_is_given_up(ingest: Ingest):
    blob = BLOBS["gzip"][0]
    with pytest.raises(NetworkError):
        ingest(blob, lambda offset: Source(blob, offset, breaks_after=0))
    short = blob[:-5]
    with pytest.raises(NetworkError):
        ingest(blob, lambda offset: Source(short, offset))


def test_wrong_bytes_are_refused(ingest: Ingest):
    blob = BLOBS["gzip"][0]
    damaged = blob[:5000] + bytes([blob[5000] ^ 1]) + blob[5001:]
    with pytest.raises(VerificationError, match="the blob has the digest"):
        ingest(damaged, digest=Digest.of(blob))
    with pytest.raises(VerificationError, match="the blob has the digest"):
        ingest(blob + b"more", digest=Digest.of(blob + b"more"), size=len(blob))
    with pytest.raises(VerificationError, match="diff ID"):
        ingest(blob, diff_id=Digest.of(b"other"))


def test_what_is_no_archive_is_refused(ingest: Ingest):
    for wrong in (
        b"not a tar archive" * 100,
        gzip.compress(PLAIN)[:-9],
        gzip.compress(PLAIN[:1000]),
        zstd.compress(PLAIN)[:-9],
        gzip.compress(PLAIN) + b"garbage behind it",
        gzip.compress(b"x" * 5000),
    ):
        with pytest.raises(InvalidLayer):
            ingest(wrong)


def test_it_can_be_stopped_and_leaves_no_thread(ingest: Ingest):
    blob = BLOBS["gzip"][0]
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise ServiceError("stopped")

    with pytest.raises(ServiceError):
        ingest(blob, lambda offset: Source(blob, offset, breaks_after=1 << 30), check=check)
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("ingest-")]


def test_random_archives(ingest: Ingest, scheduler: Scheduler):
    chooser = random.Random(7)
    for number in range(6):
        files = {b"text": b"it has a link"} | {
            b"f%d" % n: chooser.randbytes(chooser.choice((0, 1, 511, 512, 40_000, 1_200_000)))
            for n in range(chooser.randrange(1, 12))
        }
        plain = tar(files)
        blob = chooser.choice((plain, gzip.compress(plain, 1), frames(plain)))
        ingest(blob, diff_id=Digest.of(plain))
        lose_objects(ingest)
        if number % 2:
            for lost in ("blob", "blob.map"):
                (ingest.directory / lost).unlink()
        reader = Reader(ingest, blob, scheduler)
        for name, data in files.items():
            assert reader.read(name) == data


def test_a_layer_that_must_wait_holds_up_no_other(tmp_path: Path) -> None:
    """Those who make objects take turns, but not while they wait for bytes or give way."""
    waits, go_on = threading.Event(), threading.Event()

    def check() -> None:
        if threading.current_thread() is thread:
            waits.set()
            assert go_on.wait(20)

    slow, fast = Ingest(tmp_path / "slow"), Ingest(tmp_path / "fast")
    layers: list[IngestedLayer] = []
    thread = threading.Thread(target=lambda: layers.append(slow(PLAIN, check=check)))
    thread.start()
    assert waits.wait(20)
    layers.append(fast(PLAIN))
    assert thread.is_alive()
    go_on.set()
    thread.join()
    assert len({layer.diff_id for layer in layers}) == 1
