"""``layerstore mount`` and ``umount``: images and containers as directories."""

from __future__ import annotations

from typing import Annotated

from layerstore.cli.common import (
    STORAGE,
    Json,
    NoTrunc,
    StorageFlags,
    finish,
    print_json,
    short_id,
    switch,
)
from layerstore.errors import LayerstoreError, UnknownObject, UsageError
from layerstore.graphroot import mounts
from layerstore.graphroot.containers import Container
from layerstore.graphroot.describe import image_or_container
from layerstore.graphroot.images import Image
from layerstore.graphroot.mounted import mounted
from layerstore.graphroot.store import Store


def mount(
    *names: str,
    read_write: Annotated[bool, switch("Demand write access, which only containers give.")] = False,
    no_trunc: NoTrunc = False,
    json: Json = False,
    storage: StorageFlags = STORAGE,
) -> None:
    """Mount images (read-only) or containers (read-write), and print where.

    Without NAMES, list what is mounted. Mounts are counted together with those of Podman:
    `umount` undoes one.
    """
    store = storage.open()
    if not names:
        _list(store, no_trunc=no_trunc, json=json)
        return
    errors: list[LayerstoreError] = []
    found = []
    for name in names:
        try:
            owner = image_or_container(store, name)
            if isinstance(owner, Container):
                path = mounts.mount_container(store, owner)
            elif read_write:
                raise UsageError("an image can only be mounted for reading", subject=name)
            else:
                path = mounts.mount_image(store, owner)
        except LayerstoreError as error:
            errors.append(error)
            continue
        found.append({"id": owner.id, "Names": list(owner.names), "mountpoint": str(path)})
    if json:
        print_json(found)
    elif len(names) == 1:
        for item in found:
            print(item["mountpoint"])
    else:
        for item in found:
            print(f"{item['id']}  {item['mountpoint']}")
    finish(errors)


def _list(store: Store, *, no_trunc: bool, json: bool) -> None:
    found = mounted(store)
    if json:
        print_json(
            [
                {
                    "id": one.id,
                    "Names": one.names,
                    "type": one.kind,
                    "mountpoint": str(one.path),
                    "count": one.count,
                }
                for one in found
            ]
        )
        return
    for one in found:
        print(f"{one.id if no_trunc else short_id(one.id)}  {one.path}")


def umount(
    *names: str,
    all_images: Annotated[bool, switch("All images that are mounted.", "--all", "-a")] = False,
    force: Annotated[
        bool, switch("Unmount at once, however often it is mounted.", "--force", "-f")
    ] = False,
    json: Json = False,
    storage: StorageFlags = STORAGE,
) -> None:
    """Undo one mount of images or containers; the last one unmounts.

    What is not mounted is no error.
    """
    if bool(names) == all_images:
        said = "either names or --all" if names else "image or container must be specified"
        raise UsageError(said)
    store = storage.open()
    if all_images:
        # One layer may belong to several images: it is undone once.
        layers = {one.layer: one.id for one in mounted(store) if one.kind == "image"}
        names = tuple(layers.values())
    errors: list[LayerstoreError] = []
    undone: list[str] = []
    for name in names:
        try:
            owner = image_or_container(store, name)
            if _unmount(store, owner, force=force):
                undone.append(owner.id if isinstance(owner, Image) else name)
        except LayerstoreError as error:
            errors.append(error)
    if json:
        print_json(undone)
    else:
        for said in undone:
            print(said)
    finish(errors)


def _unmount(store: Store, owner: Image | Container, *, force: bool) -> bool:
    """Whether it was mounted."""
    try:
        if isinstance(owner, Image):
            mounts.unmount_image(store, owner, force=force)
        else:
            mounts.unmount_container(store, owner, force=force)
    except UnknownObject:
        return False
    return True
