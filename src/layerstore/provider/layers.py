"""The layers that are served: index and contents, opened when first needed.

Once all of a layer is here, what is claimed of it is checked (als-protocol, section 9): a
lazily read layer is verified against its TOC, and blob digest, diff ID and tar stream are
beyond that chain.  A layer of which anything is false is quarantined for good.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from layerstore import limits
from layerstore.content import (
    ContentStats,
    LayerContent,
    LayerStats,
    ObjectStore,
    Outages,
    Priority,
    Scheduler,
    is_passing,
)
from layerstore.errors import (
    ContentError,
    DiskFull,
    NoRoom,
    ServiceError,
    StorageError,
    UnsupportedFormat,
    VerificationError,
)
from layerstore.formats.checkpoints import Checkpoints
from layerstore.formats.members import MemberCodec, Packing, codec
from layerstore.image import Reference
from layerstore.layertree import LayerIndex
from layerstore.provider.agreement import check_agreement
from layerstore.provider.loader import Loader
from layerstore.provider.refuted import Claim, also_false
from layerstore.provider.sources import Sources
from layerstore.provider.state import LayerRecord, State
from layerstore.provider.streams import Hashed
from layerstore.provider.verifier import Verifier

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """An open layer."""

    record: LayerRecord
    index: LayerIndex
    content: LayerContent


class Layers:
    """Open layers by slot.  Thread-safe.

    ``rebuild`` makes a damaged index anew, see ``Loader.rebuild``.  ``prefetch`` and
    ``background`` say whether contents are fetched ahead of need and completed in the background.
    """

    def __init__(
        self,
        state: State,
        objects: ObjectStore,
        scheduler: Scheduler,
        loader: Loader,
        *,
        rebuild: Callable[[LayerRecord, tuple[Reference, ...]], None],
        outages: Outages,
        sources: Sources,
        prefetch: bool = True,
        background: bool = True,
    ) -> None:
        self.stats = ContentStats()
        self.quarantined: Callable[[int], None] = lambda _: None
        """Told the slot of a layer that was shown and is not any more."""
        self.may_complete: Callable[[int], bool] = lambda _: True
        """Whether the disk has room to complete the layer of a slot in the background."""
        self.deferred: set[int] = set()
        """Layers that are not completed because the limits do not allow it."""
        self._state = state
        self._objects = objects
        self._scheduler = scheduler
        self._loader = loader
        self._rebuild = rebuild
        self._outages = outages
        self._sources = sources
        self._prefetch = prefetch
        self._background = background
        self._lock = threading.Lock()
        self._open: dict[int, Layer] = {}
        self._touched: set[int] = set()
        self._counts: dict[int, LayerStats] = {}
        self._opening: dict[int, threading.Lock] = {}
        self._completing: set[int] = set()
        self._paused: set[int] = set()  # those of them that wait for room on the disk
        objects.disk.when_back(self._go_on)
        self._verifier = Verifier(self._verify)
        for view in state.views():
            if view.reference:
                sources.add(view.slot, Reference.parse(view.reference))

    def get(self, slot: int) -> Layer | None:
        """The layer if it is open.  Never waits."""
        return self._open.get(slot)

    def _trusts(self, file: Path) -> bool:
        return self._objects.ledger.trusts(str(file))

    def _distrust(self, slot: int) -> None:
        """Wrong bytes came out of a layer's blob: it is not complete, whatever it was before."""
        self._sources.ask_last(slot)
        if self._state.is_complete(slot):
            self._incomplete(slot)

    def _incomplete(self, slot: int) -> None:
        """A complete layer must be made complete, or be verified, anew."""
        self._state.set_complete(slot, False)
        self._complete_soon(slot)

    def patience(self, slot: int) -> float:
        """Seconds that a read of the layer waits for a registry that gives no answer.  No I/O."""
        return self._sources.patience(slot)

    def open(self, slot: int) -> Layer:
        """The layer of a slot, opened now if need be: waits for the disk.

        A damaged index is built anew.  Raises StorageError when that fails, and
        VerificationError for a layer in quarantine.
        """
        layer = self._open.get(slot)
        if layer is not None:
            return layer
        with self._changing(slot):
            layer = self._open.get(slot)
            if layer is None:
                record = self._state.layer(slot)
                if record is None:
                    raise StorageError(f"slot {slot} holds no layer")
                if record.quarantine:
                    raise VerificationError(
                        f"the layer is in quarantine: {record.quarantine}",
                        subject=record.blob_digest,
                    )
                layer = self._open_record(record)
                self._open[slot] = layer
        return layer

    def reopen(self, slot: int) -> None:
        """Something of the layer is damaged: whoever needs it next opens it anew."""
        with self._lock:
            self._open.pop(slot, None)

    def rebuild(self, record: LayerRecord) -> None:
        """Make the index of a layer, and what lies beside it, anew.  Raises StorageError."""
        self._rebuild(record, self._sources.of(record.slot))
        self.reopen(record.slot)

    def check_blob(self, slot: int, progress: Callable[[int], None]) -> str:
        """Read the blob of a layer through, see ``LayerContent.check``; raises as ``open``."""
        wrong = self.open(slot).content.check(progress)
        if wrong and self._state.is_complete(slot):
            self._incomplete(slot)
        return wrong

    def _changing(self, slot: int) -> threading.Lock:
        """Held while a layer is opened, evicted or said to be complete."""
        with self._lock:
            return self._opening.setdefault(slot, threading.Lock())

    def touch(self, slot: int) -> None:
        """Somebody uses the layer.  Never waits."""
        self._touched.add(slot)

    def take_touched(self) -> set[int]:
        """The layers that were used since the last call."""
        touched, self._touched = self._touched, set()
        for slot, layer in tuple(self._open.items()):
            if layer.content.used:
                layer.content.used = False
                touched.add(slot)
        return touched

    def drop_blob(self, slot: int) -> int:
        """Remove the stored blob of a layer; the bytes on disk it had.

        Who reads it at this moment reads on.  Raises StorageError.
        """
        with self._changing(slot):
            self._state.set_evicted(slot)  # first: what is complete has its bytes
            layer = self._open.pop(slot, None)
            if layer is not None:
                self._counts[slot] = layer.content.stats
            size = 0
            # the bitmap first: no bit may outlive its bytes
            for name in ("blob.map", "end", "blob"):
                path = self._loader.directory(slot) / name
                try:
                    size += path.stat().st_blocks * 512
                    path.unlink()
                except FileNotFoundError:
                    continue
                except OSError as error:
                    raise StorageError(
                        f"cannot remove: {error.strerror}", subject=str(path)
                    ) from error
        self.deferred.add(slot)
        return size

    def index_of(self, slot: int) -> LayerIndex:
        """The index of a layer, in quarantine or not; StorageError if it is damaged."""
        return LayerIndex.open(self._loader.directory(slot) / "index")

    def _open_index(self, record: LayerRecord) -> tuple[LayerIndex, MemberCodec]:
        try:
            return self._opened(record)
        except StorageError as error:
            _log.warning("event=index-damaged layer=%s error=%s", record.blob_digest, error)
        self.rebuild(record)
        return self._opened(record)

    def _opened(self, record: LayerRecord) -> tuple[LayerIndex, MemberCodec]:
        index = self.index_of(record.slot)
        if index.packing is not Packing.CHECKPOINTS:
            return index, codec(index.packing)
        path = self._loader.directory(record.slot) / "checkpoints"
        return index, Checkpoints.open(path, lambda member: index.member(member).offset)

    def _open_record(self, record: LayerRecord) -> Layer:
        directory = self._loader.directory(record.slot)
        index, take = self._open_index(record)
        content = LayerContent(
            record.blob_digest,
            index,
            directory / "blob",
            digest=record.blob_digest.hex,
            size=record.size,
            toc_offset=record.toc_offset,
            objects=self._objects,
            scheduler=self._scheduler,
            codec=take,
            source=partial(self._sources.open, record),
            outages=self._outages,
            places=lambda: self._sources.places(record.slot),
            patience=lambda: self._sources.patience(record.slot),
            distrust=lambda: self._distrust(record.slot),
            stats=self.stats,
            verified=self._state.is_complete(record.slot) and self._trusts(directory / "blob"),
            counts=self._counts.get(record.slot),
        )
        end = directory / "end"
        # what the disk does not give or take now is taken over another time, or fetched
        with contextlib.suppress(OSError, StorageError):
            if self._trusts(end):
                content.seed(end.read_bytes())
            end.unlink()
        if self._state.is_complete(record.slot) and not content.complete:
            if content.filled:
                _log.warning("event=layer-suspect layer=%s", record.blob_digest)
            else:
                _log.warning("event=layer-lost-bytes layer=%s", record.blob_digest)
            self._incomplete(record.slot)
        return Layer(record, index, content)

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
        record = self._state.layer(slot)
        if not self._background or self._state.is_complete(slot):
            return
        if record is None or record.quarantine:
            return
        if not self.may_complete(slot):
            self.deferred.add(slot)
            return
        self._complete_soon(slot)

    def _complete_soon(self, slot: int) -> None:
        with self._lock:
            if slot in self._completing:
                return
            self._completing.add(slot)
        self._queue_step(slot, limits.BACKGROUND_RETRY_SECONDS)

    def resume(self) -> None:
        """After a start: go on completing and checking layers that clients use."""
        for slot in sorted({view.slot for view in self._state.views()}):
            if self._state.is_complete(slot):
                self.mark_complete(slot)
            else:
                self.complete(slot)

    def hasten(self, slot: int, done: Callable[[Exception | None], None]) -> None:
        """Bring all of the layer here as fast as it goes, and have it checked.

        ``done(error or None)`` is called once all of it is here; the check follows.
        """
        content = self.open(slot).content

        def arrived(error: Exception | None) -> None:
            if error is None:
                self.mark_complete(slot)
            else:
                self._doubt(slot)
            done(error)

        content.fetch_blob(arrived)

    def _queue_step(self, slot: int, retry: float, probe: bool = False) -> None:
        self._scheduler.submit(Priority.BACKGROUND, lambda: self._step(slot, retry, probe))

    def _wait_for_answers(self, slot: int, retry: float) -> bool:
        """Go on when the layer's registry answers again; False if no outage is known."""
        places = self._sources.places(slot)
        if self._outages.since(places) is None:
            return False
        self._outages.wait(
            places, partial(self._queue_step, slot, retry), lambda _: None, until=None
        )
        return True

    def _defer(self, slot: int) -> None:
        """There is no room for what nobody needs yet."""
        with self._lock:
            self._completing.discard(slot)
        self.deferred.add(slot)

    def _step(self, slot: int, retry: float, probe: bool) -> None:
        if not probe and self._wait_for_answers(slot, retry):
            return
        if not self.may_complete(slot):
            if probe:
                self._outages.untried(self._sources.places(slot))
            self._defer(slot)
            return
        try:
            more = self.open(slot).content.complete_step()
        except NoRoom:
            self._defer(slot)
            return
        except Exception as error:  # whatever it was, the layer is not given up
            if isinstance(error, DiskFull) and self._pause(slot):
                return
            if self._doubt(slot):
                return
            if is_passing(error) and self._wait_for_answers(slot, retry):
                return
            _log.warning(
                "event=background-fetch-failed layer=%s retry_seconds=%.0f error=%s",
                record.blob_digest if (record := self._state.layer(slot)) else slot, retry, error,
            )  # fmt: skip
            again = min(retry * 2, limits.BACKGROUND_RETRY_MAX_SECONDS)
            self._outages.later(retry, partial(self._queue_step, slot, again))
            return
        if more:
            self._queue_step(slot, limits.BACKGROUND_RETRY_SECONDS)
            return
        with self._lock:
            self._completing.discard(slot)
        self.mark_complete(slot)

    def _pause(self, slot: int) -> bool:
        """Wait for room on the disk; False if it is not that."""
        with self._lock:
            self._paused.add(slot)
        if not self._objects.disk.full:  # back already, perhaps before it knew of this layer
            with self._lock:
                if slot in self._paused:
                    self._paused.remove(slot)
                    return False
        return True

    def _go_on(self) -> None:
        """The disk takes writes again."""
        for slot, layer in tuple(self._open.items()):
            if layer.content.provisional:
                self._open.pop(slot, None)  # who needs it opens it anew
        with self._lock:
            paused, self._paused = self._paused, set()
        for slot in paused:
            self._queue_step(slot, limits.BACKGROUND_RETRY_SECONDS)

    def mark_complete(self, slot: int) -> None:
        """Remember that the layer needs no registry any more, and have it checked."""
        record = self._state.layer(slot)
        if record is None:
            return
        with self._changing(slot):
            if not self._state.is_complete(slot):
                layer = self._open.get(slot)
                if layer is None or not layer.content.complete:
                    return  # it was evicted meanwhile
                self._state.set_complete(slot)
                _log.info("event=layer-complete layer=%s", record.blob_digest)
        if not record.verified and not record.quarantine:
            self._verifier.submit(slot)

    # -- trust -------------------------------------------------------------------------

    def verified(self, slot: int) -> threading.Event:
        """Set once a complete layer was checked, whatever came out."""
        record = self._state.layer(slot)
        if record is None or record.verified or record.quarantine:
            done = threading.Event()
            done.set()
            return done
        return self._verifier.submit(slot)

    def _verify(self, slot: int) -> None:
        """Check what is claimed of a complete layer."""
        record = self._state.layer(slot)
        if record is None or record.verified or record.quarantine:
            return
        if not self._state.is_complete(slot):
            return  # it was evicted meanwhile
        layer = self.open(slot)
        path = self._loader.directory(slot) / "blob"
        failure: ContentError | None = None
        try:
            with path.open("rb") as stream:
                blob = Hashed(stream)
                try:
                    facts = check_agreement(layer.index, blob, check=self._rest)
                except UnsupportedFormat:
                    raise  # it is not known to be wrong
                except ContentError as error:
                    failure = error
                intact = blob.digest() == record.blob_digest.hex
        except OSError as error:
            raise StorageError(f"cannot read: {error.strerror}", subject=str(path)) from error
        if not intact:
            _log.warning("event=layer-lost-bytes layer=%s", record.blob_digest)
            self._open.pop(slot, None)
            self._incomplete(slot)
        elif failure is not None:
            self.quarantine(slot, Claim.TOC, str(failure))
        elif record.diff_id not in (None, facts.diff_id):
            why = f"the config states diff ID {record.diff_id}, it is {facts.diff_id}"
            self.quarantine(slot, Claim.DIFF_ID, why)
        else:
            self._state.set_verified(slot, facts.diff_size)
            _log.info("event=layer-verified layer=%s", record.blob_digest)

    def _rest(self) -> None:
        if not self._scheduler.give_way(Priority.BACKGROUND):
            raise ServiceError("the store is being stopped")

    def _doubt(self, slot: int) -> bool:
        """Whether all bytes came, more than once, and are not the blob that was announced."""
        layer = self._open.get(slot)
        error = None if layer is None else layer.content.blob_error
        if error is None:
            return False
        self.quarantine(slot, Claim.TOC, str(error))
        return True

    def quarantine(self, slot: int, claim: Claim, why: str) -> None:
        """A claim about the layer is false: neither it nor who claims the same is shown again."""
        record = self._state.layer(slot)
        if record is None or record.quarantine:
            return
        self._state.quarantine(slot, f"{claim}: {why}")
        with self._lock:
            self._open.pop(slot, None)
            self._completing.discard(slot)
        _log.error("event=layer-quarantined layer=%s reason=%s", record.blob_digest, why)
        self.quarantined(slot)
        for other in also_false(self._state, record):
            self.quarantine(other.slot, claim, why)

    def close(self) -> None:
        """Close all indexes."""
        self._verifier.close()
        deadline = time.monotonic() + 1
        with self._lock:
            layers, self._open = list(self._open.values()), {}
        for layer in layers:
            if time.monotonic() < deadline:
                layer.index.close()
