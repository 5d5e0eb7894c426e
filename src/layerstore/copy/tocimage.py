"""The image that holds the TOCs of eStargz layers which have none in their blobs.

It is called like the image, with ``-esgztoc`` behind the tag, lies in the same repository, and
has one layer for each eStargz layer of all platforms, a tar archive of the TOC.  An annotation
of that layer names the eStargz blob.  The config is empty, and there is one manifest for all
platforms (stargz-snapshotter, nativeconverter/estargz/externaltoc).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from layerstore.copy import ocilayout
from layerstore.copy.context import CopyContext
from layerstore.copy.manifestedit import encode
from layerstore.copy.names import ImageName, open_destination, parse_image_name
from layerstore.copy.transport import ImageDestination
from layerstore.errors import UsageError
from layerstore.image import Digest, Reference, media_types
from layerstore.image.annotations import ESTARGZ_LAYER_DIGEST

SUFFIX: Final = "-esgztoc"
_CONFIG: Final = b"{}"


def toc_image_name(destination: str) -> ImageName:
    """The name of the TOC image that belongs to an image, both with transport.

    Raises ``UsageError`` where there can be none: it needs a tag, and a place beside it.
    """
    name = parse_image_name(destination)
    if name.transport == "docker":
        reference = Reference.parse(name.rest)
        if reference.tag is None:
            raise UsageError("an image with an external TOC is named by a tag", subject=destination)
        return ImageName("docker", str(reference.with_tag(reference.tag + SUFFIX)))
    if name.transport == "oci":
        path, tag = ocilayout.parse_name(name.rest)
        if tag is None:
            raise UsageError("an image with an external TOC is named by a tag", subject=destination)
        return ImageName("oci", f"{path}:{tag}{SUFFIX}")
    raise UsageError(
        "the image of the TOCs has no place beside this one",
        subject=destination,
        advice="destinations are docker://REFERENCE and oci:DIRECTORY:TAG",
    )


class TocImage:
    """The TOC image being written; its methods may be called from several threads."""

    def __init__(self, name: ImageName, ctx: CopyContext) -> None:
        self.name = name
        self._destination: ImageDestination = open_destination(name, ctx)

    def put(self, packed: bytes) -> tuple[Digest, int]:
        """Store the blob of one TOC; return its digest and size."""
        digest = Digest.of(packed)
        self._put(digest, packed)
        return digest, len(packed)

    def finish(self, tocs: Iterable[tuple[Digest, Digest, int]]) -> Digest:
        """Store config and manifest; ``tocs``: layer, and digest and size of its TOC's blob.

        Return the digest of the manifest.
        """
        config = Digest.of(_CONFIG)
        self._put(config, _CONFIG)
        layers: list[dict[str, Any]] = [
            {
                "mediaType": media_types.OCI_LAYER_GZIP,
                "digest": str(toc),
                "size": size,
                "annotations": {ESTARGZ_LAYER_DIGEST: str(layer)},
            }
            for toc, layer, size in sorted({(toc, layer, size) for layer, toc, size in tocs})
        ]
        raw = encode(
            {
                "schemaVersion": 2,
                "mediaType": media_types.OCI_MANIFEST,
                "config": {
                    "mediaType": media_types.OCI_CONFIG,
                    "digest": str(config),
                    "size": len(_CONFIG),
                },
                "layers": layers,
            }
        )
        self._destination.put_manifest(raw, media_types.OCI_MANIFEST, top=True)
        self._destination.commit()
        return Digest.of(raw)

    def close(self) -> None:
        """Give up connections."""
        self._destination.close()

    def _put(self, digest: Digest, data: bytes) -> None:
        if not self._destination.has_blob(digest, len(data)):
            self._destination.put_blob(digest, lambda: (data,), len(data))
