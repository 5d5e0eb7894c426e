"""Which layer that is there already may stand for which layer of an image: rules, no I/O.

A layer of an image has three names.  The manifest gives the digest of its blob and perhaps
that of its table of contents (TOC, an annotation); the config gives the digest of its tar
stream (diff ID).  Which of them somebody has *checked* decides what a layer of the storage
may be used for:

* a layer that was extracted from a whole tar stream answers for its diff ID;
* a layer that lies in an additional layer store was never compared with a blob or a tar
  stream.  It answers for the TOC digest by which it was found, and for nothing else, whatever
  its record says: the record may be a store's word that Podman took over.  Otherwise the
  publisher of one image, who chooses a blob digest, a diff ID and a TOC that do not belong
  together, would decide what is in the images of others.

The one exception is dialect L, in which a layer is looked up by its blob digest and all of it
is the store's word; it is used only by those who ask for it.

Order: a checked layer of the storage in its place, else its content, else one found by TOC in
the storage, else one in a layer store, else the blob.  Differences from containers/image
(storage/storage_dest.go), which asks the layer store first: an image whose layers are there
and checked gets no second, lazy copy of them.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from layerstore.errors import InvalidManifest, UnsupportedFormat
from layerstore.graphroot.identity import image_id, layer_id, released_image_id
from layerstore.graphroot.records import LayerRecord
from layerstore.image import Descriptor, Digest, ImageConfig, Manifest, media_types
from layerstore.image.annotations import layer_toc

_CONFIGS: Final = (media_types.OCI_CONFIG, media_types.DOCKER_CONFIG)
_LAYERS: Final = frozenset(
    (
        media_types.OCI_LAYER,
        media_types.OCI_LAYER_GZIP,
        media_types.OCI_LAYER_ZSTD,
        media_types.DOCKER_LAYER,
        media_types.DOCKER_LAYER_GZIP,
        media_types.DOCKER_LAYER_ZSTD,
    )
)


class How(enum.StrEnum):
    """Where a layer of a pulled image came from."""

    SHARED = "shared"
    """It was in the storage, in its place."""
    TOC = "toc"
    """So it was, known by its TOC."""
    ALS = "als"
    """From an additional layer store: lazily."""
    LOCAL = "local"
    """Its content was in the storage, and was copied."""
    PULLED = "pulled"
    """From the source of the image."""


class WantedLayer(msgspec.Struct, frozen=True):
    """Layer number ``index``, from 0 at the bottom, of the image that is to be there."""

    index: int
    descriptor: Descriptor
    diff_id: Digest
    toc: Digest | None


def require_image(manifest: Manifest) -> None:
    """Raise ``UnsupportedFormat`` for a manifest that is no container image's."""
    if manifest.config.media_type not in _CONFIGS:
        raise UnsupportedFormat(
            f"not a container image: its config is {manifest.config.media_type[:160]!r}",
            advice="only images can be pulled, not other artifacts",
        )


def wanted_layers(manifest: Manifest, config: ImageConfig) -> tuple[WantedLayer, ...]:
    """The layers of an image, lowest first.

    Raises ``InvalidManifest`` when manifest and config do not belong together, and
    ``UnsupportedFormat`` for layers that are no tar archives or lie elsewhere.
    """
    if len(manifest.layers) != len(config.diff_ids):
        raise InvalidManifest(
            f"the manifest lists {len(manifest.layers)} layers,"
            f" the config {len(config.diff_ids)} diff IDs"
        )
    return tuple(
        WantedLayer(number, _checked(layer), _diff_id(diff_id), layer_toc(layer.annotations))
        for number, (layer, diff_id) in enumerate(
            zip(manifest.layers, config.diff_ids, strict=True)
        )
    )


def _checked(layer: Descriptor) -> Descriptor:
    if layer.media_type not in _LAYERS:
        raise UnsupportedFormat(
            f"layers of the type {layer.media_type[:160]!r} are not supported",
            subject=layer.digest,
        )
    if layer.urls:
        raise UnsupportedFormat(
            f"a foreign layer, to be fetched from {layer.urls[0][:160]!r}: refused",
            subject=layer.digest,
            advice="push the image with all of its layers",
        )
    return layer


def _diff_id(diff_id: Digest) -> Digest:
    if diff_id.algorithm != "sha256":
        raise UnsupportedFormat(
            "only sha256 diff IDs are supported: layers are named after them", subject=diff_id
        )
    return diff_id


# -- what a stored layer answers for ----------------------------------------------------


def proven_diff_id(record: LayerRecord, *, lazy: bool) -> Digest | None:
    """The diff ID that the content of a stored layer was checked against, if any.

    ``lazy``: the content lies in an additional layer store.
    """
    if record.incomplete or lazy or proven_toc(record) is not None:
        return None
    return record.diff_digest


def proven_toc(record: LayerRecord) -> Digest | None:
    """The TOC digest that a stored layer is known by, if it is known by one.

    Its id tells, which nobody makes by accident; the key alone also stands in records of
    layers whose whole tar stream was checked.
    """
    toc = record.toc_digest
    if record.incomplete or toc is None or toc.algorithm != "sha256":
        return None
    return toc if record.id == layer_id(record.parent, toc_digest=toc) else None


def layer_ids(parent: str, diff_id: Digest) -> tuple[str, str]:
    """The ids that a checked layer on ``parent`` can have, the usual one first.

    The other is for the case that the usual one is taken by a layer that nobody checked
    (dialect L).
    """
    other = hashlib.sha256(f"{parent}+@VERIFIED={diff_id.hex}".encode()).hexdigest()
    return layer_id(parent, diff_id=diff_id), other


def in_place(record: LayerRecord, parent: str, diff_id: Digest, *, lazy: bool) -> bool:
    """Whether a stored layer *is* the checked layer ``diff_id`` on ``parent``."""
    return (
        record.parent == parent
        and record.id in layer_ids(parent, diff_id)
        and proven_diff_id(record, lazy=lazy) == diff_id
    )


def in_place_by_toc(record: LayerRecord, parent: str, toc: Digest) -> bool:
    """Whether a stored layer is the one on ``parent`` that is known by ``toc``."""
    return record.parent == parent and proven_toc(record) == toc


def in_place_by_word(record: LayerRecord, parent: str, wanted: WantedLayer) -> bool:
    """Whether a stored layer is ``wanted`` by a store's word (dialect L)."""
    return (
        not record.incomplete
        and record.parent == parent
        and record.id == layer_id(parent, diff_id=wanted.diff_id)
        and record.diff_digest == wanted.diff_id
        and record.compressed_diff_digest in (None, wanted.descriptor.digest)
    )


# -- ids of images -------------------------------------------------------------------------


class KnownImage(msgspec.Struct, frozen=True):
    """What there is under an image id: the digests of its manifest and config, its layer."""

    manifest: Digest | None
    config: Digest | None
    top_layer: str


class ImageChoice(msgspec.Struct, frozen=True):
    """The id for an image; ``replace``: a record with that id is there and is this image."""

    id: str
    replace: bool


def choose_image_id(
    config: Digest,
    manifest: Digest,
    tocs: Sequence[Digest | None],
    top_layer: str,
    known: Callable[[str], KnownImage | None],
    *,
    usual_layers: bool = True,
) -> ImageChoice:
    """The id for the image of ``manifest`` whose layers are in the storage.

    ``tocs`` has for each layer the TOC digest by which it is identified, or None.  ``known``
    looks an id up.  Without ``usual_layers`` some layer has not the id that others give it
    (``layer_ids``): under the usual id of the image, Podman refuses to pull it ("already
    exists, but uses a different top layer"), so that id is left to Podman.  A record with the
    same layers, config and manifest is this image, also under the id of released versions of
    containers/image, which several images may share. Where all layers are checked, another
    manifest does not matter: the record gets ours.
    """
    usual = image_id(config, tocs)
    by_toc = any(tocs)
    other = hashlib.sha256(f"@layerstore:{manifest}|{top_layer}".encode()).hexdigest()
    ids = [usual, *([released_image_id(tocs)] if by_toc else []), other]
    found = {one: known(one) for one in ids}
    for one, image in found.items():
        if image is None or image.top_layer != top_layer or image.config != config:
            continue
        if manifest == image.manifest or (one == usual and not by_toc):
            return ImageChoice(one, replace=True)
    # What is under the usual id is another image: as if containers/image had merged them.
    free = usual_layers and found[usual] is None
    return ImageChoice(usual if free else other, replace=False)
