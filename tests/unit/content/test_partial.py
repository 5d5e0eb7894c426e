"""Large files that are half here: what changed on the disk is never shown, and brought anew."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.waiting import until
from layerstore.content import Room
from layerstore.content.disk import Disk
from layerstore.content.partial import PartialObject

from .conftest import Chunk, Lab

DATA = os.urandom(5000)


def the_partial(tmp_path: Path) -> Path:
    (found,) = (one for one in (tmp_path / "content/partial").iterdir() if one.suffix != ".map")
    return found


def spoil(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(8))


def half_here(make_lab: Callable[..., Lab]) -> Lab:
    """Two chunks of five are in the partial object, and will be for the next process."""
    lab = make_lab([DATA])
    lab.objects.ledger.sync()
    lab.read(0, 1000, 2000)
    return lab


def test_what_rotted_between_two_processes_is_never_shown(make_lab, tmp_path, caplog):
    lab = half_here(make_lab)
    spoil(the_partial(tmp_path), 1500)
    lab.content = lab.reopen()
    assert lab.content.read_cached(0, 1400, 200) is None
    assert lab.read(0, 1400, 200) == DATA[1400:1600]
    assert lab.read(0) == DATA
    assert [record.message.split()[0] for record in caplog.records] == ["event=object-damaged"]
    assert lab.content.stats.failed_units == 0


def test_each_chunk_is_verified_once_in_a_process(make_lab, tmp_path, monkeypatch):
    lab = half_here(make_lab)
    lab.content = lab.reopen()
    asked: list[int] = []
    real = PartialObject._verify

    def verify(self: PartialObject, number: int, chunk: Chunk) -> bool:
        asked.append(number)
        return real(self, number, chunk)

    monkeypatch.setattr(PartialObject, "_verify", verify)
    lab.source.broken = True
    for _ in range(3):
        assert lab.read(0, 1000, 2000) == DATA[1000:3000]
    assert asked == [1, 2]
    assert lab.content.read_cached(0, 1000, 2000) == DATA[1000:3000]


@pytest.mark.parametrize("blob_rots_too", [False, True])
def test_what_rots_while_it_is_served_is_noticed_when_all_is_there(
    make_lab, tmp_path, caplog, blob_rots_too: bool
):
    """The layer is not to blame: the wrong chunks come anew, and the file stays readable."""
    caplog.set_level(logging.INFO)
    lab = half_here(make_lab)
    spoil(the_partial(tmp_path), 1500)
    if blob_rots_too:
        spoil(tmp_path / "layer/blob", lab.layer.member(1).offset + 20)
    for place in (0, 3000, 4000):
        assert lab.read(0, place, 1000) == DATA[place : place + 1000]
    until(lambda: "object-damaged" in caplog.text)
    assert lab.read(0) == DATA
    digest = hashlib.sha256(DATA).digest()
    until(lambda: lab.objects.has(digest))
    assert Path(lab.objects.path(digest)).read_bytes() == DATA
    assert "file-refused" not in caplog.text


def test_a_hole_that_is_none_any_more_becomes_one_again(tmp_path: Path, monkeypatch):
    path = tmp_path / "partial"
    disk = Disk(tmp_path)
    hole = Chunk(0, 3 << 20, b"", 0, 0, hole=True)
    rest = Chunk(3 << 20, 5, hashlib.sha256(b"bytes").digest(), 0, 0)

    def opened() -> PartialObject:
        return PartialObject(path, (3 << 20) + 5, 2, disk, Room())

    first = opened()
    first.present.set(0)
    first.write(1, rest.file_offset, b"bytes")
    assert first.trusts(1)
    with path.open("r+b") as file:
        file.seek(2 << 20)
        file.write(b"not zero")
    second = opened()
    assert not second.trusts(0)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", _read_only)
        assert not second.has(0, hole)
    assert second.has(0, hole)
    assert second.has(1, rest)
    assert path.read_bytes() == bytes(3 << 20) + b"bytes"
    disk.close()


def _read_only(*_: object) -> int:
    raise OSError(errno.EROFS, "Read-only file system")
