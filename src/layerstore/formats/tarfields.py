"""The fields of tar headers: numbers, texts, PAX records.

Numbers are octal digits or, when the first bit is set, two's complement binary
("base-256", GNU).  A PAX record is ``LENGTH KEY=VALUE\\n`` where LENGTH counts the
whole record in decimal (POSIX.1-2017, pax Extended Header).
"""

from __future__ import annotations

import re
from typing import Final

from layerstore.errors import InvalidLayer
from layerstore.formats import gnusparse

_ZERO: Final = bytes(512)
_ENDS: Final = b" \0"
_INT64: Final = 1 << 63
_OCTAL: Final = re.compile(rb"[ \0]*([0-7]*)[ \0]*")
_INTEGER: Final = re.compile(rb"-?[0-9]{1,19}")
_TIME: Final = re.compile(rb"(-?)([0-9]{1,19})(?:\.([0-9]{0,1000}))?")
_NO_NUL: Final = frozenset((b"path", b"linkpath", b"uname", b"gname"))


def is_zero(block: bytes) -> bool:
    """Say whether a block of at most 512 bytes is all zeros (the end of the stream is)."""
    return block == _ZERO[: len(block)]


def text(field: bytes) -> bytes:
    """Return a field's bytes up to the first NUL."""
    end = field.find(b"\0")
    return field if end < 0 else field[:end]


def number(field: bytes, what: str) -> int:
    """Return a numeric field, which may be negative; an empty one is 0."""
    digits = field[:-1]
    if digits.isdigit() and field[-1] in _ENDS:  # as nearly all are written
        try:
            return int(digits, 8)
        except ValueError:  # an 8 or a 9
            raise InvalidLayer(f"the {what} in a tar header is no number") from None
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        if field[0] & 0x40:
            value -= 1 << (8 * len(field) - 1)
        if not -_INT64 <= value < _INT64:
            raise InvalidLayer(f"the {what} in a tar header is out of range")
        return value
    match = _OCTAL.fullmatch(text(field.lstrip(b" \0")))
    if match is None:
        raise InvalidLayer(f"the {what} in a tar header is no number")
    return int(match[1], 8) if match[1] else 0


def pax_records(payload: bytes) -> dict[bytes, bytes]:
    """Return the records of a PAX extended header; of equal keys the last counts.

    The pieces of a sparse file, which have a record each, become one (``gnusparse``).
    """
    records: dict[bytes, bytes] = {}
    pieces: list[tuple[bytes, bytes]] = []
    position = 0
    while position < len(payload):
        # 19 digits hold every length that can be; a bound keeps the search short.
        space = payload.find(b" ", position, position + 20)
        digits = payload[position:space] if space > position else b""
        if not digits.isdigit():
            raise InvalidLayer("a PAX record has no length")
        end = position + int(digits)
        equals = payload.find(b"=", space, end)
        if end > len(payload) or equals <= space + 1 or payload[end - 1 : end] != b"\n":
            raise InvalidLayer("a PAX record is malformed")
        key, value = payload[space + 1 : equals], payload[equals + 1 : end - 1]
        if b"\0" in key or (key in _NO_NUL and b"\0" in value):
            raise InvalidLayer("a PAX record holds a NUL where none may be")
        if gnusparse.is_piece(key):
            pieces.append((key, value))
        else:
            records[key] = value
        position = end
    if pieces:
        key, value = gnusparse.joined_map(pieces)
        records[key] = value
    return records


def pax_integer(value: bytes, key: bytes) -> int:
    """Return a decimal value of 64 bits."""
    if _INTEGER.fullmatch(value) is None or not -_INT64 <= int(value) < _INT64:
        raise InvalidLayer(f"the PAX record {key.decode(errors='replace')} is no number")
    return int(value)


def pax_time(value: bytes) -> int:
    """Return nanoseconds since 1970 from a decimal number of seconds; finer digits are cut."""
    match = _TIME.fullmatch(value)
    if match is None or int(match[2]) >= _INT64:
        raise InvalidLayer("a PAX time is no number")
    fraction = (match[3] or b"")[:9].ljust(9, b"0")
    nanoseconds = int(match[2]) * 1_000_000_000 + int(fraction)
    return -nanoseconds if match[1] else nanoseconds
