"""Plain fields of a TOC entry, checked: digests, numbers, extended attributes.

Attribute sets are stored once each, as ``u16 count`` and per attribute
``u8 length, name, u32 length, value``, sorted by name; offset 0 is never used, so
that 0 can say "none".
"""

from __future__ import annotations

import binascii
import struct
from typing import Final

from layerstore.errors import InvalidLayer, LimitExceeded, UnsupportedFormat
from layerstore.limits import (
    XATTR_NAME_BYTES,
    XATTR_VALUE_BYTES,
    XATTRS_BYTES_PER_FILE,
    XATTRS_PER_FILE,
)

SHA256: Final = "sha256:"
ID_MAX: Final = 0xFFFF_FFFE  # the last number is "no user" to the kernel
MAJOR_MAX: Final = (1 << 12) - 1  # Linux' 32-bit device numbers
MINOR_MAX: Final = (1 << 20) - 1

_COUNT: Final = struct.Struct("=H")
_VALUE: Final = struct.Struct("=I")
_POOL_BYTES: Final = (1 << 32) - 1
_MEMO_SETS: Final = 4096


def sha256_bytes(text: str, subject: str) -> bytes:
    """The 32 bytes of ``sha256:<64 lower-case hex digits>``.

    Raises UnsupportedFormat for another algorithm, InvalidLayer otherwise.
    """
    if text.startswith(SHA256):
        try:
            raw = bytes.fromhex(text[7:])
        except ValueError:
            raw = b""
        if len(raw) == 32 and raw.hex() == text[7:]:
            return raw
        raise InvalidLayer("a digest in the TOC is malformed", subject=subject)
    if ":" in text:
        raise UnsupportedFormat("a digest in the TOC is not sha256", subject=subject)
    raise InvalidLayer("a digest in the TOC is malformed", subject=subject)


def check_number(value: int, largest: int, what: str, subject: str) -> int:
    """``value`` if it lies in [0, largest], else InvalidLayer."""
    if not 0 <= value <= largest:
        raise InvalidLayer(f"the {what} {value} is out of range", subject=subject)
    return value


def parse_xattrs(xattrs: dict[str, str], subject: str) -> dict[bytes, bytes]:
    """Names and values as bytes; the bounds are those of Linux and of ``limits``."""
    if len(xattrs) > XATTRS_PER_FILE:
        raise LimitExceeded("too many extended attributes", subject=subject)
    parsed: dict[bytes, bytes] = {}
    for name, value in xattrs.items():
        if "\N{REPLACEMENT CHARACTER}" in name:
            raise UnsupportedFormat(
                "the name of an extended attribute is not UTF-8", subject=subject
            )
        try:
            raw_name, raw_value = name.encode(), binascii.a2b_base64(value, strict_mode=True)
        except ValueError as error:
            raise InvalidLayer("a malformed extended attribute", subject=subject) from error
        if not raw_name or b"\0" in raw_name:
            raise InvalidLayer("an extended attribute without a proper name", subject=subject)
        if len(raw_name) > XATTR_NAME_BYTES or len(raw_value) > XATTR_VALUE_BYTES:
            raise LimitExceeded("an extended attribute is too long", subject=subject)
        parsed[raw_name] = raw_value
    return parsed


class XattrPool:
    """Attribute sets by offset; equal sets are stored once (as far as a bounded memory reaches)."""

    def __init__(self) -> None:
        self.data = bytearray(8)
        self._known: dict[bytes, int] = {}

    def add(self, xattrs: dict[bytes, bytes], subject: str) -> int:
        """The offset of the set, 0 for an empty one."""
        if not xattrs:
            return 0
        if sum(map(len, xattrs)) + sum(map(len, xattrs.values())) > XATTRS_BYTES_PER_FILE:
            raise LimitExceeded("the extended attributes are too large", subject=subject)
        if len(xattrs) > XATTRS_PER_FILE:
            raise LimitExceeded("too many extended attributes", subject=subject)
        parts = [_COUNT.pack(len(xattrs))]
        for name in sorted(xattrs):
            value = xattrs[name]
            parts += (bytes((len(name),)), name, _VALUE.pack(len(value)), value)
        encoded = b"".join(parts)
        offset = self._known.get(encoded)
        if offset is None:
            offset = len(self.data)
            if offset + len(encoded) > _POOL_BYTES:
                raise LimitExceeded("the layer's extended attributes are too large")
            self.data += encoded
            if len(encoded) <= 1024:
                if len(self._known) >= _MEMO_SETS:
                    self._known.clear()
                self._known[encoded] = offset
        return offset


def read_xattrs(data: bytes | bytearray | memoryview, offset: int) -> dict[bytes, bytes]:
    """The set at ``offset`` of a pool, in order of names; empty for offset 0."""
    found: dict[bytes, bytes] = {}
    if not offset:
        return found
    (count,) = _COUNT.unpack_from(data, offset)
    at = offset + _COUNT.size
    for _ in range(count):
        start = at + 1
        at = start + data[at]
        name = bytes(data[start:at])
        (length,) = _VALUE.unpack_from(data, at)
        start = at + _VALUE.size
        at = start + length
        found[name] = bytes(data[start:at])
    return found
