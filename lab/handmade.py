"""Images put into a graph root through layerstore's own interface, without a registry."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

from lab.images import tar_bytes
from lab.tars import Member
from layerstore.graphroot.identity import image_id, layer_id
from layerstore.graphroot.images import Image
from layerstore.graphroot.layers import Layer
from layerstore.graphroot.stage import stage_layer
from layerstore.graphroot.staged import StagedLayer
from layerstore.graphroot.staging import Staging
from layerstore.graphroot.store import Store
from layerstore.image import Digest, media_types


def stage(store: Store, staging: Staging, members: Sequence[Member]) -> StagedLayer:
    """Extract an archive of these members into a staging directory of ``store``."""
    return stage_layer(
        staging.new(),
        io.BytesIO(tar_bytes(members)),
        blob_digest=None,
        blob_size=None,
        diff_id=None,
        whiteouts=store.whiteouts,
    )


def put_layer(store: Store, members: Sequence[Member], parent: str = "") -> Layer:
    """A layer of these members on ``parent``."""
    with store.staging() as staging:
        staged = stage(store, staging, members)
        return store.put_layer(layer_id(parent, diff_id=staged.diff_id), parent, staged)


def documents(
    layers: Sequence[Layer],
    *,
    cmd: Sequence[str] = ("/bin/sh",),
    history: Sequence[str] | None = None,
) -> tuple[bytes, bytes]:
    """Manifest and config of an image of these layers, the base first.

    ``history`` has a command for each step; those behind the last layer add none.
    """
    config: dict[str, Any] = {
        "created": "2024-01-01T00:00:00Z",
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": list(cmd)},
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
    }
    if history is not None:
        config["history"] = [
            {"created": "2024-01-01T00:00:00Z", "created_by": step}
            | ({"empty_layer": True} if number >= len(layers) else {})
            for number, step in enumerate(history)
        ]
    raw = json.dumps(config).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": media_types.OCI_MANIFEST,
        "config": {
            "mediaType": media_types.OCI_CONFIG,
            "digest": Digest.of(raw),
            "size": len(raw),
        },
        "layers": [
            {
                "mediaType": "application/vnd.oci.image.layer.v1.tar",
                "digest": layer.blob_digest,
                "size": layer.record.compressed_size,
            }
            for layer in layers
        ],
    }
    return json.dumps(manifest).encode(), raw


def put_image(
    store: Store,
    names: Sequence[str],
    layers: Sequence[Sequence[Member]],
    *,
    cmd: Sequence[str] = ("/bin/sh",),
    history: Sequence[str] | None = None,
    signatures: Sequence[bytes] = (),
) -> Image:
    """An image of layers that have these members, the base first."""
    put: list[Layer] = []
    for members in layers:
        put.append(put_layer(store, members, put[-1].id if put else ""))
    manifest, config = documents(put, cmd=cmd, history=history)
    return store.put_image(
        image_id=image_id(Digest.of(config)),
        layer=put[-1].id if put else "",
        names=names,
        manifest=manifest,
        config=config,
        created="2024-01-01T00:00:00Z",
        signatures=signatures,
    )
