"""``info`` of a layer in an additional layer store: which of its keys are honoured.

containers/storage decodes the document straight into its layer record (layers.go,
``PutAdditionalLayer``), names, flags and id mappings included, and keeps what it found.  Here
only the keys of ``LayerFacts`` are read, each with its type; the others might as well not be
there.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from layerstore.errors import InvalidDigest, StorageError
from layerstore.image import Digest

_EXPECTED_FLAG: Final = "expected-layer-diffid"


class LayerFacts(msgspec.Struct, frozen=True):
    """What ``info`` says of a layer: the store's word, not verified."""

    compressed_diff_digest: Digest | None = None
    """The blob's digest."""
    compressed_size: int = 0
    """Of the blob in bytes; 0: not said."""
    diff_digest: Digest | None = None
    """The DiffID."""
    diff_size: int = -1
    """Of the tar stream in bytes; -1: not known."""
    compression: int = 0
    """Of the blob: 0 none, 1 bzip2, 2 gzip, 3 xz, 4 zstd, as containers/storage counts."""
    toc_digest: Digest | None = None
    expected_diff_id: Digest | None = None
    """The DiffID that the image's config states, to be checked at an export."""


class _Info(msgspec.Struct, rename="kebab"):
    compressed_diff_digest: str | None = None
    compressed_size: Annotated[int, msgspec.Meta(ge=-1, le=(1 << 63) - 1)] = 0
    diff_digest: str | None = None
    diff_size: Annotated[int, msgspec.Meta(ge=-1, le=(1 << 63) - 1)] = 0
    compression: Annotated[int, msgspec.Meta(ge=0, le=4)] = 0
    toc_digest: str | None = None
    flags: msgspec.Raw = msgspec.Raw(b"null")


class _Flags(msgspec.Struct):
    expected: str | None = msgspec.field(default=None, name=_EXPECTED_FLAG)


def parse_info(raw: bytes, *, subject: str = "info") -> LayerFacts:
    """Read the keys of ``info`` that are honoured; raises ``StorageError``."""
    try:
        info = msgspec.json.decode(raw, type=_Info)
        flags = msgspec.json.decode(info.flags, type=_Flags | None) or _Flags()
        return LayerFacts(
            compressed_diff_digest=_digest(info.compressed_diff_digest),
            compressed_size=max(info.compressed_size, 0),
            diff_digest=_digest(info.diff_digest),
            # Go leaves zeros out, and no tar stream has no bytes: 0 is "not said".
            diff_size=info.diff_size or -1,
            compression=info.compression,
            toc_digest=_digest(info.toc_digest),
            expected_diff_id=_digest(flags.expected),
        )
    except (msgspec.MsgspecError, ValueError, RecursionError, InvalidDigest) as error:
        raise StorageError(f"info cannot be used: {error}", subject=subject) from error


def _digest(text: str | None) -> Digest | None:
    return Digest.parse(text) if text else None
