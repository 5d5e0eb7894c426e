"""Names of images with their transports: ``TRANSPORT:REST``, as in containers-transports(5).

A transport is loaded when it is used: a pull from a registry needs no archives.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from layerstore.copy.context import CopyContext
from layerstore.copy.docker import RegistryImage
from layerstore.copy.storage_source import StorageSource
from layerstore.copy.transport import ImageDestination, ImageSource
from layerstore.errors import UsageError
from layerstore.graphroot.location import parse_storage_name
from layerstore.graphroot.store import Store
from layerstore.image import Reference
from layerstore.registry import RegistryClient, RegistrySettings

STORAGE: Final = "containers-storage"
TRANSPORTS: Final = ("docker", "oci", "oci-archive", "docker-archive", "dir", STORAGE)
_UNTAGGED: Final = "@@unknown-digest@@"


class ImageName(msgspec.Struct, frozen=True):
    """``rest`` is what follows the transport's colon, for ``docker`` without the slashes."""

    transport: str
    rest: str

    def __str__(self) -> str:
        slashes = "//" if self.transport == "docker" else ""
        return f"{self.transport}:{slashes}{self.rest}"


def parse_image_name(text: str) -> ImageName:
    """Part the transport from the rest; raises ``UsageError`` for one that is not known."""
    transport, colon, rest = text.partition(":")
    if not colon or transport not in TRANSPORTS:
        raise UsageError(
            "an image is named TRANSPORT:NAME",
            subject=text,
            advice=f"transports are {', '.join(TRANSPORTS)}",
        )
    if transport == "docker":
        if not rest.startswith("//"):
            raise UsageError("an image of a registry is named docker://REFERENCE", subject=text)
        rest = rest[2:]
    if not rest:
        raise UsageError("the name of the image is missing", subject=text)
    return ImageName(transport, rest)


def open_source(name: str | ImageName, ctx: CopyContext) -> ImageSource:
    """Open an image for reading; raises ``UsageError`` and what the transport does."""
    name = parse_image_name(name) if isinstance(name, str) else name
    match name.transport:
        case "docker":
            reference = Reference.parse(name.rest)
            if reference.digest is not None:
                reference = reference.with_digest(reference.digest)  # the digest says all
            return RegistryImage(_client(ctx.source_registry), reference, owned=True)
        case "oci":
            from layerstore.copy import ocilayout  # noqa: PLC0415

            return ocilayout.OciLayout(*ocilayout.parse_name(name.rest))
        case "oci-archive":
            from layerstore.copy import ocilayout  # noqa: PLC0415
            from layerstore.copy.ociarchive import OciArchiveSource  # noqa: PLC0415

            path, tag = ocilayout.parse_name(name.rest, name.transport)
            return OciArchiveSource(path, tag, scratch=ctx.scratch)
        case "docker-archive":
            from layerstore.copy import dockerarchive  # noqa: PLC0415

            path, which = dockerarchive.parse_name(name.rest)
            archive = dockerarchive.DockerArchive(path, scratch=ctx.scratch)
            try:
                return archive.source(which)
            except BaseException:
                archive.close()
                raise
        case "dir":
            from layerstore.copy.dirlayout import DirSource  # noqa: PLC0415

            return DirSource(Path(name.rest))
        case _:
            return StorageSource(*open_storage(name.rest, ctx, read_only=True))


def open_destination(
    name: str | ImageName, ctx: CopyContext, *, tags: Sequence[Reference] = ()
) -> ImageDestination:
    """Open a place for an image; ``tags`` are further names of it in a ``docker-archive``.

    Raises ``UsageError``, also for ``containers-storage``, which is filled by pulling, and
    what the transport does.
    """
    name = parse_image_name(name) if isinstance(name, str) else name
    if tags and name.transport != "docker-archive":
        raise UsageError("only docker-archive knows further names of an image", subject=str(name))
    match name.transport:
        case "docker":
            text = name.rest.removesuffix(_UNTAGGED)
            reference = Reference.parse(text)
            if reference.digest is not None and reference.tag is not None:
                raise UsageError("name a tag or a digest, not both", subject=str(name))
            return RegistryImage(
                _client(ctx.destination_registry),
                reference,
                owned=True,
                untagged=text != name.rest,
            )
        case "oci":
            from layerstore.copy import ocilayout  # noqa: PLC0415

            path, tag = ocilayout.parse_name(name.rest)
            ocilayout.require_tag(tag)
            return ocilayout.OciLayout(path, tag)
        case "oci-archive":
            from layerstore.copy import ocilayout  # noqa: PLC0415
            from layerstore.copy.ociarchive import OciArchiveDestination  # noqa: PLC0415

            path, tag = ocilayout.parse_name(name.rest, name.transport)
            ocilayout.require_tag(tag)
            return OciArchiveDestination(path, tag, scratch=ctx.scratch)
        case "docker-archive":
            from layerstore.copy import dockerarchive  # noqa: PLC0415

            path, which = dockerarchive.parse_name(name.rest)
            names = [dockerarchive.archive_tag(which)] if which else []
            archive = dockerarchive.DockerArchiveWriter(path, scratch=ctx.scratch)
            return dockerarchive.DockerArchiveDestination(archive, [*names, *tags], owned=True)
        case "dir":
            from layerstore.copy.dirlayout import DirDestination  # noqa: PLC0415

            return DirDestination(Path(name.rest))
        case _:
            raise UsageError("images come into a storage by being pulled", subject=str(name))


def open_storage(rest: str, ctx: CopyContext, *, read_only: bool = False) -> tuple[Store, str]:
    """The storage that a ``containers-storage`` name means, and the image's name in it.

    Raises ``InvalidReference``, ``ConfigError`` and ``StorageError``.
    """
    location, name = parse_storage_name(rest)
    if not name:
        raise UsageError("the name of the image is missing", subject=f"{STORAGE}:{rest}")
    if location is not None:
        return Store.open(location.config(), read_only=read_only), name
    return Store.open(ctx.storage, read_only=read_only), name


def _client(settings: RegistrySettings | None) -> RegistryClient:
    return RegistryClient(settings or RegistrySettings.from_system())
