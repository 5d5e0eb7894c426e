"""Images in a graph root, made by layerstore's own hand: for tests that want no real tools."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab import tars
from layerstore.graphroot.identity import layer_id
from layerstore.graphroot.images import Image
from layerstore.graphroot.records import ContainerRecord, LayerRecord
from layerstore.graphroot.stage import stage_layer
from layerstore.graphroot.storageconf import StorageConfig
from layerstore.graphroot.store import Store
from layerstore.image import Digest

_LAYER = "application/vnd.oci.image.layer.v1.tar"
_CREATED = "2024-01-01T00:00:00Z"


def open_store(directory: Path, *additional: Path) -> Store:
    """A store below ``directory`` (``root`` and ``run``) with these additional image stores."""
    return Store.open(
        StorageConfig(
            graph_root=directory / "root",
            run_root=directory / "run",
            additional_image_stores=tuple(additional),
        )
    )


def layer_tar(*members: tars.Member) -> bytes:
    """A tar archive of these members."""
    out = io.BytesIO()
    tars.write_tar(out, members)
    return out.getvalue()


def put_layer(store: Store, tar: bytes, parent: str = "") -> LayerRecord:
    """A layer, as a pull of the uncompressed archive would make it."""
    with store.staging() as staging:
        staged = stage_layer(
            staging.new(),
            io.BytesIO(tar),
            blob_digest=None,
            blob_size=None,
            diff_id=None,
            whiteouts=store.whiteouts,
        )
        return store.put_layer(layer_id(parent, diff_id=staged.diff_id), parent, staged).record


def put_image(
    store: Store,
    layers: Sequence[bytes],
    *names: str,
    settings: Mapping[str, Any] | None = None,
    steps: Sequence[Mapping[str, Any]] | None = None,
    created: str = _CREATED,
) -> Image:
    """An image of these archives, the base first; ``steps`` is its history (one for each)."""
    records: list[LayerRecord] = []
    for tar in layers:
        records.append(put_layer(store, tar, records[-1].id if records else ""))
    if steps is None:
        steps = [
            {"created": created, "created_by": f"step {number}"} for number in range(len(layers))
        ]
    config = json.dumps(
        {
            "created": created,
            "architecture": "amd64",
            "os": "linux",
            "config": settings or {},
            "rootfs": {"type": "layers", "diff_ids": [record.diff_digest for record in records]},
            "history": steps,
        }
    ).encode()
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": Digest.of(config),
                "size": len(config),
            },
            "layers": [
                {
                    "mediaType": _LAYER,
                    "digest": record.compressed_diff_digest,
                    "size": record.compressed_size,
                }
                for record in records
            ],
            "annotations": {"org.example.note": "a test"},
        }
    ).encode()
    return store.put_image(
        image_id=Digest.of(config).hex,
        layer=records[-1].id if records else "",
        names=names,
        manifest=manifest,
        config=config,
        created=created,
    )


def put_container(store: Store, image: Image, name: str) -> str:
    """A container's records, as Podman writes them; the id.  Its layer has no directory."""
    identity = Digest.of(name.encode()).hex
    layer = Digest.of(f"layer of {name}".encode()).hex
    with store.layer_area.table.lock.writing():
        table = store.layer_area.table
        record = LayerRecord(layer, parent=image.top_layer, created=_CREATED)
        table.save([*table.load(), record])
    with store.container_area.table.lock.writing():
        table_of_containers = store.container_area.table
        table_of_containers.save(
            [
                *table_of_containers.load(),
                ContainerRecord(identity, (name,), image.id, layer, created=_CREATED),
            ]
        )
    return identity
