"""A disk that takes nothing, or gives nothing: reads are served all the same, and rightly."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab.waiting import until
from layerstore import limits
from layerstore.content import disk, ledger
from layerstore.errors import DiskFull, StorageError

MIB = limits.MIB


class BadDisk:
    """Lets calls on files below ``root`` fail, by the part of their path that is named."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._root = os.fspath(root)
        self.writing: dict[str, int] = {}
        """Part of a path -> the error of writes."""
        self.reading: dict[str, int] = {}
        self.syncing: dict[str, int] = {}
        self.half = False
        """Half of what is written arrives before it fails."""
        self.failed = 0
        self.on_failed_sync: Callable[[int], None] = lambda _: None
        for name in ("pwrite", "write", "posix_fallocate", "ftruncate"):
            monkeypatch.setattr(os, name, self._watched(getattr(os, name), lambda: self.writing))
        for name in ("pread", "preadv"):
            monkeypatch.setattr(os, name, self._watched(getattr(os, name), lambda: self.reading))
        for name in ("fsync", "fdatasync"):
            monkeypatch.setattr(os, name, self._watched(getattr(os, name), lambda: self.syncing))
        self._pwrite = os.pwrite

    def fill(self, error: int = errno.ENOSPC) -> None:
        self.writing = {"": error}

    def free(self) -> None:
        self.writing = {}

    def _watched(self, real: Callable[..., object], table: Callable[[], dict[str, int]]):
        def call(fd: int, *arguments: Any) -> object:
            path = os.readlink(f"/proc/self/fd/{fd}")
            if path.startswith(self._root):
                for part, error in table().items():
                    if part in path:
                        self.failed += 1
                        if self.half and real.__name__ == "pwrite":
                            data, offset = arguments
                            real(fd, memoryview(data)[: len(data) // 2], offset)
                        if table() is self.syncing:
                            self.on_failed_sync(fd)
                        raise OSError(error, os.strerror(error))
            return real(fd, *arguments)

        return call


@pytest.fixture
def bad_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BadDisk:
    monkeypatch.setattr(limits, "FULL_DISK_SECONDS", 0.02)
    return BadDisk(tmp_path, monkeypatch)


def complete(lab) -> None:
    complete_content(lab.content)


def complete_content(content) -> None:
    while content.complete_step():
        pass


def files_below(path: Path) -> list[Path]:
    aside = ("boot", "underway")
    return [one for one in path.rglob("*") if one.is_file() and one.name not in aside]


FILES = [os.urandom(700), os.urandom(5300), b"small", os.urandom(12_000), b""]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_reads_are_served_while_the_disk_takes_nothing(make_lab, tmp_path, bad_disk, error):
    lab = make_lab(FILES)
    bad_disk.fill(error)
    for _ in range(2):
        for number, data in enumerate(FILES):
            assert lab.read(number) == data
    rest = random.Random(5)
    for _ in range(100):
        offset = rest.randrange(12_000)
        assert lab.read(3, offset, 2500) == FILES[3][offset : offset + 2500]
    assert lab.objects.disk.full
    assert lab.objects.disk.as_dict()["failed_writes"] == 1
    assert lab.stats.as_dict()["fetched_bytes"]["demand"] <= len(lab.layer.blob)
    assert lab.content.stored_bytes == 0
    assert files_below(tmp_path / "content") == []
    assert not any((tmp_path / "layer" / "blob.map").read_bytes())


def test_all_goes_on_when_there_is_room_again(make_lab, tmp_path, bad_disk):
    lab = make_lab(FILES)
    back = threading.Event()
    lab.objects.disk.when_back(back.set)
    bad_disk.fill()
    lab.read(1)
    with pytest.raises(DiskFull):
        lab.content.complete_step()
    bad_disk.free()
    assert back.wait(10)
    assert not lab.objects.disk.full
    before = lab.source.sent
    complete(lab)
    # what was in memory was stored, and not fetched again
    assert lab.source.sent == len(lab.layer.blob)
    assert 0 < before < lab.source.sent
    assert (tmp_path / "layer" / "blob").read_bytes() == lab.layer.blob
    lab.source.broken = True
    for number, data in enumerate(FILES):
        assert lab.read(number) == data
    assert lab.objects.has(hashlib.sha256(FILES[0]).digest())


@pytest.mark.parametrize("half", [False, True])
def test_a_disk_that_becomes_full_in_the_middle_of_a_range(make_lab, tmp_path, bad_disk, half):
    """Bytes written by then are read back; a write of which half arrived is not believed."""
    files = [os.urandom(900_000), os.urandom(900_000), os.urandom(10)]
    lab = make_lab(files, chunk_size=900_000)
    bad_disk.half = half
    pieces = 0
    real = lab.content._blob.write

    def write(offset: int, data: bytes | memoryview, *, ahead: bool) -> None:
        nonlocal pieces
        pieces += 1
        if pieces == 3:
            bad_disk.fill()
        real(offset, data, ahead=ahead)

    lab.content._blob.write = write
    assert lab.read(1) == files[1]
    assert bad_disk.failed
    assert lab.content.stored_bytes == 0
    assert lab.read(0) == files[0]
    bad_disk.free()
    until(lambda: not lab.objects.disk.full)
    again = lab.reopen()
    assert again.read_stored(0, 0, 10) is None
    while again.complete_step():
        pass
    assert again.read_stored(0, 0, 900_000) == files[0]
    assert again.read_stored(1, 0, 900_000) == files[1]


def test_a_unit_whose_bit_cannot_be_written_is_served(make_lab, tmp_path, bad_disk):
    lab = make_lab(FILES)
    bad_disk.writing = {"blob.map": errno.ENOSPC}
    assert lab.read(1) == FILES[1]
    assert not any((tmp_path / "layer" / "blob.map").read_bytes())


def test_an_object_that_cannot_be_stored_is_served_from_the_blob(make_lab, tmp_path, bad_disk):
    lab = make_lab(FILES)
    complete(lab)
    lab.source.broken = True
    bad_disk.fill()
    for _ in range(3):
        for number, data in enumerate(FILES):
            assert lab.read(number) == data
    assert files_below(tmp_path / "content") == []
    assert bad_disk.failed < 10


def test_nothing_is_fetched_that_cannot_be_stored(make_lab, bad_disk):
    lab = make_lab(FILES)
    bad_disk.fill()
    lab.read(0, 0, 1)
    requests = len(lab.source.requests)
    lab.content.prefetch(len(lab.layer.blob))
    with pytest.raises(DiskFull):
        lab.content.complete_step()
    errors: list[Exception | None] = []
    lab.content.fetch_blob(errors.append)
    assert isinstance(errors[0], DiskFull)
    assert len(lab.source.requests) == requests


def test_a_blob_that_is_exported_is_not_held_in_memory(make_lab, bad_disk):
    files = [os.urandom(MIB) for _ in range(12)]
    lab = make_lab(files, chunk_size=MIB)
    bad_disk.fill()
    ended = threading.Event()
    errors: list[Exception | None] = []

    def done(error: Exception | None) -> None:
        errors.append(error)
        ended.set()

    lab.content.fetch_blob(done)
    assert ended.wait(10)
    assert isinstance(errors[0], DiskFull)
    assert lab.source.sent < 6 * MIB


def test_a_background_fetch_that_meets_a_full_disk_ends_but_not_for_those_who_wait(
    make_lab, bad_disk
):
    files = [os.urandom(60_000) for _ in range(40)]
    lab = make_lab(files, chunk_size=60_000)
    lab.source.pause = 0.02
    errors: list[Exception] = []

    def sweep() -> None:
        try:
            lab.content.complete_step()
        except StorageError as error:
            errors.append(error)

    thread = threading.Thread(target=sweep)
    thread.start()
    until(lambda: lab.source.sent > 0)
    waiting = [threading.Thread(target=lambda n=n: results.append(lab.read(n))) for n in (5, 8)]
    results: list[bytes] = []
    for one in waiting:
        one.start()
    bad_disk.fill()
    for one in (*waiting, thread):
        one.join(20)
    assert sorted(results) == sorted([files[5], files[8]])
    assert isinstance(errors[0], DiskFull)
    assert lab.source.sent < len(lab.layer.blob) * 0.8


def test_memory_stays_within_its_bound(make_lab, bad_disk):
    files = [os.urandom(40_000) for _ in range(60)]
    lab = make_lab(files, chunk_size=5000)
    shelf = lab.objects.shelf
    shelf._capacity = 100_000
    bad_disk.fill()
    largest = 0
    wrong: list[int] = []

    def read(number: int) -> None:
        nonlocal largest
        for offset in range(0, 40_000, 7000):
            if lab.read(number, offset, 7000) != files[number][offset : offset + 7000]:
                wrong.append(number)
            largest = max(largest, shelf.size)

    readers = [threading.Thread(target=read, args=(number,)) for number in range(60)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert wrong == []
    assert 0 < largest <= 100_000


@pytest.fixture
def short_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Members of more than 20 kB are too long to be held."""
    monkeypatch.setattr(limits, "HELD_UNIT_BYTES", 20_000)
    monkeypatch.setattr(limits, "HELD_AHEAD_BYTES", 60_000)


def test_members_that_are_too_long_for_the_memory_pass_by(make_lab, bad_disk, short_memory):
    lab = make_lab([os.urandom(30_000), os.urandom(100), os.urandom(90_000)], chunk_size=30_000)
    bad_disk.fill()
    assert lab.read(1) == lab.layer.files[1]
    before = lab.source.sent
    for number, data in enumerate(lab.layer.files):
        assert lab.read(number) == data
        for offset in range(0, len(data), 1000):
            assert lab.read(number, offset, 1000) == data[offset : offset + 1000]
    assert lab.source.sent - before < 1.2 * len(lab.layer.blob)


def test_wrong_bytes_of_a_passing_member_are_not_shown(
    make_lab, bad_disk, short_memory, monkeypatch
):
    lab = make_lab([os.urandom(30_000)], chunk_size=30_000)
    right = lab.source.blob
    start = lab.layer.member(0).offset
    bad_disk.fill()
    lab.objects.disk.failed(OSError(errno.ENOSPC, "full"), "cannot write", "x")
    lab.source.blob = right[: start + 500] + bytes(1000) + right[start + 1500 :]
    with pytest.raises(Exception, match=r"corrupt|digest|invalid"):
        lab.read(0)
    assert lab.content.stats.failed_units
    lab.source.blob = right
    monkeypatch.setattr(limits, "FAILURE_SECONDS", 0)
    assert lab.read(0) == lab.layer.files[0]


def test_a_passage_whose_connection_breaks_begins_anew(make_lab, bad_disk, short_memory):
    lab = make_lab([os.urandom(30_000)], chunk_size=30_000)
    bad_disk.fill()
    lab.source.break_after = 1000
    assert lab.read(0) == lab.layer.files[0]


def test_what_a_failed_sync_leaves_in_memory_is_not_taken_for_stored(make_lab, tmp_path, bad_disk):
    """The kernel tells of bytes that it could not write once, and takes them for written then."""
    lab = make_lab(FILES)
    bad_disk.syncing = {"layer/blob": errno.EIO}

    def lose(fd: int) -> None:
        if fd == lab.content._blob.file.fd:
            os.truncate(tmp_path / "layer" / "blob", 2000)
            os.truncate(tmp_path / "layer" / "blob", len(lab.layer.blob))

    bad_disk.on_failed_sync = lose
    with pytest.raises(StorageError):
        complete(lab)
    assert not lab.content.complete
    bad_disk.syncing = {}
    until(lambda: not lab.objects.disk.full)
    complete(lab)
    assert (tmp_path / "layer" / "blob").read_bytes() == lab.layer.blob


def test_a_large_file_that_cannot_be_checked_is_made_anew(make_lab, tmp_path, bad_disk):
    lab = make_lab(FILES)
    assert lab.read(3, 0, 10) == FILES[3][:10]
    bad_disk.reading = {"partial/": errno.EIO}
    assert lab.read(3, 1000, 11_000) == FILES[3][1000:]
    until(lambda: bad_disk.failed > 0)
    until(lambda: not list((tmp_path / "content" / "partial").iterdir()))
    bad_disk.reading = {}
    until(lambda: not lab.objects.disk.full)
    assert lab.read(3) == FILES[3]
    until(lambda: lab.objects.has(hashlib.sha256(FILES[3]).digest()))


def test_what_was_written_before_a_sync_failed_is_made_anew(make_lab, tmp_path, monkeypatch):
    class Libc:
        def syncfs(self, fd: int) -> int:
            ctypes.set_errno(errno.EIO)
            return -1

    monkeypatch.setattr(limits, "FULL_DISK_SECONDS", 0.02)
    lab = make_lab(FILES)
    lab.objects.ledger.sync()
    assert lab.read(0) == FILES[0]
    assert lab.read(3, 0, 1500) == FILES[3][:1500]
    monkeypatch.setattr(ledger, "_LIBC", Libc())
    with pytest.raises(StorageError):
        lab.objects.ledger.sync()
    monkeypatch.undo()
    assert lab.objects.disk.times == 1
    assert list((tmp_path / "content" / "partial").iterdir()) == []
    for path in files_below(tmp_path / "content" / "objects"):
        path.write_bytes(bytes(path.stat().st_size))  # what the disk really has
    lab.objects.disk.look_again()
    until(lambda: not lab.objects.disk.full)
    assert lab.read(0) == FILES[0]
    assert lab.read(3) == FILES[3]


@pytest.mark.parametrize("stuck", [False, True])
def test_objects_that_cannot_be_read_are_made_anew(make_lab, bad_disk, monkeypatch, stuck):
    """Also where the disk became read only, so that they cannot be removed."""
    lab = make_lab(FILES)
    for number in range(len(FILES)):
        lab.read(number)
    until(lambda: lab.objects.has(hashlib.sha256(FILES[3]).digest()))
    lab.read(1, 0, 1)
    lab.objects.close()
    if stuck:
        bad_disk.fill(errno.EROFS)

        def unlink(*_: object, **__: object) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(os, "unlink", unlink)
    bad_disk.reading = {"content/": errno.EIO}
    for _ in range(2):
        for number, data in enumerate(FILES):
            assert lab.read(number) == data


def test_a_bitmap_that_cannot_be_read_is_begun_anew(make_lab, tmp_path, bad_disk, monkeypatch):
    lab = make_lab(FILES)
    complete(lab)
    bad_disk.reading = {"blob.map": errno.EIO}
    unlink = Path.unlink

    def heal(path: Path, **options: bool) -> None:
        bad_disk.reading = {}
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", heal)
    again = lab.reopen()
    assert bad_disk.failed == 1
    complete_content(again)
    assert again.complete
    assert (tmp_path / "layer" / "blob").read_bytes() == lab.layer.blob


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
def test_wrong_bytes_are_forgotten_though_the_disk_does_not_take_that(make_lab, bad_disk, error):
    lab = make_lab([b"A" * 100])
    right = lab.source.blob
    lab.source.blob = bytes(len(right))
    assert lab.fetch(0) is None
    lab.source.blob = right
    bad_disk.fill(error)
    assert lab.read(0) == b"A" * 100


def test_parts_of_the_blob_that_cannot_be_read_are_fetched_again(make_lab, bad_disk):
    lab = make_lab(FILES)
    complete(lab)
    requests = len(lab.source.requests)
    bad_disk.reading = {"layer/blob": errno.EIO}
    offsets: list[int] = []
    real = lab.content._blob.write

    def write(offset: int, data: bytes | memoryview, *, ahead: bool) -> None:
        bad_disk.reading = {}  # the disk puts it elsewhere
        offsets.append(offset)
        real(offset, data, ahead=ahead)

    lab.content._blob.write = write
    assert lab.read(0) == FILES[0]
    assert len(lab.source.requests) > requests
    assert offsets


def test_a_disk_without_room_stays_full_though_a_small_file_would_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "FULL_DISK_SECONDS", 0.01)
    monkeypatch.setattr(limits, "FULL_DISK_ROOM_BYTES", 1 << 60)
    wanted = threading.Event()
    watched = disk.Disk(tmp_path)
    watched.room_wanted = wanted.set
    watched.failed(OSError(errno.ENOSPC, "No space left on device"), "cannot write", "x")
    assert wanted.is_set()
    time.sleep(0.1)
    assert watched.full
    with pytest.raises(DiskFull):
        watched.check()
    monkeypatch.setattr(limits, "FULL_DISK_ROOM_BYTES", 0)
    watched.look_again()
    until(lambda: not watched.full)
    assert list(tmp_path.iterdir()) == []


def test_errors_that_are_not_of_the_disk_do_not_make_it_full(tmp_path):
    watched = disk.Disk(tmp_path)
    error = watched.failed(OSError(errno.EMFILE, "Too many open files"), "cannot open", "x")
    assert not isinstance(error, DiskFull)
    assert not watched.full


def test_a_layer_that_is_opened_while_nothing_can_be_made(make_lab, tmp_path, bad_disk):
    """Its file is not there: another is opened in its place, and nothing is stored in that."""
    lab = make_lab(FILES)
    for name in ("blob", "blob.map"):
        (tmp_path / "layer" / name).unlink()
    bad_disk.writing = {"layer": errno.ENOSPC}
    opened = lab.content = lab.reopen()
    assert opened.provisional
    bad_disk.free()
    until(lambda: not opened._disk.full)
    for number, data in enumerate(FILES):
        assert lab.read(number) == data
    with pytest.raises(DiskFull):
        opened.complete_step()
    assert opened.stored_bytes == 0
    again = lab.reopen()
    assert not again.provisional
    complete_content(again)
    assert (tmp_path / "layer" / "blob").read_bytes() == lab.layer.blob
