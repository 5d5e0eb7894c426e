"""What ``rmi`` and ``prune`` do beyond one image.

A layer of no image and no container is left over from a pull that failed, or from an image that
was removed without it.  But it may also belong to an image that somebody is pulling or building
at this moment, whose record comes last; so young ones stay.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from layerstore import limits
from layerstore.errors import InUse, LayerstoreError, UnknownObject
from layerstore.graphroot import deletion
from layerstore.graphroot.records import parse_time

if TYPE_CHECKING:
    from layerstore.graphroot.images import Image
    from layerstore.graphroot.layers import Layer
    from layerstore.graphroot.store import Store


class ImageRemoval:
    """Removes images one after the other and notes what became of each.

    ``untagged`` are names, ``deleted`` ids of images, in the order in which they went.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.untagged: list[str] = []
        self.deleted: list[str] = []
        self.errors: list[LayerstoreError] = []

    def remove(self, text: str, *, force: bool = False, ignore: bool = False) -> None:
        """Remove the image, or the one name of several, that ``text`` means; notes errors.

        An image that does not exist is no error with ``ignore``.
        """
        try:
            removed = self._store.remove_image(text, force=force)
        except UnknownObject as error:
            if not ignore:
                self.errors.append(error)
        except LayerstoreError as error:
            self.errors.append(error)
        else:
            self.untagged += removed.untagged
            if removed.deleted_image is not None:
                self.deleted += [removed.deleted_image, *removed.deleted_parents]

    def remove_all(self) -> None:
        """Remove every image of the graph root itself, by all its names."""
        for image in self._store.images():
            if not image.read_only:
                # One that went with another is not there any more.
                self.remove(image.id, force=True, ignore=True)


@dataclass
class Pruned:
    """What a prune removed: names, ids of images and layers, bytes of content and big data."""

    untagged: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    reclaimed: int = 0


def prune(
    store: Store,
    *,
    all_images: bool = False,
    grace_seconds: float = limits.UNUSED_LAYER_SECONDS,
    retired_seconds: float = limits.RETIRED_SECONDS,
) -> Pruned:
    """Remove dangling images, with ``all_images`` all without a container, and unused layers.

    Layers that are younger than ``grace_seconds``, or that have a name, stay; those of a
    published store until nobody has needed them for ``retired_seconds``.
    """
    for area in (store.layer_area, store.image_area):
        with area.editing():
            pass  # whoever edits first removes what dead processes left beside the tables
    images = {image.id: image for image in store.images()}
    sizes = {layer.id: _local_size(layer) for layer in store.layers()}
    result = Pruned()
    for removed in store.prune(all_images=all_images):
        result.untagged += removed.untagged
        if removed.deleted_image is not None:
            gone = (removed.deleted_image, *removed.deleted_parents)
            result.images += gone
            result.reclaimed += sum(_documents_size(images.get(image)) for image in gone)
        result.layers += removed.deleted_layers
    newest = (time.time() - grace_seconds) * 1e9
    result.layers += deletion.retire(store, seconds=retired_seconds)
    for layer in deletion.unused_layers(store) if store.published is None else ():
        if layer.names or (parse_time(layer.record.created) or 0) > newest:
            continue
        try:
            store.delete_layer(layer.id)
        except (InUse, UnknownObject):
            continue  # somebody was faster
        result.layers.append(layer.id)
    result.reclaimed += sum(sizes.get(layer, 0) for layer in result.layers)
    return result


def _local_size(layer: Layer) -> int:
    try:
        return 0 if layer.is_lazy else layer.size()
    except LayerstoreError:
        return 0


def _documents_size(image: Image | None) -> int:
    return 0 if image is None else sum(image.record.big_data_sizes.values())
