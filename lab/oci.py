"""Writing OCI image layouts: blobs by digest, manifests, configs and indexes.

Source: OCI image specification 1.0, image-layout.md, manifest.md, config.md and image-index.md.
The same input gives the same bytes: compression carries no time stamp and JSON keys are sorted.
"""

import hashlib
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
INDEX: Final = "application/vnd.oci.image.index.v1+json"
CONFIG: Final = "application/vnd.oci.image.config.v1+json"
LAYER_TAR: Final = "application/vnd.oci.image.layer.v1.tar"
LAYER_GZIP: Final = "application/vnd.oci.image.layer.v1.tar+gzip"
REF_NAME: Final = "org.opencontainers.image.ref.name"

_CREATED: Final = "2024-01-01T00:00:00Z"
_PIECE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class LayerSource:
    """One layer to write: an uncompressed tar and how it is stored."""

    tar: bytes | Path
    compression: Literal["gzip", "none"] = "gzip"
    level: int = 6
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunConfig:
    """What the image config says about running, and the platform it is for."""

    cmd: Sequence[str] = ()
    entrypoint: Sequence[str] = ()
    env: Sequence[str] = ("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",)
    user: str = ""
    working_dir: str = "/"
    labels: Mapping[str, str] = field(default_factory=dict)
    os: str = "linux"
    architecture: str = "amd64"
    variant: str = ""


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """A layer as the manifest names it; the size is the compressed one, in bytes."""

    digest: str
    diff_id: str
    size: int
    media_type: str


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image or index in a layout; `layers` is empty for an index."""

    layout: Path
    tag: str
    digest: str
    size: int
    media_type: str
    layers: tuple[StoredLayer, ...] = ()
    platform: Mapping[str, str] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """The name Skopeo, Podman and Buildah take."""
        return f"oci:{self.layout}:{self.tag}"

    @property
    def compressed_size(self) -> int:
        """Bytes a plain pull fetches for the layers."""
        return sum(layer.size for layer in self.layers)

    def blob(self, digest: str) -> Path:
        """The file of the blob with this digest."""
        return self.layout / "blobs" / digest.replace(":", "/")


def write_image(
    layout: Path, tag: str, layers: Iterable[LayerSource], config: RunConfig
) -> StoredImage:
    """Write the layers, config and manifest and give the manifest the name `tag`."""
    _prepare(layout)
    stored: list[StoredLayer] = []
    descriptors: list[dict[str, Any]] = []
    for source in layers:
        layer = _store_layer(layout, source)
        stored.append(layer)
        descriptors.append(_descriptor(layer.media_type, layer.digest, layer.size, source))
    config_raw = _json(_config(config, [layer.diff_id for layer in stored]))
    config_digest = _store(layout, config_raw)
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {"mediaType": CONFIG, "digest": config_digest, "size": len(config_raw)},
        "layers": descriptors,
    }
    return _publish(layout, tag, manifest, layers=tuple(stored), platform=_platform(config))


def write_index(layout: Path, tag: str, images: Sequence[StoredImage]) -> StoredImage:
    """Write an index of images that are already in this layout and name it `tag`."""
    _prepare(layout)
    index = {
        "schemaVersion": 2,
        "mediaType": INDEX,
        "manifests": [
            {
                "mediaType": image.media_type,
                "digest": image.digest,
                "size": image.size,
                "platform": dict(image.platform),
            }
            for image in images
        ],
    }
    return _publish(layout, tag, index)


def read_image(layout: Path, tag: str) -> StoredImage:
    """The image written under `tag` earlier; KeyError when the layout does not have it."""
    named = json.loads((layout / "index.json").read_bytes())["manifests"]
    found = {entry["annotations"][REF_NAME]: entry for entry in named}[tag]
    blobs = layout / "blobs"
    manifest = json.loads((blobs / found["digest"].replace(":", "/")).read_bytes())
    layers: list[StoredLayer] = []
    platform: dict[str, str] = {}
    if found["mediaType"] == MANIFEST:
        config_path = blobs / manifest["config"]["digest"].replace(":", "/")
        config = json.loads(config_path.read_bytes())
        platform = {key: config[key] for key in ("os", "architecture", "variant") if key in config}
        layers = [
            StoredLayer(each["digest"], diff_id, each["size"], each["mediaType"])
            for each, diff_id in zip(manifest["layers"], config["rootfs"]["diff_ids"], strict=True)
        ]
    return StoredImage(
        layout, tag, found["digest"], found["size"], found["mediaType"], tuple(layers), platform
    )


def _prepare(layout: Path) -> None:
    (layout / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
    marker = layout / "oci-layout"
    if not marker.exists():
        marker.write_bytes(_json({"imageLayoutVersion": "1.0.0"}))


def _publish(
    layout: Path,
    tag: str,
    document: Mapping[str, Any],
    *,
    layers: tuple[StoredLayer, ...] = (),
    platform: Mapping[str, str] | None = None,
) -> StoredImage:
    raw = _json(document)
    media_type = document["mediaType"]
    digest = _store(layout, raw)
    path = layout / "index.json"
    named = json.loads(path.read_bytes())["manifests"] if path.exists() else []
    named = [entry for entry in named if entry["annotations"][REF_NAME] != tag]
    named.append(
        {
            "mediaType": media_type,
            "digest": digest,
            "size": len(raw),
            "annotations": {REF_NAME: tag},
        }
    )
    path.write_bytes(_json({"schemaVersion": 2, "mediaType": INDEX, "manifests": named}))
    return StoredImage(layout, tag, digest, len(raw), media_type, layers, platform or {})


def _store_layer(layout: Path, source: LayerSource) -> StoredLayer:
    """Compress, hash both forms, and file the blob under its digest."""
    packer = _gzip_packer(source.level) if source.compression == "gzip" else None
    plain, packed = hashlib.sha256(), hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=layout, prefix=".blob-", delete=False) as file:
        size = 0

        def emit(data: bytes) -> None:
            nonlocal size
            file.write(data)
            packed.update(data)
            size += len(data)

        for piece in _pieces(source.tar):
            plain.update(piece)
            emit(packer.compress(piece) if packer else piece)
        if packer:
            emit(packer.flush())
    digest = f"sha256:{packed.hexdigest()}"
    target = layout / "blobs" / digest.replace(":", "/")
    shutil.move(file.name, target)
    target.chmod(0o644)
    media_type = LAYER_GZIP if packer else LAYER_TAR
    return StoredLayer(digest, f"sha256:{plain.hexdigest()}", size, media_type)


def _gzip_packer(level: int) -> "zlib._Compress":
    """One gzip member with time stamp zero, as zlib writes it."""
    return zlib.compressobj(level, zlib.DEFLATED, 16 + zlib.MAX_WBITS)


def _pieces(tar: bytes | Path) -> Iterator[bytes]:
    if isinstance(tar, bytes):
        yield tar
        return
    with tar.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece


def _store(layout: Path, raw: bytes) -> str:
    digest = hashlib.sha256(raw).hexdigest()
    (layout / "blobs" / "sha256" / digest).write_bytes(raw)
    return f"sha256:{digest}"


def _descriptor(media_type: str, digest: str, size: int, source: LayerSource) -> dict[str, Any]:
    descriptor: dict[str, Any] = {"mediaType": media_type, "digest": digest, "size": size}
    if source.annotations:
        descriptor["annotations"] = dict(source.annotations)
    return descriptor


def _platform(config: RunConfig) -> dict[str, str]:
    platform = {"architecture": config.architecture, "os": config.os}
    if config.variant:
        platform["variant"] = config.variant
    return platform


def _config(config: RunConfig, diff_ids: list[str]) -> dict[str, Any]:
    run: dict[str, Any] = {"Env": list(config.env), "WorkingDir": config.working_dir}
    for key, value in (("Cmd", config.cmd), ("Entrypoint", config.entrypoint)):
        if value:
            run[key] = list(value)
    if config.user:
        run["User"] = config.user
    if config.labels:
        run["Labels"] = dict(config.labels)
    return {
        **_platform(config),
        "created": _CREATED,
        "config": run,
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": [{"created": _CREATED, "created_by": "lab.oci"} for _ in diff_ids],
    }


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
