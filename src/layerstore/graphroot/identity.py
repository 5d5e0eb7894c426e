"""How layers and images of a graph root get their ids.

A layer that is known by the digest of its uncompressed tar stream (diff ID) is
named after its parent and that digest; a layer that is known only by the digest
of its table of contents has another formula, so that the one can never be taken
for the other.  An image is named after its config; if one of its layers is known
by its table of contents only, the ids of all tables go in as well.

Released versions of containers/image leave the config out of the latter formula,
so that two images with equal layers and different configs share one id and the
second pull silently replaces the first image.  layerstore computes the corrected
formula of March 2026 and knows the old one only to recognise it.
Source: containers/image, storage/storage_dest.go ("layerID", "computeID").
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

from layerstore.errors import UsageError
from layerstore.image import Digest

_WITH_TOC: Final = "@With TOC:"


def layer_id(
    parent: str, *, diff_id: Digest | None = None, toc_digest: Digest | None = None
) -> str:
    """The id of a layer on ``parent`` ("" for a base layer): 64 hex digits.

    Exactly one of ``diff_id`` (verified) and ``toc_digest`` says what the layer
    is known by; anything else raises ``UsageError``.
    """
    if (diff_id is None) == (toc_digest is None):
        raise UsageError("a layer is identified by its diff ID or by its TOC digest")
    if toc_digest is not None:
        return _hashed(f"{parent}+@TOC={toc_digest.hex}")
    assert diff_id is not None
    return _hashed(f"{parent}+{diff_id.hex}") if parent else diff_id.hex


def image_id(config: Digest, tocs: Sequence[Digest | None] = ()) -> str:
    """The id of an image: ``tocs`` has, for each layer, the TOC digest that it is known by or None."""
    if not any(tocs):
        return config.hex
    return _hashed(f"{_WITH_TOC}{config.hex}|{_joined(tocs)}")


def released_image_id(tocs: Sequence[Digest | None]) -> str:
    """The id that containers/image 5.30 to 5.39.2 gives to *every* image with these layers.

    For recognising such records only.  At least one layer is known by its TOC.
    """
    if not any(tocs):
        raise UsageError("an image without TOC-identified layers is named after its config")
    return _hashed(f"{_WITH_TOC}{_joined(tocs)}")


def _joined(tocs: Sequence[Digest | None]) -> str:
    return "".join(f"{toc or ''}|" for toc in tocs)


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
