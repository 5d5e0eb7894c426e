"""Annotations of lazily readable layers."""

from __future__ import annotations

import pytest

import layerstore.image.annotations as keys
from layerstore.errors import InvalidDigest
from layerstore.image import Digest, toc_digest, uncompressed_size


def test_toc_digest() -> None:
    digest = Digest.of(b"toc")
    assert toc_digest({keys.ESTARGZ_TOC_DIGEST: digest}) == digest
    assert toc_digest({keys.ZSTD_TOC_DIGEST: digest}) is None
    with pytest.raises(InvalidDigest):
        toc_digest({keys.ESTARGZ_TOC_DIGEST: "sha256:x"})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1536", 1536),
        ("", None),
        ("-1", None),
        ("1e3", None),
        ("٣", None),
        ("9" * 19, None),
    ],
)
def test_uncompressed_size(text: str, size: int | None) -> None:
    assert uncompressed_size({keys.ESTARGZ_UNCOMPRESSED_SIZE: text}) == size
    assert uncompressed_size({}) is None
