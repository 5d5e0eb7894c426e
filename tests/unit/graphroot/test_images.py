"""Images: how they are found, and what is stored of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab import handmade, tars
from layerstore.errors import CorruptStorage, Fault, UnknownObject
from layerstore.graphroot.images import Image, resolve, with_names
from layerstore.graphroot.records import ImageRecord
from layerstore.graphroot.store import Store
from layerstore.image import Digest

MANIFEST, INDEX = Digest.of(b"manifest"), Digest.of(b"index")


def image(store: Store, one: str, *names: str, digest: Digest = MANIFEST) -> Image:
    record = ImageRecord(
        one,
        digest=digest,
        names=names,
        big_data_names=("manifest", f"manifest-{INDEX}"),
        big_data_digests={"manifest": digest, f"manifest-{INDEX}": INDEX},
    )
    return Image(record, store.image_area, store)


@pytest.fixture
def images(store: Store) -> list[Image]:
    other = Digest.of(b"other")
    return [
        image(store, "aa11" + "0" * 60, "docker.io/library/alpine:latest"),
        image(store, "aa22" + "0" * 60, "localhost/built:latest", "quay.io/team/app:1"),
        image(store, "bb33" + "0" * 60, "quay.io/other/tool:2", digest=other),
        image(store, "cc44" + "0" * 60, "registry.example/team/app:2", digest=other),
        image(store, "dd55" + "0" * 60, f"quay.io/pinned/it@{other}", digest=other),
    ]


@pytest.mark.parametrize(
    ("text", "found", "name"),
    [
        ("aa11" + "0" * 60, "aa11", ""),
        ("sha256:aa11" + "0" * 60, "aa11", ""),
        ("alpine", "aa11", "docker.io/library/alpine:latest"),
        ("docker.io/alpine", "aa11", "docker.io/library/alpine:latest"),
        ("built", "aa22", "localhost/built:latest"),
        ("localhost/built", "aa22", "localhost/built:latest"),
        ("quay.io/team/app:1", "aa22", "quay.io/team/app:1"),
        ("app:1", "aa22", "quay.io/team/app:1"),
        ("team/app:2", "cc44", "registry.example/team/app:2"),
        ("tool:2", "bb33", "quay.io/other/tool:2"),
        ("aa2", "aa22", ""),
        ("b", "bb33", ""),
        ("sha256:bb", "bb33", ""),
        (str(MANIFEST), "aa11", ""),
        (f"quay.io/team/app@{MANIFEST}", "aa22", ""),
        (f"quay.io/team/app@{INDEX}", "aa22", ""),
        (f"app@{INDEX}", "aa22", ""),
        (
            f"quay.io/pinned/it@{Digest.of(b'other')}",
            "dd55",
            f"quay.io/pinned/it@{Digest.of(b'other')}",
        ),
    ],
)
def test_an_image_is_found(images: list[Image], text: str, found: str, name: str) -> None:
    chosen, matched = resolve(images, text)
    assert chosen.id[:4] == found
    assert matched == name


@pytest.mark.parametrize(
    "text",
    [
        *("", "aa", "no-such", "ee", "quay.io/app:1", "quay.io/team/app", "tool", "sha256:"),
        f"quay.io/unknown@{MANIFEST}",
        f"quay.io/team/app@{Digest.of(b'third')}",
        str(Digest.of(b"third")),
    ],
)
def test_an_image_is_not_found(images: list[Image], text: str) -> None:
    with pytest.raises(UnknownObject):
        resolve(images, text)


def test_a_short_name_of_two_images_is_none(images: list[Image], store: Store) -> None:
    images.append(image(store, "ee66" + "0" * 60, "ghcr.io/else/app:1"))
    with pytest.raises(UnknownObject, match="several"):
        resolve(images, "app:1")


def test_names_go_into_the_history() -> None:
    record = with_names(ImageRecord("a", names=("x",), names_history=("x",)), ["y", "x", "y"])
    assert record.names == ("y", "x")
    assert record.names_history == ("y", "x")
    assert with_names(record, []).names_history == ("y", "x")


def test_documents_are_stored_under_their_keys(store: Store) -> None:
    made = handmade.put_image(store, ["quay.io/a/b:1"], [[tars.regular(b"f", b"x")]])
    directory = store.config.graph_root / "overlay-images" / made.id
    config = Digest.of(made.config())
    assert made.id == config.hex
    assert made.record.big_data_names == (str(config), f"manifest-{made.digest}", "manifest")
    assert made.record.metadata == "{}"
    assert len(list(directory.iterdir())) == 3
    assert (directory / "manifest").read_bytes() == made.manifest()
    assert made.manifest() == made.index(made.digests[0])
    assert [layer.id for layer in made.layers()] == [made.top_layer]
    assert made.parsed_config().diff_ids == (made.layers()[0].diff_id,)


def test_signatures_are_kept(store: Store) -> None:
    signatures = [b"first signature", b"second"]
    made = handmade.put_image(store, ["quay.io/a/b:1"], [[]], signatures=signatures)
    assert made.digest is not None
    sizes = [len(one) for one in signatures]
    assert json.loads(made.record.metadata) == {
        "signature-sizes": sizes,
        "signatures-sizes": {made.digest: sizes},
    }
    assert made.big_data("signatures") == made.big_data(f"signature-{made.digest.hex}")
    assert store.image(made.id).signatures() == tuple(signatures)


def test_no_signatures_are_none(store: Store) -> None:
    assert handmade.put_image(store, [], [[]]).signatures() == ()


def test_damaged_signatures(store: Store) -> None:
    made = handmade.put_image(store, [], [[]], signatures=[b"one", b"two"])
    directory = store.image_area.image_directory(made.id)
    for path in directory.iterdir():
        if path.read_bytes() == b"onetwo":
            path.write_bytes(b"on")
    with pytest.raises(CorruptStorage, match="other sizes"):
        made.signatures()


def test_a_changed_manifest_is_not_believed(store: Store) -> None:
    made = handmade.put_image(store, [], [[]])
    for path in store.image_area.image_directory(made.id).iterdir():
        path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(CorruptStorage):
        made.manifest()


def test_the_size_is_that_of_layers_and_documents(store: Store) -> None:
    made = handmade.put_image(store, [], [[tars.regular(b"f", b"x" * 5000)], []])
    layers = sum(layer.size() for layer in made.layers())
    assert made.size() == layers + len(made.config()) + 2 * len(made.manifest())


def test_an_image_that_was_removed_is_gone_and_not_damaged(store: Store) -> None:
    made = handmade.put_image(store, ["quay.io/a/b:1"], [[tars.regular(b"f", b"x")]])
    store.remove_image(made.id)
    for method in (made.manifest, made.config, made.layers, made.size, made.history):
        with pytest.raises(UnknownObject, match="removed") as caught:
            method()
        assert (caught.value.code, caught.value.fault) == ("no-such-object", Fault.CALLER)
        assert caught.value.subject == made.id


def test_what_is_missing_of_an_image_that_is_there_is_damage(store: Store) -> None:
    made = handmade.put_image(store, ["quay.io/a/b:1"], [[tars.regular(b"f", b"x")]])
    for path in (store.config.graph_root / "overlay-images" / made.id).iterdir():
        path.unlink()
    with pytest.raises(CorruptStorage) as caught:
        made.manifest()
    assert caught.value.code == "corrupt-storage"


def test_history_goes_with_the_layers(store: Store) -> None:
    layers = [[tars.regular(b"f", b"x")], [tars.regular(b"g", b"x")]]
    made = handmade.put_image(store, [], layers, history=["ADD f", "ADD g", "CMD sh"])
    steps = made.history()
    assert [step.created_by for step in steps] == ["ADD f", "ADD g", "CMD sh"]
    assert [step.layer for step in steps] == [*made.layers(), None]
    assert [step.empty_layer for step in steps] == [False, False, True]


def test_without_history_there_are_no_steps(store: Store) -> None:
    made = handmade.put_image(store, [], [[], [tars.regular(b"f", b"x")]])
    assert made.history() == []


def test_a_missing_layer_is_an_error(store: Store) -> None:
    made = handmade.put_image(store, [], [[], [tars.regular(b"f", b"x")]])
    with store.layer_area.editing() as edit:
        edit.delete([made.layers()[0].id])
    with pytest.raises(CorruptStorage, match="missing"):
        made.layers()


def orphan(store: Store) -> Path:
    directory = store.config.graph_root / "overlay-images" / ("f" * 64)
    directory.mkdir()
    (directory / "manifest").write_text("half")
    return directory


def test_what_a_crash_left_of_an_image_is_removed(store: Store) -> None:
    made = handmade.put_image(store, [], [[]])
    left = orphan(store)
    foreign = left.with_name("not-ours")
    foreign.mkdir()
    with Store.open(store.config).image_area.editing():
        pass
    assert not left.exists()
    assert foreign.exists()
    assert store.image(made.id).manifest() == made.manifest()


def test_nothing_is_removed_when_the_table_was_lost(store: Store) -> None:
    left = orphan(store)
    with store.image_area.editing():
        pass
    assert left.exists()
