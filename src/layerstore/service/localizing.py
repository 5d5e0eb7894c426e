"""Images of the configured graph roots whose layers are to be local: ``layerstore materialize``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from layerstore.errors import CorruptStorage, UnknownObject
from layerstore.graphroot.layers import Layer
from layerstore.graphroot.localize import lazy_layers
from layerstore.graphroot.repair import needs_rebuilding
from layerstore.graphroot.store import Store
from layerstore.service.config import Config
from layerstore.service.graphneeds import graph_roots, image_stores, require_named
from layerstore.service.recordrepair import graph_root_store


@dataclass(frozen=True, slots=True)
class LazyImage:
    """An image, or all layers of a graph root, with lazy layers, the lowest first.

    ``errors`` are of images of which not all layers are known.
    """

    store: Store
    name: str
    layers: tuple[Layer, ...]
    errors: tuple[CorruptStorage, ...] = ()


def lazy_images(config: Config, name: str = "") -> Iterator[LazyImage]:
    """What of the image ``name`` is lazy in each graph root that has it; without a name, of all.

    Raises StorageError, also for a graph root that the configuration names and that is not there,
    ConfigError, and UnknownObject if no graph root has an image of this name.
    """
    require_named(config)
    found = False
    for root in graph_roots(config):
        store = graph_root_store(root, image_stores(config))
        if store is None:
            continue
        if not name:
            layers = tuple(_base_first(lazy_layers(store)))
            yield LazyImage(store, str(root), layers, tuple(_forgotten(store)))
            continue
        try:
            image = store.image(name)
        except UnknownObject:
            continue
        found = True
        yield LazyImage(store, name, tuple(lazy_layers(store, image.top_layer)))
    if name and not found:
        raise UnknownObject("no configured graph root has this image", subject=name)


def _forgotten(store: Store) -> Iterator[CorruptStorage]:
    for image in needs_rebuilding(store.images(), store.layer_areas):
        yield CorruptStorage(
            "layers of the image have no record",
            subject=image.id,
            advice="run `layerstore check storage --repair`, then this again",
        )


def _base_first(layers: list[Layer]) -> list[Layer]:
    parents = {layer.id: layer.parent for layer in layers}

    def depth(layer: Layer) -> int:
        above, steps = layer.parent, 0
        while above in parents and steps < len(parents):
            above, steps = parents[above], steps + 1
        return steps

    return sorted(layers, key=depth)
