"""By which TOC a whole blob and the tree extracted from it may be known.

A client of dialect T asks for the digest that the manifest's annotation states.  An
annotation proves nothing: it may name the TOC of somebody else's layer, and even the right
TOC may describe other files than the tar stream holds.  So the TOC is taken out of the blob,
compared with the annotation, and the tree with the TOC.

eStargz: the digest is that of the JSON, which the footer leads to.  zstd:chunked: it is that
of the compressed JSON, whose place another annotation gives; the older form of
stargz-snapshotter carries the eStargz annotation, with the digest of its JSON.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from layerstore import limits
from layerstore.errors import InvalidLayer, LimitExceeded, StorageError, VerificationError
from layerstore.formats import (
    FOOTER_BYTES,
    Compression,
    LayerStream,
    TocEntry,
    iter_toc,
    parse_footer,
    read_toc,
)
from layerstore.graphroot.treecheck import toc_difference
from layerstore.image import Digest
from layerstore.image.annotations import (
    ESTARGZ_TOC_DIGEST,
    ZSTD_OLD_TOC_POSITION,
    ZSTD_TOC_DIGEST,
    ZSTD_TOC_POSITION,
    layer_toc,
)
from layerstore.layertree import LayerIndex, build_index

_PIECE: Final = 1 << 20
_KEYS: Final = (ESTARGZ_TOC_DIGEST, ZSTD_TOC_DIGEST, ZSTD_TOC_POSITION, ZSTD_OLD_TOC_POSITION)
_NUMBER: Final = re.compile(r"[0-9]{1,19}")


def toc_notes(notes: Mapping[str, str]) -> dict[str, str]:
    """Those annotations that ``check_toc`` looks at."""
    return {key: notes[key] for key in _KEYS if key in notes}


def check_toc(
    blob: Path, diff: Path, notes: Mapping[str, str], compression: Compression
) -> Digest | None:
    """The TOC digest under which ``diff``, extracted from ``blob``, may be published.

    None if the annotations announce none.  Raises ``VerificationError`` if the blob's TOC is
    another or describes another tree, ``InvalidLayer`` and ``LimitExceeded`` if there is none
    that can be read, ``StorageError``.
    """
    announced = layer_toc(notes)
    if announced is None:
        return None
    try:
        size = blob.stat().st_size
        with blob.open("rb") as file:
            entries: Iterable[TocEntry]
            if compression is Compression.ZSTD:
                entries = _zstd_entries(file.fileno(), size, notes, announced)
                offset = size
            else:
                toc, offset = _estargz(file.fileno(), size)
                announced.verify(toc, subject="the layer's table of contents")
                entries = iter_toc(toc)
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror}", subject=str(blob)) from error
    out = io.BytesIO()
    build_index(entries, out, blob_size=size, toc_offset=offset)
    with LayerIndex.from_bytes(out.getvalue()) as index:
        difference = toc_difference(index, diff)
    if difference is not None:
        raise VerificationError(difference, subject="the layer's table of contents")
    return announced


def _estargz(descriptor: int, size: int) -> tuple[bytes, int]:
    tail_size = min(FOOTER_BYTES, size)
    footer = parse_footer(os.pread(descriptor, tail_size, size - tail_size), size)
    if footer.external:
        raise InvalidLayer("the layer keeps its table of contents in another image")
    return read_toc(_range(descriptor, footer.toc_offset, footer.toc_size)), footer.toc_offset


def _zstd_entries(
    descriptor: int, size: int, notes: Mapping[str, str], announced: Digest
) -> Iterator[TocEntry]:
    old = ESTARGZ_TOC_DIGEST in notes
    key = ZSTD_OLD_TOC_POSITION if old else ZSTD_TOC_POSITION
    offset, length = _position(notes.get(key, ""), size)
    packed = _range(descriptor, offset, length)
    if not old:
        announced.verify(packed, subject="the layer's table of contents")
    toc = _unpack(packed)
    if old:
        announced.verify(toc, subject="the layer's table of contents")
    return _whole_files(iter_toc(toc))


def _position(text: str, size: int) -> tuple[int, int]:
    """Read ``offset:compressed length:uncompressed length:type``."""
    parts = text.split(":")
    if len(parts) != 4 or not all(_NUMBER.fullmatch(part) for part in parts):
        raise InvalidLayer("no place of the table of contents is announced")
    offset, length = (int(part) for part in parts[:2])
    if length > limits.TOC_BYTES:
        raise LimitExceeded(f"the table of contents has {length} compressed bytes")
    if offset + length > size:
        raise InvalidLayer("the table of contents is announced beyond the end of the blob")
    return offset, length


def _unpack(packed: bytes) -> bytes:
    stream = LayerStream(io.BytesIO(packed))
    toc = bytearray()
    while data := stream.read(_PIECE):
        toc += data
        if len(toc) > limits.TOC_BYTES:
            raise LimitExceeded(f"the table of contents has more than {limits.TOC_BYTES} bytes")
    return bytes(toc)


def _whole_files(entries: Iterator[TocEntry]) -> Iterator[TocEntry]:
    """zstd:chunked entries as if each file were one chunk: its digest says all we must know.

    The places of the frames, which are not looked at, are replaced by numbers.
    """
    number = 0
    for entry in entries:
        if entry.type == "chunk":
            continue
        number += 1
        yield msgspec.structs.replace(
            entry,
            offset=number,
            inner_offset=0,
            chunk_offset=0,
            chunk_size=0,
            chunk_digest="",
            chunk_type="",
        )


def _range(descriptor: int, offset: int, length: int) -> bytes:
    found = bytearray()
    while len(found) < length and (
        data := os.pread(descriptor, length - len(found), offset + len(found))
    ):
        found += data
    return bytes(found)
