"""tar-split: what must be kept of a layer's tar stream to give it back byte by byte.

Beside the extracted files containers/storage keeps ``<layer id>.tar-split.gz``:
JSON lines, gzip compressed (github.com/vbatts/tar-split, ``tar/storage/entry.go``
and ``tar/asm``).  In the order of the stream::

    {"type":2,"payload":"<base64>","position":0}        raw bytes: headers, padding, trailer
    {"type":1,"name":"etc/hosts","size":12,"payload":"<base64>","position":1}
                                                        the content of a file: CRC-64 (ISO), 8 bytes
    {"type":1,"name":"etc/","payload":null,"position":2}    an entry without content

A name that is no UTF-8 stands in ``name_raw`` in base64.  No path may come twice.
"""

from __future__ import annotations

import binascii
import hashlib
import json
import posixpath
import re
from collections.abc import Callable, Iterator
from gzip import BadGzipFile
from typing import BinaryIO, Final, cast

import anycrc
import msgspec
from isal import igzip, isal_zlib

from layerstore import limits
from layerstore.errors import CorruptStorage, InvalidLayer, StorageError
from layerstore.formats.gzipmember import GzipError

_CRC: Final = anycrc.Model("CRC64-GO-ISO")
_SEGMENT: Final = 2
_FILE: Final = 1
_FLUSH_BYTES: Final = 256 * limits.KIB
_READ_BYTES: Final = limits.MIB
_LINE_BYTES: Final = 2 * limits.TAR_EXTENDED_HEADER_BYTES
_GZIP_MAGIC: Final = b"\x1f\x8b"
_GZIP_WBITS: Final = 31
_SHORT: Final = 32  # bytes of a path that is remembered as it is

# Needs no escaping in JSON.
_PLAIN: Final = re.compile(rb"[-+.,:=@_~/ 0-9A-Za-z]*")
# Go's encoding/json escapes these too.
_GO_ESCAPED: Final = re.compile("[<>&\u2028\u2029]")


def crc64(data: bytes | memoryview, before: int = 0) -> int:
    """The CRC-64 of Go's ``crc64.ISO`` over ``data``, going on from ``before``."""
    return cast("int", _CRC.calc(data, before))


class TarSplitWriter:
    """Writes the lines of one layer in the order of its tar stream, compressed, to ``out``.

    Raises InvalidLayer for a path that comes twice, as every container engine does that
    keeps tar-splits; what ``out`` raises passes through.
    """

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        # The fast level: the lines are read once in a while, and written at every pull.
        self._compressor = isal_zlib.compressobj(level=1, wbits=_GZIP_WBITS)
        self._lines: list[bytes] = []
        self._pending = 0
        self._position = 0
        self._seen: set[bytes] = set()

    def segment(self, data: bytes) -> None:
        """Raw bytes of the stream; none at all is no line."""
        if data:
            encoded = binascii.b2a_base64(data, newline=False)
            self._line(b'{"type":2,"payload":"%b","position":%d}\n' % (encoded, self._position))

    def file(self, name: bytes, size: int, crc: int) -> None:
        """An entry by its name in the archive, after its content of ``size`` bytes."""
        path = _clean(name)
        if len(path) > _SHORT:
            # All paths of a layer are remembered, and an archive may make each 4 KiB long.
            path = hashlib.blake2b(path, digest_size=_SHORT + 1).digest()
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

    def close(self) -> None:
        """Write what is left; ``out`` stays open."""
        self._flush()
        self._out.write(self._compressor.flush())

    def _line(self, line: bytes) -> None:
        self._position += 1
        self._lines.append(line)
        self._pending += len(line)
        if self._pending >= _FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        self._out.write(self._compressor.compress(b"".join(self._lines)))
        self._lines.clear()
        self._pending = 0


class _Line(msgspec.Struct, frozen=True):
    type: int
    name: str = ""
    name_raw: str = ""
    size: int = 0
    payload: str | None = None


def assemble(tar_split: BinaryIO, open_file: Callable[[bytes], BinaryIO]) -> Iterator[bytes]:
    """Give the tar stream back, in pieces of at most 1 MiB for files.

    ``tar_split`` is the file of JSON lines, compressed or not.  ``open_file`` is called with the
    name of an entry as it stands in the archive, and gives its content or raises OSError.  Raises CorruptStorage for a damaged tar-split, and for a file that changed since it
    was extracted.
    """
    for line in _lines(tar_split):
        if line.type == _SEGMENT:
            yield _payload(line)
        elif line.type == _FILE and line.size:
            yield from _content(line, open_file)


def _content(line: _Line, open_file: Callable[[bytes], BinaryIO]) -> Iterator[bytes]:
    name = _name(line)
    shown = name.decode(errors="replace")
    left, crc = line.size, 0
    try:
        file = open_file(name)
    except OSError as error:
        raise CorruptStorage(
            f"the file is not what it was when the layer was extracted: {error.strerror or 'gone'}",
            subject=shown,
            advice="remove the image and pull it again",
        ) from error
    with file:
        while left:
            data = file.read(min(left, _READ_BYTES))
            if not data:
                raise CorruptStorage(
                    f"the file is {left} bytes shorter than when the layer was extracted",
                    subject=shown,
                )
            crc = crc64(data, crc)
            left -= len(data)
            if not left:
                _check(line, crc, longer=bool(file.read(1)), shown=shown)
            yield data


def _check(line: _Line, crc: int, *, longer: bool, shown: str) -> None:
    if longer:
        raise CorruptStorage("the file is longer than when the layer was extracted", subject=shown)
    if crc.to_bytes(8, "big") != _payload(line):
        raise CorruptStorage(
            "file integrity checksum failed: it changed since the layer was extracted",
            subject=shown,
            advice="remove the image and pull it again",
        )


def _lines(tar_split: BinaryIO) -> Iterator[_Line]:
    decoder = msgspec.json.Decoder(_Line)
    head = tar_split.read(2)
    tar_split.seek(-len(head), 1)
    # isal declares no types here.
    opened = cast("Callable[..., BinaryIO]", igzip.IGzipFile)
    file = opened(fileobj=tar_split, mode="rb") if head == _GZIP_MAGIC else tar_split
    try:
        while text := file.readline(_LINE_BYTES):
            yield decoder.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CorruptStorage(f"a line of the tar-split is damaged: {error}") from None
    except (EOFError, BadGzipFile, GzipError) as error:
        raise CorruptStorage(f"the tar-split is damaged: {error}") from None
    except OSError as error:
        raise StorageError(f"the tar-split cannot be read: {error}") from error


def _name(line: _Line) -> bytes:
    return _base64(line.name_raw) if line.name_raw else line.name.encode()


def _payload(line: _Line) -> bytes:
    return _base64(line.payload or "")


def _base64(text: str) -> bytes:
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:
        raise CorruptStorage(f"a line of the tar-split is damaged: {error}") from None


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


def _clean(name: bytes) -> bytes:
    """The path as Go's ``filepath.Clean`` gives it."""
    if name[:1] not in (b".", b"/", b"") and b"/." not in name and b"//" not in name:
        return name[:-1] if name.endswith(b"/") else name
    if name.startswith(b"//"):
        name = b"/" + name.lstrip(b"/")
    return posixpath.normpath(name)
