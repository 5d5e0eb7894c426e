"""The uncompressed tar stream of a layer, whatever it is compressed with.

A layer is a tar archive, plain, in gzip members (RFC 1952) or in zstd frames
(RFC 8878, skippable frames included).  Media types lie often enough that the
first bytes decide, as they do in container engines.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable
from gzip import BadGzipFile
from typing import Final, Protocol, cast

from isal import igzip

from layerstore.errors import InvalidLayer
from layerstore.formats.gzipmember import GzipError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = ["Compression", "LayerStream", "Prefixed", "Readable", "detect", "zstd"]

_INPUT_BYTES: Final = 128 * 1024
_GZIP_MAGIC: Final = b"\x1f\x8b\x08"
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"


class Readable(Protocol):
    """A stream that gives at most ``n`` bytes, and ``b""`` only at its end."""

    def read(self, n: int, /) -> bytes: ...


class Compression(enum.Enum):
    """How a layer's tar stream is compressed."""

    NONE = "none"
    GZIP = "gzip"
    ZSTD = "zstd"


def detect(head: bytes) -> Compression:
    """Return the compression that the first bytes (at least 4) of a layer show."""
    if head.startswith(_GZIP_MAGIC):
        return Compression.GZIP
    # A zstd:chunked layer may begin with a skippable frame: 0x184D2A50 to 0x184D2A5F.
    if head.startswith(_ZSTD_MAGIC) or (
        len(head) >= 4 and head[0] & 0xF0 == 0x50 and head[1:4] == b"\x2a\x4d\x18"
    ):
        return Compression.ZSTD
    return Compression.NONE


class LayerStream:
    """The tar stream inside ``source``; ``compression`` says what was found there.

    ``read`` raises ``InvalidLayer`` for corrupt or truncated data and passes on what
    ``source`` raises.  Memory is bounded whatever the ratio of compression.
    """

    def __init__(self, source: Readable) -> None:
        head = b""
        while len(head) < 4 and (more := source.read(4 - len(head))):
            head += more
        self.compression = detect(head)
        rewound = Prefixed(head, source)
        self._stream: Readable
        if self.compression is Compression.GZIP:
            self._stream = _Gzip(rewound)
        elif self.compression is Compression.ZSTD:
            self._stream = _Zstd(rewound)
        else:
            self._stream = rewound

    def read(self, n: int, /) -> bytes:
        """Return at most ``n`` bytes (``n`` > 0), ``b""`` only at the end."""
        return self._stream.read(n)


class Prefixed:
    """A stream whose first bytes were read already."""

    def __init__(self, head: bytes, source: Readable) -> None:
        self._head = head
        self._source = source

    def read(self, n: int, /) -> bytes:
        """See ``Readable``."""
        if self._head:
            given, self._head = self._head[:n], self._head[n:]
            return given
        return self._source.read(n)

    def readinto(self, target: bytearray | memoryview, /) -> int:
        """Fill ``target`` as far as one read goes; how far it went."""
        data = self.read(len(target))
        target[: len(data)] = data
        return len(data)


class _Gzip:
    def __init__(self, source: Prefixed) -> None:
        # isal declares no types here.  Of the source only read and readinto are called.
        opened = cast("Callable[..., Readable]", igzip.IGzipFile)
        self._file = opened(fileobj=source, mode="rb")

    def read(self, n: int, /) -> bytes:
        try:
            return self._file.read(n)
        except (GzipError, EOFError, BadGzipFile) as error:
            raise InvalidLayer(f"the gzip stream is corrupt or truncated: {error}") from None


class _Zstd:
    def __init__(self, source: Readable) -> None:
        self._source = source
        self._frame = zstd.ZstdDecompressor()
        self._ended = False

    def read(self, n: int, /) -> bytes:
        try:
            return self._read(n)
        except zstd.ZstdError as error:
            raise InvalidLayer(f"the zstd stream is corrupt: {error}") from None

    def _read(self, n: int) -> bytes:
        while not self._ended:
            data = b""
            if self._frame.eof:
                data = self._frame.unused_data or self._source.read(_INPUT_BYTES)
                if not data:
                    self._ended = True
                    break
                self._frame = zstd.ZstdDecompressor()
            elif self._frame.needs_input:
                data = self._source.read(_INPUT_BYTES)
                if not data:
                    raise InvalidLayer("the zstd stream is truncated")
            output = self._frame.decompress(data, n)
            if output:
                return output
        return b""
