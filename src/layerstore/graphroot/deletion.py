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

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from layerstore import limits
from layerstore.errors import InUse, UnknownObject
from layerstore.graphroot.containers import ContainerArea
from layerstore.graphroot.images import Image, ImageArea, with_names
from layerstore.graphroot.layers import Layer, LayerArea
from layerstore.graphroot.published import Published
from layerstore.graphroot.records import ContainerRecord, ImageRecord, LayerRecord
from layerstore.graphroot.usage import origins

if TYPE_CHECKING:
    from layerstore.graphroot.store import Store


@dataclass(frozen=True, slots=True)
class Removed:
    """What a removal did.

    Names taken away, the id of the deleted image, ids of deleted layers, ids of
    nameless images that went because only this one was built from them.
    """

    untagged: tuple[str, ...] = ()
    deleted_image: str | None = None
    deleted_layers: tuple[str, ...] = ()
    deleted_parents: tuple[str, ...] = ()


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
    force: bool = False,
    only_nameless: bool = False,
    published: Published | None = None,
) -> Removed:
    """Untag or delete an image of this graph root that was called ``name`` ("": by id).

    The layers of a ``published`` store stay until ``retire``.
    """
    users = published.image_users(image_id) if published is not None and not force else []
    with (
        layer_area.editing() as layers,
        image_area.editing() as images,
        container_area.table.lock.reading(),
    ):
        record = images.get(image_id)
        if record is None or (name and name not in record.names):
            raise UnknownObject("no such image any more", subject=name or image_id)
        if only_nameless and record.names:
            raise InUse(f"the image is called {record.names[0]}", subject=image_id)
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
        if users:
            raise InUse(
                f"a client's container {users[0]} was made from the image",
                subject=name or image_id,
                advice="force keeps its layers, but not the image",
            )
        known = {layer.id: layer for layer in layers.records}
        doomed: tuple[str, ...] = ()
        if published is None:
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


def remove_with_parents(
    store: Store, images: Sequence[Image], image: Image, name: str, *, force: bool
) -> Removed:
    """``remove_image``, then the nameless images of which only the deleted one was the next step."""
    above = origins(images) if not all(other.names for other in images) else {}
    areas = store.layer_area, store.image_area, store.container_area
    published = store.published
    removed = remove_image(*areas, image.id, name, force=force, published=published)
    child = removed.deleted_image
    while child is not None:
        parent = next(iter(above.pop(child, ())), None)
        if parent is None or any(parent in others for others in above.values()):
            break
        try:
            more = remove_image(*areas, parent, "", only_nameless=True, published=published)
        except (InUse, UnknownObject):
            break
        removed = replace(
            removed,
            deleted_layers=removed.deleted_layers + more.deleted_layers,
            deleted_parents=(*removed.deleted_parents, parent),
        )
        child = parent
    return removed


def unused_layers(store: Store) -> list[Layer]:
    """The layers of the graph root that no image and no container needs, children first."""
    layers = {layer.id: layer for layer in store.layers()}
    used: set[str] = set()
    tops = [container.layer_id for container in store.containers()]
    for image in store.images():
        tops += [image.top_layer, *image.record.mapped_layers]
    while tops:
        top = tops.pop()
        if top in layers and top not in used:
            used.add(top)
            tops.append(layers[top].parent)
    left = [layer for layer in layers.values() if layer.id not in used and not layer.read_only]
    return sorted(left, key=lambda layer: -_depth(layer, layers))


def _depth(layer: Layer, layers: dict[str, Layer]) -> int:
    depth, seen = 0, {layer.id}
    while layer.parent in layers and layer.parent not in seen:
        layer = layers[layer.parent]
        seen.add(layer.id)
        depth += 1
    return depth


def retire(store: Store, *, seconds: float = limits.RETIRED_SECONDS) -> tuple[str, ...]:
    """Delete the layers of a published store that nobody has needed for so long; their ids.

    Layers without an image that come to notice now are noted down, and go at a later call.
    """
    published = store.published
    if published is None:
        return ()
    unused = [layer.id for layer in unused_layers(store)]
    needed = published.needed(store.layer_area) if unused else set()
    noted, going = published.due(unused, needed, seconds=seconds)
    gone = []
    for layer in going:
        with contextlib.suppress(InUse, UnknownObject):  # used again, or somebody was faster
            delete_layer(store.layer_area, store.image_area, store.container_area, layer)
            gone.append(layer)
    if noted != published:
        noted.save()
    return tuple(gone)


def prune(store: Store, *, all_images: bool) -> list[Removed]:
    """Delete what ``Store.prune`` promises; one image after the other, each under the locks."""
    removed: list[Removed] = []
    tried: set[str] = set()
    while True:
        own = [image for image in store.images() if not image.read_only]
        used = {container.image_id for container in store.containers()}
        kept = used | tried
        if not all_images:
            kept |= {image.id for image in own if image.names}
            kept.update(*origins(own).values())
        found = [image.id for image in own if image.id not in kept]
        if not found:
            return removed
        for image in found:
            tried.add(image)
            with contextlib.suppress(InUse, UnknownObject):  # somebody was faster
                removed.append(
                    remove_image(
                        store.layer_area,
                        store.image_area,
                        store.container_area,
                        image,
                        "",
                        force=all_images,
                        only_nameless=not all_images,
                        published=store.published,
                    )
                )
