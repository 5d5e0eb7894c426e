"""Where to cut a file into chunks: at places that its content chooses, and around holes.

A file that grows by a line in its middle keeps most of its chunks, so a client that has the
old ones need not fetch them again.  containers/storage rolls a checksum over every byte and
cuts where 16 of its bits are set; a loop over bytes is not for Python.  Here a cut is made in
two steps, each at the speed of C: a byte pair of which both are in a fixed eighth of all
values is a candidate, and of the candidates those count whose CRC-32 over the 48 bytes before
ends in zeros.  Both depend on these bytes alone, so equal contents are cut alike wherever
they stand.  Which chunks there are is the writer's choice; no reader depends on it.

A hole is a long run of zeros.  Reading it needs no bytes of the blob.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator
from typing import Final

from layerstore import limits
from layerstore.errors import InvalidLayer, UsageError

DEFAULT_CHUNK_BYTES: Final = 64 * limits.KIB
SMALLEST_CHUNK_BYTES: Final = 4 * limits.KIB
LARGEST_CHUNK_BYTES: Final = 4 * limits.MIB

# containers/storage begins at 1 KiB; but in a compressed stream zeros cost next to nothing, and
# a chunk costs two frames and an entry.  Below this a hole saves nothing.
HOLE_BYTES: Final = 16 * limits.KIB
HOLE_PIECE_BYTES: Final = 16 * limits.MIB

# An eighth of all byte values, spread over the range; 0 and 255 are none of them, as runs of
# these would be runs of candidates.
_MARKED: Final = bytes((value * 167 + 100) & 0xFF < 32 for value in range(256))
_PAIR: Final = b"\1\1"
_PAIR_BITS: Final = 6  # one position in 64 is a candidate
_EXTRA_BITS: Final = 1  # real files have fewer candidates than noise
_WINDOW: Final = 48
_READ_BYTES: Final = 1 * limits.MIB
_ZEROS: Final = bytes(HOLE_BYTES)
_NOT_ZERO: Final = re.compile(rb"[^\0]")

Read = Callable[[int], bytes]


class Chunker:
    """Cuts contents into chunks of about ``chunk_size`` bytes, a quarter of it to eight times.

    A content of at most ``chunk_size`` bytes stays in one piece.
    """

    def __init__(self, chunk_size: int = DEFAULT_CHUNK_BYTES) -> None:
        """Raises ``UsageError`` for a size that makes no sense."""
        if not SMALLEST_CHUNK_BYTES <= chunk_size <= LARGEST_CHUNK_BYTES:
            raise UsageError(
                f"chunk size {chunk_size} is not between {SMALLEST_CHUNK_BYTES} and "
                f"{LARGEST_CHUNK_BYTES}"
            )
        self._whole = chunk_size
        self._least = chunk_size // 4
        self._most = chunk_size * 8
        self._mask = (1 << (chunk_size.bit_length() - 1 - _PAIR_BITS - _EXTRA_BITS)) - 1

    def chunks(self, read: Read, size: int) -> Iterator[tuple[bytes, bool]]:
        """The chunks of the ``size`` bytes that ``read`` gives, and whether each is a hole.

        Raises ``InvalidLayer`` when ``read`` ends early, and what it raises.  Where the cuts
        are does not depend on how much ``read`` gives at once.
        """
        if size <= self._whole:
            if size:
                yield _exactly(read, size), False
            return
        left, data, position = size, b"", 0
        while True:
            # Enough for the longest chunk with the beginning of a hole behind it.
            if left and len(data) - position < self._most + HOLE_BYTES:
                more = _exactly(read, min(left, max(_READ_BYTES, 2 * self._most)))
                left -= len(more)
                data, position = data[position:] + more, 0
            if position == len(data):
                return
            if data.startswith(_ZEROS, position):
                length = _zeros(data, position)
                position += length
                while position == len(data) and left and length < HOLE_PIECE_BYTES:
                    data, position = _exactly(read, min(left, _READ_BYTES)), 0
                    left -= len(data)
                    more_zeros = min(_zeros(data, 0), HOLE_PIECE_BYTES - length)
                    length += more_zeros
                    position = more_zeros
                yield bytes(length), True
                continue
            cut = self._cut(data, position)
            yield data[position:cut], False
            position = cut

    def _cut(self, data: bytes, start: int) -> int:
        """Where the chunk ends that begins at ``start``, which is not in a hole."""
        end = min(len(data), start + self._most)
        hole = data.find(_ZEROS, start, min(len(data), end + HOLE_BYTES))
        if hole >= 0:
            end = min(end, hole)
        first = start + self._least
        if first >= end:
            return end
        marked = data[first:end].translate(_MARKED)
        find, crc, mask = marked.find, zlib.crc32, self._mask
        at = find(_PAIR)
        while at >= 0:
            candidate = first + at + 2
            if not crc(data[candidate - _WINDOW : candidate]) & mask:
                return candidate
            at = find(_PAIR, at + 2)
        return end


def _zeros(data: bytes, start: int) -> int:
    """How many zeros there are from ``start``."""
    found = _NOT_ZERO.search(data, start)
    return (found.start() if found else len(data)) - start


def _exactly(read: Read, size: int) -> bytes:
    data = read(size)
    if len(data) == size:
        return data
    pieces = [data]
    missing = size - len(data)
    while missing:
        piece = read(missing)
        if not piece:
            raise InvalidLayer("the tar archive ends inside a file")
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)
