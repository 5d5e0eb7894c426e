"""What an image is: pure values, checked when they are read."""

from layerstore.image import media_types
from layerstore.image.annotations import toc_digest, uncompressed_size
from layerstore.image.config import ImageConfig, parse_config
from layerstore.image.digest import Digest
from layerstore.image.manifest import Descriptor, Index, Manifest, parse_manifest
from layerstore.image.platform import Platform
from layerstore.image.reference import Reference

__all__ = [
    "Descriptor",
    "Digest",
    "ImageConfig",
    "Index",
    "Manifest",
    "Platform",
    "Reference",
    "media_types",
    "parse_config",
    "parse_manifest",
    "toc_digest",
    "uncompressed_size",
]
