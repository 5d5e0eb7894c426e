"""From a tar stream to TOC entries: what a table of contents of this archive would say.

Used where no TOC can be believed or none exists: to compare a TOC with its tar stream, and
to index an ordinary layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from layerstore.formats.tarstream import TarEntry, TarReader
from layerstore.formats.toc import TocEntry
from layerstore.formats.tocentry import EntryNames, toc_entry


@dataclass(frozen=True, slots=True)
class Piece:
    """A chunk of a file: ``size`` bytes with this SHA-256, or a hole.

    It lies ``inner_offset`` uncompressed bytes into the member that begins at ``offset``.
    """

    size: int
    digest: bytes
    offset: int = 0
    inner_offset: int = 0
    hole: bool = False


@dataclass(frozen=True, slots=True)
class FileRead:
    """A file whose payload was read: the SHA-256 of all of it, and its pieces in order."""

    digest: bytes | None
    pieces: tuple[Piece, ...]


def tar_entries(reader: TarReader, read_file: Callable[[TarEntry], FileRead]) -> Iterator[TocEntry]:
    """Yield the TOC entries of an archive, in its order.

    ``read_file`` is called for each regular file that is not empty, and reads its payload from
    ``reader``.  Raises what the reader and ``read_file`` raise, and UnsupportedFormat.
    """
    names = EntryNames()
    for entry in reader:
        toc = toc_entry(entry, names)
        if toc.type != "reg" or not entry.size:
            yield toc
            continue
        read = read_file(entry)
        if read.digest is not None:
            toc.digest = f"sha256:{read.digest.hex()}"
        offset = 0
        for piece in read.pieces:
            if offset:
                toc = TocEntry(
                    name=toc.name, name_raw=toc.name_raw, type="chunk", chunk_offset=offset
                )
            toc.offset = piece.offset
            toc.inner_offset = piece.inner_offset
            if len(read.pieces) > 1:
                toc.chunk_size = piece.size
            if piece.hole:
                toc.chunk_type = "zeros"
            else:
                toc.chunk_digest = f"sha256:{piece.digest.hex()}"
            offset += piece.size
            yield toc
