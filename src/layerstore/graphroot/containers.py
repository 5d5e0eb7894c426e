"""``overlay-containers``: the containers of a graph root.

layerstore does not make or remove containers, Podman and Buildah do: each names
the image it was made from and a layer of its own.  Both must not be deleted as
long as the container is there.  Containers that need not survive a reboot
(``podman run --rm``) stand in ``volatile-containers.json``, which tools before
containers/storage 1.45 do not see.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from layerstore.graphroot import bigdata
from layerstore.graphroot.overlay import checked_component
from layerstore.graphroot.records import ContainerRecord
from layerstore.graphroot.table import Table


class ContainerArea:
    """The containers of one graph root."""

    def __init__(self, graph_root: Path, *, read_only: bool = False) -> None:
        self.directory: Final = graph_root / "overlay-containers"
        self.table: Final = Table(
            self.directory, "containers", ContainerRecord, read_only=read_only
        )

    def records(self) -> tuple[ContainerRecord, ...]:
        """The containers at this moment."""
        return self.table.snapshot()


@dataclass(frozen=True, slots=True)
class Container:
    """One container as it was when it was asked for."""

    record: ContainerRecord
    area: ContainerArea = field(repr=False, compare=False)

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def names(self) -> tuple[str, ...]:
        return self.record.names

    @property
    def image_id(self) -> str:
        """The id of the image it was made from, "" for none."""
        return self.record.image

    @property
    def layer_id(self) -> str:
        """The id of its own, writable layer."""
        return self.record.layer

    @property
    def created(self) -> str:
        """When it was made, RFC 3339."""
        return self.record.created

    def big_data(self, key: str) -> bytes:
        """One item of its big data; raises ``CorruptStorage`` if it is not there."""
        return bigdata.read(self.area.directory / checked_component(self.id), key)
