"""``save`` and ``load``: images of the storage in archives and directories, as Podman does."""

from __future__ import annotations

import contextlib
import enum
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from layerstore.copy import dockerarchive
from layerstore.copy.archivereader import TarFiles
from layerstore.copy.context import CopyContext
from layerstore.copy.copyimage import CopyOptions, copy_between, into_storage
from layerstore.copy.dirlayout import DirSource
from layerstore.copy.manifestedit import Family
from layerstore.copy.names import ImageName, open_destination
from layerstore.copy.ociarchive import OciArchiveSource
from layerstore.copy.ocilayout import OciLayout, local_names
from layerstore.copy.recompress import Form
from layerstore.copy.storage_destination import pull_into
from layerstore.copy.storage_source import StorageSource
from layerstore.copy.transport import ImageSource
from layerstore.errors import InvalidManifest, UsageError
from layerstore.graphroot.images import Image, resolve
from layerstore.graphroot.store import Store
from layerstore.image import Reference


class SaveFormat(enum.StrEnum):
    """What ``save`` writes."""

    DOCKER_ARCHIVE = "docker-archive"
    OCI_ARCHIVE = "oci-archive"
    DOCKER_DIR = "docker-dir"
    OCI_DIR = "oci-dir"


@dataclass(frozen=True, slots=True)
class NamedImage:
    """An image that was saved or loaded, and the names that it has there."""

    image_id: str
    names: tuple[str, ...]

    @property
    def shown(self) -> tuple[str, ...]:
        """What Podman says was loaded: the names, or the id of an image without one."""
        return self.names or (f"sha256:{self.image_id}",)


def save(
    store: Store,
    images: Sequence[str],
    output: Path,
    ctx: CopyContext,
    *,
    save_format: SaveFormat = SaveFormat.DOCKER_ARCHIVE,
    several: bool = False,
    compress: bool = False,
    uncompressed: bool = False,
) -> tuple[NamedImage, ...]:
    """Write images of ``store`` to ``output``; what it holds then.

    All of ``images`` with ``several``, which only ``docker-archive`` can hold; otherwise the
    first, and the others are further names of it.  ``compress`` packs the layers in a
    ``docker-dir``, ``uncompressed`` leaves them plain in the OCI forms.

    Raises ``UnknownObject``, ``UsageError`` and what copying does.
    """
    if compress and save_format is not SaveFormat.DOCKER_DIR:
        raise UsageError("layers are packed on demand in docker-dir only")
    if uncompressed and save_format not in (SaveFormat.OCI_ARCHIVE, SaveFormat.OCI_DIR):
        raise UsageError("layers are left plain on demand in oci-archive and oci-dir only")
    if several and save_format is not SaveFormat.DOCKER_ARCHIVE:
        raise UsageError("only docker-archive holds several images")
    if save_format is SaveFormat.DOCKER_ARCHIVE:
        return _save_docker_archive(store, images, output, ctx, several=several)
    if len(images) > 1:
        raise UsageError("only docker-archive knows further names of an image")
    image, name = resolve(store.images(), images[0])
    options = CopyOptions(remove_signatures=True)
    rest = str(output)
    if save_format is SaveFormat.DOCKER_DIR:
        form = Form.GZIP if compress else None
        options = CopyOptions(format=Family.DOCKER, compression=form, remove_signatures=True)
    else:
        rest = f"{rest}:{name}" if name else rest
        if uncompressed:
            options = CopyOptions(compression=Form.PLAIN, remove_signatures=True)
    transport = {
        SaveFormat.DOCKER_DIR: "dir",
        SaveFormat.OCI_DIR: "oci",
        SaveFormat.OCI_ARCHIVE: "oci-archive",
    }[save_format]
    destination = open_destination(ImageName(transport, rest), ctx)
    with (
        contextlib.closing(StorageSource(store, name or image.id)) as source,
        contextlib.closing(destination),
    ):
        copy_between(source, destination, ctx, options)
    named = name and save_format is not SaveFormat.DOCKER_DIR
    return (NamedImage(image.id, (name,) if named else ()),)


def _save_docker_archive(
    store: Store, texts: Sequence[str], output: Path, ctx: CopyContext, *, several: bool
) -> tuple[NamedImage, ...]:
    wanted: dict[str, tuple[Image, list[Reference]]] = {}
    known = store.images()
    for text in texts if several else texts[:1]:
        image, name = resolve(known, text)
        _, names = wanted.setdefault(image.id, (image, []))
        if name and (reference := Reference.parse(name)).tag is not None:
            names.append(reference)
    if not several:
        for _, names in wanted.values():
            names.extend(map(dockerarchive.archive_tag, texts[1:]))
    archive = dockerarchive.DockerArchiveWriter(output, scratch=ctx.scratch)
    with contextlib.ExitStack() as stack:
        stack.callback(archive.abort)
        for image, names in wanted.values():
            source = stack.enter_context(contextlib.closing(StorageSource(store, image.id)))
            options = CopyOptions(remove_signatures=True)
            copy_between(source, archive.image(list(dict.fromkeys(names))), ctx, options)
        archive.finish()
    return tuple(
        NamedImage(image.id, tuple(dict.fromkeys(map(str, names))))
        for image, names in wanted.values()
    )


def load(store: Store, path: Path, ctx: CopyContext) -> tuple[NamedImage, ...]:
    """Bring all images of an archive or directory into ``store``.

    Raises ``InvalidManifest`` for what holds no images, and what ``pull_into`` does; images
    loaded before an error stay.
    """
    loaded: dict[str, NamedImage] = {}
    with contextlib.ExitStack() as stack:
        for source, names in _images_in(path, ctx, stack):
            result = pull_into(store, source, names, into_storage(source, ctx))
            before = loaded.get(result.image_id, NamedImage(result.image_id, ()))
            merged = tuple(dict.fromkeys((*before.names, *names)))
            loaded[result.image_id] = NamedImage(result.image_id, merged)
    return tuple(loaded.values())


def _images_in(
    path: Path, ctx: CopyContext, stack: contextlib.ExitStack
) -> Iterator[tuple[ImageSource, list[str]]]:
    """The images at ``path``, and what they are called there."""
    if path.is_dir():
        if (path / "index.json").exists():
            for number, entry in enumerate(OciLayout(path, None).entries()):
                names = () if entry.name is None else local_names(entry.name)
                yield OciLayout(path, f"@{number}"), _texts(names)
        elif (path / "manifest.json").exists():
            yield DirSource(path), _texts(local_names(os.path.realpath(path)))
        else:
            raise InvalidManifest("the directory holds no image", subject=str(path))
        return
    files = TarFiles(path, str(path), scratch=ctx.scratch)
    stack.callback(files.close)
    # The archives of new versions of Docker are both.
    if "index.json" in files and "oci-layout" in files:
        for number, _ in enumerate(OciArchiveSource(path, None, files=files).entries()):
            one = OciArchiveSource(path, f"@{number}", files=files)
            yield one, _texts(one.names)
        return
    archive = dockerarchive.DockerArchive(path, files=files)
    for number in range(len(archive.images)):
        image = archive.image(number)
        yield image, _texts(image.names)


def _texts(names: Sequence[Reference]) -> list[str]:
    return [str(name) for name in names]
