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
from layerstore.content.pace import Pace
from layerstore.content.scheduler import Priority, Scheduler
from layerstore.content.stats import ContentStats, LayerStats
from layerstore.content.stream import ByteSource
from layerstore.errors import NetworkError, ServiceError

_log = logging.getLogger(__name__)

Done = Callable[[Exception | None], None]


class Fetcher:
    """Brings units of a blob here.  Thread-safe."""

    def __init__(
        self,
        name: str,
        blob: BlobFile,
        scheduler: Scheduler,
        source: ByteSource,
        stats: LayerStats,
        totals: ContentStats,
    ) -> None:
        self.name = name
        self._blob = blob
        self._scheduler = scheduler
        self._source = source
        self._stats = stats
        self._totals = totals
        self._lock = threading.Lock()
        self._pace = Pace()
        self._plan = FlightPlan(_Units(blob), self._pace)
        self._waiters: dict[int, list[Waiter]] = {}

    def demand(self, units: Sequence[int], done: Done) -> None:
        """Bring these units here soon; ``done(error or None)`` is called once, from any thread."""
        if not units:
            done(None)
            return
        with self._lock:
            self._enlist(units, Waiter(len(units), done))

    def _enlist(self, units: Sequence[int], waiter: Waiter) -> None:
        for unit in units:
            self._waiters.setdefault(unit, []).append(waiter)
            for flight in self._plan.demand(unit):
                self._start(flight)

    def prefetch(self, last: int) -> None:
        """Fetch the units up to ``last`` ahead of need."""
        with self._lock:
            first, size = 0, limits.PREFETCH_RANGE_BYTES
            while flight := self._plan.sweep(first, last, size, Priority.PREFETCH):
                self._start(flight)
                first = flight.last + 1

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
            _log.warning("event=fetch-failed layer=%s error=%s", self.name, error)

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
        self._tell(calls)
        return error

    def _fly_on(self, flight: Flight) -> None:
        while flight.position <= flight.last:
            self._keep_going(flight)
            if self._blob.present[flight.position]:
                self._land(flight)
                continue
            first = last = flight.position
            while last < flight.last and not self._blob.present[last + 1]:
                last += 1
            self._stream(flight, self._blob.extent(first)[0], self._blob.extent(last)[1])

    def _keep_going(self, flight: Flight) -> None:
        if not self._scheduler.give_way(flight.priority, lambda: flight.urgent):
            raise ServiceError("the store is being stopped", subject=self.name)

    def _stream(self, flight: Flight, offset: int, end: int) -> None:
        """Store what one response brings, from flight.position on."""
        self._totals.request(flight.priority)
        asked = time.monotonic()
        latency = 0.0
        begin = offset
        response = self._source(offset, end - offset)
        try:
            if response.start != offset:
                with self._lock:
                    other = self._plan.whole
                    if other is None:
                        self._plan.spread(flight)
                if other is not None and other is not flight:
                    self._join(flight, other)
                    return
                offset, end = response.start, self._blob.size
            while flight.position <= flight.last and offset < end:
                # no further than the flight still goes: it may have been cut meanwhile
                wanted = min(end, self._end(flight.last)) - offset
                data = response.read_some(min(limits.STREAM_BYTES, max(wanted, 1)))
                if not data:
                    raise NetworkError(f"the body ended {end - offset} bytes early")
                latency = latency or time.monotonic() - asked
                self._stats.fetched_bytes += len(data)
                self._totals.fetched(flight.priority, len(data))
                self._write(flight, offset, data)
                offset += len(data)
                while flight.position <= flight.last and self._end(flight.position) <= offset:
                    self._blob.mark(flight.position)
                    self._land(flight)
                self._keep_going(flight)
            if flight.priority is Priority.DEMAND:  # others rest in between
                self._pace.measured(latency, offset - begin, time.monotonic() - asked)
        finally:
            response.close()

    def _end(self, unit: int) -> int:
        return self._blob.extent(unit)[1]

    def _write(self, flight: Flight, offset: int, data: bytes) -> None:
        if not flight.whole:
            self._blob.write(offset, data)
            return
        # a unit that is there may be in use: the same bytes once more could be other ones
        view, end = memoryview(data), offset + len(data)
        unit = flight.position
        while unit < self._blob.units and self._blob.extent(unit)[0] < end:
            start, stop = self._blob.extent(unit)
            start, stop = max(start, offset), min(stop, end)
            if start < stop and not self._blob.present[unit]:
                self._blob.write(start, view[start - offset : stop - offset])
            unit += 1

    def _join(self, flight: Flight, other: Flight) -> None:
        """Another flight already streams the whole blob: leave the units to it."""
        while flight.position <= flight.last:
            if self._scheduler.closed:
                raise ServiceError("the store is being stopped", subject=self.name)
            with self._lock:
                other.awaited = max(other.awaited, flight.last)
                gone = self._plan.whole is not other
            if self._blob.present[flight.position]:
                self._land(flight)
            elif gone:
                raise NetworkError("the stream of the whole blob broke", subject=self.name)
            else:
                time.sleep(limits.JOIN_POLL_SECONDS)

    def _land(self, flight: Flight) -> None:
        """The unit at the flight's position is there: step on, tell those who wait for it."""
        with self._lock:
            unit = flight.position
            flight.position = unit + 1
            calls = self._arrived(unit, None)
        self._tell(calls)

    def _tell(self, calls: list[Callable[[], None]]) -> None:
        """Call those who waited; one who fails costs neither the others nor the flight."""
        for call in calls:
            try:
                call()
            except Exception:
                _log.exception("layer %s: a read failed", self.name)

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
