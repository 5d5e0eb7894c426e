"""Members: the pieces of a blob that can be decompressed without the others.

Whatever the compression, a layer that is read piecewise is a row of members, each taken
out by its byte range: gzip members (eStargz), zstd frames (zstd:chunked), pieces of an
uncompressed tar, or the spans between decompressor checkpoints (``checkpoints``).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final, Protocol

from layerstore import limits
from layerstore.errors import InvalidLayer
from layerstore.formats.compression import LayerStream, Readable, zstd
from layerstore.formats.gzipmember import decompress_member


class Packing(enum.IntEnum):
    """How the members of a layer are packed.  The numbers stand in index files."""

    GZIP = 0
    ZSTD = 1
    TAR = 2
    CHECKPOINTS = 3


class MemberCodec(Protocol):
    """Takes members apart.  Thread-safe."""

    def decompress(
        self, member: int, data: bytes | memoryview, *, needed: int
    ) -> bytes | memoryview:
        """At least the first ``needed`` uncompressed bytes of member number ``member``.

        ``data`` is the member's whole range of the blob.  Raises InvalidLayer and
        LimitExceeded; never makes much more than ``needed`` bytes.
        """
        ...

    def stream(self, member: int, source: Readable) -> Readable:
        """The uncompressed bytes of a member too long to be held, and of what follows it."""
        ...


class _Gzip:
    def stream(self, member: int, source: Readable) -> Readable:
        return LayerStream(source)

    def decompress(self, member: int, data: bytes | memoryview, *, needed: int) -> bytes:
        return decompress_member(data, limit=needed + limits.MEMBER_SLACK_BYTES)


class _Zstd:
    """Frames one after the other: a writer may close one where it likes."""

    def stream(self, member: int, source: Readable) -> Readable:
        return LayerStream(source)

    def decompress(self, member: int, data: bytes | memoryview, *, needed: int) -> bytes:
        frame = zstd.ZstdDecompressor()
        try:
            plain = frame.decompress(data, needed) if needed else b""
            if len(plain) == needed:
                return plain
            pieces = [plain]
            missing = needed - len(plain)
            while missing:
                if frame.eof:
                    rest = frame.unused_data
                    if not rest:
                        break
                    frame = zstd.ZstdDecompressor()
                    plain = frame.decompress(rest, missing)
                elif frame.needs_input:
                    break
                else:
                    plain = frame.decompress(b"", missing)
                pieces.append(plain)
                missing -= len(plain)
        except zstd.ZstdError as error:
            raise InvalidLayer(f"a zstd frame is corrupt: {error}") from None
        if missing:
            raise InvalidLayer(f"zstd frames of {len(data)} bytes are truncated")
        return b"".join(pieces)


class _Tar:
    def stream(self, member: int, source: Readable) -> Readable:
        return source

    def decompress(self, member: int, data: bytes | memoryview, *, needed: int) -> memoryview:
        if len(data) < needed:
            raise InvalidLayer(f"a piece of the archive has {len(data)} bytes, not {needed}")
        return memoryview(data)[:needed]


_CODECS: Final[Mapping[Packing, MemberCodec]] = {
    Packing.GZIP: _Gzip(),
    Packing.ZSTD: _Zstd(),
    Packing.TAR: _Tar(),
}


def codec(packing: Packing) -> MemberCodec:
    """The codec of a packing that needs nothing but the members themselves."""
    return _CODECS[packing]
