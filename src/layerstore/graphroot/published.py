"""A graph root that others use as an additional image store, and what they need of it.

Podman and CRI-O read such a store and write nothing into it, so it cannot tell by its own
records which of its layers their containers stand on.  Removing an image from a published
store therefore removes its record only, so that nobody chooses it any more.  Its layers are
*retired*: they go when, ``limits.RETIRED_SECONDS`` later or more, nobody needs them.  Needed is

* what an image or a container of the store itself stands on;
* what is a lower directory of an overlay mount in any mount namespace of this machine: running
  containers of whomever;
* what the layers, images and containers of the known client graph roots stand on: stopped
  containers, too.

``GRAPHROOT/layerstore/published.json`` makes a graph root a published one::

    {"clients": ["/var/lib/containers/storage"], "retired": {"<layer id>": <seconds since 1970>}}
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from layerstore import limits
from layerstore.errors import ConfigError, CorruptStorage
from layerstore.graphroot import atomic
from layerstore.graphroot.lowers import layer_ids_in, overlay_mounts, short_names
from layerstore.graphroot.records import ContainerRecord, ImageRecord, LayerRecord
from layerstore.graphroot.storageconf import StorageConfig
from layerstore.graphroot.table import R, Table, TableName

if TYPE_CHECKING:
    from layerstore.graphroot.layers import LayerArea

_FILE: Final = Path("layerstore") / "published.json"


class _Document(msgspec.Struct):
    clients: list[str] = []
    retired: dict[str, float] = {}


@dataclass(frozen=True, slots=True)
class Published:
    """What the file says; ``path`` is the file."""

    path: Path
    clients: tuple[Path, ...] = ()
    retired: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def graph_root(self) -> Path:
        """The graph root that is published."""
        return self.path.parents[1]

    @classmethod
    def of(cls, graph_root: Path) -> Published | None:
        """None for a graph root of one's own; raises ``CorruptStorage``."""
        path = graph_root / _FILE
        try:
            data, _ = atomic.read_file(path, limits.RECORDS_BYTES)
        except OSError:
            return None
        try:
            document = msgspec.json.decode(data, type=_Document)
        except msgspec.MsgspecError as error:
            raise CorruptStorage(f"cannot be read: {error}", subject=str(path)) from error
        return cls(path, tuple(map(Path, document.clients)), document.retired)

    @classmethod
    def publish(cls, graph_root: Path, clients: Sequence[Path] = ()) -> Published:
        """Make ``graph_root`` a published one, with these clients besides those it has."""
        for client in clients:
            if not client.is_absolute():
                raise ConfigError("a client's graph root is an absolute path", subject=str(client))
        old = cls.of(graph_root)
        known = old.clients if old is not None else ()
        wanted = tuple(dict.fromkeys((*known, *clients)))
        if old is not None and wanted == known:
            return old
        new = replace(old or cls(graph_root / _FILE), clients=wanted)
        new.save()
        return new

    def save(self) -> None:
        """Write the file."""
        self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        document = _Document([str(path) for path in self.clients], dict(self.retired))
        atomic.write_file(self.path, msgspec.json.encode(document), mode=0o644)

    # -- who needs what ------------------------------------------------------------------

    def image_users(self, image: str) -> list[str]:
        """The containers of the clients that were made from ``image``."""
        return [
            container.names[0] if container.names else container.id
            for root in self.clients
            for container in _records(root, "containers", ContainerRecord)
            if container.image == image
        ]

    def needed(self, area: LayerArea) -> set[str]:
        """The layers of this store's ``area`` that others need, with all below them."""
        parents = {record.id: record.parent for record in area.records()}
        links = {area.overlay.link(layer).encode(): layer for layer in parents}
        found: set[str] = set()
        for text in (*overlay_mounts(), *self._client_lowers()):
            found.update(links[name] for name in short_names(text) if name in links)
            found.update(layer.decode() for layer in layer_ids_in(text, area.overlay.home))
        for root in self.clients:
            found.update(record.parent for record in _records(root, "layers", LayerRecord))
            for image in _records(root, "images", ImageRecord):
                found.update((image.layer, *image.mapped_layers))
        needed: set[str] = set()
        for start in found:
            layer = start
            while layer in parents and layer not in needed:
                needed.add(layer)
                layer = parents[layer]
        return needed

    def _client_lowers(self) -> Iterator[bytes]:
        for root in self.clients:
            with contextlib.suppress(OSError):
                for directory in os.scandir(root / "overlay"):
                    with contextlib.suppress(OSError):
                        yield Path(directory.path, "lower").read_bytes()

    # -- layers that nobody of the store itself needs --------------------------------------

    def due(
        self, unused: Sequence[str], needed: set[str], *, seconds: float, now: float | None = None
    ) -> tuple[Published, tuple[str, ...]]:
        """What to note down, and which of the ``unused`` layers may go now.

        ``unused`` has children before their parents.
        """
        present = time.time() if now is None else now
        retired = {layer: self.retired.get(layer, present) for layer in unused}
        going = tuple(
            layer for layer in unused if layer not in needed and retired[layer] <= present - seconds
        )
        left = {layer: since for layer, since in retired.items() if layer not in going}
        return replace(self, retired=left), going


def store_config(directory: Path, options: Sequence[str] = ()) -> StorageConfig:
    """The storage of a published store: the machine's layer stores, and a run root of its own."""
    machine = StorageConfig.from_system(options=options)
    word = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    return replace(
        machine,
        graph_root=directory,
        run_root=machine.run_root.parent / "layerstore" / word,
        additional_image_stores=(),
    )


def client_roots(directory: Path) -> tuple[Path, ...]:
    """The machine's own graph root, if its storage.conf names ``directory`` as an image store."""
    machine = StorageConfig.from_system()
    return (machine.graph_root,) if directory in machine.additional_image_stores else ()


def _records(root: Path, name: TableName, kind: type[R]) -> tuple[R, ...]:
    """The records of a client's graph root; raises what stands in the way of knowing them."""
    directory = root / f"overlay-{name}"
    if not directory.is_dir():
        return ()
    return Table(directory, name, kind, read_only=True).snapshot()
