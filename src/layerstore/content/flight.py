"""Flights: contiguous runs of units under way, and who waits for them.

A pure plan, without threads or I/O: `FlightPlan` decides which unit is fetched
by which flight, so that no unit is ever fetched twice at the same time, reads on
demand take neighbours along, and a read never waits far behind a long fetch.
The caller holds a lock around every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from layerstore import limits
from layerstore.content.pace import Pace
from layerstore.content.scheduler import Priority


class Units(Protocol):
    """What the plan needs to know of a blob."""

    @property
    def units(self) -> int: ...
    def extent(self, unit: int) -> tuple[int, int]: ...
    def is_member(self, unit: int) -> bool: ...
    def stored(self, unit: int) -> bool: ...


class Flight:
    """Units ``position`` .. ``last`` are still to come; ``last`` may be cut."""

    __slots__ = (
        "asked",
        "awaited",
        "brought",
        "failures",
        "first",
        "last",
        "position",
        "priority",
        "since",
        "started",
        "whole",
    )

    def __init__(self, first: int, last: int, priority: Priority) -> None:
        self.first = first
        self.last = last
        self.position = first
        self.priority = priority
        self.started = False
        self.whole = False  # one response with the blob from its first byte: it serves everyone
        self.awaited = -1  # the last unit that somebody waits for, though the flight began without
        self.asked: object = None  # the last request of the present attempt
        self.brought = 0  # units that came, over all attempts
        self.failures = 0  # attempts in a row that brought nothing
        self.since = 0.0  # when it began, or last brought a unit (monotonic)

    def __repr__(self) -> str:
        return f"<Flight {self.position}..{self.last} of {self.first} {self.priority.name}>"

    def covers(self, unit: int) -> bool:
        """Whether this flight will still bring the unit."""
        return self.position <= unit <= self.last

    @property
    def urgent(self) -> bool:
        """Whether somebody waits for what comes next, whatever the flight began for."""
        return self.position <= self.awaited


class FlightPlan:
    """The flights of one layer."""

    def __init__(self, units: Units, pace: Pace) -> None:
        self._units = units
        self._pace = pace
        self.widest = limits.DEMAND_RANGE_MAX_BYTES
        """Bytes of one range on demand, at most."""
        self._flights: list[Flight] = []
        self._window = 0
        self._recent_ends: list[int] = []

    def covering(self, unit: int) -> Flight | None:
        """The flight that will bring this unit, if there is one."""
        for flight in reversed(self._flights):  # whoever wants a row of units asks for the next
            if flight.covers(unit):
                return flight
        return None

    @property
    def whole(self) -> Flight | None:
        """The flight that streams the whole blob, if there is one."""
        for flight in self._flights:
            if flight.whole:
                return flight
        return None

    def demand(self, unit: int) -> list[Flight]:
        """Make sure that somebody fetches ``unit`` soon; the new flights to start."""
        flight = self.covering(unit)
        if flight is None:
            return [self._depart(unit, Priority.DEMAND)]
        if flight.priority is Priority.DEMAND or flight.whole or self._is_near(flight, unit):
            flight.awaited = max(flight.awaited, unit)
            return []
        last = flight.last
        flight.last = unit - 1
        started = [self._depart(unit, Priority.DEMAND, at_most=last)]
        if started[0].last < last:
            started.append(self._add(Flight(started[0].last + 1, last, flight.priority)))
        return started

    def sweep(self, first: int, last: int, size: int, priority: Priority) -> Flight | None:
        """A flight for the next missing units of [first, last], about ``size`` bytes."""
        unit = first
        while unit <= last and (self._units.stored(unit) or self.covering(unit)):
            unit += 1
        if unit > last:
            return None
        return self._add(Flight(unit, self._extend(unit, last, size), priority))

    def spread(self, flight: Flight) -> None:
        """The registry sends the whole blob: this flight now brings every unit."""
        flight.whole = True
        flight.first = flight.position = 0
        flight.last = self._units.units - 1

    def landed(self, flight: Flight) -> None:
        """The flight has ended, one way or the other."""
        self._flights.remove(flight)

    def _depart(self, unit: int, priority: Priority, at_most: int | None = None) -> Flight:
        recent = any(end < unit <= end + 2 for end in self._recent_ends)
        base = self._pace.window
        self._window = min(self._window * 2 if recent else base, self.widest)
        bound = self._units.units - 2 if at_most is None else at_most
        last = self._extend(unit, max(unit, bound), self._window)
        self._recent_ends = [*self._recent_ends[-7:], last]
        return self._add(Flight(unit, last, priority))

    def _extend(self, unit: int, bound: int, size: int) -> int:
        start = self._units.extent(unit)[0]
        last = unit
        while last < bound:
            following = last + 1
            if self._units.extent(following)[1] - start > size:
                break
            if self._units.stored(following) or self.covering(following):
                break
            last = following
        return last

    def _is_near(self, flight: Flight, unit: int) -> bool:
        if not flight.started:
            return False
        here = self._units.extent(min(flight.position, self._units.units - 1))[0]
        return self._units.extent(unit)[0] - here <= limits.DEMAND_STEAL_BYTES

    def _add(self, flight: Flight) -> Flight:
        self._flights.append(flight)
        return flight


class Waiter:
    """Somebody who waits for ``count`` units; ``done`` is called once, with the first error.

    ``stored`` says that units in memory are of no use: they have to be on the disk.
    """

    __slots__ = ("_count", "_done", "error", "stored")

    def __init__(
        self, count: int, done: Callable[[Exception | None], None], *, stored: bool = False
    ) -> None:
        self._count = count
        self._done = done
        self.stored = stored
        self.error: Exception | None = None

    def arrived(self, error: Exception | None) -> Callable[[], None] | None:
        """One unit is there, or will not come; the call to make when it was the last."""
        self._count -= 1
        self.error = self.error or error
        if self._count:
            return None
        return lambda: self._done(self.error)
