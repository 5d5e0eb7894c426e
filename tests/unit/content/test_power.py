"""What a power failure may leave: bits without bytes.  Nothing unverified is shown after it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from layerstore.content import objects


@pytest.fixture
def boot(tmp_path: Path, monkeypatch) -> Path:
    path = tmp_path / "boot_id"
    path.write_text("first\n")
    monkeypatch.setattr(objects, "_BOOT_ID", path)
    return path


def lose_bytes(directory: Path) -> None:
    """Keep sizes and bitmaps, lose what was written: the disk never got it."""
    for path in directory.iterdir():
        if not path.name.endswith(".map"):
            size = path.stat().st_size
            os.truncate(path, 0)
            os.truncate(path, size)


def test_verified_chunks_of_another_boot_are_not_believed(make_lab, tmp_path: Path, boot: Path):
    data = os.urandom(5000)
    lab = make_lab([data])
    assert lab.read(0, 0, 1500) == data[:1500]
    boot.write_text("second\n")
    lose_bytes(tmp_path / "content" / "partial")
    again = lab.reopen()
    lab.source.broken = True
    assert again.read_stored(0, 0, 1500) == data[:1500]


def test_verified_chunks_survive_a_restart(make_lab, tmp_path: Path, boot: Path):
    lab = make_lab([os.urandom(5000)])
    lab.read(0, 0, 1500)
    before = sorted((tmp_path / "content" / "partial").iterdir())
    assert before
    lab.reopen()
    assert sorted((tmp_path / "content" / "partial").iterdir()) == before


def test_what_is_remembered_as_whole_is_on_the_disk(make_lab, monkeypatch):
    order: list[str] = []
    real_sync, real_rename = os.fdatasync, os.rename

    def sync(fd: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        real_sync(fd)

    def rename(source: str, target: str) -> None:
        order.append("rename")
        real_rename(source, target)

    monkeypatch.setattr(os, "fdatasync", sync)
    monkeypatch.setattr(os, "rename", rename)
    lab = make_lab([os.urandom(3000)])
    lab.read(0)
    while lab.content.complete_step():
        pass
    lab.content._fetcher._scheduler.close()
    assert order.index("blob") < order.index("blob.map")
    key = lab.layer.content(0).key.hex()
    assert order.index(key) < order.index("rename")
