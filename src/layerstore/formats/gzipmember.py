"""One gzip member, taken out of a layer.

A lazily readable layer is a row of gzip members (RFC 1952) that each decompress
without the others.  A reader fetches a byte range that starts at a member and
often ends somewhere after it: what follows the member is not looked at.
"""

from __future__ import annotations

from typing import Final, cast

from isal import isal_zlib

from layerstore.errors import InvalidLayer, LimitExceeded

GZIP_WBITS: Final = 31  # zlib's notation: gzip wrapper, 32 KiB window
# The stubs of isal declare the exception class as an instance.
GzipError: Final = cast("type[Exception]", isal_zlib.error)


def decompress_member(data: bytes | memoryview, *, limit: int) -> bytes:
    """Return the uncompressed bytes of the gzip member that ``data`` begins with.

    Bytes after the member are ignored.  The member's own CRC-32 and length are checked.
    At most ``limit`` + 1 bytes are ever produced.

    Raises ``InvalidLayer`` for a corrupt or truncated member and ``LimitExceeded``
    when it holds more than ``limit`` bytes.
    """
    member = isal_zlib.decompressobj(wbits=GZIP_WBITS)
    try:
        payload = member.decompress(data, limit + 1)
    except GzipError as error:
        raise InvalidLayer(f"a gzip member is corrupt: {error}") from None
    if len(payload) > limit:
        raise LimitExceeded(f"a gzip member holds more than {limit} bytes")
    if not member.eof:
        raise InvalidLayer(f"a gzip member of {len(data)} bytes is truncated")
    return payload
