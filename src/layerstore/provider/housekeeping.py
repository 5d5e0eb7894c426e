"""Keeping the disk use within its limits: looking, measuring, evicting.

One thread looks from time to time, and at once when somebody wants room.  What goes is decided
by `eviction.plan`; here the facts are gathered and the plan is carried out, in an order that a
crash may break off anywhere: the database first says that a layer is not complete, then its
bitmap goes, then its bytes.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from layerstore import limits
from layerstore.content import ObjectStore, Room
from layerstore.content.measure import Usage, measure, stored_objects
from layerstore.errors import LayerstoreError, StorageError
from layerstore.provider import memory
from layerstore.provider.eviction import NO_LAYER, LayerFacts, Standing, Step, in_order, plan
from layerstore.provider.ingests import Ingests
from layerstore.provider.layers import Layers
from layerstore.provider.needs import LookAtNeeds, Standings
from layerstore.provider.state import State

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Survey:
    """What lies on the disk, and to whom it belongs.

    ``layers`` are in the order of eviction; ``owners`` has, for the mark of each object, the slot
    of the layer with which it goes; ``orphans`` are bytes of objects that no layer needs.
    """

    usage: Usage
    layers: Sequence[LayerFacts]
    owners: dict[int, int]
    orphans: int


class Housekeeper:
    """Watches over the disk use of the store below ``root``.  Thread-safe."""

    def __init__(
        self,
        root: Path,
        state: State,
        layers: Layers,
        objects: ObjectStore,
        room: Room,
        ingests: Ingests,
        needs: LookAtNeeds,
    ) -> None:
        self._root = root
        self._state = state
        self._layers = layers
        self._objects = objects
        self._room = room
        self._ingests = ingests
        self._needs = needs
        self._working = threading.Lock()
        self._wanted = threading.Event()
        self._ended = threading.Event()
        self._rest_until: dict[Standing, float] = {}  # after nothing was found, by extent
        self._measured = float("-inf")
        if room.used is not None:  # well enough known: a start has other things to do first
            self._measured = (
                time.monotonic() + limits.DISK_LOOK_SECONDS - limits.DISK_MEASURE_SECONDS
            )
        self._noted: dict[int, float] = {}
        self.evicted_bytes = 0
        """Bytes that were removed to make room since the start."""
        layers.may_complete = self._may_complete
        room.pressed = self._wanted.set
        objects.disk.room_wanted = room.refused
        self._thread = threading.Thread(target=self._run, name="housekeeping", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def close(self, seconds: float = 2.0) -> None:
        """Stop; note down what was used."""
        self._ended.set()
        self._wanted.set()
        if self._thread.ident is not None:
            self._thread.join(seconds)
        with contextlib.suppress(LayerstoreError):
            self._note_used(exactly=True)
        self._room.close()

    # -- looking ---------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._look()
            except (LayerstoreError, OSError) as error:
                _log.warning("event=housekeeping-failed error=%s", error)
            except Exception:
                _log.exception("looking after the disk failed")
            self._ended.wait(limits.EVICTION_PAUSE_SECONDS)
            self._wanted.wait(limits.DISK_LOOK_SECONDS)
            self._wanted.clear()

    def _look(self) -> None:
        self._note_used()
        limit = self._room.allowed.limit
        if limit is not None and time.monotonic() - self._measured > limits.DISK_MEASURE_SECONDS:
            self._room.measured_by(lambda: measure(self._root).total)
            self._measured = time.monotonic()
        asked, self._room.asked = self._room.asked, 0
        wanted, extent = self._wish(asked)
        if wanted > 0:
            if time.monotonic() < self._rest_until.get(extent, 0.0):
                self._room.hopeless()
            else:
                self._make_room(asked)
        deferred, self._layers.deferred = self._layers.deferred, set()
        for slot in sorted(deferred):
            self._layers.complete(slot)

    def _wish(self, asked: int) -> tuple[int, Standing]:
        """Bytes to free, and how far it may go for them; somebody waits to write ``asked`` bytes."""
        room, used, low = self._room, self._room.used, self._room.allowed.low_bytes
        wanted, extent = 0, Standing.UNREFERENCED
        if low is not None and used is not None and (asked or room.above_high):
            wanted, extent = used + asked - low, Standing.RUNNING
        disk = room.file_system()
        reserve = room.reserve(disk)
        if room.disk_full:
            most = min(max(reserve, limits.DISK_FULL_MIN_BYTES), limits.DISK_FULL_BYTES)
            wanted, extent = max(wanted, most - disk.free), Standing.RUNNING
        return max(wanted, reserve - disk.free), extent

    def _make_room(self, asked: int) -> None:
        with self._working:
            survey = self.survey()
            wanted, extent = self._wish(asked)  # now it is known exactly
            if wanted <= 0:
                return
            steps = plan(survey.layers, orphans=survey.orphans, wanted=wanted, extent=extent)
            freed = self._perform(steps, survey)
        if freed < wanted:
            self._room.hopeless()
        if not freed:
            urgent = extent is Standing.RUNNING
            pause = limits.DISK_LOOK_SECONDS if urgent else limits.DISK_MEASURE_SECONDS
            self._rest_until[extent] = time.monotonic() + pause

    def _may_complete(self, slot: int) -> bool:
        record = self._state.layer(slot)
        if record is None:
            return False
        layer = self._layers.get(slot)
        stored = layer.content.stored_bytes if layer else 0
        rest = record.size - stored
        evicted = self._state.evicted(slot)
        try:
            if not evicted:
                return self._room.allows(min(rest, limits.BACKGROUND_RANGE_BYTES))
            if max(self._state.used(slot), self._noted.get(slot, 0.0)) <= evicted:
                return False  # nobody missed it since
            much = stored >= limits.RETURN_SHARE * record.size
            return self._room.allows(rest, mark=None if much else self._room.allowed.low_bytes)
        except StorageError:
            return False

    # -- when layers were used ---------------------------------------------------------------

    def _note_used(self, *, exactly: bool = False) -> None:
        now = time.time()
        for slot in self._layers.take_touched():
            self._noted[slot] = now
        due = {
            slot: when
            for slot, when in self._noted.items()
            if exactly or when - self._state.used(slot) > limits.RECENCY_SECONDS
        }
        if due:
            self._state.set_used(due)
            for slot in due:
                del self._noted[slot]

    # -- who has what ------------------------------------------------------------------------

    def survey(self) -> Survey:
        """Look at everything: takes seconds where there are many files."""
        self._note_used(exactly=True)
        standings = Standings(self._state, self._needs())
        records = self._state.layers()
        ordered = in_order(
            LayerFacts(record.slot, standings.of(record), self._state.used(record.slot))
            for record in records
        )
        owners: dict[int, int] = {}
        for layer in reversed(ordered):
            for mark in self._marks(layer.slot):
                owners.setdefault(mark, layer.slot)
        found: list[Usage] = []

        def look() -> int:
            found.append(measure(self._root, owners.get))
            return found[0].total

        self._room.measured_by(look)
        self._measured = time.monotonic()
        usage = found[0]
        layers = [
            replace(
                layer,
                blob=usage.blobs.get(layer.slot, 0),
                files=usage.objects.get(layer.slot, 0),
            )
            for layer in ordered
        ]
        # what belongs to nobody may belong to a layer that is being taken in
        orphans = 0 if self._ingests.status()["fetching"] else usage.objects.get(None, 0)
        memory.give_back()
        return Survey(usage, layers, owners, orphans)

    def _marks(self, slot: int) -> Iterable[int]:
        layer = self._layers.get(slot)
        if layer is not None:
            yield from layer.index.object_marks()
            return
        try:
            index = self._layers.index_of(slot)
        except StorageError:
            return  # it is made anew when it is needed, and so are the files
        with index:
            yield from index.object_marks()

    # -- removing ------------------------------------------------------------------------------

    def collect(self, extent: Standing, *, dry: bool = False) -> list[Step]:
        """Remove all contents of layers whose standing is no better than ``extent``.

        ``dry``: only tell.
        """
        with self._working:
            survey = self.survey()
            steps = plan(survey.layers, orphans=survey.orphans, wanted=1 << 62, extent=extent)
            if not dry:
                self._perform(steps, survey)
        self._room.disk_full = False
        return steps

    def _perform(self, steps: Sequence[Step], survey: Survey) -> int:
        """Carry out a plan; bytes that became free."""
        if not steps:
            return 0
        freed = sum(self._layers.drop_blob(step.slot) for step in steps if step.blob)
        self._room.freed(freed)
        freed += self._drop_files([step for step in steps if step.files], survey.owners)
        self.evicted_bytes += freed
        for step in steps:
            record = self._state.layer(step.slot)
            _log.info(
                "event=evicted layer=%s standing=%s bytes=%d",
                record.blob_digest if record else "-", step.standing.word, step.size,
            )  # fmt: skip
        self._room.disk_full = False
        self._objects.disk.look_again()
        return freed

    def _drop_files(self, steps: Sequence[Step], owners: dict[int, int]) -> int:
        going = {None if step.slot == NO_LAYER else step.slot for step in steps}
        running = {step.slot for step in steps if step.standing is Standing.RUNNING}
        young = time.time() - limits.EVICTION_YOUNG_SECONDS
        freed = 0
        for found in stored_objects(self._root / "content"):
            owner = owners.get(found.mark)
            if owner not in going or (owner in running and found.changed > young):
                continue  # whoever had it made is about to read it
            self._objects.evict(found)
            self._room.freed(found.size)
            freed += found.size
        return freed
