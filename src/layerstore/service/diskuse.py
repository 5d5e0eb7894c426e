"""What the store takes on disk, and making room: asked of the service that runs, else done here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from layerstore import limits
from layerstore.errors import NoServiceError
from layerstore.provider import DiskUse
from layerstore.service.config import Config
from layerstore.service.control import request
from layerstore.service.opening import open_store

Method = Callable[[Mapping[str, Any]], Mapping[str, object]]


class LayerUse(msgspec.Struct, frozen=True):
    """A layer on disk; sizes in bytes there.

    ``blob`` is what its blob takes, ``files`` what the files take that go with it; others it
    shares with layers that are wanted more.  ``standing`` is that of ``provider.eviction``.
    """

    slot: int
    digest: str
    references: tuple[str, ...]
    standing: str
    complete: bool
    last_used: float
    blob: int
    files: int
    metadata: int


class ImageUse(msgspec.Struct, frozen=True):
    """An image: its layers, what they take, and what of it an eviction could free."""

    reference: str
    layers: int
    size: int
    reclaimable: int
    pinned: bool


class DiskReport(msgspec.Struct, frozen=True):
    """All of it; ``limit``, ``high`` and ``low`` are None without a limit."""

    root: str
    used: int
    limit: int | None
    high: int | None
    low: int | None
    free: int
    keep_free: int
    blobs: int
    files: int
    file_count: int
    metadata: int
    other: int
    reclaimable: int
    unreferenced: int
    layers: tuple[LayerUse, ...]
    images: tuple[ImageUse, ...]


class Removal(msgspec.Struct, frozen=True):
    """Contents that go or went, and why; no layer's if ``digest`` is ""."""

    digest: str
    references: tuple[str, ...]
    standing: str
    size: int


class GcReport(msgspec.Struct, frozen=True):
    """What was removed, or would be; ``size`` in bytes."""

    dry_run: bool
    size: int
    removed: tuple[Removal, ...]


class PinnedImage(msgspec.Struct, frozen=True):
    """An image that is never evicted; ``layers`` is how many of its layers are known."""

    reference: str
    layers: int
    complete: bool


class PinnedImages(msgspec.Struct, frozen=True):
    """All of them."""

    images: tuple[PinnedImage, ...]


class DiskControl(Protocol):
    """Whoever looks after the disk.  Methods raise ServiceError, StorageError."""

    def df(self) -> DiskReport: ...
    def gc(self, *, dry_run: bool, everything: bool) -> GcReport: ...
    def pinned(self) -> PinnedImages: ...
    def unpin(self, reference: str) -> None: ...


def disk_methods(use: DiskUse) -> dict[str, Method]:
    """What the control socket offers."""

    def df(_: Mapping[str, Any]) -> Mapping[str, object]:
        return use.report()

    def gc(asked: Mapping[str, Any]) -> Mapping[str, object]:
        return use.collect(
            dry_run=bool(asked.get("dry_run")), everything=bool(asked.get("everything"))
        )

    def pinned(_: Mapping[str, Any]) -> Mapping[str, object]:
        return use.pinned()

    def unpin(asked: Mapping[str, Any]) -> Mapping[str, object]:
        return use.unpin(str(asked.get("reference")))

    return {"df": df, "gc": gc, "pinned": pinned, "unpin": unpin}


class _Remote:
    def __init__(self, root: Path) -> None:
        self._root = root

    def _ask(self, method: str, **parameters: object) -> dict[str, Any]:
        return request(self._root, method, seconds=limits.CONTROL_DISK_SECONDS, **parameters)

    def df(self) -> DiskReport:
        return msgspec.convert(self._ask("df"), DiskReport)

    def gc(self, *, dry_run: bool, everything: bool) -> GcReport:
        return msgspec.convert(self._ask("gc", dry_run=dry_run, everything=everything), GcReport)

    def pinned(self) -> PinnedImages:
        return msgspec.convert(self._ask("pinned"), PinnedImages)

    def unpin(self, reference: str) -> None:
        self._ask("unpin", reference=reference)


class _Local:
    def __init__(self, use: DiskUse) -> None:
        self._use = use

    def df(self) -> DiskReport:
        return msgspec.convert(self._use.report(), DiskReport)

    def gc(self, *, dry_run: bool, everything: bool) -> GcReport:
        report = self._use.collect(dry_run=dry_run, everything=everything)
        return msgspec.convert(report, GcReport)

    def pinned(self) -> PinnedImages:
        return msgspec.convert(self._use.pinned(), PinnedImages)

    def unpin(self, reference: str) -> None:
        self._use.unpin(reference)


@contextlib.contextmanager
def disk_control(root: Path, config: Config) -> Iterator[DiskControl]:
    """The service whose root directory is ``root``; where none runs, the store itself.

    Raises ServiceError, StorageError and ConfigError.
    """
    try:
        request(root, "status")
    except NoServiceError:
        quiet = msgspec.structs.replace(config, prefetch=False, background_fetch=False)
        with open_store(root, quiet) as store:
            yield _Local(store.disk_use)
    else:
        yield _Remote(root)
