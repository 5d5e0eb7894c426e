"""The layers that are served: index and contents, opened when first needed."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from layerstore import limits
from layerstore.content import ContentStats, LayerContent, ObjectStore, Priority, Scheduler
from layerstore.errors import (
    ConfigError,
    ContentError,
    LayerstoreError,
    NetworkError,
    NotFound,
    RegistryError,
    StorageError,
)
from layerstore.formats.members import codec
from layerstore.image import Reference
from layerstore.layertree import LayerIndex
from layerstore.provider.loader import Loader
from layerstore.provider.state import LayerRecord, State
from layerstore.registry import BlobReader, RegistryClient

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """An open layer."""

    record: LayerRecord
    index: LayerIndex
    content: LayerContent


class _Watched:
    """A response; ``broken`` is called when it breaks."""

    def __init__(self, reader: BlobReader, broken: Callable[[], None]) -> None:
        self.start = reader.start
        self.close = reader.close
        self._reader = reader
        self._broken = broken

    def read_some(self, limit: int) -> bytes:
        """See BlobReader."""
        try:
            return self._reader.read_some(limit)
        except NetworkError:
            self._broken()
            raise


class Layers:
    """Open layers by slot.  Thread-safe.

    ``prefetch`` and ``background`` say whether contents are fetched ahead of need and
    completed in the background.
    """

    def __init__(
        self,
        state: State,
        client: RegistryClient,
        objects: ObjectStore,
        scheduler: Scheduler,
        loader: Loader,
        *,
        prefetch: bool = True,
        background: bool = True,
    ) -> None:
        self.stats = ContentStats()
        self._state = state
        self._client = client
        self._objects = objects
        self._scheduler = scheduler
        self._loader = loader
        self._prefetch = prefetch
        self._background = background
        self._lock = threading.Lock()
        self._open: dict[int, Layer] = {}
        self._opening: dict[int, threading.Lock] = {}
        self._references: dict[int, list[Reference]] = {}
        self._completing: set[int] = set()
        for view in state.views():
            if view.reference:
                self.add_reference(view.slot, Reference.parse(view.reference))

    def get(self, slot: int) -> Layer | None:
        """The layer if it is open.  Never waits."""
        return self._open.get(slot)

    def add_reference(self, slot: int, reference: Reference) -> None:
        """The blob of the layer can be fetched from this reference's repository, too."""
        with self._lock:
            known = self._references.setdefault(slot, [])
            repositories = [one.name for one in known]
            if reference.name in repositories:
                del known[repositories.index(reference.name)]
            known.insert(0, reference)

    def has_source(self, slot: int) -> bool:
        """Whether a reference is known from which the layer can be fetched."""
        with self._lock:
            return bool(self._references.get(slot))

    def _ask_last(self, slot: int, reference: Reference | None = None) -> None:
        """A place (the first one if None) gave no bytes or wrong ones: ask others before it."""
        with self._lock:
            known = self._references.get(slot, [])
            if reference is None and known:
                reference = known[0]
            if reference in known:
                known.remove(reference)
                known.append(reference)

    def open(self, slot: int) -> Layer:
        """The layer of a slot, opened now if need be: waits for the disk.

        A damaged index is built anew.  Raises StorageError when that fails.
        """
        layer = self._open.get(slot)
        if layer is not None:
            return layer
        with self._lock:
            opening = self._opening.setdefault(slot, threading.Lock())
        with opening:
            layer = self._open.get(slot)
            if layer is None:
                record = self._state.layer(slot)
                if record is None:
                    raise StorageError(f"slot {slot} holds no layer")
                layer = self._open_record(record)
                self._open[slot] = layer
        return layer

    def _open_index(self, record: LayerRecord) -> LayerIndex:
        path = self._loader.directory(record.slot) / "index"
        try:
            return LayerIndex.open(path)
        except StorageError as error:
            _log.warning("event=index-damaged layer=%s error=%s", record.blob_digest, error)
        with self._lock:
            references = tuple(self._references.get(record.slot, ()))
        self._loader.rebuild(record, references)
        return LayerIndex.open(path)

    def _open_record(self, record: LayerRecord) -> Layer:
        directory = self._loader.directory(record.slot)
        index = self._open_index(record)
        content = LayerContent(
            record.blob_digest,
            index,
            directory / "blob",
            digest=record.blob_digest.hex,
            size=record.size,
            toc_offset=record.toc_offset,
            codec=codec(index.packing),
            objects=self._objects,
            scheduler=self._scheduler,
            source=lambda offset, length: self._read_blob(record, offset, length),
            distrust=lambda: self._ask_last(record.slot),
            stats=self.stats,
            verified=self._state.is_complete(record.slot),
        )
        end = directory / "end"
        try:
            content.seed(end.read_bytes())
            end.unlink()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise StorageError(f"cannot read: {error.strerror}", subject=str(end)) from error
        if self._state.is_complete(record.slot) and not content.complete:
            _log.warning("event=layer-lost-bytes layer=%s", record.blob_digest)
            self._state.set_complete(record.slot, False)
            self.complete(record.slot)
        return Layer(record, index, content)

    def _read_blob(self, record: LayerRecord, offset: int, length: int) -> _Watched:
        """Open a range at the first place that gives it; a network failure is worth another try."""
        slot = record.slot
        with self._lock:
            references = list(self._references.get(slot, ()))
        failure: LayerstoreError = NotFound(
            "no reference is known for this layer", subject=record.blob_digest
        )
        for reference in references:
            try:
                reader = self._client.open_blob(
                    reference, record.blob_digest, offset=offset, length=length, size=record.size
                )
            except (RegistryError, NetworkError, ContentError, ConfigError) as error:
                failure = failure if isinstance(failure, NetworkError) else error
                self._ask_last(slot, reference)
            else:
                return _Watched(reader, partial(self._ask_last, slot, reference))
        raise failure

    # -- ahead of need -------------------------------------------------------------

    def start(self, slot: int) -> None:
        """A client took the layer: fetch what it will need first, then all of it."""
        layer = self.open(slot)
        self._scheduler.expect_demand()
        if self._prefetch and layer.index.landmark:
            layer.content.prefetch(layer.index.landmark)
        self.complete(slot)

    def complete(self, slot: int) -> None:
        """Fetch the whole layer in the background, unless it is complete."""
        if not self._background or self._state.is_complete(slot):
            return
        with self._lock:
            if slot in self._completing:
                return
            self._completing.add(slot)
        self._queue_step(slot, limits.BACKGROUND_RETRY_SECONDS)

    def resume(self) -> None:
        """After a start: go on completing layers that clients use."""
        for slot in sorted({view.slot for view in self._state.views()}):
            self.complete(slot)

    def _queue_step(self, slot: int, retry: float) -> None:
        self._scheduler.submit(Priority.BACKGROUND, lambda: self._step(slot, retry))

    def _step(self, slot: int, retry: float) -> None:
        try:
            more = self.open(slot).content.complete_step()
        except Exception as error:  # whatever it was, the layer is not given up
            _log.warning(
                "event=background-fetch-failed layer=%s retry_seconds=%.0f error=%s",
                record.blob_digest if (record := self._state.layer(slot)) else slot, retry, error,
            )  # fmt: skip
            again = min(retry * 2, limits.BACKGROUND_RETRY_MAX_SECONDS)
            timer = threading.Timer(retry, self._queue_step, (slot, again))
            timer.daemon = True
            timer.start()
            return
        if more:
            self._queue_step(slot, limits.BACKGROUND_RETRY_SECONDS)
            return
        with self._lock:
            self._completing.discard(slot)
        self.mark_complete(slot)

    def mark_complete(self, slot: int) -> None:
        """Remember that the layer needs no registry any more."""
        if not self._state.is_complete(slot):
            self._state.set_complete(slot)
            record = self._state.layer(slot)
            _log.info("event=layer-complete layer=%s", record and record.blob_digest)

    def status(self) -> list[dict[str, object]]:
        """One report a known layer, for ``layerstore status``."""
        names: dict[int, list[str]] = {}
        uses: dict[int, int] = {}
        for view in self._state.views():
            names.setdefault(view.slot, []).append(view.reference)
            uses[view.slot] = uses.get(view.slot, 0) + self._state.uses(view.key)
        report: list[dict[str, object]] = []
        for record in self._state.layers():
            layer = self.get(record.slot)
            complete = self._state.is_complete(record.slot)
            stored = record.size if complete else 0
            report.append(
                {
                    "slot": record.slot,
                    "digest": record.blob_digest,
                    "toc_digest": record.toc_digest,
                    "references": sorted({name for name in names.get(record.slot, ()) if name}),
                    "uses": uses.get(record.slot, 0),
                    "complete": complete,
                    "total_bytes": record.size,
                    "stored_bytes": layer.content.stored_bytes if layer else stored,
                    "needed_bytes": layer.content.stats.needed_bytes if layer else 0,
                    "fetched_bytes": layer.content.stats.fetched_bytes if layer else 0,
                    "refused_units": layer.content.stats.failed_units if layer else 0,
                    "files": layer.index.files if layer else None,
                    "opened": layer is not None,
                }
            )
        return report

    def close(self) -> None:
        """Close all indexes."""
        deadline = time.monotonic() + 1
        with self._lock:
            layers, self._open = list(self._open.values()), {}
        for layer in layers:
            if time.monotonic() < deadline:
                layer.index.close()
