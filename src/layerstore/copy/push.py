"""``layerstore push``: an image of the graph root to a registry, or anywhere else."""

from __future__ import annotations

from dataclasses import replace

from layerstore.copy.context import CopyContext
from layerstore.copy.copyimage import CopyOptions, CopyResult, copy_between
from layerstore.copy.names import TRANSPORTS, open_destination
from layerstore.copy.storage_source import StorageSource
from layerstore.errors import UsageError
from layerstore.graphroot.store import Store


def push(
    image: str,
    destination: str | None = None,
    store: Store | None = None,
    context: CopyContext | None = None,
    options: CopyOptions | None = None,
) -> CopyResult:
    """Push the image called ``image`` from ``store`` (default: the storage of this machine).

    ``destination`` is a reference or ``TRANSPORT:NAME``; without one the image goes where its
    name says.  An image whose layers still have their blobs (those of a layer store do) is
    pushed byte for byte, with its manifest; otherwise layers are packed anew, except those
    that the destination has already.  Raises ``UnknownObject``, ``UsageError`` and what
    ``copy_between`` raises.
    """
    store = store or Store.open(read_only=True)
    context = context or CopyContext()
    source = StorageSource(store, image)
    if destination is None:
        if source.reference is None:
            raise UsageError("the image has no name that says where to push it", subject=image)
        destination = str(source.reference)
    transport, colon, _ = destination.partition(":")
    if not colon or transport not in TRANSPORTS:
        destination = f"docker://{destination}"
    target = open_destination(destination, context)
    try:
        return copy_between(source, target, replace(context, storage=store.config), options)
    finally:
        target.close()
