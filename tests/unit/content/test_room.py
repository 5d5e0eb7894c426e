"""Counting what is used, and refusing what the limits do not allow."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from layerstore import limits
from layerstore.content import DiskRoom, Room
from layerstore.content.measure import mark_of, measure, stored_objects
from layerstore.errors import NoRoom

MIB = limits.MIB


def room(root: Path, limit: int = 64 * MIB, **more: float) -> Room:
    return Room(root, DiskRoom(limit=limit, keep_free=0.0, **more))


def known(root: Path, used: int, limit: int = 64 * MIB) -> Room:
    found = room(root, limit)
    found.measured_by(lambda: used)
    return found


def test_what_is_ahead_ends_at_the_high_mark_and_demand_at_the_limit(tmp_path: Path):
    one = known(tmp_path, 50 * MIB)
    one.charge(7 * MIB, ahead=True)
    with pytest.raises(NoRoom):
        one.charge(MIB, ahead=True)
    one.charge(5 * MIB)
    with pytest.raises(NoRoom, match="may"):
        one.charge(2 * MIB)
    assert one.used == 62 * MIB
    one.freed(10 * MIB)
    one.charge(2 * MIB, ahead=True)


def test_small_files_count_as_whole_blocks(tmp_path: Path):
    one = known(tmp_path, 0)
    for _ in range(10):
        one.charge(1)
    assert one.used == 10 * limits.DISK_BLOCK_BYTES


def test_without_a_limit_only_the_reserve_counts(tmp_path: Path):
    Room(tmp_path, DiskRoom(keep_free=0.0)).charge(1 << 50, ahead=True)
    full = Room(tmp_path, DiskRoom(keep_free=1.0))
    full.charge(1 << 50)
    with pytest.raises(NoRoom):
        full.charge(1, ahead=True)


def test_a_read_on_demand_waits_until_room_is_made(tmp_path: Path):
    one = known(tmp_path, 60 * MIB)
    asked = threading.Event()
    one.pressed = asked.set
    writer = threading.Thread(target=lambda: one.charge(8 * MIB))
    writer.start()
    assert asked.wait(20)
    assert one.asked == 8 * MIB
    one.freed(30 * MIB)
    writer.join(5)
    assert not writer.is_alive()
    assert one.used == 38 * MIB


def test_nobody_waits_where_no_room_can_be_made(tmp_path: Path):
    one = known(tmp_path, 60 * MIB)
    one.pressed = lambda: threading.Thread(target=one.hopeless).start()
    with pytest.raises(NoRoom):
        one.charge(8 * MIB)


def test_a_start_knows_at_most_what_is_used_without_measuring(tmp_path: Path):
    one = room(tmp_path)
    assert one.used is None
    with pytest.raises(NoRoom):
        one.charge(1, ahead=True)  # who knows?
    one.measured_by(lambda: 10 * MIB)
    for _ in range(40):
        one.charge(MIB // 2)
    real = one.used
    assert real is not None
    killed = room(tmp_path)  # nothing was written down at an end
    assert killed.used is not None
    assert real <= killed.used <= real + limits.DISK_COUNT_BYTES
    one.close()
    assert room(tmp_path).used == real


def test_what_is_written_during_a_measurement_counts(tmp_path: Path):
    one = known(tmp_path, 0)

    def measured() -> int:
        one.charge(MIB)
        one.freed(5 * MIB)
        return 20 * MIB

    one.measured_by(measured)
    assert one.used == 21 * MIB


def test_a_measurement_counts_blocks_and_who_owns_them(tmp_path: Path):
    names = {"ab" * 32: 5000, "cd" * 32: 100_000, "ef" * 32: 1}
    for name, size in names.items():
        path = tmp_path / "content" / "objects" / name[:2] / name[2:]
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(size))
    sparse = tmp_path / "layers" / "7" / "blob"
    sparse.parent.mkdir(parents=True)
    sparse.touch()
    os.truncate(sparse, 50 * MIB)
    with sparse.open("r+b") as file:
        file.write(bytes(MIB))
    (tmp_path / "state.sqlite").write_bytes(bytes(9000))
    (tmp_path / "store").mkdir()  # the mount point may lie here: it is none of ours
    (tmp_path / "store" / "huge").write_bytes(bytes(MIB))
    owners = {mark_of("ab" * 32): 7, mark_of("cd" * 32): 8}
    usage = measure(tmp_path, owners.get)
    assert usage.files == 3
    assert 5000 <= usage.objects[7] < 20_000
    assert 100_000 <= usage.objects[8] < 130_000
    assert 1 <= usage.objects[None] <= 8192
    assert MIB <= usage.blobs[7] < 2 * MIB
    du = sum(
        os.lstat(where).st_blocks * 512
        for directory, _, files in os.walk(tmp_path)
        if "store" not in directory
        for where in (directory, *(os.path.join(directory, name) for name in files))
    )
    assert usage.total == du
    assert {found.mark for found in stored_objects(tmp_path / "content")} == {
        mark_of(name) for name in names
    }
