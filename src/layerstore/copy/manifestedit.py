"""Manifests for a destination: the same bytes if nothing changes, else as little as can be.

Two families of manifests say the same in other words: OCI, and Docker's version 2 schema 2
("v2s2").  Between them only media types differ, and what Docker's has no place for, the
annotations, is lost.  The config stays byte for byte, and with it the image's ID.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from layerstore.errors import UnsupportedFormat
from layerstore.formats import Compression
from layerstore.image import Descriptor, Digest, Manifest, media_types

_STALE_PREFIXES: Final = (
    "io.github.containers.zstd-chunked.",
    "io.containers.zstd-chunked.",
    "containerd.io/snapshot/remote/",
    "containerd.io/snapshot/stargz/",
    "io.containers.estargz.",
)
_FOREIGN_DOCKER: Final = "application/vnd.docker.image.rootfs.foreign.diff.tar"
_FOREIGN_OCI: Final = "application/vnd.oci.image.layer.nondistributable.v1.tar"


class Family(enum.Enum):
    """Which words a manifest uses."""

    OCI = "oci"
    DOCKER = "v2s2"

    @classmethod
    def of(cls, media_type: str) -> Family:
        """The family of a manifest or index."""
        docker = (media_types.DOCKER_MANIFEST, media_types.DOCKER_LIST)
        return cls.DOCKER if media_type in docker else cls.OCI

    @property
    def manifest(self) -> str:
        """The media type of manifests."""
        return media_types.OCI_MANIFEST if self is Family.OCI else media_types.DOCKER_MANIFEST

    @property
    def index(self) -> str:
        """The media type of indexes."""
        return media_types.OCI_INDEX if self is Family.OCI else media_types.DOCKER_LIST

    @property
    def config(self) -> str:
        """The media type of image configs."""
        return media_types.OCI_CONFIG if self is Family.OCI else media_types.DOCKER_CONFIG


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What the media type of a layer says."""

    compression: Compression
    distributed: bool  # False: to be had from its own URLs only


def _table() -> dict[tuple[Family, LayerKind], str]:
    none, gzip, zstd = Compression.NONE, Compression.GZIP, Compression.ZSTD
    oci, docker = Family.OCI, Family.DOCKER
    return {
        (oci, LayerKind(none, True)): media_types.OCI_LAYER,
        (oci, LayerKind(gzip, True)): media_types.OCI_LAYER_GZIP,
        (oci, LayerKind(zstd, True)): media_types.OCI_LAYER_ZSTD,
        (oci, LayerKind(none, False)): _FOREIGN_OCI,
        (oci, LayerKind(gzip, False)): f"{_FOREIGN_OCI}+gzip",
        (oci, LayerKind(zstd, False)): f"{_FOREIGN_OCI}+zstd",
        (docker, LayerKind(none, True)): media_types.DOCKER_LAYER,
        (docker, LayerKind(gzip, True)): media_types.DOCKER_LAYER_GZIP,
        (docker, LayerKind(zstd, True)): media_types.DOCKER_LAYER_ZSTD,
        (docker, LayerKind(none, False)): _FOREIGN_DOCKER,
        (docker, LayerKind(gzip, False)): f"{_FOREIGN_DOCKER}.gzip",
    }


_TYPES: Final = _table()
_KINDS: Final = {media_type: kind for (_, kind), media_type in _TYPES.items()}


def layer_kind(media_type: str) -> LayerKind | None:
    """What a layer's media type says; None if it is no file system layer."""
    return _KINDS.get(media_type)


def layer_type(media_type: str, family: Family) -> str:
    """The media type that says the same in ``family``; itself if there is none."""
    kind = _KINDS.get(media_type)
    return media_type if kind is None else _TYPES.get((family, kind), media_type)


@dataclass(frozen=True, slots=True)
class CopiedLayer:
    """What a layer is at the destination; ``compression`` None if it stayed as it was."""

    digest: Digest
    size: int
    compression: Compression | None = None


def is_image(manifest: Manifest) -> bool:
    """Whether this is a container image, all of whose layers are file system layers."""
    return manifest.is_image and all(layer_kind(layer.media_type) for layer in manifest.layers)


def edit_manifest(
    raw: bytes, manifest: Manifest, family: Family, layers: Sequence[CopiedLayer]
) -> tuple[bytes, str]:
    """The manifest with these layers, in the words of ``family``; and its media type.

    Raises ``UnsupportedFormat`` for what cannot be said in that family.
    """
    if Family.of(manifest.media_type) is family:
        if all(layer.compression is None for layer in layers):
            return raw, manifest.media_type
        document = json.loads(raw)
        document["layers"] = [
            _changed(entry, old, new, family)
            for entry, old, new in zip(document["layers"], manifest.layers, layers, strict=True)
        ]
        return encode(document), family.manifest
    if not is_image(manifest):
        raise UnsupportedFormat(f"no container image, so its manifest cannot become {family.value}")
    document = json.loads(raw)
    converted: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": family.manifest,
        "config": _described(family.config, manifest.config.digest, manifest.config.size),
        "layers": [
            _converted(old, new, family) for old, new in zip(manifest.layers, layers, strict=True)
        ],
    }
    return encode(converted), family.manifest


def edit_index(
    raw: bytes, media_type: str, family: Family, entries: Mapping[int, tuple[str, Digest, int]]
) -> tuple[bytes, str]:
    """The index with the entries of these numbers only, in the words of ``family``.

    ``entries`` gives media type, digest and size of each.
    """
    document = json.loads(raw)
    old = document.get("manifests") or []
    new = []
    for number, (kind, digest, size) in sorted(entries.items()):
        new.append(old[number] | {"mediaType": kind, "digest": str(digest), "size": size})
    same_family = Family.of(media_type) is family
    if same_family and new == old:
        return raw, media_type
    document["manifests"] = new
    if not same_family:
        document["mediaType"] = family.index
        if family is Family.DOCKER:
            for key in ("annotations", "artifactType", "subject"):
                document.pop(key, None)
            for entry in new:
                entry.pop("annotations", None)
    return encode(document), family.index


def encode(document: Mapping[str, Any]) -> bytes:
    """A document's bytes."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def stale(key: str) -> bool:
    """Whether an annotation of a layer speaks of its bytes, and falls with them."""
    return key.startswith(_STALE_PREFIXES)


def _changed(
    entry: dict[str, Any], old: Descriptor, new: CopiedLayer, family: Family
) -> dict[str, Any]:
    if new.compression is None:
        return entry
    entry = entry | _described(_type(old, new, family), new.digest, new.size)
    kept = {key: value for key, value in old.annotations.items() if not stale(key)}
    entry.pop("annotations", None)
    return entry | ({"annotations": kept} if kept else {})


def _converted(old: Descriptor, new: CopiedLayer, family: Family) -> dict[str, Any]:
    entry = _described(_type(old, new, family), new.digest, new.size)
    if old.urls:
        entry["urls"] = list(old.urls)
    return entry


def _type(old: Descriptor, new: CopiedLayer, family: Family) -> str:
    kind = layer_kind(old.media_type)
    if kind is None:
        raise UnsupportedFormat(f"a layer of type {old.media_type} cannot be changed")
    wanted = LayerKind(new.compression or kind.compression, kind.distributed)
    found = _TYPES.get((family, wanted))
    if found is None or (family is Family.DOCKER and wanted.compression is Compression.ZSTD):
        raise UnsupportedFormat("zstd layers have no place in Docker's manifests")
    return found


def _described(media_type: str, digest: Digest, size: int) -> dict[str, Any]:
    return {"mediaType": media_type, "size": size, "digest": str(digest)}
