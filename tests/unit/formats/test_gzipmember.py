"""Taking one gzip member out of a byte range."""

import contextlib
import gzip
import os
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerstore.errors import ContentError, InvalidLayer, LimitExceeded
from layerstore.formats import decompress_member

PAYLOAD = os.urandom(3000) + b"layer" * 3000


@given(st.binary(max_size=5000), st.binary(max_size=200), st.integers(0, 9))
def test_a_member_comes_back_and_what_follows_is_ignored(
    payload: bytes, rest: bytes, level: int
) -> None:
    member = gzip.compress(payload, level)
    assert decompress_member(memoryview(member + rest), limit=5000) == payload


def test_only_the_first_member_is_taken() -> None:
    blob = gzip.compress(b"first") + gzip.compress(b"second")
    assert decompress_member(blob, limit=100) == b"first"


def test_an_empty_member_is_empty() -> None:
    assert decompress_member(gzip.compress(b""), limit=0) == b""


def test_optional_header_fields_are_skipped() -> None:
    plain = gzip.compress(b"data")
    extra = plain[:3] + b"\x0c" + plain[4:10] + b"\x04\0SGab" + b"name\0" + plain[10:]
    assert decompress_member(extra, limit=100) == b"data"


def test_the_limit_is_exact() -> None:
    member = gzip.compress(PAYLOAD)
    assert decompress_member(member, limit=len(PAYLOAD)) == PAYLOAD
    with pytest.raises(LimitExceeded):
        decompress_member(member, limit=len(PAYLOAD) - 1)


def test_a_bomb_is_cut_off() -> None:
    packer = zlib.compressobj(9, wbits=31)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(64)) + packer.flush()
    with pytest.raises(LimitExceeded):
        decompress_member(bomb, limit=1000)


def test_every_truncation_is_noticed() -> None:
    member = gzip.compress(b"some bytes, more bytes, some bytes")
    for length in range(len(member)):
        with pytest.raises(InvalidLayer):
            decompress_member(member[:length], limit=1000)


def test_checksum_and_length_of_the_member_are_checked() -> None:
    member = bytearray(gzip.compress(PAYLOAD))
    for position in (-1, -5, -8):
        damaged = bytearray(member)
        damaged[position] ^= 1
        with pytest.raises(InvalidLayer):
            decompress_member(bytes(damaged), limit=1 << 20)


@given(st.binary(max_size=300), st.integers(0, 2))
def test_arbitrary_bytes_only_raise_content_errors(data: bytes, keep: int) -> None:
    data = b"\x1f\x8b\x08"[:keep] + data
    with contextlib.suppress(ContentError):
        assert len(decompress_member(data, limit=10_000)) <= 10_000
