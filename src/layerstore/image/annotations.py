"""Annotation keys: those that lazily readable layers carry in their manifest, and one of indexes.

eStargz: stargz-snapshotter, docs/estargz.md.  zstd:chunked: containers/storage,
pkg/chunked; the keys without ``github`` are the older form that
stargz-snapshotter still writes.  Entries of an index: BuildKit,
docs/attestations/attestation-storage.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from layerstore.errors import InvalidDigest
from layerstore.image.digest import Digest

ESTARGZ_TOC_DIGEST: Final = "containerd.io/snapshot/stargz/toc.digest"
ESTARGZ_UNCOMPRESSED_SIZE: Final = "io.containers.estargz.uncompressed-size"
ESTARGZ_LAYER_DIGEST: Final = "containerd.io/snapshot/stargz/layer.digest"

ZSTD_TOC_DIGEST: Final = "io.github.containers.zstd-chunked.manifest-checksum"
ZSTD_TOC_POSITION: Final = "io.github.containers.zstd-chunked.manifest-position"
ZSTD_TARSPLIT_DIGEST: Final = "io.github.containers.zstd-chunked.tarsplit-checksum"
ZSTD_TARSPLIT_POSITION: Final = "io.github.containers.zstd-chunked.tarsplit-position"
ZSTD_OLD_TOC_DIGEST: Final = "io.containers.zstd-chunked.manifest-checksum"
ZSTD_OLD_TOC_POSITION: Final = "io.containers.zstd-chunked.manifest-position"

REFERENCE_TYPE: Final = "vnd.docker.reference.type"
"""On the entry of an index that tells something about an image, and is none: an attestation."""

TOC_NOTES: Final = frozenset(
    {
        ESTARGZ_TOC_DIGEST,
        ZSTD_TOC_DIGEST,
        ZSTD_TOC_POSITION,
        ZSTD_TARSPLIT_POSITION,
        ZSTD_OLD_TOC_DIGEST,
        ZSTD_OLD_TOC_POSITION,
    }
)
"""The keys that lead to a layer's TOC and say how to verify it."""

_SIZE_DIGITS: Final = 18  # below 2**63


def toc_digest(annotations: Mapping[str, str]) -> Digest | None:
    """Digest of the uncompressed eStargz TOC, None if not announced.

    Raises ``InvalidDigest`` when the value is no digest.
    """
    value = annotations.get(ESTARGZ_TOC_DIGEST)
    return None if value is None else Digest.parse(value)


def layer_toc(found: Mapping[str, str]) -> Digest | None:
    """The TOC digest by which clients look a layer up (dialect T), from its annotations.

    None if there is none to rely on: it is no sha256 digest, or there are two of different
    formats.
    """
    texts = [found[key] for key in (ESTARGZ_TOC_DIGEST, ZSTD_TOC_DIGEST) if key in found]
    if len(texts) != 1:
        return None
    try:
        toc = Digest.parse(texts[0])
    except InvalidDigest:
        return None
    return toc if toc.algorithm == "sha256" else None


def uncompressed_size(annotations: Mapping[str, str]) -> int | None:
    """Announced length of the layer's tar stream in bytes.

    None when it is absent or not a plain decimal: the number is a convenience,
    and without it the layer is merely less useful.
    """
    value = annotations.get(ESTARGZ_UNCOMPRESSED_SIZE, "")
    if value.isascii() and value.isdigit() and len(value) <= _SIZE_DIGITS:
        return int(value)
    return None
