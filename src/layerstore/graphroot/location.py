"""Which storage a ``containers-storage:`` name means.

containers-transports(5): ``containers-storage:[driver@graphroot+runroot:option,option]name``.
Everything in the brackets may be left out, and they themselves; what is left out comes from
storage.conf.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from layerstore.errors import InvalidReference
from layerstore.graphroot.storageconf import StorageConfig


class StorageLocation(msgspec.Struct, frozen=True):
    """What stood in the brackets; ``driver`` is "" and roots are None where nothing did."""

    driver: str = ""
    graph_root: Path | None = None
    run_root: Path | None = None
    options: tuple[str, ...] = ()

    def config(self) -> StorageConfig:
        """The storage, completed by the machine's configuration; raises ``ConfigError``."""
        return StorageConfig.from_system(
            root=self.graph_root,
            run_root=self.run_root,
            driver=self.driver or None,
            options=self.options,
        )

    def __str__(self) -> str:
        driver = f"{self.driver}@" if self.driver else ""
        run_root = f"+{self.run_root}" if self.run_root else ""
        options = f":{','.join(self.options)}" if self.options else ""
        return f"[{driver}{self.graph_root or ''}{run_root}{options}]"


def parse_storage_name(text: str) -> tuple[StorageLocation | None, str]:
    """Split what follows ``containers-storage:`` into the storage and the name of the image.

    Raises ``InvalidReference``.
    """
    if not text.startswith("["):
        return None, text
    inside, bracket, name = text[1:].partition("]")
    if not bracket:
        raise InvalidReference("the storage has no closing bracket", subject=text)
    driver, at, rest = inside.partition("@")
    if not at:
        driver, rest = "", inside
    elif not driver:
        raise InvalidReference("the storage driver is missing before the @", subject=text)
    if not rest:
        raise InvalidReference("the storage is missing in the brackets", subject=text)
    roots, _, options = rest.partition(":")
    graph_root, _, run_root = roots.partition("+")
    for root in (graph_root, run_root):
        if root and not root.startswith("/"):
            raise InvalidReference(f"the path {root!r} is not absolute", subject=text)
    location = StorageLocation(
        driver,
        Path(graph_root) if graph_root else None,
        Path(run_root) if run_root else None,
        tuple(option for option in options.split(",") if option),
    )
    return location, name
