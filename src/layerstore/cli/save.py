"""``layerstore save`` and ``layerstore load``: images of the storage in files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from layerstore.cli.common import STORAGE, Json, StorageFlags, option, print_json, switch
from layerstore.copy.context import CopyContext
from layerstore.copy.progress import listener
from layerstore.copy.saveload import NamedImage, SaveFormat
from layerstore.copy.saveload import load as load_images
from layerstore.copy.saveload import save as save_images
from layerstore.errors import UsageError

_STDIN, _STDOUT = Path("/dev/stdin"), Path("/dev/stdout")


def save(
    *images: str,
    output: Annotated[
        Path | None, option("Where to write [standard output].", "--output", "-o")
    ] = None,
    format: Annotated[  # noqa: A002
        Literal["docker-archive", "oci-archive", "docker-dir", "oci-dir"],
        option("What to write."),
    ] = "docker-archive",
    multi_image_archive: Annotated[
        bool,
        switch(
            "IMAGEs are all to be saved, not further names of the first.",
            "--multi-image-archive",
            "-m",
        ),
    ] = False,
    compress: Annotated[bool, switch("Pack the layers in a docker-dir.")] = False,
    uncompressed: Annotated[bool, switch("Leave layers plain in the OCI formats.")] = False,
    quiet: Annotated[bool, switch("Show no progress.", "--quiet", "-q")] = False,
    json: Json = False,
    storage: StorageFlags = STORAGE,
) -> None:
    """Save an image of the storage to an archive or a directory.

    IMAGEs after the first are further names of it in a docker-archive; with -m they are
    images to be saved, too.
    """
    if not images:
        raise UsageError("name the image to save")
    if output is None:
        if json:
            raise UsageError("standard output is for one thing: --json goes with --output")
        if format.endswith("-dir"):
            raise UsageError("a directory has to be named with --output")
        if sys.stdout.isatty():
            raise UsageError("an archive is not for a terminal: use --output or redirect")
    store = storage.open(read_only=True)
    with listener(quiet=quiet) as shown:
        saved = save_images(
            store,
            images,
            output or _STDOUT,
            CopyContext(listener=shown),
            save_format=SaveFormat(format),
            several=multi_image_archive,
            compress=compress,
            uncompressed=uncompressed,
        )
    if json:
        print_json([_document(image) for image in saved])


def load(
    *,
    input: Annotated[  # noqa: A002
        Path | None, option("What to read [standard input].", "--input", "-i")
    ] = None,
    quiet: Annotated[bool, switch("Show no progress.", "--quiet", "-q")] = False,
    json: Json = False,
    storage: StorageFlags = STORAGE,
) -> None:
    """Load all images of an archive or a directory into the storage."""
    if input is None and sys.stdin.isatty():
        raise UsageError("there is nothing to load: use --input or redirect")
    store = storage.open()
    with listener(quiet=quiet) as shown:
        loaded = load_images(store, input or _STDIN, CopyContext(listener=shown))
    if json:
        print_json([_document(image) for image in loaded])
        return
    for image in loaded:
        for name in image.shown:
            print(f"Loaded image: {name}")


def _document(image: NamedImage) -> dict[str, Any]:
    return {"Id": image.image_id, "Names": list(image.names)}
