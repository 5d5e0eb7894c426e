"""Finding and undoing the compression of a layer."""

import contextlib
import gzip
import io
import os
import struct
import sys
import tracemalloc
import zlib
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerstore.errors import InvalidLayer, NetworkError
from layerstore.formats import Compression, LayerStream

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

DATA = os.urandom(5000) + b"tar" * 100_000
SKIPPABLE = b"\x50\x2a\x4d\x18" + struct.pack("<I", 5) + b"12345"


def unpack(blob: bytes, piece: int = 70_000) -> bytes:
    stream = LayerStream(io.BytesIO(blob))
    found = b""
    while data := stream.read(piece):
        assert len(data) <= piece
        found += data
    return found


@pytest.mark.parametrize(
    ("blob", "kind"),
    [
        (DATA, Compression.NONE),
        (b"", Compression.NONE),
        (b"\x1f", Compression.NONE),
        (gzip.compress(DATA), Compression.GZIP),
        (zstd.compress(DATA), Compression.ZSTD),
        (SKIPPABLE + zstd.compress(DATA), Compression.ZSTD),
    ],
)
def test_the_first_bytes_decide(blob: bytes, kind: Compression) -> None:
    assert LayerStream(io.BytesIO(blob)).compression is kind


def test_many_members_and_frames_are_one_stream() -> None:
    parts = [DATA[:1], b"", DATA[1:90], DATA[90:]]
    assert unpack(DATA) == DATA
    assert unpack(b"".join(map(gzip.compress, parts))) == DATA
    assert unpack(SKIPPABLE + SKIPPABLE.join(map(zstd.compress, parts)) + SKIPPABLE) == DATA


@pytest.mark.parametrize("blob", [gzip.compress(DATA), zstd.compress(DATA)])
def test_truncation_and_garbage_are_noticed(blob: bytes) -> None:
    for broken in (
        blob[:-1],
        blob[: len(blob) // 2],
        blob[:10],
        blob + b"garbage",
        blob + blob[:5],
    ):
        with pytest.raises(InvalidLayer):
            unpack(broken)


def test_a_wrong_checksum_is_noticed() -> None:
    blob = bytearray(gzip.compress(DATA))
    blob[-6] ^= 1
    with pytest.raises(InvalidLayer):
        unpack(bytes(blob))


def test_what_the_source_raises_passes() -> None:
    class Broken:
        def __init__(self, blob: bytes) -> None:
            self.blob = io.BytesIO(blob)

        def read(self, n: int, /) -> bytes:
            if not (data := self.blob.read(min(n, 100))):
                raise NetworkError("gone")
            return data

    for pack in (gzip.compress, zstd.compress):
        stream = LayerStream(Broken(pack(DATA)[:3000]))
        with pytest.raises(NetworkError):
            b"".join(iter(partial(stream.read, 1000), b""))


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_bomb_needs_no_memory(kind: str) -> None:
    zeros = bytes(1 << 20)
    if kind == "gzip":
        packer = zlib.compressobj(9, wbits=31)
        bomb = b"".join(packer.compress(zeros) for _ in range(64)) + packer.flush()
    else:
        bomb = zstd.compress(zeros) * 64
    stream = LayerStream(io.BytesIO(bomb))
    total = 0
    tracemalloc.start()
    try:
        while data := stream.read(1 << 16):
            total += len(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 64 << 20
    assert peak < 4 << 20


@given(st.sampled_from([b"", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", SKIPPABLE]), st.binary())
def test_noise_only_raises_content_errors(head: bytes, noise: bytes) -> None:
    with contextlib.suppress(InvalidLayer):
        unpack(head + noise)
