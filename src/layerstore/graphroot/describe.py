"""What is told about an image: the documents of ``podman inspect`` and ``podman history``.

``image_document`` has Podman's keys, and one more, ``Layers``: where the content of each layer
comes from, which Podman does not tell.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from layerstore.errors import CorruptStorage, InvalidReference, LayerstoreError, UnknownObject
from layerstore.graphroot.records import ZERO_TIME, parse_time, same_time, time_text
from layerstore.graphroot.usage import parents
from layerstore.image import Reference

if TYPE_CHECKING:
    from layerstore.graphroot.containers import Container
    from layerstore.graphroot.images import Image
    from layerstore.graphroot.layers import Layer
    from layerstore.graphroot.store import Store
    from layerstore.graphroot.usage import ImageSummary

_SECOND: Final = 1_000_000_000  # in nanoseconds
MISSING: Final = "<missing>"
"""The id of a step of a history whose image is not here."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of an image's making, as ``podman history`` shows it; ``size`` is in bytes."""

    id: str
    created: str
    created_by: str
    size: int
    comment: str
    tags: tuple[str, ...]


def image_or_container(store: Store, text: str) -> Image | Container:
    """What ``text`` means; a container comes before an image of the same name, as for Podman.

    Raises ``UnknownObject``.
    """
    with contextlib.suppress(UnknownObject):
        return store.container(text)
    return store.image(text)


def history(image: Image) -> list[Step]:
    """The steps of ``image``, the newest first; raises ``StorageError``.

    As Podman shows them (containers/common, libimage/history.go): a step has the id of an image
    with the layers that are there after it, and their names; each id stands at the newest step only.
    """
    on_top: dict[str, list[Image]] = {}
    for one in (image, *image.store.images()):
        with_layer = on_top.setdefault(one.top_layer, [])
        if one.top_layer and one not in with_layer:
            with_layer.append(one)
    found: list[Step] = []
    shown: set[str] = set()
    layers = image.layers()
    for step in reversed(image.history()):
        here = on_top.get(layers[-1].id, []) if layers else []
        identity = here[0].id if here and here[0].id not in shown else MISSING
        shown.add(identity)
        found.append(
            Step(
                id=identity,
                created=same_time(step.created) or ZERO_TIME,
                created_by=step.created_by,
                size=step.layer.size() if step.layer is not None else 0,
                comment=step.comment,
                tags=tuple(name for one in here for name in one.names),
            )
        )
        if layers and not step.empty_layer:
            layers.pop()
    return found


def image_document(image: Image) -> dict[str, Any]:
    """What ``podman image inspect`` prints, and ``Layers``; raises ``StorageError``."""
    config = _config(image)
    settings: dict[str, Any] = config.get("config") or {}
    manifest = image.parsed_manifest()
    layers = image.layers()
    steps: list[dict[str, Any]] = [step or {} for step in config.get("history") or []]
    size = image.size()
    return {
        "Id": image.id,
        "Digest": image.manifest_digest or "",  # as Podman 5; Podman 4 names the index here
        "RepoTags": [name for name in image.names if "@" not in name],
        "RepoDigests": repo_digests(image),
        "Parent": parents(image.store.images()).get(image.id, ""),
        "Comment": config.get("comment") or "",
        "Created": config.get("created") or image.created,
        "Config": settings,
        "Version": config.get("docker_version") or "",
        "Author": config.get("author") or "",
        "Architecture": config.get("architecture") or "",
        "Os": config.get("os") or "",
        "Size": size,
        "VirtualSize": size,
        "GraphDriver": _driver(image.store, layers),
        "RootFS": {
            "Type": "layers",
            "Layers": (config.get("rootfs") or {}).get("diff_ids") or [],
        },
        "Labels": settings.get("Labels"),
        "Annotations": dict(manifest.annotations),
        "ManifestType": manifest.media_type,
        "User": settings.get("User") or "",
        "History": steps,
        "NamesHistory": list(image.record.names_history),
        "Layers": [layer_document(layer) for layer in layers],
    }


def layer_document(layer: Layer) -> dict[str, Any]:
    """Where a layer comes from.

    ``DiffID``, ``BlobDigest`` and ``Size`` are null where nobody has verified them (layers of an
    additional layer store); ``ExpectedDiffID`` is then what the image's config announces.
    ``Source`` is ``local``, ``additional-layer-store`` or ``additional-image-store``.
    """
    additional = layer.additional_layer
    if additional is not None:
        source = "additional-layer-store"
    else:
        source = "additional-image-store" if layer.read_only else "local"
    record = layer.record
    return {
        "Id": layer.id,
        "DiffID": layer.diff_id,
        "ExpectedDiffID": record.expected_diff_id,
        "TOCDigest": layer.toc_digest,
        "BlobDigest": layer.blob_digest,
        "Size": record.diff_size if record.diff_size > 0 or layer.diff_id else None,
        "CompressedSize": record.compressed_size or None,
        "Source": source,
        "Lazy": additional is not None,
        "DiffPath": str(layer.diff_path),
        "AdditionalLayer": None if additional is None else str(additional),
        "ReadOnly": layer.read_only,
    }


def container_document(store: Store, container: Container) -> dict[str, Any]:
    """What the storage knows of a container: Podman's own database knows more."""
    layers = store.layer_chain(container.layer_id)
    image = next((one for one in store.images() if one.id == container.image_id), None)
    return {
        "Id": container.id,
        "Names": list(container.names),
        "Created": container.created,
        "Image": container.image_id,
        "ImageName": image.names[0] if image is not None and image.names else "",
        "GraphDriver": _driver(store, layers),
        "Layers": [layer_document(layer) for layer in layers],
    }


def repo_digests(image: Image) -> list[str]:
    """``repository@digest`` for every repository and manifest digest of the image, sorted."""
    found: set[str] = set()
    for name in image.names:
        try:
            repository = Reference.parse(name).name
        except InvalidReference:
            continue
        found.update(f"{repository}@{digest}" for digest in image.digests)
    return sorted(found)


def _driver(store: Store, layers: list[Layer]) -> dict[str, Any]:
    """The directories of the top layer, as overlay's options have them, and its mount."""
    if not layers:
        return {"Name": store.config.driver, "Data": {}}
    *below, top = layers
    data: dict[str, str] = {}
    if below:
        data["LowerDir"] = ":".join(str(layer.diff_path) for layer in reversed(below))
    data["UpperDir"] = str(top.diff_path)
    data["WorkDir"] = str(top.diff_path.with_name("work"))
    return {"Name": store.config.driver, "Data": data}


def _config(image: Image) -> dict[str, Any]:
    try:
        document = json.loads(image.config())
    except ValueError as error:
        raise CorruptStorage("the config is damaged", subject=image.id) from error
    if not isinstance(document, dict):
        raise CorruptStorage("the config is no JSON object", subject=image.id)
    return document


def summary_document(summary: ImageSummary) -> dict[str, Any]:
    """One image of ``podman images --format json``."""
    image = summary.image
    seconds = (parse_time(image.created) or 0) // _SECOND
    return {
        "Id": image.id,
        "ParentId": summary.parent,
        "RepoTags": [name for name in image.names if "@" not in name],
        "RepoDigests": repo_digests(image),
        "Size": summary.size,
        "VirtualSize": summary.size,
        "Labels": _labels(image),
        "Containers": summary.containers,
        "ReadOnly": image.read_only,
        "Dangling": not image.names,
        "Names": list(image.names),
        "Digest": image.digest or "",
        "History": list(image.record.names_history),
        "Created": seconds,
        "CreatedAt": time_text(seconds * _SECOND),
    }


def _labels(image: Image) -> dict[str, Any] | None:
    try:
        settings: dict[str, Any] = _config(image).get("config") or {}
    except LayerstoreError:
        return None  # a damaged image is listed all the same
    return settings.get("Labels")
