"""Layers that an additional layer store has, on their way into a graph root."""

from __future__ import annotations

import msgspec

from layerstore.graphroot.als import AlsLayer
from layerstore.graphroot.records import EXPECTED_DIFF_ID, LayerRecord, now
from layerstore.image import Digest


class AlsOffer(msgspec.Struct, frozen=True):
    """A layer that was found in an additional layer store, to become one of the graph root.

    ``diff_id`` is what the image's config says: nobody has verified it, so it becomes the flag
    that is checked at an export.  ``diff_size`` replaces the store's word.
    """

    layer_id: str
    found: AlsLayer
    diff_id: Digest | None
    diff_size: int | None = None

    def record(self, parent: str) -> LayerRecord:
        """Its record on ``parent``.

        A layer found by its table of contents is known by that alone; one found by its blob
        (dialect L) carries the store's digests, for whoever asked for that.
        """
        facts = self.found.facts
        by_blob = self.found.dialect == "L"
        return LayerRecord(
            id=self.layer_id,
            parent=parent,
            created=now(),
            compressed_diff_digest=facts.compressed_diff_digest if by_blob else None,
            compressed_size=max(facts.compressed_size, 0),
            diff_digest=facts.diff_digest if by_blob else None,
            diff_size=facts.diff_size if self.diff_size is None else self.diff_size,
            toc_digest=None if by_blob else facts.toc_digest,
            compression=facts.compression,
            flags={EXPECTED_DIFF_ID: str(self.diff_id)} if self.diff_id is not None else {},
        )
