"""Mounting layers of our own: options, counts, and what goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lab import handmade, tars
from lab.podman import unmount_below
from layerstore.errors import MountError, StorageError, UnknownObject
from layerstore.graphroot import mounts, overlaymount
from layerstore.graphroot.layers import Layer
from layerstore.graphroot.mountpoints import MountPoints
from layerstore.graphroot.overlaymount import OverlayMount
from layerstore.graphroot.storageconf import StorageConfig
from layerstore.graphroot.store import Store

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
BASE = [tars.directory(b"d/"), tars.regular(b"d/base", b"base\n")]
UPPER = [tars.directory(b"d/"), tars.regular(b"d/upper", b"upper\n"), tars.whiteout(b"d/base")]


@pytest.fixture
def config() -> Iterator[StorageConfig]:
    """A graph root on a file system that overlays can be made of."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="layerstore-mounts-") as text:
        yield StorageConfig(Path(text) / "root", Path(text) / "run")
        unmount_below(Path(text))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[OverlayMount]:
    """What the kernel would be asked for; it is not asked."""
    found: list[OverlayMount] = []
    monkeypatch.setattr(overlaymount, "make", found.append)
    monkeypatch.setattr(mounts, "_use_home", lambda store: None)
    monkeypatch.setattr(mounts, "in_user_namespace", lambda: False)
    return found


def two(store: Store) -> tuple[Layer, Layer]:
    base = handmade.put_layer(store, BASE)
    return base, handmade.put_layer(store, UPPER, base.id)


def test_what_the_kernel_is_asked_for(config: StorageConfig, asked: list[OverlayMount]) -> None:
    store = Store.open(replace(config, mount_options=("nodev,metacopy=on",)))
    base, upper = two(store)
    place = config.graph_root / "overlay"
    mounts.mount_layer(store, upper.id, read_only=False, mount_label="l", volatile=True)
    mounts.mount_layer(store, upper.id, read_only=True)
    mounts.mount_layer(store, base.id, read_only=True, options=["noexec"])
    write, read, single = asked
    lower = place / store.layer_area.overlay.lower(upper.id)[0]
    assert write.lowers == (lower,)
    assert (write.upper, write.work) == (place / upper.id / "diff", place / upper.id / "work")
    assert write.target == place / upper.id / "merged"
    assert (write.options, write.label) == (("nodev", "metacopy=on", "volatile"), "l")
    assert read.lowers == (place / upper.id / "diff", lower)
    assert (read.upper, read.work) == (None, None)
    assert read.options == ("ro", "metacopy=on")
    assert single.lowers == (place / base.id / "diff", place / base.id / "empty")
    assert single.options == ("noexec", "ro", "metacopy=on")


def test_without_privileges_other_attributes_are_used(
    config: StorageConfig, asked: list[OverlayMount]
) -> None:
    store = Store.open(replace(config, mount_options=("nodev,metacopy=on",), rootless=True))
    _, upper = two(store)
    mounts.mount_layer(store, upper.id, read_only=False)
    assert asked[0].options == ("nodev", "userxattr")


def test_rotated_directories_are_lowers_too(
    config: StorageConfig, asked: list[OverlayMount]
) -> None:
    store = Store.open(config)
    base, upper = two(store)
    place = config.graph_root / "overlay"
    (place / base.id / "diff1").mkdir()
    (place / upper.id / "diff1").mkdir()
    mounts.mount_layer(store, upper.id, read_only=False)
    assert [path.resolve() for path in asked[0].lowers] == [
        place / upper.id / "diff1",
        place / base.id / "diff",
        place / base.id / "diff1",
    ]


def test_a_layer_whose_store_is_gone(config: StorageConfig, asked: list[OverlayMount]) -> None:
    store = Store.open(config)
    base, upper = two(store)
    diff = config.graph_root / "overlay" / base.id / "diff"
    shutil.rmtree(diff)
    diff.symlink_to("/no/layer/store/diff")
    with pytest.raises(MountError, match=r"/no/layer/store/diff.*is that store mounted"):
        mounts.mount_layer(store, upper.id, read_only=True)
    assert asked == []


def test_layers_written_for_a_mount_program(
    config: StorageConfig, asked: list[OverlayMount]
) -> None:
    store = Store.open(config)
    base, _ = two(store)
    (config.graph_root / "overlay/.has-mount-program").write_text("true")
    with pytest.raises(MountError, match="mount_program"):
        mounts.mount_layer(store, base.id, read_only=True)
    assert asked == []


def test_what_is_not_there_or_not_allowed(config: StorageConfig, asked: list[OverlayMount]) -> None:
    store = Store.open(config)
    base, _ = two(store)
    with pytest.raises(UnknownObject):
        mounts.mount_layer(store, "e" * 64, read_only=True)
    with pytest.raises(UnknownObject):
        mounts.unmount_layer(store, base.id)
    with pytest.raises(StorageError, match="reading only"):
        mounts.mount_layer(Store.open(config, read_only=True), base.id, read_only=True)
    assert asked == []
    assert mounts.mounted(store) == ()


@ROOT
def test_mounting_and_unmounting(config: StorageConfig) -> None:
    store = Store.open(config)
    _, upper = two(store)
    path = mounts.mount_layer(store, upper.id, read_only=True)
    assert sorted(os.listdir(path / "d")) == ["upper"]
    assert mounts.mount_layer(Store.open(config), upper.id, read_only=True) == path
    assert [(point.id, point.count) for point in mounts.mounted(store)] == [(upper.id, 2)]
    assert mounts.unmount_layer(store, upper.id) is True
    assert mounts.unmount_layer(store, upper.id) is False
    assert os.listdir(path) == []
    assert path.stat().st_mode & 0o777 == 0o700
    assert not overlaymount.is_mounted(config.graph_root / "overlay")


@ROOT
def test_a_mount_in_use_disappears_at_once(config: StorageConfig) -> None:
    store = Store.open(config)
    _, upper = two(store)
    path = mounts.mount_layer(store, upper.id, read_only=True)
    with (path / "d/upper").open() as file:
        assert mounts.unmount_layer(store, upper.id) is False
        assert not (path / "d").exists()
        assert file.read() == "upper\n"
    assert (mounts.mount_layer(store, upper.id, read_only=True) / "d/upper").exists()


@ROOT
def test_a_failed_mount_leaves_nothing(config: StorageConfig) -> None:
    store = Store.open(config)
    base, upper = two(store)
    with pytest.raises(MountError):
        mounts.mount_layer(store, upper.id, read_only=False, options=["nonsense"])
    assert not overlaymount.is_mounted(config.graph_root / "overlay")
    points = MountPoints(store.layer_area.run_directory)
    with points.lock.reading():
        assert points.load() == ()
    kept = mounts.mount_layer(store, base.id, read_only=True)
    with pytest.raises(MountError):
        mounts.mount_layer(store, upper.id, read_only=False, options=["nonsense"])
    assert (kept / "d/base").exists()


@ROOT
def test_a_list_that_cannot_be_saved_undoes_the_mount(
    config: StorageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(config)
    base, _ = two(store)

    def full(*_: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(MountPoints, "save", full)
    with pytest.raises(StorageError, match="full"):
        mounts.mount_layer(store, base.id, read_only=True)
    assert not overlaymount.is_mounted(config.graph_root / "overlay" / base.id / "merged")


def die_behind_a_mount(store: Store, layer: Layer) -> Path:
    """Mounted, but not in the list: as after ``kill -9`` between the two."""
    path = mounts.mount_layer(store, layer.id, read_only=True)
    (store.layer_area.run_directory / "mountpoints.json").unlink()
    return path


@ROOT
def test_a_mount_that_nobody_wrote_down_is_used_and_ends(config: StorageConfig) -> None:
    store = Store.open(config)
    base, _ = two(store)
    path = die_behind_a_mount(store, base)
    assert mounts.mount_layer(store, base.id, read_only=True) == path
    assert mounts.unmount_layer(store, base.id) is False
    assert not overlaymount.is_mounted(path)
    die_behind_a_mount(store, base)
    assert mounts.unmount_layer(store, base.id) is False
    assert not overlaymount.is_mounted(path)
    assert not overlaymount.is_mounted(config.graph_root / "overlay")


@ROOT
def test_a_mount_that_nobody_wrote_down_goes_with_its_layer(config: StorageConfig) -> None:
    store = Store.open(config)
    _, upper = two(store)
    path = die_behind_a_mount(store, upper)
    store.delete_layer(upper.id)
    assert not overlaymount.is_mounted(path)
    assert not (config.graph_root / "overlay/tempdirs").exists()


@ROOT
def test_the_mark_of_a_volatile_mount_is_no_obstacle(config: StorageConfig) -> None:
    store = Store.open(config)
    _, upper = two(store)
    for _ in range(2):
        path = mounts.mount_layer(store, upper.id, read_only=False, volatile=True)
        (path / "new").touch()
        mounts.unmount_layer(store, upper.id)
    assert (config.graph_root / "overlay" / upper.id / "diff/new").exists()


@ROOT
def test_counts_forgotten_by_others(config: StorageConfig) -> None:
    """Podman drops the counts of layers of image stores, which it does not know as its own."""
    Store.open(config)
    _, upper = two(Store.open(config))
    client = StorageConfig(
        config.graph_root.parent / "client",
        config.run_root.parent / "client-run",
        additional_image_stores=(config.graph_root,),
    )
    store = Store.open(client)
    path = mounts.mount_layer(store, upper.id, read_only=True)
    (client.run_root / "overlay-layers/mountpoints.json").write_text(json.dumps([]))
    assert (path / "d/upper").exists()
    assert mounts.unmount_layer(store, upper.id) is False
    assert not path.exists()
