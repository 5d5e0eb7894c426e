"""Images of a graph root as sources: which blobs are there, and what becomes of the others."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from lab import oci
from lab.simimages import Image, Publisher
from lab.simregistry import SimRegistry
from layerstore.copy.context import CopyContext
from layerstore.copy.docker import RegistryImage
from layerstore.copy.intostorage import IntoStorage
from layerstore.copy.push import push
from layerstore.copy.saveload import save
from layerstore.copy.storage_destination import pull_into
from layerstore.copy.storage_source import StorageSource
from layerstore.errors import NotFound
from layerstore.graphroot.storageconf import LayerStoreSpec, StorageConfig
from layerstore.graphroot.store import Store
from layerstore.image import Digest, Platform, Reference
from layerstore.registry import RegistryClient

NAME = "localhost/built:1"
FILES = [{"base": b"the base\n"}, {"top": b"the top\n"}]
TAR_BYTES = 4608


@pytest.fixture
def lazy(tmp_path: Path, accepting: CopyContext) -> tuple[Store, Image, str]:
    """A storage with a lazy image, known by its blobs (dialect L); the image and its id."""
    stores = tmp_path / "als"
    spec = LayerStoreSpec(stores, with_reference=True)
    config = StorageConfig(tmp_path / "root", tmp_path / "run", additional_layer_stores=(spec,))
    with SimRegistry() as registry, contextlib.ExitStack() as stack:
        image = Publisher(registry).push("a/b", "1", FILES)
        reference = Reference.parse(f"{registry.host}/a/b:1")
        name = base64.b64encode(str(reference).encode()).decode()
        for number, (written, blob) in enumerate(zip(image.layers, image.blobs, strict=True)):
            place = stores / name / written.digest
            (place / "diff").mkdir(parents=True)
            for path, data in FILES[number].items():
                (place / "diff" / path).write_bytes(data)
            info = {"diff-digest": written.diff_id, "diff-size": 10240, "compression": 2}
            info["compressed-diff-digest"] = written.digest
            (place / "info").write_text(json.dumps(info))
            (place / "blob").write_bytes(blob)
        store = Store.open(config)
        assert accepting.source_registry is not None
        client = RegistryClient(accepting.source_registry)
        stack.callback(client.close)
        options = IntoStorage(platform=Platform("linux", "amd64"), toc_layers=False, dialect_l=True)
        result = pull_into(store, RegistryImage(client, reference), [str(reference)], options)
        assert [layer.how for layer in result.layers] == ["als"] * 2
        return store, image, result.image_id


def with_layers(store: Store, image_id: str, digests: Sequence[str], media_type: str) -> None:
    """Another image of the same layers, whose manifest gives them other digests."""
    image = store.image(image_id)
    manifest = json.loads(image.manifest())
    manifest["layers"] = [
        {"mediaType": media_type, "digest": digest, "size": TAR_BYTES} for digest in digests
    ]
    store.put_image(
        image_id="ab" * 32,
        layer=image.top_layer,
        names=[NAME],
        manifest=json.dumps(manifest).encode(),
        config=image.config(),
    )


def test_of_lazy_layers_the_blob_is_there(lazy: tuple[Store, Image, str]) -> None:
    store, image, image_id = lazy
    source = StorageSource(store, image_id)
    for written, blob in zip(image.layers, image.blobs, strict=True):
        assert source.gives_blob(Digest(written.digest))
        with source.open_blob(Digest(written.digest), len(blob)) as stream:
            assert stream.read(1 << 20) == blob


def test_an_image_built_on_lazy_layers_names_their_tar_streams(
    lazy: tuple[Store, Image, str], tmp_path: Path, accepting: CopyContext
) -> None:
    """As Buildah's manifests do."""
    store, image, image_id = lazy
    digests = [layer.diff_id for layer in image.layers]
    with_layers(store, image_id, digests, "application/vnd.oci.image.layer.v1.tar")
    source = StorageSource(store, NAME)
    for digest in map(Digest, digests):
        with source.open_blob(digest, TAR_BYTES) as stream:
            assert Digest.of(stream.read(1 << 20)) == digest
    assert exported(store, tmp_path, accepting) == digests


def test_an_image_of_other_blobs_gets_the_tar_streams_of_lazy_layers(
    lazy: tuple[Store, Image, str], tmp_path: Path, accepting: CopyContext
) -> None:
    store, image, image_id = lazy
    others = [str(Digest.of(layer.digest.encode())) for layer in image.layers]
    with_layers(store, image_id, others, "application/vnd.oci.image.layer.v1.tar+gzip")
    source = StorageSource(store, NAME)
    for digest in map(Digest, others):
        assert not source.gives_blob(digest)
        with pytest.raises(NotFound):
            source.open_blob(digest, TAR_BYTES)
    assert exported(store, tmp_path, accepting) == [layer.diff_id for layer in image.layers]


def exported(store: Store, directory: Path, accepting: CopyContext) -> list[str]:
    """The layers that arrive elsewhere, by their diff IDs: every layer was checked."""
    context = replace(accepting, scratch=directory)
    save(store, [NAME], directory / "saved.tar", context)
    push(NAME, f"oci:{directory / 'pushed'}:1", store, context)
    return [layer.diff_id for layer in oci.read_image(directory / "pushed", "1").layers]
