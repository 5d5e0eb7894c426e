"""Fetching the units of one layer: plans become requests, arrivals wake those who wait."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence

from layerstore import limits
from layerstore.content.blob import BlobFile
from layerstore.content.flight import Flight, FlightPlan, Waiter
from layerstore.content.ingest import Ingester
from layerstore.content.scheduler import Priority, Scheduler
from layerstore.content.stats import ContentStats, LayerStats
from layerstore.content.stream import ByteSource, MemberStream
from layerstore.errors import LayerstoreError, NetworkError, ServiceError

_log = logging.getLogger(__name__)

Done = Callable[[Exception | None], None]


class Fetcher:
    """Brings units of a blob here, each verified before anybody hears of it.  Thread-safe."""

    def __init__(
        self,
        name: str,
        blob: BlobFile,
        ingester: Ingester,
        scheduler: Scheduler,
        source: ByteSource,
        stats: LayerStats,
        totals: ContentStats,
    ) -> None:
        self.name = name
        self._blob = blob
        self._ingester = ingester
        self._scheduler = scheduler
        self._source = source
        self._stats = stats
        self._totals = totals
        self._lock = threading.Lock()
        self._plan = FlightPlan(_Units(blob))
        self._waiters: dict[int, list[Waiter]] = {}
        self._failed: dict[int, tuple[float, Exception]] = {}

    def demand(self, units: Sequence[int], done: Done) -> None:
        """Bring these units here soon; ``done(error or None)`` is called once, from any thread.

        A unit that was refused a moment ago is not tried again at once.
        """
        if not units:
            done(None)
            return
        now = time.monotonic()
        with self._lock:
            for unit in units:
                when, error = self._failed.get(unit, (0.0, None))
                if error is not None and now - when < limits.FAILURE_SECONDS:
                    break
            else:
                error = None
            if error is None:
                self._enlist(units, Waiter(len(units), done))
        if error is not None:
            done(error)

    def _enlist(self, units: Sequence[int], waiter: Waiter) -> None:
        for unit in units:
            self._waiters.setdefault(unit, []).append(waiter)
            for flight in self._plan.demand(unit):
                self._start(flight)

    def prefetch(self, last: int) -> None:
        """Fetch the units up to ``last`` ahead of need."""
        with self._lock:
            size = limits.PREFETCH_RANGE_BYTES
            while (flight := self._plan.sweep(0, last, size, Priority.PREFETCH)) is not None:
                self._start(flight)

    def sweep(self) -> Exception | None:
        """Fetch a next large range in this thread; the error that ended it early."""
        with self._lock:
            flight = self._plan.sweep(
                0, self._blob.units - 1, limits.BACKGROUND_RANGE_BYTES, Priority.BACKGROUND
            )
        return None if flight is None else self._fly(flight)

    # -- flights ---------------------------------------------------------------

    def _start(self, flight: Flight) -> None:
        self._scheduler.submit(flight.priority, lambda: self._fly_quietly(flight))

    def _fly_quietly(self, flight: Flight) -> None:
        error = self._fly(flight)
        if error is not None:
            _log.warning("layer %s: fetch failed: %s", self.name, error)

    def _fly(self, flight: Flight) -> Exception | None:
        """Bring all units of a flight; the error that ended it early, if one did."""
        error: Exception | None = None
        attempt = 0
        flight.started = True
        while True:
            before = flight.position
            try:
                self._fly_on(flight)
            except NetworkError as caught:
                error = caught
                attempt = 1 if flight.position > before else attempt + 1
                if attempt < limits.FETCH_ATTEMPTS and not self._scheduler.closed:
                    pause = limits.BACKOFF_FIRST_SECONDS * 2**attempt
                    time.sleep(random.uniform(pause / 2, pause))
                    continue
            except Exception as caught:
                error = caught
            else:
                error = None
            break
        with self._lock:
            self._plan.landed(flight)
            left = range(flight.position, flight.last + 1)
            calls = [
                call
                for unit in left
                if self._plan.covering(unit) is None
                for call in self._arrived(unit, error or ServiceError("the fetch was stopped"))
            ]
        for call in calls:
            call()
        return error

    def _fly_on(self, flight: Flight) -> None:
        while flight.position <= flight.last:
            if not self._scheduler.give_way(flight.priority):
                raise ServiceError("the store is being stopped", subject=self.name)
            unit = flight.position
            if self._blob.present[unit]:
                self._take(flight, unit, self._blob.read_unit(unit), fetched=False)
                continue
            last = unit
            while last < flight.last and not self._blob.present[last + 1]:
                last += 1
            self._stream(flight, self._blob.extent(unit)[0], self._blob.extent(last)[1])

    def _stream(self, flight: Flight, offset: int, end: int) -> None:
        """Take units out of one response, from flight.position on."""
        piece = (
            limits.STREAM_DEMAND_BYTES
            if flight.priority is Priority.DEMAND
            else limits.STREAM_BULK_BYTES
        )
        self._totals.request(flight.priority)
        with MemberStream(self._source, offset, end - offset, piece) as stream:
            if stream.start != offset:
                with self._lock:
                    other = self._plan.whole
                    if other is None:
                        self._plan.spread(flight)
                if other is not None:
                    self._join(flight, other)
                    return
                end = self._blob.size
            while flight.position <= flight.last:
                unit = flight.position
                first, unit_end = self._blob.extent(unit)
                if unit_end > end or (self._blob.present[unit] and not flight.whole):
                    return
                data = stream.take(unit_end - first)
                self._stats.fetched_bytes += unit_end - first
                self._totals.fetched(flight.priority, unit_end - first)
                self._take(flight, unit, data, fetched=True)
                if not self._scheduler.give_way(flight.priority):
                    raise ServiceError("the store is being stopped", subject=self.name)

    def _join(self, flight: Flight, other: Flight) -> None:
        """Another flight already streams the whole blob: leave the units to it."""
        while flight.position <= flight.last:
            if not self._scheduler.give_way(Priority.DEMAND):
                raise ServiceError("the store is being stopped", subject=self.name)
            with self._lock:
                gone = self._plan.whole is not other
            if self._blob.present[flight.position]:
                self._take(flight, flight.position, b"", fetched=False, stored=True)
            elif gone:
                raise NetworkError("the stream of the whole blob broke", subject=self.name)
            else:
                time.sleep(0.02)

    def _take(
        self,
        flight: Flight,
        unit: int,
        data: bytes | memoryview,
        *,
        fetched: bool,
        stored: bool = False,
    ) -> None:
        """Verify and store one unit, tell those who wait for it, and step on."""
        error: Exception | None = None
        try:
            if self._blob.is_member(unit) and not stored:
                self._ingester.take(unit - 1, data)
            if fetched and not self._blob.present[unit]:
                self._blob.store(unit, data)
        except LayerstoreError as caught:
            error = caught
            self._totals.failed_units += 1
            self._stats.failed_units += 1
            _log.error("layer %s: refused bytes of unit %d: %s", self.name, unit, caught)
        with self._lock:
            if error is not None:
                self._failed[unit] = (time.monotonic(), error)
            else:
                self._failed.pop(unit, None)
            flight.position = unit + 1
            calls = self._arrived(unit, error)
        for call in calls:
            call()

    def _arrived(self, unit: int, error: Exception | None) -> list[Callable[[], None]]:
        waiters = self._waiters.pop(unit, ())
        return [call for waiter in waiters if (call := waiter.arrived(error)) is not None]


class _Units:
    """The view that FlightPlan has of a blob."""

    def __init__(self, blob: BlobFile) -> None:
        self._blob = blob
        self.units = blob.units
        self.extent = blob.extent
        self.is_member = blob.is_member

    def stored(self, unit: int) -> bool:
        return self._blob.present[unit]
