"""Why a layer would be served, or would not: what ``layerstore explain`` shows.

The judgement is that of real lookups, made in a store that is thrown away, so that the two
cannot drift apart.  Ordinary layers are judged as if nothing was here yet.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass

from layerstore import limits
from layerstore.errors import LayerstoreError
from layerstore.formats.announced import announced
from layerstore.image import Descriptor, Digest, Platform, Reference
from layerstore.image.annotations import layer_toc
from layerstore.provider.policy import Ordinary
from layerstore.provider.refusal import BAD_TOC, BEING_FETCHED, NO_TOC, NOT_HERE
from layerstore.provider.state import View
from layerstore.provider.store import Store


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a dialect finds the layer: ``lazy``, ``once-complete`` or ``never``, and why not."""

    served: str
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ExplainedLayer:
    """A layer of an image; ``size`` is that of the blob in bytes."""

    digest: Digest
    diff_id: Digest
    media_type: str
    form: str
    size: int
    toc_digest: Digest | None
    dialect_l: Verdict
    dialect_t: Verdict


@dataclass(frozen=True, slots=True)
class ExplainedImage:
    """One image of a reference, its layers in order."""

    layers: tuple[ExplainedLayer, ...]


def explain(
    store: Store, reference: Reference, platforms: Collection[Platform] | None, wanted: Ordinary
) -> list[ExplainedImage]:
    """Judge every layer of an image, or of all images of an index if ``platforms`` is None.

    ``store`` is a fresh one under the policy ``known``; ``wanted`` is the real policy for
    ordinary layers.  Raises what the registry and the image deserve.
    """
    deadline = time.monotonic() + limits.RESOLVE_SECONDS
    images = []
    for manifest, diff_ids in store.chosen(reference, platforms, deadline):
        layers = tuple(
            _layer(store, reference, descriptor, diff_id, wanted)
            for descriptor, diff_id in zip(manifest.layers, diff_ids, strict=True)
        )
        images.append(ExplainedImage(layers))
    return images


def _layer(
    store: Store, reference: Reference, descriptor: Descriptor, diff_id: Digest, wanted: Ordinary
) -> ExplainedLayer:
    try:
        promised = announced(descriptor)
        form, toc, problem = promised.form.value, promised.toc_digest, promised.problem
    except LayerstoreError:
        form, toc, problem = "unknown", None, ""
    by_blob = _verdict(store, reference, descriptor.digest)
    if by_blob.reason == NOT_HERE and wanted in (Ordinary.AUTO, Ordinary.EAGER):
        waits = "a lookup waits for it" if wanted is Ordinary.EAGER else "it is fetched for later"
        by_blob = Verdict("once-complete", BEING_FETCHED, f"{by_blob.detail}; {waits}")
    asked = toc or layer_toc(descriptor.annotations)  # clients look at nothing but its digest
    if asked is not None:
        by_toc = _verdict(store, reference, asked)
    elif problem:
        by_toc = Verdict("never", BAD_TOC, problem)
    else:
        why = "clients never ask for a layer without a TOC annotation"
        by_toc = Verdict("never", NO_TOC, why)
    return ExplainedLayer(
        descriptor.digest, diff_id, descriptor.media_type, form, descriptor.size, toc,
        by_blob, by_toc,
    )  # fmt: skip


def _verdict(store: Store, reference: Reference, name: Digest) -> Verdict:
    found = store.judge(str(reference), name)
    if isinstance(found, View):
        return Verdict("lazy")
    served = "once-complete" if found.reason == NOT_HERE else "never"
    return Verdict(served, found.reason, str(found))
