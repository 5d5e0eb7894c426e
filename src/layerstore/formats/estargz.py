"""Reading the TOC member of an eStargz blob.

The member holds a tar archive whose first entry is named exactly
``stargz.index.json``; the entry's payload is the TOC, and the annotation
``containerd.io/snapshot/stargz/toc.digest`` is the SHA-256 of that payload
(stargz-snapshotter, docs/estargz.md).
"""

from __future__ import annotations

from typing import Final

from isal import isal_zlib

from layerstore import limits
from layerstore.errors import InvalidLayer, LimitExceeded
from layerstore.formats.gzipmember import GZIP_WBITS, GzipError

TOC_NAME: Final = "stargz.index.json"
PREFETCH_LANDMARK: Final = ".prefetch.landmark"
NO_PREFETCH_LANDMARK: Final = ".no.prefetch.landmark"
LANDMARK_CONTENT: Final = b"\x0f"

_BLOCK: Final = 512
_TRAILER_BYTES: Final = 1 << 20  # padding and end blocks after the payload; writers use 1 to 10 KiB


def read_toc(member: bytes | memoryview) -> bytes:
    """Return the TOC, exact bytes of its JSON, from the gzip member that ``member`` begins with.

    ``member`` is the range [TOC offset, blob size - footer size).  Only one gzip member is
    read.  Never more than ``limits.TOC_BYTES`` plus the tar framing is decompressed.

    Raises ``InvalidLayer`` for broken gzip or tar data or another first entry, and
    ``LimitExceeded`` for a TOC above the limit.
    """
    stream = isal_zlib.decompressobj(wbits=GZIP_WBITS)
    try:
        header = stream.decompress(member, _BLOCK)
        size = _toc_size(header)
        # A max_length of 0 would mean "no bound".
        payload = stream.decompress(stream.unconsumed_tail, size) if size else b""
        if len(payload) == size:
            trailer = stream.decompress(stream.unconsumed_tail, _TRAILER_BYTES)
        else:
            trailer = b""
    except GzipError as error:
        raise InvalidLayer(f"the member of the table of contents is corrupt: {error}") from None
    if len(payload) != size or not stream.eof:
        if len(trailer) == _TRAILER_BYTES:
            raise InvalidLayer("the member of the table of contents holds more than one")
        raise InvalidLayer("the member of the table of contents is truncated")
    return payload


def _toc_size(header: bytes) -> int:
    """Check the tar header of the TOC and return the size of its payload."""
    if len(header) != _BLOCK:
        raise InvalidLayer("the member of the table of contents has no tar header")
    unsigned = sum(header) - sum(header[148:156]) + 8 * 0x20
    if _octal(header[148:156]) != unsigned:
        raise InvalidLayer("the tar header of the table of contents has a wrong checksum")
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    if name != TOC_NAME.encode() or prefix:
        raise InvalidLayer(f"the table of contents is not named {TOC_NAME}")
    if header[156:157] not in (b"0", b"\0"):
        raise InvalidLayer("the table of contents is not a regular file")
    size = _octal(header[124:136])
    if size > limits.TOC_BYTES:
        raise LimitExceeded(
            f"the table of contents has {size} bytes, more than {limits.TOC_BYTES} are not read"
        )
    return size


def _octal(field: bytes) -> int:
    text = field.strip(b" \0")
    if not text or text.strip(b"01234567"):
        raise InvalidLayer("the tar header of the table of contents has a field that is no number")
    return int(text, 8)
