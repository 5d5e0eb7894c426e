"""Manifests and indexes of images, OCI and Docker version 2 schema 2.

A manifest lists a config and layers, an index lists manifests for several
platforms.  Two readers must never see two things in one document (the
"ambiguous manifest" attack, CVE-2021-41190), so repeated keys, keys that differ
from a known one only in case, fields of the other kind and a media type that
contradicts the Content-Type are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec

from layerstore import limits
from layerstore.errors import InvalidManifest, LimitExceeded
from layerstore.image import media_types
from layerstore.image.annotations import REFERENCE_TYPE
from layerstore.image.digest import Digest, decode_digest
from layerstore.image.platform import Platform

_Size = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
_FIELDS: Final = frozenset(
    ("schemaVersion", "mediaType", "config", "layers", "manifests", "annotations")
)
_DESCRIPTOR_FIELDS: Final = frozenset(("mediaType", "digest", "size", "annotations", "platform"))


class Descriptor(msgspec.Struct, frozen=True, kw_only=True):
    """A pointer to content: what it is, its digest and its size in bytes."""

    media_type: str
    digest: Digest
    size: int
    annotations: dict[str, str] = {}
    platform: Platform | None = None
    urls: tuple[str, ...] = ()

    @property
    def may_be_image(self) -> bool:
        """Whether an entry of an index may be an image, and not an attestation about one or an
        artifact; the manifest itself has the last word (``Manifest.is_image``).
        """
        return self.media_type in media_types.MANIFESTS and REFERENCE_TYPE not in self.annotations


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One image for one platform; ``layers`` from the lowest to the topmost."""

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: dict[str, str] = {}

    @property
    def is_image(self) -> bool:
        """Whether its config is that of a container image, and not of some other artifact."""
        return self.config.media_type in media_types.IMAGE_CONFIGS


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """The manifests of one image, usually one per platform."""

    media_type: str
    manifests: tuple[Descriptor, ...]
    annotations: dict[str, str] = {}

    def select(self, platform: Platform) -> Descriptor | None:
        """The entry that suits ``platform`` best, the first of equals; None if none runs."""
        ranked = (
            (rank, number)
            for number, entry in enumerate(self.manifests)
            if entry.platform is not None and (rank := platform.rank(entry.platform)) is not None
        )
        best = min(ranked, default=None)
        return None if best is None else self.manifests[best[1]]


class _Descriptor(msgspec.Struct, rename="camel"):
    media_type: _Text
    digest: Digest
    size: _Size
    annotations: dict[str, str] | None = None
    platform: Platform | None = None
    urls: tuple[str, ...] | None = None


class _Document(msgspec.Struct, rename="camel"):
    schema_version: int
    media_type: str | None = None
    config: _Descriptor | None = None
    layers: list[_Descriptor] | None = None
    manifests: list[_Descriptor] | None = None
    annotations: dict[str, str] | None = None
    fs_layers: Any = None  # of schema 1
    history: Any = None


_DECODER: Final = msgspec.json.Decoder(_Document, dec_hook=decode_digest)


def parse_manifest(raw: bytes, media_type: str | None = None) -> Manifest | Index:
    """Read a manifest or index.

    ``media_type`` is the Content-Type it came with; one that names no manifest
    type (``text/plain``) says nothing and is ignored.  Raises
    ``InvalidManifest`` and ``LimitExceeded``.
    """
    if len(raw) > limits.MANIFEST_BYTES:
        raise LimitExceeded(
            f"a manifest has at most {limits.MANIFEST_BYTES} bytes, this one {len(raw)}"
        )
    _refuse_ambiguous_keys(raw)
    try:
        document = _DECODER.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidManifest(f"not a manifest: {error}") from error
    if document.schema_version != 2:
        raise InvalidManifest(
            f"schemaVersion is {document.schema_version}, only 2 is supported",
            advice="rebuild or convert an image of the old schema 1",
        )
    kind = _kind(document, media_type)
    if kind in media_types.INDEXES:
        return _index(document, kind)
    return _manifest(document, kind)


def _kind(document: _Document, header: str | None) -> str:
    announced = media_types.essence(header) if header else None
    if announced not in media_types.ALL_MANIFESTS:
        announced = None
    stated = document.media_type
    if stated is None or stated == "":
        if announced in (media_types.DOCKER_LIST, media_types.DOCKER_MANIFEST):
            raise InvalidManifest("a Docker manifest must state its mediaType")
        if announced is not None:
            return announced
        if (document.layers is None) == (document.manifests is None):
            raise InvalidManifest("neither clearly a manifest nor an index")
        is_index = document.layers is None
        return media_types.OCI_INDEX if is_index else media_types.OCI_MANIFEST
    if stated not in media_types.ALL_MANIFESTS:
        raise InvalidManifest(f"mediaType {stated[:160]!r} is no image manifest")
    if announced is not None and announced != stated:
        raise InvalidManifest(f"mediaType is {stated}, but it was served as {announced}")
    return stated


def _manifest(document: _Document, kind: str) -> Manifest:
    _refuse_fields(document, kind, "manifests", "fs_layers", "history")
    if document.config is None or document.layers is None:
        raise InvalidManifest("a manifest needs config and layers")
    if len(document.layers) > limits.MANIFEST_LAYERS:
        raise LimitExceeded(
            f"a manifest has at most {limits.MANIFEST_LAYERS} layers,"
            f" this one {len(document.layers)}"
        )
    return Manifest(
        media_type=kind,
        config=_descriptor(document.config),
        layers=tuple(map(_descriptor, document.layers)),
        annotations=_annotations(document.annotations),
    )


def _index(document: _Document, kind: str) -> Index:
    _refuse_fields(document, kind, "config", "layers", "fs_layers", "history")
    manifests = document.manifests or []
    if len(manifests) > limits.INDEX_MANIFESTS:
        raise LimitExceeded(
            f"an index has at most {limits.INDEX_MANIFESTS} manifests, this one {len(manifests)}"
        )
    return Index(
        media_type=kind,
        manifests=tuple(map(_descriptor, manifests)),
        annotations=_annotations(document.annotations),
    )


def _refuse_fields(document: _Document, kind: str, *names: str) -> None:
    for name in names:
        if getattr(document, name) is not None:
            raise InvalidManifest(f"ambiguous: {kind} with a field {name!r}")


def _descriptor(raw: _Descriptor) -> Descriptor:
    return Descriptor(
        media_type=raw.media_type,
        digest=raw.digest,
        size=raw.size,
        annotations=_annotations(raw.annotations),
        platform=raw.platform,
        urls=raw.urls or (),
    )


def _annotations(value: dict[str, str] | None) -> dict[str, str]:
    if value is not None and len(value) > limits.ANNOTATIONS:
        raise LimitExceeded(f"at most {limits.ANNOTATIONS} annotations are taken")
    return value or {}


def _refuse_ambiguous_keys(raw: bytes) -> None:
    # msgspec keeps the last of repeated keys without a word, and Go's decoder
    # ignores case; the plain decoder sees every pair.
    try:
        document = json.loads(raw, object_pairs_hook=_checked_object)
    except (ValueError, RecursionError) as error:
        raise InvalidManifest(f"not JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidManifest("not a JSON object")
    _refuse_case_variants(document, _FIELDS)


def _checked_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise InvalidManifest("ambiguous: a JSON object repeats a key")
    if "digest" in value and "size" in value:
        _refuse_case_variants(value, _DESCRIPTOR_FIELDS)
    return value


def _refuse_case_variants(value: Mapping[str, Any], fields: frozenset[str]) -> None:
    folded = {name.casefold() for name in fields}
    for key in value:
        if key not in fields and key.casefold() in folded:
            raise InvalidManifest(f"ambiguous: field {key!r} differs from a known one in case")
