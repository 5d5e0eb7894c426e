"""Images of eStargz layers, pushed into a simulated registry."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lab import tars
from lab.simregistry import SimRegistry
from layerstore.formats import EstargzResult, write_estargz

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"

Files = dict[str, bytes] | Sequence[tars.Member]


@dataclasses.dataclass
class Image:
    """A pushed image: its layers as written and the documents."""

    layers: list[EstargzResult]
    blobs: list[bytes]
    config: dict[str, Any]
    manifest: dict[str, Any]
    digest: str


def layer(files: Files) -> tuple[EstargzResult, bytes]:
    """An eStargz layer of plain files, or of tar members."""
    members: Iterable[tars.Member] = (
        [tars.regular(name.encode(), data) for name, data in files.items()]
        if isinstance(files, dict)
        else files
    )
    tar = io.BytesIO()
    tars.write_tar(tar, members)
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
        files: Sequence[Files],
        *,
        architecture: str = "amd64",
        change: Callable[[dict[str, Any]], None] | None = None,
    ) -> Image:
        """Push an image with one layer for each element of ``files``."""
        written = [layer(one) for one in files]
        for _, blob in written:
            self.registry.add_blob(repository, blob)
        config = {
            "architecture": architecture,
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [result.diff_id for result, _ in written]},
        }
        manifest: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": self._config(repository, config),
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

    def _config(self, repository: str, config: dict[str, Any]) -> dict[str, Any]:
        """Push a config; its descriptor."""
        raw = json.dumps(config).encode()
        return {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": self.registry.add_blob(repository, raw),
            "size": len(raw),
        }

    def push_index(
        self,
        repository: str,
        tag: str,
        images: Sequence[Image],
        others: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Push an index of images that were pushed before, and of ``others``, its last entries."""
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
                ]
                + list(others),
            }
        ).encode()
        self.registry.add_manifest(repository, raw, tag, media_type=OCI_INDEX)

    def attestation(self, repository: str) -> dict[str, Any]:
        """Push an attestation as BuildKit makes it; the entry of the index."""
        config = {
            "architecture": "unknown",
            "os": "unknown",
            "rootfs": {"type": "layers", "diff_ids": ["sha256:" + "5" * 64]},
        }
        statement = b'{"predicate":{}}'
        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": self._config(repository, config),
            "layers": [
                {
                    "mediaType": "application/vnd.in-toto+json",
                    "digest": self.registry.add_blob(repository, statement),
                    "size": len(statement),
                }
            ],
        }
        return self._entry(repository, manifest) | {
            "platform": {"os": "unknown", "architecture": "unknown"},
            "annotations": {"vnd.docker.reference.type": "attestation-manifest"},
        }

    def artifact(self, repository: str) -> dict[str, Any]:
        """Push an artifact that is no image; the entry of the index."""
        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": {
                "mediaType": "application/vnd.oci.empty.v1+json",
                "digest": self.registry.add_blob(repository, b"{}"),
                "size": 2,
            },
            "layers": [
                {
                    "mediaType": "application/vnd.example.report+json",
                    "digest": self.registry.add_blob(repository, b'{"report":1}'),
                    "size": 12,
                }
            ],
        }
        return self._entry(repository, manifest)

    def _entry(self, repository: str, manifest: dict[str, Any]) -> dict[str, Any]:
        raw = json.dumps(manifest).encode()
        self.registry.add_manifest(repository, raw)
        digest = "sha256:" + hashlib.sha256(raw).hexdigest()
        return {"mediaType": OCI_MANIFEST, "digest": digest, "size": len(raw)}


def without_tocs(manifest: dict[str, Any]) -> None:
    """Make the layers ordinary ones: a change for `Publisher.push`."""
    for layer in manifest["layers"]:
        del layer["annotations"]
