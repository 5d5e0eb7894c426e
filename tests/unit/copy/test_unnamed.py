"""New files have no name until they are whole; what the dead left is removed by the next."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerstore.copy.archivewriter import ArchiveWriter
from layerstore.copy.recompress import Form, make_blob
from layerstore.copy.unnamed import NewDirectory, NewFile, publish
from layerstore.errors import StorageError


class Watching(io.BytesIO):
    """A stream that notes what is in a directory each time that it is read."""

    def __init__(self, data: bytes, directory: Path) -> None:
        super().__init__(data)
        self.directory = directory
        self.seen: set[str] = set()

    def read(self, n: int | None = -1, /) -> bytes:
        self.seen.update(os.listdir(self.directory))
        return super().read(n)


def test_a_blob_that_is_packed_has_no_name(tmp_path: Path) -> None:
    tar = Watching(b"t" * 100, tmp_path)
    made = make_blob(tar, Form.PLAIN, tmp_path, diff_id=None, subject="")
    with made.file as file:
        assert tar.seen == set(os.listdir(tmp_path)) == set()
        pieces = file.pieces(made.size, "")
        assert b"".join(pieces()) == b"".join(pieces()) == b"t" * 100  # anew at each call
    assert made.digest.hex == hashlib.sha256(b"t" * 100).hexdigest()


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_a_file_has_its_name_when_it_is_whole(
    tmp_path: Path, there: bool, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``known``: whether the file system knows files without a name."""
    if not known:
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)  # as an old kernel reads it
    target = tmp_path / "target"
    if there:
        target.write_bytes(b"old")
    seen: list[str] = []

    def pieces() -> Iterator[bytes]:
        yield b"new "
        seen.extend(name for name in os.listdir(tmp_path) if name != "target")
        yield b"content"

    publish(target, pieces, "")
    assert target.read_bytes() == b"new content"
    assert target.stat().st_mode & 0o777 == 0o644
    assert bool(seen) is not known
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("known", [False, True])
def test_a_failure_leaves_nothing(
    tmp_path: Path, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not known:
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)

    def pieces() -> Iterator[bytes]:
        yield b"x"
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left"):
        publish(tmp_path / "target", pieces, "")
    with pytest.raises(OSError, match=r"Is a directory|not empty"), NewFile(tmp_path) as file:
        file.publish(tmp_path)
    assert os.listdir(tmp_path) == []


def test_an_unfinished_archive_has_no_name(tmp_path: Path) -> None:
    target = tmp_path / "archive.tar"
    target.write_bytes(b"old")
    archive = ArchiveWriter(target, "archive")
    archive.add("a", b"aaa")
    assert os.listdir(tmp_path) == ["archive.tar"]
    assert target.read_bytes() == b"old"
    archive.finish()
    assert b"aaa" in target.read_bytes()


def test_a_directory_of_the_dead_is_removed_and_no_other(tmp_path: Path) -> None:
    living, dead = NewDirectory(tmp_path), NewDirectory(tmp_path)
    (dead.path / "blob").write_bytes(b"x")
    os.close(dead._descriptor)  # the lock goes with the process
    other = tmp_path / ".layerstore-new-of-somebody"
    other.mkdir()
    new = NewDirectory(tmp_path)
    assert set(tmp_path.iterdir()) == {living.path, new.path, other}
    living.close()
    new.close()
    assert set(tmp_path.iterdir()) == {other}
