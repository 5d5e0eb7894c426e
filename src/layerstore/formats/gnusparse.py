"""Sparse files in PAX archives: which parts of a file its payload holds (GNU tar, "Sparse Formats").

GNU tar's ``--format=pax -S`` writes one of three forms.  Each gives the file's size and a map, the
offset and the length of every piece of data; what is between them is zeros and not in the archive::

    0.0   records GNU.sparse.{size,numblocks}, and for each piece GNU.sparse.{offset,numbytes}
    0.1   the pieces in one record instead, GNU.sparse.map=OFFSET,LENGTH,...
    1.0   records GNU.sparse.{major=1,minor=0,name,realsize}; the map stands before the payload as
          decimal numbers, each with a newline: their count, then the pairs; filled up to a block

Judged as Go's ``archive/tar`` does: a version that it does not know is no sparse file.  The older
type ``S`` is not read, as no container engine extracts it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from layerstore import limits
from layerstore.errors import InvalidLayer, LimitExceeded

_KEYS: Final = b"GNU.sparse."
NAME: Final = b"GNU.sparse.name"
"""The record with the file's name; its header has another one in form 1.0."""
_MAP: Final = b"GNU.sparse.map"
_PIECES: Final = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")  # in this order, form 0.0
_NUMBER: Final = re.compile(rb"[-+]?[0-9]{1,19}")
_INT64: Final = 1 << 63
_BLOCK: Final = 512


@dataclass(frozen=True, slots=True)
class SparseMap:
    """The file has ``size`` bytes; ``pieces`` are offset and length of its data, in order.

    The payload is the data of the pieces one after the other; they do not overlap.
    """

    size: int
    pieces: tuple[tuple[int, int], ...]

    @property
    def data_size(self) -> int:
        """Bytes of all pieces."""
        return sum(length for _, length in self.pieces)


def joined_map(pieces: Sequence[tuple[bytes, bytes]]) -> tuple[bytes, bytes]:
    """The record of form 0.1 that stands for those of form 0.0, given in their order.

    Raises InvalidLayer if the order is not right.
    """
    for number, (key, value) in enumerate(pieces):
        if key != _PIECES[number % 2] or b"," in value:
            raise InvalidLayer("the map of a sparse file is malformed")
    return _MAP, b",".join(value for _, value in pieces)


def is_piece(key: bytes) -> bool:
    """Whether a PAX record is one of form 0.0, of which a header has several."""
    return key in _PIECES


def is_sparse(records: Mapping[bytes, bytes]) -> bool:
    """Whether these PAX records are a sparse file's."""
    major, minor = records.get(_KEYS + b"major", b""), records.get(_KEYS + b"minor", b"")
    if major or minor:
        return (major, minor) in ((b"0", b"0"), (b"0", b"1"), (b"1", b"0"))
    return bool(records.get(_MAP))


def read_map(
    records: Mapping[bytes, bytes], size: int, read_blocks: Callable[[int], bytes]
) -> tuple[SparseMap, int]:
    """The map of a file that ``is_sparse``, and how many bytes of its payload the map took.

    ``size`` is that of the payload with the map; ``read_blocks`` gives exactly so many bytes of
    it.  Raises InvalidLayer, LimitExceeded, and what ``read_blocks`` does.
    """
    length = records.get(_KEYS + b"size") or records.get(_KEYS + b"realsize")
    real = _number(length) if length else size
    taken = 0
    if records.get(_KEYS + b"major") == b"1":
        lines = _Lines(size, read_blocks)
        count = _number(lines.first(1)[0])
        if count < 0:
            raise InvalidLayer("the map of a sparse file has another length")
        numbers = [_number(line) for line in lines.first(1 + 2 * count)[1:]]
        taken = lines.taken
    else:
        taken = 0
        text = records.get(_MAP, b"")
        numbers = [_number(each) for each in text.split(b",")] if text else []
        if len(numbers) != 2 * _number(records.get(_KEYS + b"numblocks", b"")):
            raise InvalidLayer("the map of a sparse file has another length")
    found = SparseMap(real, tuple(zip(numbers[::2], numbers[1::2], strict=True)))
    _check(found, size - taken)
    return found, taken


class _Lines:
    """What stands before the payload; of which ``taken`` bytes were read, whole blocks."""

    def __init__(self, size: int, read_blocks: Callable[[int], bytes]) -> None:
        self.taken = 0
        self._size = size
        self._read = read_blocks
        self._text = bytearray()
        self._count = 0

    def first(self, wanted: int) -> list[bytes]:
        while self._count < wanted:
            if self.taken + _BLOCK > self._size:
                raise InvalidLayer("the map of a sparse file has no end")
            if self.taken >= limits.SPARSE_MAP_BYTES:
                raise LimitExceeded(
                    f"the map of a sparse file has more than {limits.SPARSE_MAP_BYTES} bytes"
                )
            block = self._read(_BLOCK)
            self.taken += _BLOCK
            self._count += block.count(b"\n")
            self._text += block
        return bytes(self._text).split(b"\n", wanted)[:wanted]


def _check(found: SparseMap, payload: int) -> None:
    end = 0
    for offset, length in found.pieces:
        if length < 0 or offset < end:
            raise InvalidLayer("the pieces of a sparse file are not in order")
        end = offset + length
    if end > found.size:
        raise InvalidLayer("a piece of a sparse file is behind the file's end")
    if found.data_size != payload:
        raise InvalidLayer("a sparse file has not as much data as its map says")
    if found.size > limits.LAYER_BYTES:
        raise LimitExceeded(f"a sparse file in the tar archive announces {found.size} bytes")


def _number(text: bytes) -> int:
    if _NUMBER.fullmatch(text) is None or not -_INT64 <= int(text) < _INT64:
        raise InvalidLayer("the map of a sparse file has something for a number")
    return int(text)
