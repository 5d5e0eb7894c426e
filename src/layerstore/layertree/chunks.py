"""Chunks: where in the blob a file's bytes lie, and what they must hash to.

A regular file's entry describes its first chunk; entries of type ``chunk`` that
follow it the others.  ``chunkSize`` absent means "up to the end of the file".
Several chunks may share one member (equal ``offset``, growing ``innerOffset``);
they must not overlap.  A member ends where the next one that any entry names
begins, the last one at the TOC.

A chunk of type ``zeros`` (zstd:chunked) is a *hole*: it is in no member, for there is
nothing to fetch and nothing to verify.

What a file *is* for the content store is its key: the chunk's digest for a file
of one chunk, a digest over the list of chunks otherwise.  It is made of what will
be verified, unlike the ``digest`` of a file of several chunks, which nothing checks
chunk by chunk.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from typing import Final

from layerstore import limits
from layerstore.errors import InvalidLayer, LimitExceeded, UnsupportedFormat
from layerstore.formats.toc import TocEntry

from .fields import check_number, sha256_bytes
from .layout import DIGEST_PAIR, FLAG_DIGEST, KEY_CHUNK, KEY_PREFIX
from .names import subject_of

NO_OWNER: Final = 0xFFFF_FFFF
HOLE: Final = 0xFFFF_FFFF_FFFF_FFFF  # in the place of a chunk's offset
TAR_BLOCK: Final = 512
_ZEROS: Final = "zeros"
_HOLE_PIECE_BYTES: Final = 1 << 30  # larger holes are several chunks: sizes have 32 bits
_NO_DIGEST: Final = bytes(32)
_EMPTY: Final = hashlib.sha256(b"").digest()


class ChunkTable:
    """All chunks of a layer, in the order of the TOC.

    ``begin`` takes the entry of a regular file, ``more`` each chunk entry after it,
    ``finish`` says what became of it: (first chunk, chunks, number of the digest pair
    plus one or 0, flags).
    """

    def __init__(self, toc_offset: int, member_bytes: int = limits.MEMBER_BYTES) -> None:
        self.toc_offset = toc_offset
        self._member_bytes = member_bytes
        self._hole_pieces = 0
        self.offsets = array("Q")  # compressed; or HOLE
        self.inner = array("Q")
        self.sizes = array("I")
        self.starts = array("Q")  # file offsets
        self.owners = array("I")
        self.digests = bytearray()
        self.pairs = bytearray()
        self._subject = ""
        self._size = 0
        self._covered = 0
        self._first = 0
        self._digest: bytes | None = None

    def __len__(self) -> int:
        return len(self.offsets)

    def begin(self, entry: TocEntry, owner: int) -> None:
        """Start the file of ``entry``; ``owner`` is NO_OWNER for one that is not shown."""
        subject = subject_of(entry.name)
        size = check_number(entry.size, limits.FILE_BYTES, "size", subject)
        self._subject = subject
        self._size = size
        self._covered = 0
        self._first = len(self.offsets)
        self._digest = sha256_bytes(entry.digest, subject) if entry.digest else None
        hole = self._is_hole(entry)
        if not size:
            if self._digest not in (None, _EMPTY):
                raise InvalidLayer("an empty file with the digest of another", subject=subject)
            return
        if hole:
            self._append_hole(entry, owner)
            return
        whole = entry.chunk_size in (0, size)
        if whole and self._digest is not None:
            digest = self._digest
            if entry.chunk_digest not in ("", entry.digest):
                sha256_bytes(entry.chunk_digest, subject)
                raise InvalidLayer("a file's digest and its only chunk's differ", subject=subject)
        elif entry.chunk_digest:
            digest = sha256_bytes(entry.chunk_digest, subject)
        else:
            raise InvalidLayer("a chunk has no digest to verify it by", subject=subject)
        self._append(entry, owner, digest)

    def more(self, entry: TocEntry, owner: int) -> None:
        """One more chunk of the current file."""
        subject = self._subject
        if self._covered >= self._size:
            raise InvalidLayer("a chunk after the end of its file, or of none", subject=subject)
        if self._is_hole(entry):
            self._append_hole(entry, owner)
            return
        if not entry.chunk_digest:
            raise InvalidLayer("a chunk has no digest to verify it by", subject=subject)
        self._append(entry, owner, sha256_bytes(entry.chunk_digest, subject))

    def _is_hole(self, entry: TocEntry) -> bool:
        if entry.chunk_type not in ("", _ZEROS):
            raise UnsupportedFormat(f"chunks of type {entry.chunk_type!r}", subject=self._subject)
        return entry.chunk_type == _ZEROS

    def _extent(self, entry: TocEntry) -> tuple[int, int]:
        """Where the chunk begins in its file, and its size."""
        start = self._covered
        if entry.chunk_offset != start:
            raise InvalidLayer("a file's chunks are not contiguous", subject=self._subject)
        left = self._size - start
        size = entry.chunk_size or left
        if not 0 < size <= left:
            raise InvalidLayer("a chunk's size does not fit its file", subject=self._subject)
        return start, size

    def _append_hole(self, entry: TocEntry, owner: int) -> None:
        start, size = self._extent(entry)
        end = start + size
        self._hole_pieces += -(-size // _HOLE_PIECE_BYTES)
        if self._hole_pieces > limits.HOLE_PIECES:
            raise LimitExceeded("the holes of the layer are too large", subject=self._subject)
        for at in range(start, end, _HOLE_PIECE_BYTES):
            self.offsets.append(HOLE)
            self.inner.append(0)
            self.sizes.append(min(_HOLE_PIECE_BYTES, end - at))
            self.starts.append(at)
            self.owners.append(owner)
            self.digests += _NO_DIGEST
        self._covered = end

    def _append(self, entry: TocEntry, owner: int, digest: bytes) -> None:
        subject = self._subject
        start, size = self._extent(entry)
        if size > limits.CHUNK_BYTES:
            raise LimitExceeded(f"a chunk of {size} bytes", subject=subject)
        offset, inner = entry.offset, entry.inner_offset
        if not 0 <= offset < self.toc_offset or inner < 0:
            raise InvalidLayer("a chunk lies outside the layer's contents", subject=subject)
        if offset == 0 and inner < TAR_BLOCK:
            # The blob begins with a tar header, so no content can: the position is missing.
            raise InvalidLayer("a chunk has no position in the blob", subject=subject)
        if entry.end_offset and not offset < entry.end_offset <= self.toc_offset:
            raise InvalidLayer("a chunk ends outside the layer's contents", subject=subject)
        if inner + size > self._member_bytes:
            raise LimitExceeded("a chunk lies too far inside its member", subject=subject)
        self.offsets.append(offset)
        self.inner.append(inner)
        self.sizes.append(size)
        self.starts.append(start)
        self.owners.append(owner)
        self.digests += digest
        self._covered = start + size

    def finish(self) -> tuple[int, int, int, int]:
        """End the current file; InvalidLayer if its chunks do not make up its size."""
        if self._covered != self._size:
            raise InvalidLayer("a file's chunks do not make up its size", subject=self._subject)
        self._size = self._covered = 0
        first = self._first
        count = len(self.offsets) - first
        if count < 2 and not (count and self.offsets[first] == HOLE):
            return first if count else 0, count, 0, 0
        key = hashlib.sha256(KEY_PREFIX)
        for number in range(first, first + count):
            digest = self.digests[32 * number : 32 * number + 32]
            key.update(KEY_CHUNK.pack(self.starts[number], self.sizes[number], digest))
        self.pairs += DIGEST_PAIR.pack(self._digest or bytes(32), key.digest())
        flags = FLAG_DIGEST if self._digest is not None else 0
        return first, count, len(self.pairs) // DIGEST_PAIR.size, flags

    def by_position(self) -> array[int]:
        """Numbers of the chunks that are no holes, by (offset, inner offset).

        Raises InvalidLayer if two of them overlap.
        """
        offsets, inner, sizes = self.offsets, self.inner, self.sizes
        order = array("I", (number for number, at in enumerate(offsets) if at != HOLE))
        if any(
            offsets[before] > offsets[number]
            or (offsets[before] == offsets[number] and inner[before] > inner[number])
            for before, number in itertools.pairwise(order)
        ):
            order = array(
                "I", sorted(order, key=lambda number: offsets[number] << 64 | inner[number])
            )
        last_offset, last_end = -1, 0
        for number in order:
            offset, start = offsets[number], inner[number]
            if offset == last_offset and start < last_end:
                raise InvalidLayer("two chunks of the TOC overlap")
            last_offset, last_end = offset, start + sizes[number]
        return order

    def members(self, order: array[int]) -> array[int]:
        """The distinct compressed offsets in ascending order, then the TOC's."""
        found = array("Q")
        last = -1
        for number in order:
            offset = self.offsets[number]
            if offset != last:
                found.append(offset)
                last = offset
        found.append(self.toc_offset)
        return found
