"""Fetching the units of one layer: plans become requests, arrivals wake those who wait."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeGuard

from layerstore import limits
from layerstore.content.blob import BlobFile
from layerstore.content.flight import Flight, FlightPlan, Waiter
from layerstore.content.landing import Landing
from layerstore.content.outages import Outages, gone, pause_after
from layerstore.content.pace import Pace
from layerstore.content.scheduler import Priority, Scheduler
from layerstore.content.stats import ContentStats, LayerStats
from layerstore.content.stream import ByteSource, Response
from layerstore.errors import (
    DiskFull,
    LayerstoreError,
    NetworkError,
    RegistryError,
    ServiceError,
    StorageError,
)

_log = logging.getLogger(__name__)

Done = Callable[[Exception | None], None]
_FEW: Final = 2  # attempts that fail before an outage is known


class Fetcher:
    """Brings units of a blob here.  Thread-safe.

    ``places`` names the hosts that ``source`` asks, for ``outages``; ``patience`` are the
    seconds that a read waits for one that gives no answer.
    """

    def __init__(
        self,
        name: str,
        blob: BlobFile,
        scheduler: Scheduler,
        source: ByteSource,
        stats: LayerStats,
        totals: ContentStats,
        outages: Outages,
        places: Callable[[], str],
        patience: Callable[[], float],
    ) -> None:
        self.name = name
        self._blob = blob
        self._scheduler = scheduler
        self._source = source
        self._outages = outages
        self._places = places
        self._patience = patience
        self._stats = stats
        self._totals = totals
        self._lock = threading.Lock()
        self._pace = Pace()
        self._plan = FlightPlan(_Units(blob), self._pace)
        self._waiters: dict[int, list[Waiter]] = {}

    def demand(self, units: Sequence[int], done: Done, *, stored: bool = False) -> None:
        """Bring these units here soon; ``done(error or None)`` is called once, from any thread.

        What the disk does not take is held in memory, unless it has to be ``stored``:
        that ends with DiskFull then.
        """
        if not units:
            done(None)
            return
        with self._lock:
            self._enlist(units, Waiter(len(units), done, stored=stored))

    def _enlist(self, units: Sequence[int], waiter: Waiter) -> None:
        full = self._blob.disk.full
        self._plan.widest = limits.HELD_RANGE_BYTES if full else limits.DEMAND_RANGE_MAX_BYTES
        for unit in units:
            self._waiters.setdefault(unit, []).append(waiter)
            for flight in self._plan.demand(unit):
                self._start(flight)

    def prefetch(self, last: int) -> None:
        """Fetch the units up to ``last`` ahead of need, unless the disk takes nothing."""
        if self._blob.disk.full:
            return
        with self._lock:
            first, size = 0, limits.PREFETCH_RANGE_BYTES
            while flight := self._plan.sweep(first, last, size, Priority.PREFETCH):
                self._start(flight)
                first = flight.last + 1

    def sweep(self) -> Exception | None:
        """Fetch a next large range in this thread; the error that ended it early.

        Raises DiskFull if the disk takes nothing.
        """
        self._blob.disk.check()
        with self._lock:
            flight = self._plan.sweep(
                0, self._blob.units - 1, limits.BACKGROUND_RANGE_BYTES, Priority.BACKGROUND
            )
        return None if flight is None else self._fly_ahead(flight)

    # -- flights ---------------------------------------------------------------

    def _start(self, flight: Flight) -> None:
        flight.since = time.monotonic()
        self._submit(flight, probe=False)

    def _submit(self, flight: Flight, *, probe: bool) -> None:
        if flight.priority is Priority.DEMAND:
            self._scheduler.submit(flight.priority, lambda: self._fly(flight, probe=probe))
        else:
            self._scheduler.submit(flight.priority, lambda: self._fly_quietly(flight))

    def _fly_quietly(self, flight: Flight) -> None:
        error = self._fly_ahead(flight)
        if error is not None:
            self._report(error)

    def _report(self, error: Exception) -> None:
        if isinstance(error, DiskFull):
            return  # that was said when it began
        _log.warning("event=fetch-failed layer=%s error=%s", self.name, error)

    def _fly_ahead(self, flight: Flight) -> Exception | None:
        """Bring units that nobody waits for; the error that ended it early, if one did.

        Who came to wait for some of them is left to flights of his own.
        """
        while True:
            error = self._attempt(flight)
            if (
                error is None
                or not _may_pass(error)
                or flight.failures >= limits.FETCH_ATTEMPTS
                or flight.urgent
                or self._scheduler.closed
            ):
                break
            flight.started = False  # a read does not join it now
            time.sleep(pause_after(flight.failures))
            if not self._outages.admits(self._places()):
                break
        self._end_flight(flight, error)
        return error

    def _fly(self, flight: Flight, *, probe: bool) -> None:
        """Bring units that reads wait for.  While the registry gives no answer it waits elsewhere."""
        places = self._places()
        if not probe and not self._outages.admits(places):
            self._wait(flight, places, probed=False)
            return
        error = self._attempt(flight)
        if probe and flight.asked is None:
            self._outages.untried(places)
        if error is None or self._scheduler.closed:
            self._end_flight(flight, error)
        elif not is_passing(error):
            if _may_pass(error) and flight.failures < limits.FETCH_ATTEMPTS:
                self._rest(flight)
            else:
                self._end_flight(flight, error)
        elif self._outages.since(places) is not None:
            self._wait(flight, places, probed=probe)
        elif flight.failures > 1 and self._is_over(flight):
            self._end_flight(flight, gone(places, time.monotonic() - flight.since, error))
        else:
            self._rest(flight)

    def _is_over(self, flight: Flight) -> bool:
        return time.monotonic() >= flight.since + self._patience()

    def _rest(self, flight: Flight) -> None:
        """Try again after a moment."""
        flight.whole = False  # who joined its stream goes on alone
        pause = pause_after(flight.failures)
        self._outages.later(pause, lambda: self._submit(flight, probe=False))

    def _wait(self, flight: Flight, places: str, *, probed: bool) -> None:
        """Try again when the places answer, or are to be asked whether they do."""
        flight.whole = False
        begun = self._outages.since(places) or flight.since

        def again(probe: bool) -> None:
            if probe or flight.failures <= _FEW:
                self._submit(flight, probe=probe)
            else:
                self._rest(flight)  # others have answers, and this one never has

        self._outages.wait(
            places,
            again,
            lambda error: self._end_flight(flight, error),
            until=min(begun, flight.since) + self._patience(),
            probed=probed,
        )

    def _attempt(self, flight: Flight) -> Exception | None:
        """Go as far as it goes; what ended it early."""
        flight.started = True
        flight.asked = None
        before = flight.brought
        error: Exception | None = None
        try:
            self._fly_on(flight)
        except Exception as caught:
            error = caught
        if flight.brought > before:
            flight.since, flight.failures = time.monotonic(), 0
        if error is not None:
            flight.failures += 1
        return error

    def _end_flight(self, flight: Flight, error: Exception | None) -> None:
        """The flight is over: who waits for what did not come gets the error, or another flight."""
        if error is not None and flight.priority is Priority.DEMAND:
            self._report(error)
        calls: list[Callable[[], None]] = []
        with self._lock:
            self._plan.landed(flight)
            for unit in range(flight.position, flight.last + 1):
                if unit not in self._waiters or self._plan.covering(unit) is not None:
                    continue
                if error is not None and flight.priority is not Priority.DEMAND:
                    for another in self._plan.demand(unit):
                        self._start(another)
                else:
                    calls += self._arrived(unit, error or ServiceError("the fetch was stopped"))
        self._tell(calls)

    def _fly_on(self, flight: Flight) -> None:
        while flight.position <= flight.last:
            self._keep_going(flight)
            if self._blob.here(flight.position):
                self._land(flight)
                continue
            first = last = flight.position
            while last < flight.last and not self._blob.here(last + 1):
                last += 1
            self._stream(flight, self._blob.extent(first)[0], self._blob.extent(last)[1])

    def _keep_going(self, flight: Flight) -> None:
        if not self._scheduler.give_way(flight.priority, lambda: flight.urgent):
            raise ServiceError("the store is being stopped", subject=self.name)

    def _stream(self, flight: Flight, offset: int, end: int) -> None:
        """Store what one response brings, from flight.position on."""
        if self._blob.disk.full:
            self._check_use(flight)
        self._totals.request(flight.priority)
        asked = time.monotonic()
        latency = 0.0
        begin = offset
        response = self._ask(flight, offset, end - offset)
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
            with Landing(self._blob, lambda: _is_ahead(flight)) as landing:
                while flight.position <= flight.last and offset < end:
                    # no further than the flight still goes: it may have been cut meanwhile
                    wanted = min(end, self._end(flight.last)) - offset
                    data = response.read_some(min(limits.STREAM_BYTES, max(wanted, 1)))
                    if not data:
                        raise NetworkError(f"the body ended {end - offset} bytes early")
                    latency = latency or time.monotonic() - asked
                    self.count(flight.priority, len(data))
                    landing.write(flight.position, offset, data, whole=flight.whole)
                    offset += len(data)
                    while flight.position <= flight.last and self._end(flight.position) <= offset:
                        landing.arrived(flight.position)
                        flight.brought += 1
                        self._land(flight)
                    if landing.in_memory:
                        self._check_use(flight, landing.refusal)
                    self._keep_going(flight)
            if flight.priority is Priority.DEMAND:  # others rest in between
                self._pace.measured(latency, offset - begin, time.monotonic() - asked)
        finally:
            response.close()

    def _ask(self, flight: Flight, offset: int, size: int) -> Response:
        """The head of an answer; all who wait for these places learn whether one comes."""
        asked = flight.asked = self._outages.asked(self._places())
        patience = limits.ANSWER_FIRST_SECONDS * 2**flight.failures
        try:
            response = self._source(offset, size, min(patience, limits.ANSWER_MAX_SECONDS))
        except LayerstoreError as error:
            if error.passing:
                self._outages.unanswered(asked, error, sure=flight.failures > 0)
            else:
                self._outages.answered(asked)
            raise
        self._outages.answered(asked)
        return response

    def count(self, priority: Priority, size: int) -> None:
        """So many bytes came."""
        self._stats.fetched_bytes += size
        self._totals.fetched(priority, size)

    def _end(self, unit: int) -> int:
        return self._blob.extent(unit)[1]

    def _check_use(self, flight: Flight, refusal: StorageError | None = None) -> None:
        """Raise DiskFull if the disk takes nothing and memory helps nobody who waits.

        A little more than was asked for is brought nevertheless: a next read may want it.
        """
        if flight.position > flight.last:
            return
        left = self._end(flight.last) - self._blob.extent(flight.position)[0]
        if flight.priority is Priority.DEMAND and left <= limits.HELD_RANGE_BYTES:
            return
        with self._lock:
            for unit in range(flight.position, flight.last + 1):
                if any(not waiter.stored for waiter in self._waiters.get(unit, ())):
                    return
        if isinstance(refusal, DiskFull):
            raise refusal
        raise DiskFull("the disk takes nothing", subject=self.name)

    def _join(self, flight: Flight, other: Flight) -> None:
        """Another flight already streams the whole blob: leave the units to it."""
        while flight.position <= flight.last:
            if self._scheduler.closed:
                raise ServiceError("the store is being stopped", subject=self.name)
            with self._lock:
                other.awaited = max(other.awaited, flight.last)
                gone = self._plan.whole is not other
            if self._blob.here(flight.position):
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


def is_passing(error: Exception) -> TypeGuard[LayerstoreError]:
    """Whether nobody could answer: asking again may help, and soon or late it will."""
    return isinstance(error, LayerstoreError) and error.passing


def _may_pass(error: Exception) -> bool:
    """The same, or an answer that contradicts itself: the next one may be right."""
    garbled = isinstance(error, RegistryError) and not error.status
    return garbled or is_passing(error)


def _is_ahead(flight: Flight) -> bool:
    """Whether nobody waits for what the flight brings next."""
    return flight.priority is not Priority.DEMAND and not flight.urgent


class _Units:
    """The view that FlightPlan has of a blob."""

    def __init__(self, blob: BlobFile) -> None:
        self._blob = blob
        self.units = blob.units
        self.extent = blob.extent
        self.is_member = blob.is_member

    def stored(self, unit: int) -> bool:
        return self._blob.here(unit)
