"""Archives read in place and written several files at once; what is hostile is refused."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from layerstore import limits
from layerstore.copy.archivereader import TarFiles
from layerstore.copy.archivewriter import ArchiveWriter
from layerstore.copy.localfiles import scratch_directory
from layerstore.errors import InvalidLayer, LimitExceeded, NotFound, StorageError, UsageError


def archive(*members: tuple[str, bytes] | tuple[str, str, bytes]) -> bytes:
    """Files as (name, content), others as (name, link target, tar type)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for member in members:
            info = tarfile.TarInfo(member[0])
            if len(member) == 2:
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
            else:
                info.linkname, info.type = member[1], member[2]
                tar.addfile(info)
    return out.getvalue()


def opened(tmp_path: Path, raw: bytes) -> TarFiles:
    path = tmp_path / "archive.tar"
    path.write_bytes(raw)
    return TarFiles(path, "the archive", scratch=tmp_path)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_files_are_read_in_place_packed_or_not(tmp_path: Path, pack: object) -> None:
    raw = archive(("./a", b"aaa"), ("d/b", b"x" * 5000))
    assert callable(pack)
    files = opened(tmp_path, pack(raw))
    assert files.read("a", 10) == b"aaa"
    assert files.read("d/b", 5000) == b"x" * 5000
    with files.open("d/b") as one, files.open("a") as other:
        assert (one.read(2), other.read(9), one.size) == (b"xx", b"aaa", 5000)
    files.close()
    assert os.listdir(tmp_path) == ["archive.tar"]


def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    thread = threading.Thread(target=path.write_bytes, args=(archive(("a", b"aaa")),))
    thread.start()
    files = TarFiles(path, "the pipe", scratch=tmp_path)
    thread.join()
    assert files.read("a", 3) == b"aaa"
    files.close()


def test_links_lead_to_other_files_of_the_archive(tmp_path: Path) -> None:
    files = opened(
        tmp_path,
        archive(
            ("1/layer.tar", b"content"),
            ("2/layer.tar", "../1/layer.tar", tarfile.SYMTYPE),
            ("3/layer.tar", "../2/layer.tar", tarfile.SYMTYPE),
            ("4/layer.tar", "1/layer.tar", tarfile.LNKTYPE),
        ),
    )
    for number in range(1, 5):
        assert files.read(f"{number}/layer.tar", 100) == b"content"
    files.close()


@pytest.mark.parametrize(
    "members",
    [
        [("../a", b"")],
        [("/etc/passwd", b"")],
        [("d/../../a", b"")],
        [("a", "/etc/passwd", tarfile.SYMTYPE)],
        [("a", "../../etc/passwd", tarfile.SYMTYPE)],
        [("a", "../b", tarfile.LNKTYPE)],
    ],
)
def test_entries_and_links_that_lead_outside_are_refused(
    tmp_path: Path, members: list[tuple[str, bytes]]
) -> None:
    with pytest.raises(InvalidLayer, match="outside"):
        opened(tmp_path, archive(*members))


def test_what_is_no_file_or_not_one_file_is_not_read(tmp_path: Path) -> None:
    files = opened(
        tmp_path,
        archive(
            ("loop", "pool", tarfile.SYMTYPE),
            ("pool", "loop", tarfile.SYMTYPE),
            ("pipe", "", tarfile.FIFOTYPE),
            ("twice", b"1"),
            ("twice", b"2"),
            ("lost", "nowhere", tarfile.SYMTYPE),
            ("good", b"3"),
        ),
    )
    for name, words in (("loop", "circles"), ("pipe", "regular"), ("twice", "twice")):
        with pytest.raises(InvalidLayer, match=words):
            files.open(name)
    for name in ("lost", "nothing"):
        with pytest.raises(NotFound):
            files.open(name)
    with pytest.raises(LimitExceeded):
        files.read("good", 0)
    assert files.read("good", 1) == b"3"
    files.close()


def test_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ARCHIVE_MEMBERS", 2)
    opened(tmp_path, archive(("a", b""), ("b", b""))).close()
    with pytest.raises(LimitExceeded):
        opened(tmp_path, archive(("a", b""), ("b", b""), ("c", b"")))
    monkeypatch.setattr(limits, "ARCHIVE_BYTES", 1 << 20)
    bomb = gzip.compress(archive(("zeros", bytes(2 << 20))))
    assert len(bomb) < 10_000
    with pytest.raises(LimitExceeded, match="unpacked"):
        opened(tmp_path, bomb)


@pytest.mark.parametrize("cut", [100, 700, 1536 + 100])
def test_a_damaged_archive_is_refused(tmp_path: Path, cut: int) -> None:
    raw = archive(("a", b"a" * 300), ("b", b"b" * 300))
    with pytest.raises(InvalidLayer):
        opened(tmp_path, raw[:cut])
    for pack in (gzip.compress, bz2.compress, lzma.compress):
        packed = pack(raw)
        with pytest.raises(InvalidLayer):
            opened(tmp_path, packed[: len(packed) - 20])


def test_no_archive(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        TarFiles(tmp_path / "nothing", "it")
    with pytest.raises(StorageError):
        TarFiles(tmp_path, "it")
    with pytest.raises(InvalidLayer):
        opened(tmp_path, b"no tar" * 1000)


# -- writing -------------------------------------------------------------------------


def test_files_are_written_at_once_and_appear_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new.tar"
    writer = ArchiveWriter(target, "it")
    both = threading.Barrier(2, timeout=20)

    def slowly(letter: bytes) -> Iterator[bytes]:
        yield letter * 1000
        both.wait()  # both are on their way
        yield letter * 333

    with ThreadPoolExecutor(2) as pool:
        list(
            pool.map(
                lambda letter: writer.add_blob(letter, lambda: slowly(letter.encode()), 1333), "ab"
            )
        )
    writer.add("small", b"s")
    writer.add_link("d/link", "../small")
    assert not target.exists()
    writer.finish()
    assert os.listdir(tmp_path) == ["new.tar"]
    with tarfile.open(target) as tar:
        for letter in "ab":
            member = tar.extractfile(letter)
            assert member is not None
            assert member.read() == letter.encode() * 1333
        assert tar.getmember("d/link").linkname == "../small"
        assert sorted(tar.getnames()) == ["a", "b", "d/link", "small"]


def test_an_archive_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "old.tar"
    target.write_bytes(b"old")
    writer = ArchiveWriter(target, "it")

    def broken() -> Iterator[bytes]:
        yield b"half"
        raise NotFound("gone")

    with pytest.raises(NotFound):
        writer.add_blob("a", broken, 8)
    for pieces in ([b"123"], [b"12345"]):
        with pytest.raises(UsageError):
            writer.add_blob("b", partial(iter, pieces), 4)
    writer.abort()
    assert os.listdir(tmp_path) == ["old.tar"]
    assert target.read_bytes() == b"old"


def test_a_target_that_is_no_regular_file_gets_the_archive_in_one_piece(tmp_path: Path) -> None:
    target = tmp_path / "pipe"
    os.mkfifo(target)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    writer = ArchiveWriter(target, "it", scratch=scratch)
    writer.add("a", b"content")
    got: list[bytes] = []
    thread = threading.Thread(target=lambda: got.append(target.read_bytes()))
    thread.start()
    writer.finish()
    thread.join()
    with tarfile.open(fileobj=io.BytesIO(got[0])) as tar:
        assert tar.getnames() == ["a"]
    assert os.listdir(scratch) == []
    with pytest.raises(StorageError):
        ArchiveWriter(scratch, "a directory")
    with pytest.raises(StorageError):
        ArchiveWriter(tmp_path / "no" / "where", "nowhere")


def test_a_missing_directory_for_temporary_files_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert scratch_directory(None) == tmp_path
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    with pytest.raises(StorageError, match="missing: the directory for temporary files"):
        scratch_directory(None)
