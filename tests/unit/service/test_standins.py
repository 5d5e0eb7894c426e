"""What a stopped store leaves, and takes away again."""

import os
from pathlib import Path

import pytest

from layerstore.service import standins

LAYER = "bG9jYWxob3N0L2E6MQ==/sha256:" + "0" * 64
SPLIT = "YS9i/Yz/sha256:" + "1" * 64  # base64 has slashes, too


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, Path]:
    mountpoint, root = tmp_path / "store", tmp_path / "root"
    mountpoint.mkdir()
    root.mkdir()
    return mountpoint, root


def test_a_stand_in_has_a_size_and_is_no_layer(place: tuple[Path, Path]) -> None:
    mountpoint, root = place
    assert standins.leave(mountpoint, root, [LAYER, SPLIT]) == 2
    for layer in (LAYER, SPLIT):
        assert os.listdir(mountpoint / layer) == ["diff"]
        assert (mountpoint / layer / "diff").is_file()
    standins.leave(mountpoint, root, [SPLIT])
    assert os.listdir(mountpoint) == [SPLIT.partition("/")[0]]
    standins.clear(root)
    assert os.listdir(mountpoint) == []
    assert os.listdir(root) == []
    standins.clear(root)


def test_nothing_else_is_removed(place: tuple[Path, Path]) -> None:
    mountpoint, root = place
    standins.leave(mountpoint, root, [LAYER, SPLIT])
    (mountpoint / LAYER / "diff").write_text("somebody's own")
    (mountpoint / "notes").write_text("somebody's, too")
    standins.clear(root)
    assert sorted(os.listdir(mountpoint)) == [LAYER.partition("/")[0], "notes"]
    assert (mountpoint / LAYER / "diff").read_text() == "somebody's own"


@pytest.mark.parametrize("damage", ["", "[]", "{}", '["/nowhere", [1]]'])
def test_a_damaged_list_keeps_nobody_from_starting(place: tuple[Path, Path], damage: str) -> None:
    _, root = place
    (root / "stand-ins.json").write_text(damage)
    standins.clear(root)


def test_nothing_is_made_in_a_mount(place: tuple[Path, Path]) -> None:
    _, root = place
    assert standins.leave(Path("/proc"), root, [LAYER]) == 0
    assert os.listdir(root) == []
