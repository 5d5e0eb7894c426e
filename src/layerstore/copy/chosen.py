"""One image of a source: manifest, config and layers, for one platform, checked before use.

The order is that of containers/image (copy/single.go): the index, if the name stands for one,
chooses the manifest; the signature policy judges its bytes before anything in them is believed;
then config and layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from layerstore import limits
from layerstore.copy.reuse import WantedLayer, require_image, wanted_layers
from layerstore.copy.transport import ImageSource
from layerstore.errors import InvalidManifest, LimitExceeded, NotFound
from layerstore.image import (
    Descriptor,
    ImageConfig,
    Index,
    Manifest,
    Platform,
    parse_config,
    parse_manifest,
)
from layerstore.image.goconfig import require_readable_config, require_readable_manifest
from layerstore.registry import FetchedManifest

_NESTING: Final = 4  # indexes inside indexes

Check = Callable[[FetchedManifest], None]


class ChosenImage(msgspec.Struct, frozen=True):
    """The image to be had; ``index`` is what its name stands for, if that is not the manifest."""

    manifest: FetchedManifest
    parsed: Manifest
    index: FetchedManifest | None
    config_raw: bytes
    config: ImageConfig
    layers: tuple[WantedLayer, ...]


def choose_manifest(
    source: ImageSource, platform: Platform
) -> tuple[FetchedManifest, FetchedManifest | None]:
    """The manifest for ``platform``, and the index that led to it if one did.

    Raises ``NotFound`` when the index has none for the platform.
    """
    top = found = source.manifest()
    for _ in range(_NESTING):
        parsed = parse_manifest(found.raw, found.media_type)
        if isinstance(parsed, Manifest):
            return found, top if found is not top else None
        found = source.manifest(_entry(parsed, platform).digest)
    raise LimitExceeded(f"indexes are nested more than {_NESTING - 1} deep")


def _entry(index: Index, platform: Platform) -> Descriptor:
    entry = index.select(platform)
    if entry is None:
        # As containers/image: one without a platform is for all.
        entry = next((one for one in index.manifests if one.platform is None), None)
    if entry is None:
        names = {repr(str(one.platform))[1:-1] for one in index.manifests if one.platform}
        there = ", ".join(sorted(names))
        raise NotFound(
            f"no image for the platform {platform}",
            advice=f"there are: {there or 'none'}"[:500],
        )
    return entry


def choose_image(source: ImageSource, platform: Platform, check: Check) -> ChosenImage:
    """Read the image for ``platform``; ``check`` may refuse its manifest.

    Raises ``InvalidManifest``, ``UnsupportedFormat``, ``LimitExceeded`` and ``NotFound`` for
    what the image lacks, besides the errors of the source and of ``check``.
    """
    found, index = choose_manifest(source, platform)
    check(found)
    parsed = parse_manifest(found.raw, found.media_type)
    if not isinstance(parsed, Manifest):  # choose_manifest gave no index
        raise InvalidManifest("an index where a manifest was expected")
    for document in (found, index):
        if document is not None:
            require_readable_manifest(document.raw)
    require_image(parsed)  # what is none need not have a config that reads like one
    if parsed.config.size > limits.CONFIG_BYTES:
        raise LimitExceeded(
            f"the config has {parsed.config.size} bytes, at most {limits.CONFIG_BYTES} are taken"
        )
    raw = source.blob(parsed.config.digest, limits.CONFIG_BYTES)
    if len(raw) != parsed.config.size:
        raise InvalidManifest(
            f"the config has {len(raw)} bytes, not {parsed.config.size} as the manifest says"
        )
    config = parse_config(raw)
    require_readable_config(raw)
    return ChosenImage(found, parsed, index, raw, config, wanted_layers(parsed, config))
