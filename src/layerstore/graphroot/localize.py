"""Lazy layers made local: so that containers start without the layer store.

The layer's blob is read from the store, which gives it only when all of it is verified, and is
extracted beside the layer without a lock.  Blob, tar stream and diff ID are checked on the way:
the record then says of the layer what it says of one that was pulled.  Its id stays, whatever it
was made of.  Under the lock the extracted tree and the link to the store change places in one
step, so that a crash leaves the one layer or the other.

Mounts that stand on the lazy layer stay on it; new ones stand on the local one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from layerstore.errors import UnknownObject
from layerstore.graphroot.layers import Layer
from layerstore.graphroot.overlay import has_additional_layer
from layerstore.graphroot.records import EXPECTED_DIFF_ID, LayerRecord
from layerstore.graphroot.stage import stage_layer
from layerstore.graphroot.staged import DIFF, TAR_SPLIT, StagedLayer
from layerstore.graphroot.store import COMPRESSION_NUMBERS, Store


def lazy_layers(store: Store, top: str = "") -> list[Layer]:
    """The lazy layers of this graph root itself, the base first; with ``top`` those below it."""
    layers = store.layer_chain(top) if top else store.layers()
    return [layer for layer in layers if layer.is_lazy and not layer.read_only]


def localize(store: Store, layer: Layer, progress: Callable[[int], None]) -> None:
    """Make a lazy layer local.  ``progress`` is told numbers of bytes of its blob.

    Parents come before their children.  Raises StorageError if the layer store does not give the
    blob, VerificationError and other errors of content if it is not what the record says, and
    UnknownObject if the layer is gone.
    """
    record = layer.record
    with store.staging() as staging:
        with layer.blob() as (stream, _):
            staged = stage_layer(
                staging.new(),
                stream,
                blob_digest=record.compressed_diff_digest,
                blob_size=record.compressed_size if record.compressed_size > 0 else None,
                diff_id=record.diff_digest or record.expected_diff_id,
                whiteouts=store.whiteouts,
                progress=progress,
                ignore_chown_errors=store.config.ignore_chown_errors,
            )
        area = store.layer_area
        attributes = None if staged.root_entry else area.overlay.root_attributes(record.parent)
        tar_split = staged.directory / TAR_SPLIT
        with area.editing() as edit:
            now = edit.get(layer.id)
            if now is None:
                raise UnknownObject("the layer does not exist any more", subject=layer.id)
            if has_additional_layer(area.overlay.directory(layer.id)):
                edit.localize(_local(now, staged), staged.directory / DIFF, attributes, tar_split)


def _local(record: LayerRecord, staged: StagedLayer) -> LayerRecord:
    """What the record of a layer says that was extracted and verified as ``staged``."""
    flags = {name: value for name, value in record.flags.items() if name != EXPECTED_DIFF_ID}
    return dataclasses.replace(
        record,
        compressed_diff_digest=staged.blob_digest,
        compressed_size=staged.blob_size,
        diff_digest=staged.diff_id,
        diff_size=staged.diff_size,
        compression=COMPRESSION_NUMBERS[staged.compression],
        uids=staged.uids,
        gids=staged.gids,
        flags=flags,
    )
