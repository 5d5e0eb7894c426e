"""The ``info`` document of a layer, which a client takes over into its layer record.

Keys and their effects: containers/storage, ``Layer`` in layers.go.  A client of
dialect L (containers/storage < 1.54) looks layers up by blob digest and needs
``diff-digest`` and the exact ``diff-size``; one of dialect T (>= 1.54) looks them
up by TOC digest, demands ``toc-digest`` back, and takes the DiffID for export from
the flag ``expected-layer-diffid``.  Nothing else is ever stated: every key would
be believed, and a client reuses layers by what it believes, for any image.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from layerstore.formats.announced import Form
from layerstore.image import Descriptor, Digest, uncompressed_size
from layerstore.provider import names
from layerstore.provider.refusal import NO_SIZE, Refusal
from layerstore.provider.state import LayerRecord, View

# containers/storage archive.Compression
_COMPRESSION: Final = {
    Form.ESTARGZ: 2,
    Form.TAR: 0,
    Form.TAR_GZIP: 2,
    Form.ZSTD_CHUNKED: 4,
    Form.ZSTD_CHUNKED_V0: 4,
    Form.TAR_ZSTD: 4,
}


def diff_size(record: LayerRecord, descriptor: Descriptor) -> int | None:
    """Exact length in bytes of the layer's tar stream, None if nothing tells it.

    As it was found in the whole blob, as the tar-split gives it, or as the manifest says.
    """
    if record.verified:
        return record.diff_size
    if record.tar_length is not None:
        return record.tar_length
    return uncompressed_size(descriptor.annotations)


def layer_info(record: LayerRecord, diff_id: Digest, descriptor: Descriptor) -> bytes:
    """``info`` of dialect L.

    ``diff_id`` is the one that the image's config states; the blob digest is claimed only if
    all that is said of the layer was checked.  Raises Refusal without a size.
    """
    size = diff_size(record, descriptor)
    if size is None:
        raise Refusal(NO_SIZE, "nothing tells the layer's uncompressed size")
    return _encode(record, {"diff-digest": diff_id, "diff-size": size})


def toc_info(record: LayerRecord, diff_id: Digest) -> bytes:
    """``info`` of dialect T.

    ``diff-digest`` becomes the layer's trusted DiffID, so it is stated only if it was found in
    the whole blob; as ``expected-layer-diffid`` a client checks it.
    """
    known: dict[str, object] = {
        "diff-size": -1,
        "toc-digest": record.toc_digest,
        "flags": {"expected-layer-diffid": diff_id},
    }
    if record.verified:
        known |= {"diff-digest": diff_id, "diff-size": record.diff_size}
    return _encode(record, known)


def unsized(views: Iterable[View]) -> list[str]:
    """The directories of layers whose ``info`` tells no size that a client believes."""
    return [
        names.directory_of(view.reference, view.name)
        for view in views
        if "diff-digest" not in msgspec.json.decode(view.info, type=dict[str, object])
    ]


def _encode(record: LayerRecord, more: dict[str, object]) -> bytes:
    info: dict[str, object] = {}
    if record.verified:
        info["compressed-diff-digest"] = record.blob_digest
    info |= {"compressed-size": record.size, "compression": _COMPRESSION[record.form]}
    return msgspec.json.encode(info | more, enc_hook=str)
