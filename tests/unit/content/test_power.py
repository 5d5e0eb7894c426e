"""What a power failure may leave: names and bits without bytes.  Nothing unverified is shown."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from lab.waiting import until
from layerstore.content import Ledger, ObjectStore, ledger, objects
from layerstore.errors import StorageError


@pytest.fixture
def boot(tmp_path: Path, monkeypatch) -> Path:
    path = tmp_path / "boot_id"
    path.write_text("first\n")
    monkeypatch.setattr(ledger, "_BOOT_ID", path)
    return path


@pytest.fixture
def hashed(monkeypatch) -> list[int]:
    """One item for each object that was verified."""
    calls: list[int] = []
    real = objects._sha256

    def count(fd: int) -> bytes:
        calls.append(fd)
        return real(fd)

    monkeypatch.setattr(objects, "_sha256", count)
    return calls


def lose_bytes(directory: Path) -> int:
    """Keep names, sizes, times and bitmaps, lose what was written: the disk never got it."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.suffix != ".map"]
    for path in files:
        found = path.stat()
        os.truncate(path, 0)
        os.truncate(path, found.st_size)
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    return len(files)


def test_verified_chunks_of_another_boot_are_not_believed(make_lab, tmp_path: Path, boot: Path):
    data = os.urandom(5000)
    lab = make_lab([data])
    lab.objects.ledger.sync()
    assert lab.read(0, 0, 1500) == data[:1500]
    boot.write_text("second\n")
    assert lose_bytes(tmp_path / "content" / "partial")
    again = lab.reopen()
    lab.source.broken = True
    assert again.read_stored(0, 0, 1500) == data[:1500]


def test_verified_chunks_survive_a_restart(make_lab, tmp_path: Path, boot: Path):
    lab = make_lab([os.urandom(5000)])
    lab.objects.ledger.sync()
    lab.read(0, 0, 1500)
    before = sorted((tmp_path / "content" / "partial").iterdir())
    assert before
    lab.reopen()
    assert sorted((tmp_path / "content" / "partial").iterdir()) == before


def test_verified_chunks_survive_a_boot_after_a_clean_end(make_lab, tmp_path: Path, boot: Path):
    lab = make_lab([os.urandom(5000)])
    lab.read(0, 0, 1500)
    lab.objects.ledger.end()
    before = sorted((tmp_path / "content" / "partial").iterdir())
    assert before
    boot.write_text("second\n")
    lab.reopen()
    assert sorted((tmp_path / "content" / "partial").iterdir()) == before
    boot.write_text("third\n")  # and this time the power failed
    lab.reopen()
    assert list((tmp_path / "content" / "partial").iterdir()) == []


def test_an_object_without_its_bytes_is_noticed_and_made_anew(
    make_lab, tmp_path: Path, boot: Path, caplog
):
    files = [os.urandom(700), os.urandom(800)]
    lab = make_lab(files)
    lab.objects.ledger.sync()
    assert [lab.read(number) for number in (0, 1)] == files
    boot.write_text("second\n")
    assert lose_bytes(tmp_path / "content" / "objects") == 2
    again = lab.reopen()
    again._objects.ledger.sync()
    lab.source.broken = True  # the blob is still there
    assert again.read_cached(0, 0, 700) is None, "the loop has no time to verify"
    assert [again.read_stored(number, 0, 900) for number in (0, 1)] == files
    assert caplog.text.count("event=object-damaged") == 2
    assert again.read_cached(0, 0, 700) == files[0]


def test_bytes_are_also_right_where_the_damaged_object_was_not_opened(
    make_lab, tmp_path: Path, boot: Path
):
    """Two files with one content: the second one's member arrives while the first is suspect."""
    data = os.urandom(700)
    lab = make_lab([data])
    lab.objects.ledger.sync()
    lab.read(0)
    boot.write_text("second\n")
    lose_bytes(tmp_path / "content" / "objects")
    store = ObjectStore(tmp_path / "content")
    digest = hashlib.sha256(data).digest()
    store.put(digest, data)
    file = store.open(digest)
    assert file is not None
    assert file.read(0, 700) == data


@pytest.mark.parametrize("large", [False, True])
def test_what_was_synced_is_not_verified_again(
    make_lab, tmp_path: Path, boot: Path, hashed: list[int], large: bool
):
    files = [os.urandom(3000 if large else 700)]
    lab = make_lab(files)
    lab.objects.ledger.sync()
    lab.read(0)
    lab.content._fetcher._scheduler.close()  # the large one becomes whole in there
    lab.objects.ledger.sync()
    hashed.clear()
    for name in ("second", "third", "fourth"):
        boot.write_text(name)
        again = lab.reopen()
        assert again.read_stored(0, 0, 4000) == files[0]
    assert hashed == []


def test_each_suspect_object_is_verified_once(make_lab, boot: Path, hashed: list[int]):
    files = [os.urandom(700)]
    lab = make_lab(files)
    lab.objects.ledger.sync()
    lab.read(0)
    boot.write_text("second\n")
    for _ in range(3):
        again = lab.reopen()
        again._objects.ledger.sync()
        assert again.read_stored(0, 0, 700) == files[0]
        assert len(hashed) == 1


def test_a_clean_end_leaves_nothing_suspect(make_lab, boot: Path, hashed: list[int]):
    files = [os.urandom(700)]
    lab = make_lab(files)
    lab.read(0)
    lab.objects.ledger.end()
    hashed.clear()
    boot.write_text("second\n")
    again = lab.reopen()
    assert not again._objects.ledger.unclean
    assert again.read_stored(0, 0, 700) == files[0]
    assert len(hashed) == 1, "there was no mark yet when it was written, so it has no stamp"
    again._objects.ledger.sync()
    boot.write_text("third\n")
    assert lab.reopen().read_stored(0, 0, 700) == files[0]


@pytest.mark.parametrize("damage", [b"", b"{}", b"nonsense\n", None])
def test_without_its_mark_everything_is_suspect(
    make_lab, tmp_path: Path, boot: Path, hashed: list[int], damage: bytes | None
):
    files = [os.urandom(700)]
    lab = make_lab(files)
    lab.objects.ledger.sync()
    lab.read(0)
    # bytes are given before the object is finished, which takes a busy disk its time
    until(lambda: lab.objects.has(hashlib.sha256(files[0]).digest()))
    lab.objects.ledger.sync()  # `end` would not wait long for a busy disk
    lab.objects.ledger.close()
    mark = tmp_path / "content" / "synced"
    if damage is None:  # a bit flipped: a higher generation
        mark.write_bytes(mark.read_bytes().replace(b'"current":', b'"current":1', 1))
    else:
        mark.write_bytes(damage)
    hashed.clear()
    assert lab.reopen().read_stored(0, 0, 700) == files[0]
    assert len(hashed) == 1


def test_a_time_is_no_stamp(tmp_path: Path, boot: Path):
    """Clocks jump: a file whose stamp the disk never got must not look synced by its time."""
    book = Ledger(tmp_path)
    book.sync()
    path = tmp_path / "file"
    path.write_bytes(b"x")
    for when in (0, 1, 10**9, 1 << 33):
        os.utime(path, (when, when))
        assert not book.trusts(str(path))
    with path.open("rb") as file:
        book.stamp(file.fileno())
    assert book.trusts(str(path))
    assert not book.trusts(str(tmp_path / "absent"))


def test_who_goes_on_writing_after_a_hand_over_stamps_nothing(tmp_path: Path, boot: Path):
    """The next server's mark may say already that the generation is on the disk."""
    old = Ledger(tmp_path)
    old.sync()
    old.end(clean=False)
    new = Ledger(tmp_path)
    new.sync()
    path = tmp_path / "file"
    with path.open("wb") as out:
        old.stamp(out.fileno())
    assert not new.trusts(str(path))


def test_a_failed_sync_makes_suspect_what_was_not_synced(tmp_path: Path, boot: Path, monkeypatch):
    book = Ledger(tmp_path)
    book.sync()
    files = [tmp_path / name for name in ("before", "meanwhile", "after")]

    def write(path: Path) -> None:
        with path.open("wb") as out:
            book.stamp(out.fileno())

    write(files[0])
    book.sync()
    write(files[1])

    class Broken:
        @staticmethod
        def syncfs(_: int) -> int:
            return -1

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "_LIBC", Broken)
        with pytest.raises(StorageError):
            book.sync()
    write(files[2])
    assert [book.trusts(str(path)) for path in files] == [True, False, True]
    book.sync()
    assert [book.trusts(str(path)) for path in files] == [True, False, True]
    boot.write_text("second")
    assert [Ledger(tmp_path).trusts(str(path)) for path in files] == [True, False, True]


def test_many_power_failures_are_not_forgotten(tmp_path: Path, boot: Path):
    lost: list[Path] = []
    kept: list[Path] = []
    for number in range(12):
        boot.write_text(f"boot {number}")
        book = Ledger(tmp_path)
        book.sync()
        for name, paths in (("kept", kept), ("lost", lost)):
            paths.append(path := tmp_path / f"{name}{number}")
            with path.open("wb") as out:
                book.stamp(out.fileno())
            if name == "kept":
                book.sync()
    boot.write_text("last")
    book = Ledger(tmp_path)
    assert not any(book.trusts(str(path)) for path in lost)
    assert all(book.trusts(str(path)) for path in kept[-6:])


def test_what_is_remembered_as_whole_is_on_the_disk(make_lab, monkeypatch):
    order: list[str] = []
    real_sync = os.fdatasync

    def sync(fd: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        real_sync(fd)

    monkeypatch.setattr(os, "fdatasync", sync)
    lab = make_lab([os.urandom(3000)])
    lab.read(0)
    while lab.content.complete_step():
        pass
    assert order.index("blob") < order.index("blob.map")
