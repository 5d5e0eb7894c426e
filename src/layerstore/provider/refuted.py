"""Claims about a blob that were found to be false, and who else makes them.

A layer is a set of claims about its blob.  Which of them is false stands before the colon in the
record's ``quarantine``: whoever makes it again is refused, whatever else they claim and under any
name.  Who claims the other things about the same blob is none the worse for it.
"""

from __future__ import annotations

import enum

from layerstore.image import Digest
from layerstore.provider.state import LayerRecord, State


class Claim(enum.StrEnum):
    """What of a layer was false: that the TOC is the blob's, or that its diff ID is."""

    TOC = "toc"
    DIFF_ID = "diff-id"

    def of(self, toc_digest: Digest | None, diff_id: Digest | None) -> Digest | None:
        """The digest that was claimed."""
        return toc_digest if self is Claim.TOC else diff_id


def refuted(
    state: State, blob: Digest, toc_digest: Digest | None, diff_id: Digest | None
) -> str | None:
    """Why one of these claims about a blob is known to be false; None if none is."""
    for record in state.layers_of_blob(blob):
        if not record.quarantine:
            continue
        claim = Claim(record.quarantine.partition(":")[0])
        false = claim.of(record.toc_digest, record.diff_id)
        same = (record.toc_digest, record.diff_id) == (toc_digest, diff_id)
        if same or (false is not None and false == claim.of(toc_digest, diff_id)):
            return record.quarantine
    return None


def also_false(state: State, record: LayerRecord) -> list[LayerRecord]:
    """The layers that are not in quarantine and make the claim for which ``record`` is."""
    return [
        other
        for other in state.layers_of_blob(record.blob_digest)
        if not other.quarantine
        and refuted(state, other.blob_digest, other.toc_digest, other.diff_id) is not None
    ]
