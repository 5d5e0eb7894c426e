"""The footer of an eStargz blob: where the table of contents begins.

The last bytes of the blob are an empty gzip member whose extra field carries the
offset of the member that holds the TOC (stargz-snapshotter, docs/estargz.md)::

    eStargz, 51 bytes                        legacy stargz, 47 bytes
     0  1f 8b 08 04 00*4 00 ff  gzip header   0  the same
    10  LE16 26                 XLEN         10  LE16 22
    12  "SG", LE16 22           subfield
    16  %016x                   TOC offset   12  %016x
    32  "STARGZ"                             28  "STARGZ"
    38  01 00 00 ff ff          empty block  34  the same
    43  00*8                    CRC, ISIZE   39  the same

A third form, 46 bytes, says that the TOC is kept in another image::

    10  LE16 21                 XLEN
    12  "SG", LE16 17           subfield
    16  "STARGZEXTERNALTOC"
    33  01 00 00 ff ff, 00*8    empty block, CRC, ISIZE
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from layerstore import limits
from layerstore.errors import InvalidLayer, LimitExceeded

FOOTER_BYTES: Final = 51
LEGACY_FOOTER_BYTES: Final = 47
EXTERNAL_FOOTER_BYTES: Final = 46

_HEADER: Final = bytes.fromhex("1f8b0804 00000000 00 ff")
_TRAILER: Final = bytes.fromhex("010000ffff 00000000 00000000")
_OFFSET: Final = rb"([0-9a-f]{16})STARGZ"
_FORMS: Final = (
    (
        FOOTER_BYTES,
        re.compile(re.escape(_HEADER + b"\x1a\0SG\x16\0") + _OFFSET + re.escape(_TRAILER)),
    ),
    (
        LEGACY_FOOTER_BYTES,
        re.compile(re.escape(_HEADER + b"\x16\0") + _OFFSET + re.escape(_TRAILER)),
    ),
)
EXTERNAL_FOOTER: Final = _HEADER + b"\x15\0SG\x11\0STARGZEXTERNALTOC" + _TRAILER


@dataclass(frozen=True, slots=True)
class Footer:
    """Where the TOC lies: ``toc_size`` compressed bytes from ``toc_offset``, then the footer.

    With ``external`` there is none in the blob: ``toc_size`` is 0, and ``toc_offset`` is where
    the members of the tar stream end and the footer begins.
    """

    toc_offset: int
    toc_size: int
    footer_size: int
    external: bool = False


def parse_footer(tail: bytes, blob_size: int) -> Footer:
    """Read the footer from ``tail``, the last bytes of a blob of ``blob_size`` bytes.

    ``tail`` should hold at least ``FOOTER_BYTES`` bytes where the blob has them.

    Raises ``InvalidLayer`` when there is no eStargz footer or it points outside the blob, and
    ``LimitExceeded`` when the compressed TOC is larger than ``limits.TOC_BYTES``.
    """
    for size, form in _FORMS:
        match = form.fullmatch(tail, max(0, len(tail) - size))
        if match is not None:
            return _footer(int(match[1], 16), size, blob_size)
    if tail.endswith(EXTERNAL_FOOTER) and blob_size >= EXTERNAL_FOOTER_BYTES:
        end = blob_size - EXTERNAL_FOOTER_BYTES
        return Footer(end, 0, EXTERNAL_FOOTER_BYTES, external=True)
    raise InvalidLayer("the layer does not end in an eStargz footer")


def build_footer(toc_offset: int) -> bytes:
    """Return the 51 byte footer of a blob whose TOC member begins at ``toc_offset``."""
    return _HEADER + b"\x1a\0SG\x16\0" + b"%016xSTARGZ" % toc_offset + _TRAILER


def _footer(toc_offset: int, footer_size: int, blob_size: int) -> Footer:
    toc_size = blob_size - footer_size - toc_offset
    if toc_size <= 0:
        raise InvalidLayer(
            f"the footer places the table of contents at {toc_offset}, "
            f"beyond the end of the blob of {blob_size} bytes"
        )
    if toc_size > limits.TOC_BYTES:
        raise LimitExceeded(
            f"the table of contents has {toc_size} compressed bytes, "
            f"more than {limits.TOC_BYTES} are not read"
        )
    return Footer(toc_offset, toc_size, footer_size)
