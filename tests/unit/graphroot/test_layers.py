"""Layers of one graph root: made and deleted so that a crash leaves all or nothing."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lab import handmade, images, tars
from layerstore.errors import StorageError, UnknownObject
from layerstore.graphroot import als
from layerstore.graphroot.cleanup import prune
from layerstore.graphroot.layers import Layer, LayerArea, LayerEdit
from layerstore.graphroot.overlay import Overlay, RootAttributes
from layerstore.graphroot.records import INCOMPLETE, LayerRecord
from layerstore.graphroot.staging import StagingLost, TempDirectory
from layerstore.graphroot.store import Store

OURS = RootAttributes(0o755, os.geteuid(), os.getegid())
FILE = tars.regular(b"file", b"content\n")


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The paths that layer stores were told about."""
    paths: list[Path] = []
    monkeypatch.setattr(als, "release_path", paths.append)
    return paths


def on_disk(store: Store) -> list[dict[str, object]]:
    loaded: list[dict[str, object]] = json.loads(
        (store.config.graph_root / "overlay-layers/layers.json").read_text()
    )
    return loaded


def files(store: Store) -> list[str]:
    """Everything about layers that is no record, lock or link directory."""
    root = store.config.graph_root
    found = [*(root / "overlay").iterdir(), *(root / "overlay/l").iterdir()]
    found += (root / "overlay-layers").iterdir()
    return sorted(
        path.name for path in found if path.name not in ("l", "layers.json", "layers.lock")
    )


def crash(store: Store, layer: str, *, after: Callable[[LayerArea], None]) -> None:
    """Leave ``layer`` behind as a process does that is killed."""
    with store.layer_area.editing() as edit:
        edit.put(LayerRecord(layer, flags={INCOMPLETE: True}))
        edit.save()
        after(store.layer_area)


def test_a_layer_is_recorded_as_other_tools_would(store: Store) -> None:
    layer = handmade.put_layer(store, [tars.directory(b"d/", uid=7, gid=8), FILE])
    assert layer.diff_id is not None
    (record,) = on_disk(store)
    assert list(record) == [
        *("id", "created", "compressed-diff-digest", "compressed-size", "diff-digest"),
        *("diff-size", "uidset", "gidset"),
    ]
    assert record["id"] == layer.diff_id.hex
    assert record["diff-size"] == layer.size() == 3 * 512 + 1024
    assert record["uidset"] == [0, 7]
    assert record["gidset"] == [0, 8]
    assert (layer.diff_path / "file").read_text() == "content\n"
    assert layer.area.tar_split(layer.id) is not None
    assert oct(layer.diff_path.stat().st_mode & 0o7777) == "0o555"
    assert not layer.is_lazy
    assert not layer.read_only
    with pytest.raises(UnknownObject):
        layer.blob()


def test_a_layer_gives_its_tar_stream_again(store: Store) -> None:
    members = [tars.directory(b"d/"), FILE, tars.symlink(b"d/link", b"../file")]
    layer = handmade.put_layer(store, members)
    assert b"".join(layer.tar()) == images.tar_bytes(members)


def test_layers_that_a_crash_left_are_deleted_by_the_next_reader(
    store: Store, released: list[Path]
) -> None:
    kept = handmade.put_layer(store, [FILE])
    before = files(store)

    def half_made(area: LayerArea) -> None:
        (area.overlay.home / "half/diff").mkdir(parents=True)
        (area.overlay.home / "half/link").write_text("A" * 26)
        (area.overlay.home / "l" / ("A" * 26)).symlink_to("../half/diff")
        (area.directory / "half.tar-split.gz").write_text("x")
        (area.directory / "half").mkdir()
        (area.directory / "half/data").write_text("x")

    crash(store, "half", after=half_made)
    assert [layer.id for layer in store.layers()] == [kept.id]
    assert [record["id"] for record in on_disk(store)] == [kept.id]
    assert files(store) == before
    assert released == []


def test_a_layer_store_is_told_of_its_layer_that_a_crash_left(
    store: Store, released: list[Path]
) -> None:
    place = f"/store/sha256:{'ab' * 32}"

    def half_made(area: LayerArea) -> None:
        (area.overlay.home / "half").mkdir()
        (area.overlay.home / "half/additionallayer").write_text(place)

    crash(store, "half", after=half_made)
    assert store.layers() == []
    assert released == [Path(place)]


@pytest.mark.parametrize(
    "text", ["", "relative", "/var/lib/precious", f"/store/../sha256:{'ab' * 32}"]
)
def test_an_additionallayer_that_cannot_be_is_in_nobodys_way(
    store: Store, released: list[Path], text: str
) -> None:
    """As a power failure, or somebody's hand, leaves it: it would stop every change for ever."""

    def half_made(area: LayerArea) -> None:
        (area.overlay.home / "half").mkdir()
        (area.overlay.home / "half/additionallayer").write_text(text)

    kept = handmade.put_layer(store, [FILE])
    (kept.area.overlay.home / kept.id / "additionallayer").write_text(text)
    crash(store, "half", after=half_made)
    (listed,) = store.layers()
    assert (listed.id, listed.is_lazy) == (kept.id, True)
    assert kept.diff_id is not None
    assert store.layers_by_diff_id(kept.diff_id) == []
    store.delete_layer(kept.id)
    assert store.layers() == []
    assert released == []


def test_a_read_only_store_hides_what_a_crash_left(store: Store) -> None:
    crash(store, "half", after=lambda _: None)
    assert Store.open(store.config, read_only=True).layers() == []
    assert [record["id"] for record in on_disk(store)] == ["half"]


def test_under_a_read_lock_incomplete_layers_are_hidden(store: Store) -> None:
    crash(store, "half", after=lambda _: None)
    with store.layer_area.table.lock.reading():
        assert store.layers() == []
    assert [record["id"] for record in on_disk(store)] == ["half"]


@pytest.mark.parametrize("error", [StagingLost("gone"), KeyboardInterrupt()])
def test_a_layer_that_cannot_be_made_leaves_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    before = files(store)

    def fail(*_: object) -> None:
        assert on_disk(store)[0]["flags"] == {INCOMPLETE: True}
        raise error

    monkeypatch.setattr(Overlay, "_give_link", fail)
    with pytest.raises(type(error)):
        handmade.put_layer(store, [FILE])
    assert on_disk(store) == []
    assert files(store) == before


def test_the_flag_is_gone_when_the_layer_is_there(store: Store) -> None:
    layer = handmade.put_layer(store, [FILE])
    assert not layer.record.incomplete
    assert "flags" not in on_disk(store)[0]


def test_deletion_flags_first(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = handmade.put_layer(store, [FILE])
    original = Overlay.detach
    seen = []

    def detach(self: Overlay, layer: str, bin_: TempDirectory) -> None:
        seen.append(on_disk(store)[0]["flags"])
        original(self, layer, bin_)

    monkeypatch.setattr(Overlay, "detach", detach)
    store.delete_layer(layer.id)
    assert seen == [{INCOMPLETE: True}]
    assert files(store) == []


def test_deletion_is_quick_under_the_lock(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = handmade.put_layer(store, [FILE])
    held = []

    def remove(path: Path) -> None:
        held.append((path.exists(), store.layer_area.table.lock.held))

    monkeypatch.setattr("layerstore.graphroot.staging.remove_tree", remove)
    store.delete_layer(layer.id)
    assert held == [(True, False)]


def test_names_are_unique(store: Store) -> None:
    one, other = handmade.put_layer(store, [FILE]), handmade.put_layer(store, [])
    with store.layer_area.editing() as edit:
        edit.put(replace(one.record, names=("a", "b")))
        edit.put(replace(other.record, names=("b",)))
        edit.save()
    assert store.layer("a").id == one.id
    assert store.layer("b").id == other.id
    assert [layer.names for layer in store.layers()] == [("a",), ("b",)]


def test_a_size_that_is_not_recorded_is_that_of_the_files(store: Store) -> None:
    members = [
        FILE,
        tars.hard_link(b"again", b"file"),
        tars.directory(b"d/"),
        tars.regular(b"d/f", b"12345"),
    ]
    layer = handmade.put_layer(store, members)
    unknown = Layer(replace(layer.record, diff_digest=None), layer.area)
    assert unknown.size() == len(b"content\n") + 5


def test_sweeping_leaves_what_is_not_temporary(store: Store) -> None:
    directory = store.config.graph_root / "overlay-layers"
    (directory / ".tmp-abc.tar-split.gz").write_text("x")
    (directory / "abc.tar-split.gz").write_text("x")
    with Store.open(store.config).layer_area.editing():
        pass
    assert not (directory / ".tmp-abc.tar-split.gz").exists()
    assert (directory / "abc.tar-split.gz").exists()


def test_prune_removes_what_dead_writers_left_beside_tables_that_nobody_changes(
    store: Store,
) -> None:
    left = [
        store.config.graph_root / f"overlay-{kind}" / f".tmp-{kind}.json7338215047"
        for kind in ("layers", "images")
    ]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_text("[")
    prune(Store.open(store.config))
    assert [path for path in left if path.exists()] == []


def test_storage_that_cannot_repair_still_lists(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = handmade.put_layer(store, [FILE])
    crash(store, "half", after=lambda _: None)

    def fail(_: LayerEdit) -> None:
        raise StorageError("read-only file system")

    monkeypatch.setattr(LayerEdit, "delete_incomplete", fail)
    assert [layer.id for layer in store.layers()] == [kept.id]
