"""The list of mounts, shared with other tools."""

import json
import logging
from pathlib import Path

import pytest

from layerstore.errors import CorruptStorage
from layerstore.graphroot import mountpoints
from layerstore.graphroot.mountpoints import MountPoint, MountPoints, unmount_for_removal


@pytest.fixture
def detached(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    paths: list[Path] = []
    monkeypatch.setattr(mountpoints, "detach_mount", paths.append)
    return paths


def test_the_list_is_written_as_others_read_it(tmp_path: Path) -> None:
    points = MountPoints(tmp_path)
    with points.lock.writing():
        assert points.load() == ()
        points.save([MountPoint("a", Path("/r/a/merged"), 2), MountPoint("b", Path("/b"), 0)])
        assert points.load() == (MountPoint("a", Path("/r/a/merged"), 2),)
    text = (tmp_path / "mountpoints.json").read_text()
    assert text == '[{"id":"a","path":"/r/a/merged","count":2}]'
    assert len((tmp_path / "mountpoints.lock").read_bytes()) == 64


@pytest.mark.parametrize("text", ["{}", "[1]", "[{}]", '[{"id":1,"path":"/a","count":1}]', "["])
def test_a_damaged_list(tmp_path: Path, text: str) -> None:
    (tmp_path / "mountpoints.json").write_text(text)
    points = MountPoints(tmp_path)
    with points.lock.reading(), pytest.raises(CorruptStorage):
        points.load()


@pytest.mark.parametrize("text", ["", "null", "[]"])
def test_an_empty_list(tmp_path: Path, text: str) -> None:
    (tmp_path / "mountpoints.json").write_text(text)
    points = MountPoints(tmp_path)
    with points.lock.reading():
        assert points.load() == ()


def test_deleted_layers_are_unmounted(
    tmp_path: Path, detached: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    items = [
        {"id": "a", "path": "/root/overlay/a/merged", "count": 3},
        {"id": "b", "path": "/root/overlay/b/merged", "count": 1},
        {"id": "c", "path": "/etc", "count": 1},
    ]
    (tmp_path / "mountpoints.json").write_text(json.dumps(items))
    with caplog.at_level(logging.WARNING):
        unmount_for_removal(
            tmp_path, {name: tmp_path / name / "merged" for name in ["a", "c", "d"]}
        )
    assert detached == [Path("/root/overlay/a/merged")]
    assert "/etc" in caplog.text
    left = json.loads((tmp_path / "mountpoints.json").read_text())
    assert [item["id"] for item in left] == ["b"]


def test_without_mounts_nothing_is_written(tmp_path: Path, detached: list[Path]) -> None:
    unmount_for_removal(tmp_path, {name: tmp_path / name / "merged" for name in ["a"]})
    assert list(tmp_path.iterdir()) == []
    assert detached == []


def test_a_path_where_nothing_is_mounted(tmp_path: Path) -> None:
    mountpoints.detach_mount(tmp_path)
    mountpoints.detach_mount(tmp_path / "gone")
