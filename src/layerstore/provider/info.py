"""The ``info`` document of a layer, which a client takes over into its layer record.

Keys and their effects: containers/storage, ``Layer`` in layers.go.  A client of
dialect L (containers/storage < 1.54) looks layers up by blob digest and needs
``diff-digest`` and the exact ``diff-size``; one of dialect T (>= 1.54) looks them
up by TOC digest, demands ``toc-digest`` back, and takes the DiffID for export from
the flag ``expected-layer-diffid``.  Nothing else is ever stated: every key would
be believed.
"""

from __future__ import annotations

import enum

import msgspec

from layerstore.image import Digest

_GZIP = 2  # containers/storage archive.Compression


class Dialect(enum.StrEnum):
    """How a client names layers."""

    LAYER = "L"
    TOC = "T"


def layer_info(
    *, diff_id: Digest, diff_size: int, compressed_size: int, verified_digest: Digest | None
) -> bytes:
    """``info`` of dialect L.

    ``verified_digest`` is the blob digest if the whole blob was checked against it:
    a client reuses layers by it later, for any image.
    """
    info: dict[str, object] = {}
    if verified_digest is not None:
        info["compressed-diff-digest"] = verified_digest
    info |= {
        "compressed-size": compressed_size,
        "diff-digest": diff_id,
        "diff-size": diff_size,
        "compression": _GZIP,
    }
    return msgspec.json.encode(info, enc_hook=str)


def toc_info(*, toc_digest: Digest, diff_id: Digest, compressed_size: int) -> bytes:
    """``info`` of dialect T."""
    return msgspec.json.encode(
        {
            "compressed-size": compressed_size,
            "diff-size": -1,
            "compression": _GZIP,
            "toc-digest": toc_digest,
            "flags": {"expected-layer-diffid": diff_id},
        },
        enc_hook=str,
    )
