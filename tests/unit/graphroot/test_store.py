"""The graph root as a whole: putting, finding, naming, and stores of others."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lab import handmade, tars
from layerstore.errors import (
    ConfigError,
    InUse,
    InvalidManifest,
    StorageError,
    UnknownObject,
    UsageError,
    VerificationError,
)
from layerstore.graphroot import als
from layerstore.graphroot.check import Kind, check
from layerstore.graphroot.identity import layer_id
from layerstore.graphroot.layers import Addition
from layerstore.graphroot.offers import AlsOffer
from layerstore.graphroot.overlay import Overlay, RootAttributes
from layerstore.graphroot.records import ContainerRecord, ImageRecord, now, parse_time
from layerstore.graphroot.removal import remove_tree
from layerstore.graphroot.staging import StagingLost
from layerstore.graphroot.storageconf import LayerStoreSpec, StorageConfig
from layerstore.graphroot.store import Store
from layerstore.graphroot.table import Table
from layerstore.graphroot.whiteouts import WhiteoutStyle
from layerstore.image import Digest

BASE, MIDDLE, TOP = ([tars.regular(name, b"x")] for name in (b"b", b"m", b"t"))
TOC = Digest.of(b"a table of contents")
BLOB = Digest.of(b"a blob")
DIFF = Digest.of(b"a tar stream")


def contents(store: Store) -> list[object]:
    return [*store.layers(), *store.images(), *store.containers()]


def test_a_new_graph_root(store: Store) -> None:
    root = store.config.graph_root
    assert sorted(os.listdir(root)) == [
        *("overlay", "overlay-containers", "overlay-images", "overlay-layers", "storage.lock"),
    ]
    assert oct(root.stat().st_mode & 0o777) == "0o700"
    assert contents(store) == []


def test_reading_makes_nothing(tmp_path: Path) -> None:
    store = Store.open(StorageConfig(tmp_path / "root", tmp_path / "run"), read_only=True)
    assert contents(store) == []
    assert os.listdir(tmp_path) == []
    with pytest.raises(StorageError, match="for reading"):
        store.staging()


@pytest.mark.parametrize("driver", ["vfs", "btrfs"])
def test_storage_of_another_driver(tmp_path: Path, driver: str) -> None:
    (tmp_path / "root" / f"{driver}-images").mkdir(parents=True)
    with pytest.raises(ConfigError, match=driver):
        Store.open(StorageConfig(tmp_path / "root", tmp_path / "run"))


def test_a_setting_that_is_not_supported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        Store.open(StorageConfig(tmp_path / "root", tmp_path / "run", driver="vfs"))


@pytest.mark.parametrize(
    ("in_namespace", "program", "style"),
    [
        (False, "false", WhiteoutStyle.OVERLAY),
        (True, "false", WhiteoutStyle.USERXATTR),
        (True, "true", WhiteoutStyle.AUFS),
    ],
)
def test_the_kind_of_whiteouts(
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    in_namespace: bool,
    program: str,
    style: WhiteoutStyle,
) -> None:
    monkeypatch.setattr("layerstore.graphroot.store.in_user_namespace", lambda: in_namespace)
    (store.config.graph_root / "overlay/.has-mount-program").write_text(program)
    assert store.whiteouts is style


# -- layers ------------------------------------------------------------------------


def test_a_layer_is_put_once(store: Store) -> None:
    first = handmade.put_layer(store, BASE)
    with store.staging() as staging:
        staged = handmade.stage(store, staging, BASE)
        assert store.put_layer(first.id, "", staged) == first
        assert (staged.directory / "diff/b").exists()
    assert len(store.layers()) == 1


def test_the_parent_must_be_there(store: Store) -> None:
    with pytest.raises(UnknownObject):
        handmade.put_layer(store, BASE, "e" * 64)
    # its directory alone is not enough: somebody deletes it, or a crash left it
    (store.config.graph_root / "overlay" / ("e" * 64) / "diff").mkdir(parents=True)
    with pytest.raises(UnknownObject):
        handmade.put_layer(store, BASE, "e" * 64)
    assert store.layers() == []


def test_a_staged_layer_that_was_collected(store: Store) -> None:
    with store.staging() as staging:
        staged = handmade.stage(store, staging, BASE)
        remove_tree(store.layer_area.overlay.tempdirs)
        with pytest.raises(StagingLost):
            store.put_layer(staged.diff_id.hex, "", staged)
    assert store.layers() == []
    assert handmade.put_layer(store, BASE).diff_id == staged.diff_id


def test_layers_are_found(store: Store) -> None:
    base = handmade.put_layer(store, BASE)
    child = handmade.put_layer(store, MIDDLE, base.id)
    assert store.layer(base.id) == base
    assert store.layer(child.id[:8]) == child
    assert store.layer_chain(child.id) == [base, child]
    assert child.diff_id is not None
    assert store.layers_by_diff_id(child.diff_id) == [child]
    assert child.blob_digest is not None
    assert store.layers_by_blob_digest(child.blob_digest) == [child]
    assert store.layers_by_toc_digest(TOC) == []
    for text in ("", "e" * 64, "unknown"):
        with pytest.raises(UnknownObject):
            store.layer(text)


def test_the_same_layer_from_many_threads(store: Store) -> None:
    found = []

    def put() -> None:
        found.append(handmade.put_layer(store, BASE))

    threads = [threading.Thread(target=put) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(map(repr, found))) == 1
    assert len(store.layers()) == 1
    assert not store.layer_area.overlay.tempdirs.exists()


# -- layers of layer stores ------------------------------------------------------------


def als_entry(store_root: Path, name: Digest, **info: object) -> Path:
    directory = store_root / str(name)
    (directory / "diff").mkdir(parents=True)
    (directory / "blob").write_bytes(b"a blob")
    keys = {key.replace("_", "-"): value for key, value in info.items()}
    (directory / "info").write_text(json.dumps(keys))
    return directory


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """+ for each count taken in a layer store, - for each given back."""
    signals: list[str] = []
    use, release = als.StoreFiles.use, als.StoreFiles.release

    def counting_use(self: als.StoreFiles, layer: Path) -> None:
        signals.append("+")
        use(self, layer)

    def counting_release(self: als.StoreFiles, layer: Path) -> None:
        signals.append("-")
        release(self, layer)

    monkeypatch.setattr(als.StoreFiles, "use", counting_use)
    monkeypatch.setattr(als.StoreFiles, "release", counting_release)
    return signals


def test_a_layer_known_by_its_toc(store: Store, tmp_path: Path, counted: list[str]) -> None:
    place = als_entry(
        tmp_path / "als",
        TOC,
        toc_digest=TOC,
        diff_digest=Digest.of(b"what the store says"),
        compressed_diff_digest=BLOB,
        diff_size=-1,
        compression=2,
    )
    with_store = als.LayerStores([LayerStoreSpec(tmp_path / "als", False)], lookup_seconds=5)
    found = with_store.find_by_toc(None, TOC)
    assert found is not None
    one = layer_id("", toc_digest=TOC)
    (layer,) = store.put_als_layers("", [AlsOffer(one, found, DIFF)])
    with_store.close()
    assert counted == ["+", "+", "-"]
    (record,) = json.loads((store.config.graph_root / "overlay-layers/layers.json").read_text())
    assert record | {"created": ""} == {
        "id": one,
        "created": "",
        "toc-digest": TOC,
        "diff-size": -1,
        "compression": 2,
        "flags": {"expected-layer-diffid": DIFF},
    }
    directory = store.config.graph_root / "overlay" / one
    assert (directory / "additionallayer").read_text() == str(place)
    assert os.readlink(directory / "diff") == str(place / "diff")
    assert layer.is_lazy
    assert layer.additional_layer == place
    assert store.layers_by_toc_digest(TOC) == [layer]

    store.delete_layer(one)
    assert counted == ["+", "+", "-", "-"]
    assert (place / "diff").is_dir()


def test_what_a_layer_store_says_answers_for_nothing(store: Store, tmp_path: Path) -> None:
    """The attack: a store claims the blob digest and diff ID of an honest layer."""
    honest = handmade.put_layer(store, BASE)
    assert honest.diff_id is not None
    blob, diff_id = honest.blob_digest, honest.diff_id
    assert blob is not None
    store.delete_layer(honest.id)
    als_entry(
        tmp_path / "als",
        TOC,
        toc_digest=TOC,
        diff_digest=diff_id,
        compressed_diff_digest=blob,
        diff_size=100,
    )
    with_store = als.LayerStores([LayerStoreSpec(tmp_path / "als", False)], lookup_seconds=5)
    found = with_store.find_by_toc(None, TOC)
    assert found is not None
    offer = AlsOffer(layer_id("", toc_digest=TOC), found, diff_id)
    (lie,) = store.put_als_layers("", [offer])
    with_store.close()
    assert lie.diff_id is None
    assert lie.blob_digest is None
    for lazy in (False, True):
        assert store.layers_by_diff_id(diff_id, lazy=lazy) == []
        assert store.layers_by_blob_digest(blob, lazy=lazy) == []
    assert handmade.put_layer(store, BASE).id != lie.id


def test_a_layer_known_by_its_blob(store: Store, tmp_path: Path) -> None:
    als_entry(
        tmp_path / "als",
        BLOB,
        compressed_diff_digest=BLOB,
        compressed_size=6,
        diff_digest=DIFF,
        diff_size=1000,
        compression=2,
    )
    with_store = als.LayerStores([LayerStoreSpec(tmp_path / "als", False)], lookup_seconds=5)
    found = with_store.find_by_blob(None, BLOB)
    assert found is not None
    offer = AlsOffer(layer_id("", diff_id=DIFF), found, DIFF)
    (layer,) = store.put_als_layers("", [offer])
    with_store.close()
    assert (layer.diff_id, layer.blob_digest, layer.size()) == (DIFF, BLOB, 1000)
    assert store.layers_by_diff_id(DIFF) == []  # only the store says so
    assert store.layers_by_diff_id(DIFF, lazy=True) == [layer]


def test_a_layer_that_is_there_takes_no_count(
    store: Store, tmp_path: Path, counted: list[str]
) -> None:
    als_entry(tmp_path / "als", TOC, toc_digest=TOC)
    one = layer_id("", toc_digest=TOC)
    specs = [LayerStoreSpec(tmp_path / "als", False)]
    for _ in range(2):
        with_store = als.LayerStores(specs, lookup_seconds=5)
        found = with_store.find_by_toc(None, TOC)
        assert found is not None
        store.put_als_layers("", [AlsOffer(one, found, None)])
        with_store.close()
    found = als.LayerStores(specs, lookup_seconds=5).find_by_toc(None, TOC)
    assert found is not None
    with pytest.raises(UnknownObject):
        store.put_als_layers("f" * 64, [AlsOffer("e" * 64, found, None)])
    found.release()
    assert counted.count("+") - counted.count("-") == 1


def chain(root: Path, tocs: Sequence[Digest]) -> tuple[als.LayerStores, list[AlsOffer]]:
    """Layers of a store, each to stand on the one before."""
    stores = als.LayerStores([LayerStoreSpec(root, False)], lookup_seconds=5)
    offers: list[AlsOffer] = []
    for toc in tocs:
        als_entry(root, toc, toc_digest=toc)
        found = stores.find_by_toc(None, toc)
        assert found is not None
        below = offers[-1].layer_id if offers else ""
        offers.append(AlsOffer(layer_id(below, toc_digest=toc), found, None))
    return stores, offers


TOCS = [Digest.of(b"toc %d" % number) for number in range(5)]


def test_layers_of_a_layer_store_all_together(
    store: Store, tmp_path: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stores, offers = chain(tmp_path / "als", TOCS)
    saves: list[int] = []
    save = Table.save

    def counting(self: Any, records: Sequence[Any], **kwargs: Any) -> None:
        saves.append(len(records))
        save(self, records, **kwargs)

    monkeypatch.setattr(Table, "save", counting)
    first = store.put_als_layers("", offers[:2])
    assert [layer.id for layer in first] == [offer.layer_id for offer in offers[:2]]
    layers = store.put_als_layers("", offers)
    stores.close()
    assert [layer.id for layer in layers] == [offer.layer_id for offer in offers]
    assert [layer.record.parent for layer in layers[1:]] == [layer.id for layer in layers[:-1]]
    assert saves == [2, 2, 5, 5]  # incomplete, complete: once for all
    assert counted.count("+") - counted.count("-") == 5
    assert store.layer_chain(layers[-1].id) == layers


def test_another_layer_under_the_id_ends_the_row(store: Store, tmp_path: Path) -> None:
    stores, offers = chain(tmp_path / "als", TOCS)
    other = replace(offers[2].record("another parent"), parent="")
    with store.layer_area.editing() as edit:
        edit.add(Addition(other, RootAttributes(0o755, 0, 0)))
    layers = store.put_als_layers("", offers)
    stores.close()
    assert [layer.id for layer in layers] == [offer.layer_id for offer in offers[:3]]
    assert layers[2].record.parent == ""
    assert {layer.id for layer in store.layers()} == {layer.id for layer in layers}


def test_all_layers_of_the_row_or_none(
    store: Store, tmp_path: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stores, offers = chain(tmp_path / "als", TOCS)
    create = Overlay.create

    def failing(self: Overlay, layer: str, *args: Any, **kwargs: Any) -> None:
        if layer == offers[3].layer_id:
            raise StorageError("the disk is full", subject=layer)
        create(self, layer, *args, **kwargs)

    monkeypatch.setattr(Overlay, "create", failing)
    with pytest.raises(StorageError, match="full"):
        store.put_als_layers("", offers)
    stores.close()
    assert store.layers() == []
    assert counted.count("+") == counted.count("-")
    overlay = store.config.graph_root / "overlay"
    assert {path.name for path in overlay.iterdir()} <= {"l", "tempdirs"}
    assert list((overlay / "l").iterdir()) == []


# -- images ------------------------------------------------------------------------


def test_a_name_belongs_to_one_image(store: Store) -> None:
    one = handmade.put_image(store, ["quay.io/a/b:1", "quay.io/a/b:2"], [BASE])
    other = handmade.put_image(store, ["quay.io/a/b:1"], [MIDDLE])
    assert store.image(one.id).names == ("quay.io/a/b:2",)
    assert store.image("quay.io/a/b:1").id == other.id
    store.add_names(one.id, ["quay.io/a/b:1", "quay.io/a/b:3"])
    assert store.image(other.id).names == ()
    assert store.image(other.id).record.names_history == ("quay.io/a/b:1",)
    assert store.image(one.id).names == ("quay.io/a/b:1", "quay.io/a/b:3", "quay.io/a/b:2")
    store.set_names(one.id, ["quay.io/a/b:4"])
    assert store.image(one.id).names == ("quay.io/a/b:4",)


def test_putting_an_image_again_adds_names(store: Store) -> None:
    handmade.put_image(store, ["quay.io/a/b:1"], [BASE])
    again = handmade.put_image(store, ["quay.io/a/b:2"], [BASE])
    assert again.names == ("quay.io/a/b:2", "quay.io/a/b:1")
    assert store.images() == [again]


@pytest.mark.parametrize(
    "name", ["alpine", "quay.io/a/b", "localhost/UPPER:1", "", "a b", "[::1]:5000/a:1"]
)
def test_names_are_full(store: Store, name: str) -> None:
    with pytest.raises(UsageError):
        handmade.put_image(store, [name], [BASE])
    image = handmade.put_image(store, [], [BASE])
    with pytest.raises(UsageError):
        store.add_names(image.id, [name])


def test_another_manifest_is_no_silent_change(store: Store) -> None:
    image = handmade.put_image(store, ["quay.io/a/b:1"], [BASE])
    other = image.manifest().replace(b"{", b'{"annotations": {"a": "b"}, ', 1)
    arguments: dict[str, Any] = {
        "image_id": image.id,
        "layer": image.top_layer,
        "names": [],
        "manifest": other,
        "config": image.config(),
    }
    with pytest.raises(InUse, match="another manifest"):
        store.put_image(**arguments)
    changed = store.put_image(**arguments, replace=True)
    assert changed.digests == (Digest.of(other), image.digest)
    assert store.image(changed.id).manifest() == other
    assert image.digest is not None
    assert store.image(changed.id).index(image.digest) == image.manifest()
    second = handmade.put_layer(store, MIDDLE)
    with pytest.raises(InUse, match="another top layer"):
        store.put_image(**(arguments | {"layer": second.id}), replace=True)


def test_documents_must_fit(store: Store) -> None:
    layer = handmade.put_layer(store, BASE)
    manifest, config = handmade.documents([layer])
    arguments: dict[str, Any] = {"image_id": "a" * 64, "layer": layer.id, "names": []}
    with pytest.raises(VerificationError):
        store.put_image(**arguments, manifest=manifest, config=config + b" ")
    with pytest.raises(InvalidManifest):
        store.put_image(**arguments, manifest=b"{}", config=config)
    with pytest.raises(UnknownObject):
        store.put_image(**(arguments | {"layer": "e" * 64}), manifest=manifest, config=config)
    assert store.images() == []
    assert sorted(os.listdir(store.image_area.directory)) == ["images.lock"]


@pytest.mark.parametrize(
    ("text", "recorded"),
    [
        ("2024-01-01T02:00:00.50+02:00", "2024-01-01T02:00:00.5+02:00"),
        ("0001-01-01T00:00:00+23:00", "0001-01-01T00:00:00+23:00"),
        ("9999-12-31T23:59:59-23:59", "9999-12-31T23:59:59-23:59"),
    ],
)
def test_the_time_of_creation_is_one(store: Store, text: str, recorded: str) -> None:
    assert _put_created(store, text) == recorded


@pytest.mark.parametrize("text", ["", "yesterday", "0001-01-01T00:00:00Z"])
def test_without_a_time_of_creation_it_is_the_present(store: Store, text: str) -> None:
    before = parse_time(now())
    recorded = parse_time(_put_created(store, text))
    assert before is not None
    assert recorded is not None
    assert before <= recorded <= time.time_ns()


def _put_created(store: Store, text: str) -> str:
    layer = handmade.put_layer(store, BASE)
    manifest, config = handmade.documents([layer])
    store.put_image(
        image_id="a" * 64, layer=layer.id, names=[], manifest=manifest, config=config, created=text
    )
    return Store.open(store.config).image("a").created


def test_the_index_is_kept(store: Store) -> None:
    layer = handmade.put_layer(store, BASE)
    manifest, config = handmade.documents([layer])
    index = b'{"an": "index"}'
    image = store.put_image(
        image_id="a" * 64,
        layer=layer.id,
        names=["quay.io/a/b:1"],
        manifest=manifest,
        index=index,
        config=config,
    )
    # as containers/storage, which lists an image by what it was asked for
    assert image.digests == (Digest.of(index), Digest.of(manifest))
    assert (image.digest, image.manifest_digest) == image.digests
    assert image.manifest() == manifest
    assert image.index(Digest.of(index)) == index
    assert store.image(f"quay.io/a/b@{Digest.of(index)}").id == image.id


def test_who_opens_the_graph_root_without_its_mount_program_knows_of_it(tmp_path: Path) -> None:
    places = (tmp_path / "root", tmp_path / "run")
    Store.open(StorageConfig(*places, mount_program="/usr/bin/fuse-overlayfs"))
    assert Store.open(StorageConfig(*places)).whiteouts is WhiteoutStyle.AUFS


# -- additional image stores -------------------------------------------------------------


@pytest.fixture
def client(store: Store, tmp_path: Path) -> Store:
    """A graph root that uses ``store`` as an additional image store."""
    return Store.open(
        StorageConfig(
            tmp_path / "mine",
            tmp_path / "my-run",
            additional_image_stores=(store.config.graph_root,),
        )
    )


def test_images_of_another_store_are_there(store: Store, client: Store) -> None:
    image = handmade.put_image(store, ["quay.io/a/b:1"], [BASE, MIDDLE])
    found = client.image("quay.io/a/b:1")
    assert found.read_only
    assert found.manifest() == image.manifest()
    assert [layer.id for layer in found.layers()] == [layer.id for layer in image.layers()]
    assert all(layer.read_only for layer in found.layers())
    assert found.size() == image.size()
    top = found.layers()[-1]
    assert top.area.mount_path(top.id) == client.config.run_root / "overlay" / top.id / "merged"
    with pytest.raises(InUse, match="read-only"):
        client.remove_image("quay.io/a/b:1", force=True)
    assert client.prune(all_images=True) == []
    assert client.images() == [found]


def test_layers_stand_on_those_of_another_store(store: Store, client: Store) -> None:
    base = handmade.put_layer(store, BASE)
    child = handmade.put_layer(client, MIDDLE, base.id)
    assert not child.read_only
    assert [layer.id for layer in client.layer_chain(child.id)] == [base.id, child.id]
    assert [path.parent for path in child.lower_dirs] == [store.config.graph_root / "overlay/l"]
    assert (child.lower_dirs[0] / "b").exists()
    assert [layer.id for layer in store.layers()] == [base.id]
    # a layer that the other store has is not made twice
    assert handmade.put_layer(client, BASE).read_only
    assert client.layer_area.overlay.layers() == [child.id]


def test_an_image_of_another_store_gets_a_name_here(store: Store, client: Store) -> None:
    image = handmade.put_image(store, ["quay.io/a/b:1"], [BASE])
    named = client.add_names(image.id, ["localhost/mine:1"])
    assert not named.read_only
    assert named.names == ("localhost/mine:1", "quay.io/a/b:1")
    assert client.image("mine:1").manifest() == image.manifest()
    assert store.image(image.id).names == ("quay.io/a/b:1",)
    assert client.remove_image(image.id, force=True).deleted_layers == ()
    assert store.image(image.id).layers()
    assert client.image(image.id).read_only


def test_an_image_of_another_store_that_podman_4_named_here(store: Store, client: Store) -> None:
    """Its record here has no big data, and none of the names that it has there."""
    image = handmade.put_image(store, ["quay.io/a/b:1", "quay.io/a/taken:1"], [BASE])
    other = handmade.put_image(client, ["quay.io/a/taken:1"], [MIDDLE])
    with client.image_area.editing() as edit:
        edit.put(
            ImageRecord(image.id, names=("localhost/new:1",), layer=image.top_layer, metadata="{}")
        )
        edit.save()
    found = client.image("new:1")
    assert found.manifest() == image.manifest()
    assert found.names == ("localhost/new:1", "quay.io/a/b:1")
    assert not found.read_only
    assert client.image("quay.io/a/b:1").id == image.id
    assert client.image("quay.io/a/taken:1").id == other.id
    assert check(client).findings == ()
    client.add_names(image.id, ["localhost/newer:1"])
    assert client.image("newer:1").config() == image.config()
    store.remove_image(image.id, force=True)
    assert {found.kind for found in check(client).findings} >= {Kind.IMAGE_DATA}


def test_a_store_that_is_not_there(tmp_path: Path) -> None:
    config = StorageConfig(
        tmp_path / "root", tmp_path / "run", additional_image_stores=(tmp_path / "gone",)
    )
    with pytest.raises(ConfigError, match="no directory"):
        Store.open(config)


# -- containers ----------------------------------------------------------------------


def test_containers_are_found(store: Store) -> None:
    records = [
        ContainerRecord("a" * 64, ("one",), "i" * 64, "l" * 64),
        ContainerRecord("b" * 64, ("two",), "", "m" * 64, volatile=True),
    ]
    table = store.container_area.table
    with table.lock.writing():
        table.load()
        table.save(records)
    assert [container.record for container in store.containers()] == records
    assert store.container("one").id == "a" * 64
    assert store.container("bb").names == ("two",)
    assert store.container("one").image_id == "i" * 64
    assert store.container("two").layer_id == "m" * 64
    with pytest.raises(UnknownObject):
        store.container("three")
