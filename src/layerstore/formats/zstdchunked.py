"""Reading the TOC and the tar-split of a zstd:chunked layer (layer-formats, section 3).

Behind the frames of the tar stream lie skippable frames: the TOC and the tar-split, each
compressed with zstd, and a footer, which only tells where they are.  A reader takes the
places from the layer's annotations and never needs the footer.  What the annotation's
digest covers: the compressed TOC where containers/storage wrote it; where stargz-snapshotter
did (v0), one annotation covers the JSON and another the compressed bytes.
"""

from __future__ import annotations

import binascii
import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import msgspec

from layerstore import limits
from layerstore.errors import InvalidDigest, InvalidLayer, LimitExceeded
from layerstore.formats.announced import Place
from layerstore.formats.compression import Compression, LayerStream
from layerstore.image import Digest

FOOTER_BYTES: Final = 64
OLD_FOOTER_BYTES: Final = 40

_FOOTER: Final = struct.Struct("<7Q8s")
_OLD_FOOTER: Final = struct.Struct("<4Q8s")
_MAGIC: Final = b"GNUlInUx"
_OLD_MAGIC: Final = b"GnUlInUx"
_CRFS: Final = 1
_PIECE: Final = 1 * limits.MIB
_LINE_BYTES: Final = 2 * limits.TAR_EXTENDED_HEADER_BYTES
_SEGMENT: Final = 2
_FILE: Final = 1


@dataclass(frozen=True, slots=True)
class ZstdFooter:
    """What the footer says; ``tar_split`` is None in the first form."""

    toc: Place
    tar_split: Place | None


def parse_zstd_footer(tail: bytes, blob_size: int) -> ZstdFooter:
    """Read the footer from the last bytes (at least 64 where there are) of a blob.

    Raises InvalidLayer if there is none or it points outside the blob.
    """
    if tail.endswith(_MAGIC) and len(tail) >= FOOTER_BYTES:
        *toc, kind, at, packed, size, _ = _FOOTER.unpack(tail[-FOOTER_BYTES:])
        footer = ZstdFooter(Place(*toc), Place(at, packed, size))
    elif tail.endswith(_OLD_MAGIC) and len(tail) >= OLD_FOOTER_BYTES:
        *toc, kind, _ = _OLD_FOOTER.unpack(tail[-OLD_FOOTER_BYTES:])
        footer = ZstdFooter(Place(*toc), None)
    else:
        raise InvalidLayer("the layer does not end in a zstd:chunked footer")
    for place in (footer.toc, footer.tar_split):
        if place is not None and place.offset + place.size > blob_size:
            raise InvalidLayer("the footer points beyond the end of the layer")
    if kind != _CRFS:
        raise InvalidLayer(f"the footer names a TOC of the unknown type {kind}")
    return footer


def read_zstd_toc(packed: bytes, expected: Digest, *, compressed_digest: bool) -> bytes:
    """Return the TOC's JSON out of its compressed bytes, once the digest was found right.

    ``compressed_digest`` says that ``expected`` covers the compressed bytes, else the JSON.
    Raises VerificationError, InvalidLayer, and LimitExceeded above ``limits.TOC_BYTES``.
    """
    subject = "table of contents"
    if compressed_digest:
        expected.verify(packed, subject=subject)
    toc = _decompress(packed, limits.TOC_BYTES, subject)
    if not compressed_digest:
        expected.verify(toc, subject=subject)
    return toc


class _TarSplitDigest(msgspec.Struct, gc=False):
    version: int
    digest: str = msgspec.field(name="tarSplitDigest", default="")


def tar_split_digest(toc: bytes) -> Digest | None:
    """The digest of the compressed tar-split that the TOC states; None if it states none.

    Raises InvalidLayer.
    """
    try:
        text = msgspec.json.decode(toc, type=_TarSplitDigest).digest
        return Digest.parse(text) if text else None
    except (msgspec.MsgspecError, UnicodeError, RecursionError, InvalidDigest) as error:
        raise InvalidLayer(f"the table of contents is no valid document: {error}") from None


class _Line(msgspec.Struct, gc=False):
    type: int
    size: int = 0
    payload: str | None = None


def tar_length(packed: bytes, expected: Digest) -> int:
    """The exact length in bytes of the tar stream that a compressed tar-split describes.

    Raises VerificationError unless ``packed`` has the digest ``expected``; InvalidLayer and
    LimitExceeded.  Memory is bounded by one line.
    """
    expected.verify(packed, subject="tar-split")
    decode = msgspec.json.Decoder(_Line).decode
    total = 0
    rest = b""
    for piece in _pieces(packed, "tar-split"):
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) > _LINE_BYTES:
            raise LimitExceeded("a line of the tar-split is too long")
        try:
            for line in lines:
                total += _length(decode(line))
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise InvalidLayer(f"the tar-split is damaged: {error}") from None
        if total > limits.LAYER_BYTES:
            raise LimitExceeded("the tar-split describes too long an archive")
    if rest:
        raise InvalidLayer("the tar-split is cut off")
    return total


def _length(line: _Line) -> int:
    if line.type == _SEGMENT:
        return len(binascii.a2b_base64(line.payload or "", strict_mode=True))
    if line.type != _FILE or line.size < 0:
        raise InvalidLayer("the tar-split has a line of no known kind")
    return line.size


def _decompress(packed: bytes, most: int, subject: str) -> bytes:
    found = bytearray()
    for piece in _pieces(packed, subject):
        found += piece
        if len(found) > most:
            raise LimitExceeded(f"the {subject} has more than {most} bytes")
    return bytes(found)


def _pieces(packed: bytes, subject: str) -> Iterator[bytes]:
    stream = LayerStream(io.BytesIO(packed))
    if stream.compression is not Compression.ZSTD:
        raise InvalidLayer(f"the {subject} is not compressed with zstd")
    while data := stream.read(_PIECE):
        yield data
