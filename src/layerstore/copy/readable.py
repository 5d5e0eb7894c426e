"""Whether a layer that was written can be read lazily: judged by those who are to read it.

Extraction follows a name wherever it leads, through links of the same layer and ``..``; readers
of a table of contents take it as it stands.  A layer that needs the former is pulled as ever, and
never served.
"""

from __future__ import annotations

import os
from typing import BinaryIO

from layerstore.copy.layerform import WrittenLayer
from layerstore.errors import ContentError
from layerstore.formats import FOOTER_BYTES, iter_toc, parse_footer, read_toc
from layerstore.formats.announced import Form, announced
from layerstore.formats.members import Packing
from layerstore.formats.zstdchunked import read_zstd_toc
from layerstore.image import Descriptor
from layerstore.layertree import build_index


def why_unreadable(written: WrittenLayer, media_type: str, blob: BinaryIO) -> str:
    """What keeps a layer store from showing a layer; nothing if it can be shown.

    ``blob`` is seekable.  Raises OSError.
    """
    try:
        layer = Descriptor(
            media_type=media_type,
            digest=written.digest,
            size=written.size,
            annotations=written.annotations,
        )
        promised = announced(layer)
        if promised.toc_digest is None:
            return promised.problem
        if promised.toc is not None:
            end = promised.toc.offset
            packed = _range(blob, end, promised.toc.size)
            toc = read_zstd_toc(packed, promised.toc_digest, compressed_digest=True)
        else:
            tail = min(FOOTER_BYTES, written.size)
            footer = parse_footer(_range(blob, written.size - tail, tail), written.size)
            end = footer.toc_offset
            toc = read_toc(written.external_toc or _range(blob, end, footer.toc_size))
        with open(os.devnull, "wb") as nowhere:
            build_index(
                iter_toc(toc),
                nowhere,
                blob_size=written.size,
                toc_offset=end,
                packing=Packing.GZIP if promised.form is Form.ESTARGZ else Packing.ZSTD,
            )
    except ContentError as error:
        return str(error)
    return ""


def _range(blob: BinaryIO, offset: int, size: int) -> bytes:
    blob.seek(offset)
    return blob.read(size)
