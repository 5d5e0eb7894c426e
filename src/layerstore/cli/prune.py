"""``layerstore prune``."""

from __future__ import annotations

from typing import Annotated

from layerstore import limits
from layerstore.cli.common import (
    STORAGE,
    Json,
    Quiet,
    StorageFlags,
    confirmed,
    human_size,
    option,
    print_json,
    switch,
)
from layerstore.copy.prune import prune as prune_storage

_DANGLING = "WARNING! This command removes all dangling images and unused layers."
_ALL = "WARNING! This command removes all images without a container, and unused layers."


def prune(
    *,
    all_images: Annotated[
        bool, switch("Remove all images that no container uses.", "--all", "-a")
    ] = False,
    force: Annotated[bool, switch("Do not ask for confirmation.", "--force", "-f")] = False,
    grace: Annotated[
        float, option("With --store: seconds that a layer stays after its image.", "--grace")
    ] = limits.RETIRED_SECONDS,
    quiet: Quiet = False,
    json: Json = False,
    storage: StorageFlags = STORAGE,
) -> None:
    """Remove what nobody needs: dangling images, layers of no image, what dead processes left."""
    if not force and not confirmed(_ALL if all_images else _DANGLING):
        return
    result = prune_storage(storage.open(), all_images=all_images, retired_seconds=grace)
    if json:
        print_json(
            {
                "Untagged": result.untagged,
                "DeletedImages": result.images,
                "DeletedLayers": result.layers,
                "SpaceReclaimed": result.reclaimed,
            }
        )
    elif not quiet:
        for name in result.untagged:
            print(f"Untagged: {name}")
        for identity in result.images:
            print(f"Deleted: {identity}")
        for identity in result.layers:
            print(f"Deleted layer: {identity}")
        print(f"Total reclaimed space: {human_size(result.reclaimed, space=False)}")
