"""Image configs: the platform and the digests of the uncompressed layers.

OCI image specification ("Image Configuration"); Docker's config has the same
fields.  Everything else in it is the consumer's affair and is not read.
"""

from __future__ import annotations

from typing import Final

import msgspec

from layerstore import limits
from layerstore.errors import InvalidManifest, LimitExceeded
from layerstore.image.digest import Digest, decode_digest
from layerstore.image.platform import Platform


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a config that layerstore needs.

    ``diff_ids`` are the digests of the layers' tar streams, lowest first;
    ``created`` is the RFC 3339 text as written, or empty.
    """

    platform: Platform
    diff_ids: tuple[Digest, ...]
    created: str = ""


class _RootFs(msgspec.Struct):
    type: str = "layers"
    diff_ids: list[Digest] | None = None


class _Document(msgspec.Struct):
    os: str = ""
    architecture: str = ""
    variant: str = ""
    created: str | None = None
    rootfs: _RootFs | None = None


_DECODER: Final = msgspec.json.Decoder(_Document, dec_hook=decode_digest)


def parse_config(raw: bytes) -> ImageConfig:
    """Read an image config; raises ``InvalidManifest`` and ``LimitExceeded``.

    A config without ``rootfs`` (an artifact's) has no diff IDs.
    """
    if len(raw) > limits.CONFIG_BYTES:
        raise LimitExceeded(
            f"an image config has at most {limits.CONFIG_BYTES} bytes, this one {len(raw)}"
        )
    try:
        document = _DECODER.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidManifest(f"not an image config: {error}") from error
    rootfs = document.rootfs or _RootFs()
    if rootfs.type != "layers":
        raise InvalidManifest(f"rootfs.type is {rootfs.type[:80]!r}, only 'layers' is known")
    diff_ids = tuple(rootfs.diff_ids or ())
    if len(diff_ids) > limits.MANIFEST_LAYERS:
        raise LimitExceeded(
            f"an image has at most {limits.MANIFEST_LAYERS} layers, this one {len(diff_ids)}"
        )
    return ImageConfig(
        platform=Platform(document.os, document.architecture, document.variant),
        diff_ids=diff_ids,
        created=document.created or "",
    )
