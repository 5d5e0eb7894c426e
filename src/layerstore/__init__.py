"""layerstore: containers start before their images have arrived.

The storage that Podman, Buildah, Skopeo and CRI-O share, as Python objects::

    from layerstore import Store, pull

    store = Store.open()
    result = pull("docker.io/library/alpine:3", store)
    for layer in store.image(result.image_id).layers():
        print(layer.id, layer.size())

``docs/python-api.md`` has more.  What is not named here is not meant for use from outside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from layerstore import lazy

if TYPE_CHECKING:
    from layerstore.copy.context import CopyContext
    from layerstore.copy.copyimage import CopyOptions, CopyResult
    from layerstore.copy.pull import PullOptions, When, pull
    from layerstore.copy.push import push
    from layerstore.copy.storage_destination import LayerOutcome, PullResult
    from layerstore.errors import LayerstoreError
    from layerstore.graphroot.containers import Container
    from layerstore.graphroot.deletion import Removed
    from layerstore.graphroot.images import HistoryEntry, Image
    from layerstore.graphroot.layers import Layer
    from layerstore.graphroot.storageconf import LayerStoreSpec, StorageConfig
    from layerstore.graphroot.store import Store
    from layerstore.image import Digest, Platform, Reference
    from layerstore.registry import RegistrySettings

__version__ = "0.1.0"

__all__ = [
    "Container",
    "CopyContext",
    "CopyOptions",
    "CopyResult",
    "Digest",
    "HistoryEntry",
    "Image",
    "Layer",
    "LayerOutcome",
    "LayerStoreSpec",
    "LayerstoreError",
    "Platform",
    "PullOptions",
    "PullResult",
    "Reference",
    "RegistrySettings",
    "Removed",
    "StorageConfig",
    "Store",
    "When",
    "pull",
    "push",
]

# Where each name lives.  It is loaded when it is first asked for: most programs need few of
# them, and the service none.
_HOMES: Final = {
    "Container": "graphroot.containers",
    "CopyContext": "copy.context",
    "CopyOptions": "copy.copyimage",
    "CopyResult": "copy.copyimage",
    "Digest": "image",
    "HistoryEntry": "graphroot.images",
    "Image": "graphroot.images",
    "Layer": "graphroot.layers",
    "LayerOutcome": "copy.storage_destination",
    "LayerStoreSpec": "graphroot.storageconf",
    "LayerstoreError": "errors",
    "Platform": "image",
    "PullOptions": "copy.pull",
    "PullResult": "copy.storage_destination",
    "Reference": "image",
    "RegistrySettings": "registry",
    "Removed": "graphroot.deletion",
    "StorageConfig": "graphroot.storageconf",
    "Store": "graphroot.store",
    "When": "copy.pull",
    "pull": "copy.pull",
    "push": "copy.push",
}
if not TYPE_CHECKING:  # else every name would be one to mypy
    __getattr__ = lazy.attributes(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
