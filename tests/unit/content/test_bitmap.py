from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from layerstore.content.bitmap import Bitmap
from layerstore.content.disk import Disk
from layerstore.errors import StorageError


def test_bits_survive_the_process(tmp_path: Path):
    bits = Bitmap(tmp_path / "map", 20, Disk(tmp_path))
    assert bits.set(3)
    assert bits.set(19)
    assert not bits.set(19)
    assert bits.unset(3)
    assert not bits.unset(3)
    again = Bitmap(tmp_path / "map", 20, Disk(tmp_path))
    assert [number for number in range(20) if again[number]] == [19]
    assert (again.missing, bits.missing) == (19, 19)


def test_a_bitmap_of_another_length_tells_nothing(tmp_path: Path):
    Bitmap(tmp_path / "map", 100, Disk(tmp_path)).set(1)
    again = Bitmap(tmp_path / "map", 20, Disk(tmp_path))
    assert again.missing == 20
    again.set(19)
    assert os.stat(tmp_path / "map").st_size == 3
    assert Bitmap(tmp_path / "map", 20, Disk(tmp_path))[19]


def test_a_full_disk_is_an_error_and_leaves_the_bit_unset(tmp_path: Path, monkeypatch):
    """A store to a mapped page that cannot be allocated would be SIGBUS: the end of the service."""
    bits = Bitmap(tmp_path / "map", 100_000, Disk(tmp_path))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(StorageError):
            bits.set(50_000)
    assert not bits[50_000]
    assert bits.missing == 100_000
    assert bits.set(50_000)


def test_bits_behind_the_end_do_not_count(tmp_path: Path):
    (tmp_path / "map").write_bytes(b"\xff\xff")
    bits = Bitmap(tmp_path / "map", 12, Disk(tmp_path))
    assert bits.full
    assert bits.missing == 0
