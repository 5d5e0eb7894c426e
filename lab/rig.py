"""One Podman with a running layerstore beside it, each with its own, recorded way to the registry.

Podman's requests and the store's pass through two different recording proxies, so that a test can
say who fetched what.  The store finds its proxy as a site would name a mirror: its registries.conf
rewrites the location of the host that stands in the image reference.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from lab import trees
from lab.fdstore import FdStore
from lab.oci import StoredImage
from lab.podman import Flavour, PodmanEnv
from lab.recording import RecordingProxy, Request
from lab.store import LayerstoreService
from lab.trees import Tree


class Rig:
    """A Podman environment of ``flavour`` and a store, both on ``upstream`` ("host:port").

    ``provider_upstream`` is another registry for the store alone (one that misbehaves, say).
    A context manager: starts the store, and removes everything at the end.
    ``with_reference`` False configures the store without ``:ref``.
    """

    def __init__(
        self,
        directory: Path,
        flavour: Flavour,
        upstream: str,
        *,
        provider_upstream: str | None = None,
        config: str = "",
        with_reference: bool = True,
        fd_store: FdStore | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """``fd_store`` and ``variables`` (of the environment) are for the service."""
        self.flavour: Final = flavour
        self.client: Final = RecordingProxy(upstream)
        """What Podman asks."""
        self.provider: Final = RecordingProxy(upstream)
        """What the store asks (nothing, where it has an upstream of its own)."""
        self.env: Final = PodmanEnv(
            directory / "podman", flavour, registries=(upstream, self.client.host)
        )
        conf = directory / "provider.conf"
        conf.write_text(
            f'[[registry]]\nprefix = "{self.client.host}"\n'
            f'location = "{provider_upstream or self.provider.host}"\ninsecure = true\n'
        )
        self.service: Final = LayerstoreService(
            directory / "layerstore",
            environment={
                **self.env.environment(),
                "CONTAINERS_REGISTRIES_CONF": str(conf),
                **(variables or {}),
            },
            config=config,
            fd_store=fd_store,
        )
        self.with_reference: Final = with_reference

    @property
    def store(self) -> Path:
        """The mounted store."""
        return self.service.mountpoint

    def image(self, name: str) -> str:
        """The reference of ``repository:tag`` as Podman is to be told."""
        return f"{self.client.host}/{name}"

    def configure(self) -> None:
        """Tell Podman of the store."""
        if self.with_reference:
            self.env.configure_storage(additional_layer_store=self.store)
        else:
            self.env.configure_storage(extra=f'additionallayerstores = ["{self.store}"]')

    def layer_path(self, image: str, name: str) -> Path:
        """Where the store has the layer ``name`` (a digest) of an image."""
        return layer_path(self.store, image, name)

    def share(self, image: StoredImage) -> float:
        """Bytes of blobs that the store has fetched so far, as a part of the image's layers."""
        return sum(r.bytes for r in blob_requests(self.provider, image)) / image.compressed_size

    def __enter__(self) -> Self:
        self.service.start()
        self.configure()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.env.cleanup()
        self.service.__exit__(kind, error, traceback)
        self.client.close()
        self.provider.close()


@dataclass(frozen=True, slots=True)
class Pushed:
    """An image in the tests' registry; ``name`` is ``repository:tag``."""

    name: str
    image: StoredImage


MakeRig = Callable[..., Rig]
Push = Callable[[StoredImage, str], Pushed]
PlainTree = Callable[[Pushed], Tree]
Document = dict[str, Any]


def edited(image: StoredImage, layout: Path, change: Callable[[Document, Document], None]) -> Path:
    """A copy of an image's layout whose manifest and config ``change`` has worked on."""
    shutil.copytree(image.layout, layout)

    def load(name: str) -> Document:
        document: Document = json.loads(image.blob(name).read_bytes())
        return document

    def store(document: Document) -> Document:
        raw = json.dumps(document).encode()
        name = hashlib.sha256(raw).hexdigest()
        (layout / "blobs/sha256" / name).write_bytes(raw)
        return {"digest": f"sha256:{name}", "size": len(raw)}

    manifest = load(image.digest)
    config = load(manifest["config"]["digest"])
    change(manifest, config)
    manifest["config"] |= store(config)
    index = json.loads((layout / "index.json").read_bytes())
    index["manifests"][0] |= store(manifest)
    (layout / "index.json").write_text(json.dumps(index))
    return layout


def layer_path(store: Path, image: str, name: str) -> Path:
    """The directory of a layer in a store that is configured with references."""
    return store / base64.b64encode(image.encode()).decode() / name


def blob_requests(face: RecordingProxy, image: StoredImage) -> list[Request]:
    """The requests for layer blobs of an image that passed there (its config does not count)."""
    layers = {layer.digest for layer in image.layers}
    return [request for request in face.requests() if request.path.rpartition("/")[2] in layers]


def sizes(image: StoredImage) -> dict[str, int]:
    """Compressed sizes by digest of the layers."""
    return {layer.digest: layer.size for layer in image.layers}


@contextlib.contextmanager
def mounted(env: PodmanEnv, image: str) -> Iterator[Path]:
    """`podman image mount` for the time of a block."""
    path = env.podman("image", "mount", image).stdout.strip()
    try:
        yield Path(path)
    finally:
        env.podman("image", "unmount", image)


def image_tree(env: PodmanEnv, image: str) -> Tree:
    """Everything in a mounted image."""
    with mounted(env, image) as path:
        return trees.snapshot(path)


def graph_layers(env: PodmanEnv) -> list[dict[str, Any]]:
    """The layer records of the graph root."""
    path = env.graph_root / "overlay-layers/layers.json"
    records: list[dict[str, Any]] = json.loads(path.read_bytes()) if path.exists() else []
    return records


def store_layers(env: PodmanEnv, store: Path) -> list[Path]:
    """The directories in the store that layers of the graph root stand for.

    Raises AssertionError where a layer has contents of its own instead.
    """
    found = []
    for record in graph_layers(env):
        directory = env.graph_root / "overlay" / record["id"]
        diff = directory / "diff"
        assert diff.is_symlink(), f"layer {record['id']} was extracted"
        target = Path(os.readlink(diff))
        assert target.is_relative_to(store), target
        named = Path((directory / "additionallayer").read_text())
        assert named == target.parent, (named, target)
        found.append(named)
    return found


def extracted_layers(env: PodmanEnv) -> list[Path]:
    """The layers of the graph root that hold files themselves."""
    diffs = [env.graph_root / "overlay" / record["id"] / "diff" for record in graph_layers(env)]
    return [diff for diff in diffs if not diff.is_symlink()]


def differing(
    expected: Tree, actual: Tree, *, seconds: bool = False, any_mtime: Collection[bytes] = ()
) -> Sequence[str]:
    """The first differences of two images' trees, their roots left out.

    containers/storage skips an archive's entry for the root when it extracts (the directory keeps
    mode 0555 and the time of the day); a store shows what the entry says.
    """
    ignore = {*trees.FORMAT_FILES, b"."}
    found = trees.compare(expected, actual, ignore=ignore, seconds=seconds, any_mtime=any_mtime)
    return found[:20]
