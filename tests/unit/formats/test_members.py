"""Members of every packing, taken out of byte ranges."""

import contextlib
import gzip
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerstore.errors import ContentError, InvalidLayer, LimitExceeded
from layerstore.formats.compression import zstd
from layerstore.formats.members import Packing, codec

PAYLOAD = os.urandom(3000) + b"layer" * 3000


def pack(packing: Packing, payload: bytes) -> bytes:
    if packing is Packing.GZIP:
        return gzip.compress(payload)
    return zstd.compress(payload) if packing is Packing.ZSTD else payload


@pytest.mark.parametrize("packing", [Packing.GZIP, Packing.ZSTD, Packing.TAR])
def test_the_beginning_of_a_member_is_taken_and_what_follows_is_ignored(packing: Packing):
    member = pack(packing, PAYLOAD) + b"something that follows"
    for needed in (0, 1, 5000, len(PAYLOAD)):
        found = codec(packing).decompress(0, memoryview(member), needed=needed)
        assert bytes(found[:needed]) == PAYLOAD[:needed]


@pytest.mark.parametrize("packing", [Packing.GZIP, Packing.ZSTD, Packing.TAR])
def test_a_member_that_is_too_short_is_invalid(packing: Packing):
    member = pack(packing, PAYLOAD)
    with pytest.raises(InvalidLayer):
        codec(packing).decompress(0, member[: len(member) // 2], needed=len(PAYLOAD))


@given(st.lists(st.binary(max_size=300), max_size=6), st.integers(0, 1800))
def test_zstd_frames_are_read_one_after_the_other(payloads: list[bytes], needed: int):
    plain = b"".join(payloads)
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0skip"
    blob = skippable.join(map(zstd.compress, payloads))
    if needed <= len(plain):
        found = codec(Packing.ZSTD).decompress(0, blob, needed=needed)
        assert found == plain[:needed]
    else:
        with pytest.raises(InvalidLayer):
            codec(Packing.ZSTD).decompress(0, blob, needed=needed)


def test_a_zstd_bomb_gives_no_more_than_is_needed():
    bomb = zstd.compress(bytes(64 << 20))
    assert codec(Packing.ZSTD).decompress(0, bomb, needed=1000) == bytes(1000)


def test_a_gzip_bomb_is_cut_off():
    bomb = gzip.compress(bytes(80 << 20), 1)
    with pytest.raises(LimitExceeded):
        codec(Packing.GZIP).decompress(0, bomb, needed=1000)


@given(st.binary(max_size=300), st.integers(0, 4), st.sampled_from([Packing.GZIP, Packing.ZSTD]))
def test_arbitrary_bytes_only_raise_content_errors(data: bytes, keep: int, packing: Packing):
    data = pack(packing, b"")[:keep] + data
    with contextlib.suppress(ContentError):
        assert len(codec(packing).decompress(0, data, needed=100)) >= 100
