"""Layer records that newer containers/storage forgets, made again from what is left.

containers/storage 1.58 and later (Podman >= 5.5, CRI-O >= 1.33) keep the record of a
layer that came from an additional layer store in memory only: the next process has the
image, whose top layer nobody knows.  Left on disk are the image with its manifest and
config, and of each layer ``overlay/<id>/{additionallayer,diff,link,lower}``.

A record is made again only if everything agrees: the layer's id follows, by the formula,
from the ids below it and the TOC digest in the manifest (or the diff ID in the config),
up to the top layer that the image names; ``additionallayer`` leads to a directory of that
very digest; ``diff`` leads there.  ``lower`` follows from the layers below and is written as
they make it: whoever pulled a lower one again meanwhile may have renamed it.  ``info`` of the
store is asked for sizes, and may only confirm identities.  Where the store does not answer, the
sizes are those of the manifest.

The uses that the forgetful client told the store of are those of the new records: none is
counted again.  Source: als-protocol 3.6; tried with Podman 4.3.1 and 5.4.2.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from layerstore import limits
from layerstore.errors import CorruptStorage, LayerstoreError
from layerstore.graphroot import als
from layerstore.graphroot.alsinfo import LayerFacts
from layerstore.graphroot.identity import layer_id
from layerstore.graphroot.images import Image
from layerstore.graphroot.layers import LayerArea
from layerstore.graphroot.overlay import Overlay
from layerstore.graphroot.records import EXPECTED_DIFF_ID, LayerRecord, now
from layerstore.image import Descriptor, Digest, media_types
from layerstore.image.annotations import layer_toc, uncompressed_size

_log = logging.getLogger(__name__)
_NONE, _GZIP, _ZSTD = 0, 2, 4  # as records count compressions
_COMPRESSIONS: Final = {
    media_types.OCI_LAYER: _NONE,
    media_types.DOCKER_LAYER: _NONE,
    media_types.OCI_LAYER_ZSTD: _ZSTD,
    media_types.DOCKER_LAYER_ZSTD: _ZSTD,
}

ReadInfo = Callable[[Path], LayerFacts]


@dataclass(frozen=True, slots=True)
class _Step:
    """One layer of an image in the place where it must be: its id follows from the rest."""

    id: str
    parent: str
    blob: Descriptor
    diff_id: Digest
    toc: Digest | None  # None: identified by its diff ID


def rebuild_image(
    areas: Sequence[LayerArea], image: Image, *, read_info: ReadInfo | None = None
) -> tuple[str, ...]:
    """Make the missing layer records of ``image`` again; the ids of these layers.

    ``areas`` are those of a store, its own first.  Raises ``CorruptStorage`` saying what does not
    fit when it cannot be done, and leaves everything as it is then.
    """
    area, known = areas[0], _records(areas)
    if _complete(image.top_layer, known):
        return ()
    lost = [step for step in _chain(area.overlay, image, known) if step.id not in known]
    facts = {step.id: _facts(area.overlay, step, read_info or als.read_info) for step in lost}
    with area.editing() as edit:
        made = []
        for step in lost:
            if edit.get(step.id) is None:
                _require_in_place(area.overlay, step)
                area.overlay.mend_lower(step.id, step.parent)
                edit.put(_record(step, facts[step.id]))
                made.append(step.id)
        if made:
            edit.save()
    for layer in made:
        _log.warning("event=layer-record-rebuilt image=%s layer=%s", image.id, layer)
    return tuple(made)


def needs_rebuilding(images: Iterable[Image], areas: Sequence[LayerArea]) -> list[Image]:
    """The images of the store itself of which at least one layer has no record."""
    known = _records(areas)
    return [
        image for image in images if not image.read_only and not _complete(image.top_layer, known)
    ]


# -- which layers there must be -----------------------------------------------------------


def _records(areas: Sequence[LayerArea]) -> dict[str, LayerRecord]:
    return {record.id: record for area in reversed(areas) for record in area.records()}


def _complete(top: str, known: Mapping[str, LayerRecord]) -> bool:
    layer = top
    for _ in range(len(known) + 1):
        if not layer:
            return True
        if layer not in known:
            return False
        layer = known[layer].parent
    return True  # a circle is for others to find


def _chain(overlay: Overlay, image: Image, known: Mapping[str, LayerRecord]) -> list[_Step]:
    """The layers of ``image``, base first, as the ids of manifest and config make them."""
    subject = f"image {image.id}"
    manifest, config = image.parsed_manifest(), image.parsed_config()
    if len(manifest.layers) != len(config.diff_ids):
        raise CorruptStorage(
            "manifest and config have different numbers of layers", subject=subject
        )
    # Each layer may be known by its diff ID or by its TOC: follow what is there.
    ways: dict[str, list[_Step]] = {"": []}
    for number, (blob, diff_id) in enumerate(zip(manifest.layers, config.diff_ids, strict=True)):
        further: dict[str, list[_Step]] = {}
        for parent, way in ways.items():
            for toc in dict.fromkeys((None, layer_toc(blob.annotations))):
                found = (
                    layer_id(parent, toc_digest=toc) if toc else layer_id(parent, diff_id=diff_id)
                )
                if found in known or overlay.exists(found):
                    further[found] = [*way, _Step(found, parent, blob, diff_id, toc)]
        if not further:
            raise CorruptStorage(
                f"nothing is left of layer {number + 1} of {len(manifest.layers)} ({blob.digest})",
                subject=subject,
                advice="pull the image again",
            )
        ways = dict(list(further.items())[: limits.REPAIR_WAYS])
    if image.top_layer not in ways:
        raise CorruptStorage(
            "the ids of its layers do not lead to its top layer",
            subject=subject,
            advice="pull the image again",
        )
    return ways[image.top_layer]


# -- whether what is left is that layer -----------------------------------------------------


def _require_in_place(overlay: Overlay, step: _Step) -> Path:
    """The layer's directory in its layer store, if all that is left of the layer fits."""
    additional = overlay.additional_layer(step.id)
    if additional is None:
        raise CorruptStorage(
            "an ordinary layer without a record cannot be proved to be whole",
            subject=f"layer {step.id}",
            advice="pull the image again",
        )
    wanted = step.toc or step.blob.digest
    if additional.name != wanted:
        raise CorruptStorage(
            f"additionallayer leads to {additional.name[:80]!r}, the image wants {wanted}",
            subject=f"layer {step.id}",
        )
    try:
        target = os.readlink(overlay.diff_path(step.id))
    except OSError as error:
        raise CorruptStorage(
            f"diff is no link: {error.strerror}", subject=f"layer {step.id}"
        ) from error
    if target != str(additional / "diff"):
        raise CorruptStorage(
            "diff leads to another place than additionallayer", subject=f"layer {step.id}"
        )
    overlay.link(step.id)  # recreated where it is lost, refused where it cannot be
    return additional


def _facts(overlay: Overlay, step: _Step, read_info: ReadInfo) -> LayerFacts:
    additional = _require_in_place(overlay, step)
    stated = LayerFacts(
        compressed_size=max(step.blob.size, 0),
        diff_size=uncompressed_size(step.blob.annotations) or -1,
        compression=_COMPRESSIONS.get(step.blob.media_type, _GZIP),
    )
    try:
        said = read_info(additional)
    except (OSError, LayerstoreError) as error:
        _log.info("the store does not give info of %s: %s", additional, error)
        return stated
    if step.toc is not None and said.toc_digest != step.toc:
        raise CorruptStorage("the store has another TOC there", subject=str(additional))
    if step.toc is None and said.diff_digest not in (None, step.diff_id):
        raise CorruptStorage("the store has another diff ID there", subject=str(additional))
    return LayerFacts(
        compressed_size=said.compressed_size or stated.compressed_size,
        diff_size=said.diff_size if said.diff_size >= 0 else stated.diff_size,
        compression=said.compression or stated.compression,
    )


def _record(step: _Step, facts: LayerFacts) -> LayerRecord:
    return LayerRecord(
        id=step.id,
        parent=step.parent,
        created=now(),
        compressed_size=facts.compressed_size,
        diff_digest=None if step.toc is not None else step.diff_id,
        toc_digest=step.toc,
        diff_size=facts.diff_size,
        compression=facts.compression,
        flags={EXPECTED_DIFF_ID: str(step.diff_id)},
    )
