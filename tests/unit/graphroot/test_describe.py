"""What is told about images: the documents of inspect and history."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from lab import tars
from lab.graphroot import layer_tar, open_store, put_container, put_image
from layerstore.errors import CorruptStorage
from layerstore.graphroot import describe, usage
from layerstore.graphroot.store import Store

BASE = layer_tar(tars.regular(b"etc/base", b"base"))
MORE = layer_tar(tars.regular(b"etc/more", b"more and more"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path)


def test_the_document_of_an_image(store: Store, tmp_path: Path) -> None:
    settings = {"Cmd": ["/hello"], "Labels": {"a": "b"}, "User": "me"}
    step = put_image(store, [BASE])
    image = put_image(
        store, [BASE, MORE], "quay.io/team/app:v1", "localhost/x:1", settings=settings
    )
    document = describe.image_document(image)
    assert document["Id"] == image.id
    assert document["RepoTags"] == ["quay.io/team/app:v1", "localhost/x:1"]
    assert document["RepoDigests"] == [
        f"localhost/x@{image.digest}",
        f"quay.io/team/app@{image.digest}",
    ]
    assert document["Parent"] == step.id
    assert document["Config"] == settings
    assert (document["Labels"], document["User"]) == ({"a": "b"}, "me")
    assert document["Annotations"] == {"org.example.note": "a test"}
    assert document["Size"] == image.size() == document["VirtualSize"]
    base, top = image.layers()
    assert document["RootFS"]["Layers"] == [base.diff_id, top.diff_id]
    overlay = tmp_path / "root/overlay"
    assert document["GraphDriver"] == {
        "Name": "overlay",
        "Data": {
            "LowerDir": f"{overlay}/{base.id}/diff",
            "UpperDir": f"{overlay}/{top.id}/diff",
            "WorkDir": f"{overlay}/{top.id}/work",
        },
    }
    assert [layer["DiffID"] for layer in document["Layers"]] == document["RootFS"]["Layers"]
    assert document["Layers"][0] == {
        "Id": base.id,
        "DiffID": base.diff_id,
        "ExpectedDiffID": None,
        "TOCDigest": None,
        "BlobDigest": base.blob_digest,
        "Size": len(BASE),
        "CompressedSize": len(BASE),
        "Source": "local",
        "Lazy": False,
        "DiffPath": f"{overlay}/{base.id}/diff",
        "AdditionalLayer": None,
        "ReadOnly": False,
    }
    msgspec.json.encode(document, enc_hook=str)


def test_layers_of_an_additional_image_store_are_told_apart(tmp_path: Path) -> None:
    shared = open_store(tmp_path / "shared")
    put_image(shared, [BASE], "localhost/base:1")
    store = open_store(tmp_path / "own", tmp_path / "shared/root")
    image = put_image(store, [BASE, MORE], "localhost/app:1")
    below, above = describe.image_document(image)["Layers"]
    assert (below["Source"], below["ReadOnly"]) == ("additional-image-store", True)
    assert (above["Source"], above["ReadOnly"]) == ("local", False)
    assert below["DiffPath"].startswith(str(tmp_path / "shared"))


def test_history_names_the_images_of_its_steps(store: Store) -> None:
    step = put_image(store, [BASE], "localhost/base:1")
    image = put_image(
        store,
        [BASE, MORE],
        "localhost/app:1",
        steps=[
            {"created": "2024-01-01T00:00:00Z", "created_by": "step 0"},
            {"created_by": "ENV a=b", "empty_layer": True, "comment": "a word"},
            {"created_by": "COPY"},
        ],
    )
    newest, empty, oldest = describe.history(image)
    assert (newest.id, newest.created_by, newest.size) == (image.id, "COPY", len(MORE))
    assert newest.tags == ("localhost/app:1",)
    assert (empty.id, empty.size, empty.comment) == (step.id, 0, "a word")
    assert (oldest.id, oldest.size) == (describe.MISSING, len(BASE))
    assert empty.tags == oldest.tags == ("localhost/base:1",)


def test_history_begins_with_the_image_itself(store: Store) -> None:
    first = put_image(store, [BASE], "localhost/first:1")
    steps = [{"created_by": "another"}]
    image = put_image(store, [BASE], "localhost/second:1", steps=steps)
    (step,) = describe.history(image)
    assert step.id == image.id
    assert set(step.tags) == {*first.names, *image.names}


def test_a_step_may_tell_nothing(store: Store) -> None:
    steps: list[Any] = [None, {"created": "2024-01-01T00:00:00.50+02:00"}]
    image = put_image(store, [BASE, MORE], "localhost/app:1", steps=steps)
    newest, oldest = describe.history(image)
    assert newest.created == "2024-01-01T00:00:00.5+02:00"
    assert (oldest.created, oldest.created_by) == ("0001-01-01T00:00:00Z", "")
    assert describe.image_document(image)["History"] == [{}, steps[1]]


def test_the_document_of_a_container(store: Store) -> None:
    image = put_image(store, [BASE], "localhost/app:1")
    identity = put_container(store, image, "c1")
    document = describe.container_document(store, store.container("c1"))
    assert (document["Id"], document["Names"]) == (identity, ["c1"])
    assert (document["Image"], document["ImageName"]) == (image.id, "localhost/app:1")
    assert document["Layers"][0]["Id"] == image.top_layer
    assert document["Layers"][1]["Size"] is None


def test_a_summary_gives_times_as_podman_does(store: Store) -> None:
    put_image(store, [BASE], "localhost/app:1", settings={"Labels": {"a": "b"}})
    (summary,) = usage.summaries(store)
    document = describe.summary_document(summary)
    assert (document["Created"], document["CreatedAt"]) == (1704067200, "2024-01-01T00:00:00Z")
    assert document["Labels"] == {"a": "b"}


def test_a_damaged_config_is_an_error_of_the_storage(store: Store, tmp_path: Path) -> None:
    image = put_image(store, [BASE], "localhost/app:1")
    for path in (tmp_path / "root/overlay-images" / image.id).glob("=*"):
        path.write_bytes(b"{}")
    with pytest.raises(CorruptStorage):
        describe.image_document(image)
    (summary,) = usage.summaries(store)
    assert describe.summary_document(summary)["Labels"] is None
