"""Digests."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerstore.errors import InvalidDigest, VerificationError
from layerstore.image import Digest

EMPTY = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_of_and_parts() -> None:
    digest = Digest.of(b"")
    assert digest == EMPTY
    assert (digest.algorithm, digest.hex) == ("sha256", EMPTY[7:])
    assert Digest.parse(EMPTY) == digest
    assert {digest: 1}[Digest(EMPTY)] == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sha256:",
        EMPTY.upper(),
        EMPTY[:-1],
        EMPTY + "0",
        EMPTY + "\n",
        "md5:" + "0" * 32,
        EMPTY[7:],
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(InvalidDigest):
        Digest.parse(text)


@given(st.binary(), st.binary())
def test_verify(data: bytes, other: bytes) -> None:
    for digest in (Digest.of(data), Digest.parse(f"sha512:{hashlib.sha512(data).hexdigest()}")):
        digest.verify(data, subject="x")
        if other != data:
            with pytest.raises(VerificationError, match="x"):
                digest.verify(other, subject="x")
