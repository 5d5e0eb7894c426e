"""``layerstore push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from layerstore.cli.common import (
    REGISTRY,
    STORAGE,
    Json,
    Quiet,
    RegistryFlags,
    StorageFlags,
    option,
    print_json,
    switch,
)
from layerstore.copy.context import CopyContext
from layerstore.copy.copyimage import CopyOptions
from layerstore.copy.manifestedit import Family
from layerstore.copy.policy import Policy
from layerstore.copy.progress import listener
from layerstore.copy.pull import registry_host
from layerstore.copy.push import push as push_image
from layerstore.copy.recompress import Form


def push(
    image: str,
    destination: str | None = None,
    /,
    *,
    compression_format: Annotated[Form | None, option("Pack the layers so.")] = None,
    compression_level: Annotated[int | None, option("How tightly.")] = None,
    force_compression: Annotated[
        bool, switch("Also layers that the destination has otherwise.")
    ] = False,
    format: Annotated[  # noqa: A002
        Family | None, option("Manifest [as it is].", "--format", "-f")
    ] = None,
    remove_signatures: Annotated[bool, switch("Leave signatures out.")] = False,
    digestfile: Annotated[Path | None, option("Write the manifest's digest there.")] = None,
    signature_policy: Annotated[Path | None, option("policy.json to judge images by.")] = None,
    quiet: Quiet = False,
    json: Json = False,
    registry: RegistryFlags = REGISTRY,
    storage: StorageFlags = STORAGE,
) -> None:
    """Push IMAGE to a registry.

    DESTINATION is a name such as quay.io/me/app:1, or TRANSPORT:NAME; without it, the image
    goes where its name says.
    """
    settings = registry.settings(host=registry_host(destination or image))
    options = CopyOptions(
        format=format,
        compression=compression_format,
        level=compression_level,
        force_compression=force_compression,
        remove_signatures=remove_signatures,
    )
    with listener(quiet=quiet) as shown:
        context = CopyContext(
            destination_registry=settings,
            policy=None if signature_policy is None else Policy.load(signature_policy),
            listener=shown,
        )
        result = push_image(image, destination, storage.open(read_only=True), context, options)
    if digestfile is not None:
        digestfile.write_text(result.digest)
    if json:
        print_json({"digest": result.digest, "mediaType": result.media_type})
