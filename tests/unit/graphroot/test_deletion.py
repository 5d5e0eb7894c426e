"""What goes with an image, and what must never go."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import pytest

from lab import handmade, tars
from layerstore.errors import InUse, StorageError, UnknownObject
from layerstore.graphroot.deletion import layers_to_delete
from layerstore.graphroot.images import Image
from layerstore.graphroot.records import ContainerRecord, ImageRecord, LayerRecord
from layerstore.graphroot.store import Store

BASE, MIDDLE, TOP, BRANCH = ([tars.regular(name, b"x")] for name in (b"b", b"m", b"t", b"o"))


def records(**parents: str) -> dict[str, LayerRecord]:
    return {one: LayerRecord(one, parent=parent) for one, parent in parents.items()}


CHAIN = records(base="", middle="base", top="middle")
IMAGE = ImageRecord("image", layer="top")


@pytest.mark.parametrize(
    ("layers", "others", "containers", "expected"),
    [
        (CHAIN, [], [], ("top", "middle", "base")),
        (CHAIN, [ImageRecord("other", layer="middle")], [], ("top",)),
        (CHAIN, [ImageRecord("other", layer="top")], [], ()),
        (CHAIN, [ImageRecord("other", mapped_layers=("middle",))], [], ("top",)),
        (CHAIN | records(branch="middle"), [], [], ("top",)),
        (CHAIN | records(branch="base"), [], [], ("top", "middle")),
        (CHAIN | records(container="top"), [], [], ()),
        (CHAIN, [], [ContainerRecord("c", layer="middle")], ("top",)),
        # the base lives in an additional image store
        (records(middle="base", top="middle"), [], [], ("top", "middle")),
        # records that go round in a circle
        (records(top="middle", middle="top"), [], [], ()),
    ],
)
def test_which_layers_go(
    layers: dict[str, LayerRecord],
    others: list[ImageRecord],
    containers: list[ContainerRecord],
    expected: Sequence[str],
) -> None:
    assert layers_to_delete(IMAGE, [IMAGE, *others], layers, containers) == tuple(expected)


def test_copies_for_other_id_mappings_go_too() -> None:
    image = replace(IMAGE, mapped_layers=("copy", "used-copy"))
    layers = CHAIN | records(copy="middle")
    assert layers_to_delete(image, [], layers, []) == ("copy", "top", "middle", "base")
    layers |= records(**{"used-copy": "middle", "container": "used-copy"})
    assert layers_to_delete(image, [], layers, []) == ("copy", "top")


def container(store: Store, image: Image, *, volatile: bool) -> ContainerRecord:
    """A container of ``image`` as Podman records it, without the directories."""
    layer = LayerRecord("c" * 64, names=("c-layer",), parent=image.top_layer, volatile=volatile)
    with store.layer_area.editing() as edit:
        edit.put(layer)
        edit.save()
    record = ContainerRecord("d" * 64, ("c",), image.id, layer.id, volatile=volatile)
    with store.container_area.table.lock.writing():
        store.container_area.table.load()
        store.container_area.table.save([record])
    return record


def test_an_image_goes_with_its_layers(store: Store) -> None:
    image = handmade.put_image(store, ["quay.io/a/b:1"], [BASE, MIDDLE])
    layers = [layer.id for layer in image.layers()]
    removed = store.remove_image("quay.io/a/b:1")
    assert removed.untagged == ("quay.io/a/b:1",)
    assert removed.deleted_image == image.id
    assert removed.deleted_layers == tuple(layers[::-1])
    assert store.layers() == []
    assert store.images() == []
    root = store.config.graph_root
    assert os.listdir(root / "overlay") == ["l"]
    assert os.listdir(root / "overlay/l") == []
    assert sorted(os.listdir(root / "overlay-layers")) == ["layers.json", "layers.lock"]
    assert sorted(os.listdir(root / "overlay-images")) == ["images.json", "images.lock"]


def test_shared_layers_stay(store: Store) -> None:
    one = handmade.put_image(store, ["quay.io/a/one:1"], [BASE, MIDDLE, TOP])
    other = handmade.put_image(store, ["quay.io/a/other:1"], [BASE, MIDDLE, BRANCH])
    assert store.remove_image(one.id).deleted_layers == (one.top_layer,)
    assert [layer.id for layer in other.layers()]
    assert len(store.remove_image(other.id).deleted_layers) == 3


def test_one_of_several_names_is_only_taken_away(store: Store) -> None:
    image = handmade.put_image(store, ["quay.io/a/b:1", "localhost/b:2"], [BASE])
    assert store.remove_image("b:2").untagged == ("localhost/b:2",)
    assert store.image(image.id).names == ("quay.io/a/b:1",)
    assert store.image(image.id).record.names_history == ("quay.io/a/b:1", "localhost/b:2")


def test_several_names_want_force(store: Store) -> None:
    image = handmade.put_image(store, ["quay.io/a/b:1", "localhost/b:2"], [BASE])
    with pytest.raises(InUse, match="several names"):
        store.remove_image(image.id)
    assert store.remove_image(image.id, force=True).deleted_image == image.id


@pytest.mark.parametrize("volatile", [False, True])
def test_an_image_of_a_container_stays(store: Store, volatile: bool) -> None:
    image = handmade.put_image(store, ["quay.io/a/b:1", "quay.io/a/b:2"], [BASE])
    record = container(store, image, volatile=volatile)
    with pytest.raises(InUse, match=record.id):
        store.remove_image(image.id, force=True)
    assert store.remove_image("quay.io/a/b:2").deleted_image is None
    with pytest.raises(InUse, match=record.id):
        store.remove_image("quay.io/a/b:1")
    assert store.prune(all_images=True) == []
    assert store.image(image.id).layers()


@pytest.mark.parametrize("volatile", [False, True])
def test_layers_below_a_container_stay(store: Store, volatile: bool) -> None:
    image = handmade.put_image(store, [], [BASE, MIDDLE])
    record = container(store, image, volatile=volatile)
    with store.container_area.table.lock.writing():  # its image was removed by an old tool
        store.container_area.table.load()
        store.container_area.table.save([replace(record, image="e" * 64)])
    assert store.remove_image(image.id).deleted_layers == ()
    assert len(store.layers()) == 3
    for layer in store.layers():
        with pytest.raises(InUse):
            store.delete_layer(layer.id)


def test_a_layer_that_is_needed_is_not_deleted(store: Store) -> None:
    image = handmade.put_image(store, [], [BASE, MIDDLE])
    base, top = image.layers()
    with pytest.raises(InUse, match=top.id):
        store.delete_layer(base.id)
    with pytest.raises(InUse, match=image.id):
        store.delete_layer(top.id)
    with pytest.raises(UnknownObject):
        store.delete_layer("e" * 64)


def test_a_layer_that_nothing_needs_is_deleted(store: Store) -> None:
    layer = handmade.put_layer(store, BASE)
    store.delete_layer(layer.id)
    assert store.layers() == []


def test_pruning_takes_what_has_no_name(store: Store) -> None:
    named = handmade.put_image(store, ["quay.io/a/b:1"], [BASE])
    nameless = handmade.put_image(store, [], [MIDDLE])
    assert [removed.deleted_image for removed in store.prune()] == [nameless.id]
    assert [image.id for image in store.images()] == [named.id]
    assert [removed.deleted_image for removed in store.prune(all_images=True)] == [named.id]
    assert store.layers() == []


def test_pruning_spares_what_others_were_built_from(store: Store) -> None:
    stages = [["ADD b"], ["ADD b", "ADD m"], ["ADD b", "ADD m", "CMD x"]]
    handmade.put_image(store, [], [BASE], history=stages[0])
    handmade.put_image(store, [], [BASE, MIDDLE], history=stages[1])
    final = handmade.put_image(store, ["localhost/f:1"], [BASE, MIDDLE], history=stages[2])
    assert store.prune() == []
    store.remove_names(final.id, final.names)
    assert len(store.prune()) == 3
    assert store.layers() == []
    assert store.images() == []


def test_removal_takes_the_nameless_images_below(store: Store) -> None:
    stages = [["ADD b"], ["ADD b", "ADD m"], ["ADD b", "ADD m", "ADD t"]]
    kept = handmade.put_image(store, ["localhost/base:1"], [BASE], history=stages[0])
    between = handmade.put_image(store, [], [BASE, MIDDLE], history=stages[1])
    final = handmade.put_image(store, ["localhost/f:1"], [BASE, MIDDLE, TOP], history=stages[2])
    removed = store.remove_image("f:1")
    assert removed.deleted_image == final.id
    assert removed.deleted_parents == (between.id,)
    assert len(removed.deleted_layers) == 2
    assert [image.id for image in store.images()] == [kept.id]


def test_removal_spares_what_others_were_built_from(store: Store) -> None:
    handmade.put_image(store, [], [BASE], history=["ADD b"])
    handmade.put_image(store, ["localhost/m:1"], [BASE, MIDDLE], history=["ADD b", "ADD m"])
    handmade.put_image(store, ["localhost/o:1"], [BASE, BRANCH], history=["ADD b", "ADD o"])
    assert store.remove_image("m:1").deleted_parents == ()
    assert len(store.remove_image("o:1").deleted_parents) == 1
    assert store.layers() == []


def test_a_store_that_is_open_for_reading_deletes_nothing(store: Store) -> None:
    image = handmade.put_image(store, [], [BASE])
    reader = Store.open(store.config, read_only=True)
    for delete in (
        lambda: reader.remove_image(image.id),
        lambda: reader.delete_layer(image.top_layer),
        lambda: reader.prune(all_images=True),
    ):
        with pytest.raises(StorageError, match="for reading"):
            delete()
    assert reader.image(image.id).layers()
