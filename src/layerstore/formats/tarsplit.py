"""tar-split: what must be kept of a layer's tar stream to give it back byte by byte.

JSON lines (github.com/vbatts/tar-split, ``tar/storage/entry.go`` and ``tar/asm``), in the
order of the stream::

    {"type":2,"payload":"<base64>","position":0}        raw bytes: headers, padding, trailer
    {"type":1,"name":"etc/hosts","size":12,"payload":"<base64>","position":1}
                                                        the content of a file: CRC-64 (ISO), 8 bytes
    {"type":1,"name":"etc/","payload":null,"position":2}    an entry without content

A name that is no UTF-8 stands in ``name_raw`` in base64.  No path may come twice.

containers/storage keeps them beside an extracted layer, in gzip; a zstd:chunked layer
carries them, in zstd.
"""

from __future__ import annotations

import binascii
import hashlib
import json
import posixpath
import re
from typing import Final, Protocol, cast

import anycrc

from layerstore import limits
from layerstore.errors import InvalidLayer

_CRC: Final = anycrc.Model("CRC64-GO-ISO")
_FLUSH_BYTES: Final = 256 * limits.KIB
_SHORT: Final = 32  # bytes of a path that is remembered as it is

# Needs no escaping in JSON.
_PLAIN: Final = re.compile(rb"[-+.,:=@_~/ 0-9A-Za-z]*")
# Go's encoding/json escapes these too.
_GO_ESCAPED: Final = re.compile("[<>&\u2028\u2029]")


class Writable(Protocol):
    """Where bytes go."""

    def write(self, data: bytes, /) -> object: ...


class Packer(Protocol):
    """A compressor of one stream."""

    def compress(self, data: bytes, /) -> bytes: ...

    def flush(self) -> bytes: ...


def crc64(data: bytes | memoryview, before: int = 0) -> int:
    """The CRC-64 of Go's ``crc64.ISO`` over ``data``, going on from ``before``."""
    return cast("int", _CRC.calc(data, before))


class TarSplitWriter:
    """Writes the lines of one layer in the order of its tar stream, compressed, to ``out``.

    Raises InvalidLayer for a path that comes twice, as every container engine does that
    keeps tar-splits; what ``out`` raises passes through.
    """

    def __init__(self, out: Writable, packer: Packer) -> None:
        self._out = out
        self._packer = packer
        self._lines: list[bytes] = []
        self._pending = 0
        self._position = 0
        self._seen: set[bytes] = set()
        self.size = 0
        """Bytes of the lines so far."""

    def segment(self, data: bytes) -> None:
        """Raw bytes of the stream; none at all is no line."""
        if data:
            encoded = binascii.b2a_base64(data, newline=False)
            self._line(b'{"type":2,"payload":"%b","position":%d}\n' % (encoded, self._position))

    def file(self, name: bytes, size: int, crc: int) -> None:
        """An entry by its name in the archive, after its content of ``size`` bytes."""
        path = _remembered(name)
        if path in self._seen:
            raise InvalidLayer(
                "the archive has this path twice, and then no engine can give the layer back",
                subject=name.decode(errors="replace"),
            )
        self._seen.add(path)
        parts = [b'{"type":1']
        if name:
            parts.append(_named(name))
        if size:
            checksum = binascii.b2a_base64(crc.to_bytes(8, "big"), newline=False)
            parts.append(b',"size":%d,"payload":"%b"' % (size, checksum))
        else:
            parts.append(b',"payload":null')
        parts.append(b',"position":%d}\n' % self._position)
        self._line(b"".join(parts))

    def has(self, name: bytes) -> bool:
        """Whether there was an entry of this path."""
        return _remembered(name) in self._seen

    def close(self) -> None:
        """Write what is left; ``out`` stays open."""
        self._flush()
        self._out.write(self._packer.flush())

    def _line(self, line: bytes) -> None:
        self._position += 1
        self._lines.append(line)
        self._pending += len(line)
        self.size += len(line)
        if self._pending >= _FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        self._out.write(self._packer.compress(b"".join(self._lines)))
        self._lines.clear()
        self._pending = 0


def _named(name: bytes) -> bytes:
    if _PLAIN.fullmatch(name):
        return b',"name":"%b"' % name
    try:
        text = name.decode()
    except UnicodeDecodeError:
        return b',"name_raw":"%b"' % binascii.b2a_base64(name, newline=False)
    quoted = json.dumps(text, ensure_ascii=False)
    escaped = _GO_ESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", quoted)
    return b',"name":%b' % escaped.encode()


def _remembered(name: bytes) -> bytes:
    path = _clean(name)
    if len(path) > _SHORT:
        # All paths of a layer are remembered, and an archive may make each 4 KiB long.
        path = hashlib.blake2b(path, digest_size=_SHORT + 1).digest()
    return path


def _clean(name: bytes) -> bytes:
    """The path as Go's ``filepath.Clean`` gives it."""
    if name[:1] not in (b".", b"/", b"") and b"/." not in name and b"//" not in name:
        return name[:-1] if name.endswith(b"/") else name
    if name.startswith(b"//"):
        name = b"/" + name.lstrip(b"/")
    return posixpath.normpath(name)
