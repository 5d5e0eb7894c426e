"""Whose the mounted layers are: ``podman mount`` and ``podman image mount`` without a name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from layerstore.graphroot import mounts

if TYPE_CHECKING:
    from layerstore.graphroot.containers import Container
    from layerstore.graphroot.images import Image
    from layerstore.graphroot.store import Store


@dataclass(frozen=True, slots=True)
class Mounted:
    """A layer that is mounted: that of a container, the top layer of an image, or just a layer.

    ``id`` and ``names`` are those of the container or image; ``count`` is how many have mounted
    it.
    """

    kind: str
    id: str
    names: tuple[str, ...]
    layer: str
    path: Path
    count: int


def mounted(store: Store) -> list[Mounted]:
    """What is mounted in this graph root, by whatever tool; images of one layer come once each."""
    images, containers = store.images(), store.containers()
    found: list[Mounted] = []
    for point in mounts.mounted(store):
        owners: list[tuple[str, Image | Container]] = [
            ("container", one) for one in containers if one.layer_id == point.id
        ]
        owners += [("image", one) for one in images if one.top_layer == point.id]
        found += [
            Mounted(kind, owner.id, owner.names, point.id, point.path, point.count)
            for kind, owner in owners
        ]
        if not owners:
            found.append(Mounted("layer", point.id, (), point.id, point.path, point.count))
    return found
