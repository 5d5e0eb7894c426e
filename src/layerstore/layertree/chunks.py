"""Chunks: where in the blob a file's bytes lie, and what they must hash to.

A regular file's entry describes its first chunk; entries of type ``chunk`` that
follow it the others.  ``chunkSize`` absent means "up to the end of the file".
Several chunks may share one gzip member (equal ``offset``, growing
``innerOffset``); they must not overlap.  A member ends where the next one that
any entry names begins, the last one at the TOC.

What a file *is* for the content store is its key: the chunk's digest for a file
of one chunk, a digest over the list of chunks otherwise.  It is made of what will
be verified, unlike the ``digest`` of a file of several chunks, which nothing checks
chunk by chunk.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from typing import Final

from layerstore import limits
from layerstore.errors import InvalidLayer, LimitExceeded, UnsupportedFormat
from layerstore.formats.toc import TocEntry

from .fields import check_number, sha256_bytes
from .layout import DIGEST_PAIR, FLAG_DIGEST, KEY_CHUNK, KEY_PREFIX
from .names import subject_of

NO_OWNER: Final = 0xFFFF_FFFF
TAR_BLOCK: Final = 512
_EMPTY: Final = hashlib.sha256(b"").digest()


class ChunkTable:
    """All chunks of a layer, in the order of the TOC.

    ``begin`` takes the entry of a regular file, ``more`` each chunk entry after it,
    ``finish`` says what became of it: (first chunk, chunks, number of the digest pair
    plus one or 0, flags).
    """

    def __init__(self, toc_offset: int) -> None:
        self.toc_offset = toc_offset
        self.offsets = array("Q")  # compressed
        self.inner = array("I")
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
        if entry.chunk_type:
            raise UnsupportedFormat(f"chunks of type {entry.chunk_type!r}", subject=subject)
        if not size:
            if self._digest not in (None, _EMPTY):
                raise InvalidLayer("an empty file with the digest of another", subject=subject)
            return
        whole = entry.chunk_size in (0, size)
        if entry.chunk_digest:
            digest = sha256_bytes(entry.chunk_digest, subject)
            if whole and self._digest not in (None, digest):
                raise InvalidLayer("a file's digest and its only chunk's differ", subject=subject)
        elif whole and self._digest is not None:
            digest = self._digest
        else:
            raise InvalidLayer("a chunk has no digest to verify it by", subject=subject)
        self._append(entry, owner, digest)

    def more(self, entry: TocEntry, owner: int) -> None:
        """One more chunk of the current file."""
        subject = self._subject
        if self._covered >= self._size:
            raise InvalidLayer("a chunk after the end of its file, or of none", subject=subject)
        if entry.chunk_type:
            raise UnsupportedFormat(f"chunks of type {entry.chunk_type!r}", subject=subject)
        if not entry.chunk_digest:
            raise InvalidLayer("a chunk has no digest to verify it by", subject=subject)
        self._append(entry, owner, sha256_bytes(entry.chunk_digest, subject))

    def _append(self, entry: TocEntry, owner: int, digest: bytes) -> None:
        subject = self._subject
        start = self._covered
        if entry.chunk_offset != start:
            raise InvalidLayer("a file's chunks are not contiguous", subject=subject)
        left = self._size - start
        size = entry.chunk_size or left
        if not 0 < size <= left:
            raise InvalidLayer("a chunk's size does not fit its file", subject=subject)
        if size > limits.CHUNK_BYTES:
            raise LimitExceeded(f"a chunk of {size} bytes", subject=subject)
        offset, inner = entry.offset, entry.inner_offset
        if not 0 <= offset < self.toc_offset or inner < 0:
            raise InvalidLayer("a chunk lies outside the layer's contents", subject=subject)
        if offset == 0 and inner < TAR_BLOCK:
            # The blob begins with a tar header, so no content can: the position is missing.
            raise InvalidLayer("a chunk has no position in the blob", subject=subject)
        if inner + size > limits.MEMBER_BYTES:
            raise LimitExceeded("a chunk lies too far inside its gzip member", subject=subject)
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
        if count < 2:
            return first if count else 0, count, 0, 0
        key = hashlib.sha256(KEY_PREFIX)
        for number in range(first, first + count):
            digest = self.digests[32 * number : 32 * number + 32]
            key.update(KEY_CHUNK.pack(self.starts[number], self.sizes[number], digest))
        self.pairs += DIGEST_PAIR.pack(self._digest or bytes(32), key.digest())
        flags = FLAG_DIGEST if self._digest is not None else 0
        return first, count, len(self.pairs) // DIGEST_PAIR.size, flags

    def by_position(self) -> array[int]:
        """Chunk numbers by (offset, inner offset); InvalidLayer if two chunks overlap."""
        offsets, inner, sizes = self.offsets, self.inner, self.sizes
        order = array("I", range(len(offsets)))
        if any(
            offsets[number - 1] > offsets[number]
            or (offsets[number - 1] == offsets[number] and inner[number - 1] > inner[number])
            for number in range(1, len(offsets))
        ):
            order = array(
                "I", sorted(order, key=lambda number: offsets[number] << 32 | inner[number])
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


def member_of(members: array[int], offset: int) -> int:
    """The number of the member that begins at ``offset``."""
    return bisect_right(members, offset) - 1
