"""Why a lookup was not answered with a layer.

Each refusal has a stable reason code: the same word in the log, in the counters
of ``layerstore status`` and in docs/troubleshooting.md.  The client then pulls the
layer the ordinary way.
"""

from __future__ import annotations

from layerstore.errors import LayerstoreError


class Refusal(LayerstoreError):
    """The layer is not offered; ``reason`` is one of the codes below or an error's code."""

    code = "refused"

    def __init__(self, reason: str, what: str, *, subject: str = "") -> None:
        super().__init__(what, subject=subject)
        self.reason = reason

    @classmethod
    def of(cls, error: LayerstoreError) -> Refusal:
        """A refusal because of an error."""
        if isinstance(error, Refusal):
            return error
        return cls(error.code, str(error))


BUSY = "busy"
NOT_IN_IMAGE = "not-in-image"
REPEATED = "repeated-layer"
UNKNOWN_LAYER = "unknown-layer"
NO_TOC = "no-toc-annotation"
BAD_TOC = "bad-toc-annotation"
NO_EXTERNAL_TOC = "no-external-toc"
NO_SIZE = "no-uncompressed-size"
NO_DIFF_ID = "no-diff-id"
DIALECT_L_OFF = "dialect-l-off"
ORDINARY_OFF = "ordinary-layers-off"
NOT_HERE = "not-here"
BEING_FETCHED = "being-fetched"
NO_ROOM = "no-room"
CONTRADICTION = "contradiction"
QUARANTINED = "quarantined"
OUTAGE = "outage"
