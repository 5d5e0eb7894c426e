"""Images of eStargz layers in a simulated registry, and stores on them."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lab import tars
from lab.simregistry import SimRegistry
from layerstore.formats import EstargzResult, write_estargz
from layerstore.image import Digest
from layerstore.provider import Refusal, Store, View
from layerstore.registry import RegistryClient, RegistrySettings
from layerstore.registry.registriesconf import RegistriesConf

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"


@dataclasses.dataclass
class Image:
    """A pushed image: its layers as written and the documents."""

    layers: list[EstargzResult]
    blobs: list[bytes]
    config: dict[str, Any]
    manifest: dict[str, Any]
    digest: str


def layer(files: dict[str, bytes]) -> tuple[EstargzResult, bytes]:
    tar = io.BytesIO()
    tars.write_tar(tar, [tars.regular(name.encode(), data) for name, data in files.items()])
    tar.seek(0)
    out = io.BytesIO()
    return write_estargz(tar, out), out.getvalue()


class Publisher:
    """Pushes images into a simulated registry; ``change`` may spoil the manifest before."""

    def __init__(self, registry: SimRegistry) -> None:
        self.registry = registry

    def push(
        self,
        repository: str,
        tag: str | None,
        files: Sequence[dict[str, bytes]],
        *,
        architecture: str = "amd64",
        change: Callable[[dict[str, Any]], None] | None = None,
    ) -> Image:
        written = [layer(one) for one in files]
        for _, blob in written:
            self.registry.add_blob(repository, blob)
        config = {
            "architecture": architecture,
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [result.diff_id for result, _ in written]},
        }
        raw_config = json.dumps(config).encode()
        manifest: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": self.registry.add_blob(repository, raw_config),
                "size": len(raw_config),
            },
            "layers": [
                {
                    "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                    "digest": result.digest,
                    "size": result.size,
                    "annotations": result.annotations,
                }
                for result, _ in written
            ],
        }
        if change is not None:
            change(manifest)
        raw = json.dumps(manifest).encode()
        digest = "sha256:" + hashlib.sha256(raw).hexdigest()
        self.registry.add_manifest(repository, raw, *([tag] if tag else []))
        return Image(
            [result for result, _ in written],
            [blob for _, blob in written],
            config,
            manifest,
            digest,
        )

    def push_index(self, repository: str, tag: str, images: Sequence[Image]) -> None:
        raw = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": OCI_INDEX,
                "manifests": [
                    {
                        "mediaType": OCI_MANIFEST,
                        "digest": image.digest,
                        "size": 1,
                        "platform": {"os": "linux", "architecture": image.config["architecture"]},
                    }
                    for image in images
                ],
            }
        ).encode()
        self.registry.add_manifest(repository, raw, tag, media_type=OCI_INDEX)


class Asker:
    """A store that can be restarted, and lookups that wait for their answer."""

    def __init__(self, root: Path, registry: SimRegistry) -> None:
        self.root = root
        self.registry = registry
        self.options: dict[str, bool] = {"background": False}
        self.store = self.open()

    def open(self) -> Store:
        settings = RegistrySettings(
            registries=RegistriesConf(), tls_verify=False, attempts=2, read_seconds=2.0
        )
        self.client = RegistryClient(settings)
        self.store = Store(self.root, self.client, **self.options)
        return self.store

    def restart(self) -> None:
        self.close()
        self.open()

    def close(self) -> None:
        self.store.close()
        self.client.close()

    def lookup(self, reference: str, name: str, seconds: float = 30.0) -> View | Refusal:
        done = threading.Event()
        answers: list[View | Refusal] = []

        def answer(result: View | Refusal) -> None:
            answers.append(result)
            done.set()

        self.store.resolve(reference, Digest(name), answer)
        assert done.wait(seconds), "the lookup was never answered"
        assert len(answers) == 1
        return answers[0]

    def view(self, reference: str, name: str) -> View:
        result = self.lookup(reference, name)
        assert isinstance(result, View), result
        return result

    def reason(self, reference: str, name: str) -> str:
        result = self.lookup(reference, name)
        assert isinstance(result, Refusal), result
        return result.reason

    def read(self, view: View, path: str) -> bytes:
        """Read a file of the layer as the file system would."""
        opened = self.store.layers.open(view.slot)
        entry = opened.index.entry_of_path(path.encode())
        assert entry is not None
        size = opened.index.inode(entry).size
        done = threading.Event()
        errors: list[Exception | None] = []

        def finish(error: Exception | None) -> None:
            errors.append(error)
            done.set()

        opened.content.fetch(entry, 0, size, finish)
        assert done.wait(30)
        if errors[0] is not None:
            raise errors[0]
        data = opened.content.read_stored(entry, 0, size)
        assert data is not None
        return data


@pytest.fixture
def registry() -> Iterator[SimRegistry]:
    with SimRegistry() as simulated:
        yield simulated


@pytest.fixture
def publisher(registry: SimRegistry) -> Publisher:
    return Publisher(registry)


@pytest.fixture
def asker(tmp_path: Path, registry: SimRegistry) -> Iterator[Asker]:
    asker = Asker(tmp_path / "state", registry)
    yield asker
    asker.close()
