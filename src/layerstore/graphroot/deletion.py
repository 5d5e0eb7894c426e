"""What may be deleted from a graph root, and deleting it.

An image goes only if no container was made from it.  With it go its layers, from
the top downward, until one that something else needs: a layer above it that
stays, another image of this graph root (its top layer or a copy of that for
another id mapping), a container.  Everything is decided with the locks of
layers, images and containers held, so that nobody can begin to use what is
being deleted; what takes long happens after they are released.

Source: containers/storage, store.go ("DeleteImage", "DeleteLayer").
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from layerstore.errors import InUse, LayerstoreError, UnknownObject
from layerstore.graphroot.containers import ContainerArea
from layerstore.graphroot.images import Image, ImageArea, with_names
from layerstore.graphroot.layers import LayerArea
from layerstore.graphroot.records import ContainerRecord, ImageRecord, LayerRecord

if TYPE_CHECKING:
    from layerstore.graphroot.store import Store


@dataclass(frozen=True, slots=True)
class Removed:
    """What a removal did: names taken away, the id of a deleted image, ids of deleted layers."""

    untagged: tuple[str, ...] = ()
    deleted_image: str | None = None
    deleted_layers: tuple[str, ...] = ()


def layers_to_delete(
    image: ImageRecord,
    images: Sequence[ImageRecord],
    layers: Mapping[str, LayerRecord],
    containers: Sequence[ContainerRecord],
) -> tuple[str, ...]:
    """The layers that go with ``image``, children before their parents.

    ``images`` may contain the image itself.  Layers that are not in ``layers``
    (those of additional image stores) stay.
    """
    kept = {container.layer for container in containers}
    for other in images:
        if other.id != image.id:
            kept.update((other.layer, *other.mapped_layers))
    children: dict[str, set[str]] = {}
    for layer in layers.values():
        children.setdefault(layer.parent, set()).add(layer.id)
    doomed: dict[str, None] = {}

    def may_go(layer: str) -> bool:
        return (
            layer in layers
            and layer not in kept
            and all(child in doomed for child in children.get(layer, ()))
        )

    for mapped in image.mapped_layers:
        if may_go(mapped):
            doomed[mapped] = None
    top = image.layer
    while top and top not in doomed and may_go(top):
        doomed[top] = None
        top = layers[top].parent
    return tuple(doomed)


def remove_image(
    layer_area: LayerArea,
    image_area: ImageArea,
    container_area: ContainerArea,
    image_id: str,
    name: str,
    *,
    force: bool,
) -> Removed:
    """Untag or delete an image of this graph root that was called ``name`` ("": by id)."""
    with (
        layer_area.editing() as layers,
        image_area.editing() as images,
        container_area.table.lock.reading(),
    ):
        record = images.get(image_id)
        if record is None or (name and name not in record.names):
            raise UnknownObject("no such image any more", subject=name or image_id)
        if len(record.names) > 1 and name:
            left = [other for other in record.names if other != name]
            images.put(with_names(record, left))
            images.save()
            return Removed(untagged=(name,))
        if len(record.names) > 1 and not force:
            raise InUse(
                f"the image has several names: {', '.join(record.names)}",
                subject=image_id,
                advice="remove it by each of its names, or use force",
            )
        containers = container_area.table.load()
        used = [container.id for container in containers if container.image == image_id]
        if used:
            raise InUse(f"the image is used by container {used[0]}", subject=name or image_id)
        known = {layer.id: layer for layer in layers.records}
        doomed = layers_to_delete(record, images.records, known, containers)
        images.delete(image_id)
        layers.delete(doomed)
    return Removed(record.names, image_id, doomed)


def delete_layer(
    layer_area: LayerArea, image_area: ImageArea, container_area: ContainerArea, layer_id: str
) -> None:
    """Delete one layer that nothing needs."""
    with (
        layer_area.editing() as layers,
        image_area.editing() as images,
        container_area.table.lock.reading(),
    ):
        if layers.get(layer_id) is None:
            raise UnknownObject("no such layer", subject=layer_id)
        for layer in layers.records:
            if layer.parent == layer_id:
                raise InUse(f"layer {layer.id} stands on it", subject=layer_id)
        for container in container_area.table.load():
            if container.layer == layer_id:
                raise InUse(f"it is the layer of container {container.id}", subject=layer_id)
        for image in images.records:
            if image.layer == layer_id:
                raise InUse(f"it is the top layer of image {image.id}", subject=layer_id)
        for image in images.records:
            if layer_id in image.mapped_layers:
                left = tuple(mapped for mapped in image.mapped_layers if mapped != layer_id)
                images.put(replace(image, mapped_layers=left))
                images.save()
        layers.delete([layer_id])


def prune(store: Store, *, all_images: bool) -> list[Removed]:
    """Delete what ``Store.prune`` promises; one image after the other, each under the locks."""
    removed: list[Removed] = []
    stuck: set[str] = set()
    while True:
        own = [image for image in store.images() if not image.read_only]
        used = {container.image_id for container in store.containers()}
        parents = frozenset() if all_images else _parents(store, own)
        found = [
            image
            for image in own
            if image.id not in used | stuck | parents and (all_images or not image.names)
        ]
        if not found:
            return removed
        for image in found:
            stuck.add(image.id)
            try:
                removed.append(
                    remove_image(
                        store.layer_area,
                        store.image_area,
                        store.container_area,
                        image.id,
                        "",
                        force=all_images,
                    )
                )
            except (InUse, UnknownObject):
                continue  # somebody was faster


def _parents(store: Store, images: Sequence[Image]) -> frozenset[str]:
    """The images on which others were built: their layers and their history go on there."""
    parent_of = {layer.id: layer.parent for layer in store.layers()}
    by_top: dict[str, list[Image]] = {}
    for image in images:
        if image.top_layer:
            by_top.setdefault(image.top_layer, []).append(image)
    found: set[str] = set()
    for image in images:
        below = parent_of.get(image.top_layer, "")
        seen: set[str] = set()
        while below and below not in seen:
            seen.add(below)
            found.update(other.id for other in by_top.get(below, ()))
            below = parent_of.get(below, "")
    for siblings in by_top.values():
        if len(siblings) > 1:
            found |= _by_history(siblings)
    return frozenset(found)


def _by_history(siblings: Collection[Image]) -> set[str]:
    histories = {image.id: _history(image) for image in siblings}
    return {
        shorter
        for shorter, steps in histories.items()
        for longer in histories.values()
        if steps and len(steps) < len(longer) and longer[: len(steps)] == steps
    }


def _history(image: Image) -> list[Any]:
    try:
        history = json.loads(image.config()).get("history")
    except (LayerstoreError, ValueError, AttributeError):
        return []
    return history if isinstance(history, list) else []
