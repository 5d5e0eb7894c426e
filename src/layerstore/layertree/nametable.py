"""Names while a layer is compiled: (directory, name) to number, without a Python object each.

Open addressing over flat arrays: a name costs its bytes and some 25 bytes more, so
that a layer of millions of names stays within a small multiple of its TOC.
"""

from __future__ import annotations

from array import array
from typing import Final

from layerstore.errors import LimitExceeded

NONE: Final = 0xFFFF_FFFF
_NAMES_BYTES: Final = (1 << 32) - 1
_FIRST_BITS: Final = 10


class NameTable:
    """Numbers 1.. for distinct (directory, name); ``targets`` says what each names now.

    A number whose target is NONE is a name that is not (any more) there.
    """

    def __init__(self) -> None:
        self.names = bytearray()
        self.ends = array("I", (0,))
        self.directories = array("I", (NONE,))
        self.targets = array("I", (NONE,))
        self._hashes = array("I", (0,))
        self._mask = (1 << _FIRST_BITS) - 1
        self._slots = array("I", bytes(4 << _FIRST_BITS))

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, number: int) -> bytes:
        """The name with that number."""
        return bytes(self.names[self.ends[number - 1] : self.ends[number]])

    def find(self, directory: int, name: bytes) -> int:
        """The number of ``name`` in ``directory``, 0 if it never was there."""
        return self._slots[self._probe(directory, name, hash((directory, name)) & 0xFFFF_FFFF)]

    def number(self, directory: int, name: bytes) -> int:
        """As ``find``, but a new name gets a number."""
        hashed = hash((directory, name)) & 0xFFFF_FFFF
        slot = self._probe(directory, name, hashed)
        number = self._slots[slot]
        if number:
            return number
        number = len(self.targets)
        if len(self.names) + len(name) > _NAMES_BYTES:
            raise LimitExceeded("the names of the layer are too large together")
        self.names += name
        self.ends.append(len(self.names))
        self.directories.append(directory)
        self.targets.append(NONE)
        self._hashes.append(hashed)
        self._slots[slot] = number
        if number * 2 > self._mask:
            self._grow()
        return number

    def _probe(self, directory: int, name: bytes, hashed: int) -> int:
        slots, mask = self._slots, self._mask
        slot = hashed & mask
        while number := slots[slot]:
            if (
                self._hashes[number] == hashed
                and self.directories[number] == directory
                and self.names[self.ends[number - 1] : self.ends[number]] == name
            ):
                break
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        mask = self._mask = self._mask * 4 + 3
        slots = self._slots = array("I", bytes(4 * (mask + 1)))
        for number, hashed in enumerate(self._hashes):
            if number:
                slot = hashed & mask
                while slots[slot]:
                    slot = (slot + 1) & mask
                slots[slot] = number

    def forget_hashes(self) -> None:
        """Give back what only ``find`` and ``number`` need."""
        self._slots = array("I", (0,))
        self._hashes = array("I", (0,))
        self._mask = 0
