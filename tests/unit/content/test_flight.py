from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from layerstore import limits
from layerstore.content.flight import FlightPlan
from layerstore.content.pace import Pace
from layerstore.content.scheduler import Priority


class Units:
    """A blob of equal units."""

    def __init__(self, units: int, size: int = 1000) -> None:
        self.units = units
        self._size = size
        self.there: set[int] = set()

    def extent(self, unit: int) -> tuple[int, int]:
        return unit * self._size, (unit + 1) * self._size

    def is_member(self, unit: int) -> bool:
        return 0 < unit < self.units - 1

    def stored(self, unit: int) -> bool:
        return unit in self.there


def make_plan(units: Units) -> FlightPlan:
    return FlightPlan(units, Pace())


def test_sequential_demand_widens_the_window():
    units = Units(100_000, 10_000)
    plan = make_plan(units)
    sizes = []
    unit = 10
    for _ in range(6):
        (flight,) = plan.demand(unit)
        sizes.append(flight.last - flight.first + 1)
        unit = flight.last + 1
    assert sizes == sorted(sizes)
    assert sizes[-1] * 10_000 > 4 * sizes[0] * 10_000
    assert sizes[-1] * 10_000 <= limits.DEMAND_RANGE_MAX_BYTES


def test_demand_cuts_a_background_flight_that_is_far_away():
    units = Units(10_000, 10_000)
    plan = make_plan(units)
    background = plan.sweep(0, 9_999, 1 << 30, Priority.BACKGROUND)
    assert background is not None
    background.started = True
    started = plan.demand(5_000)
    assert [flight.priority for flight in started] == [Priority.DEMAND, Priority.BACKGROUND]
    assert background.last == 4_999
    assert started[0].first == 5_000
    assert started[1].first == started[0].last + 1
    assert started[1].last == 9_999


def test_demand_waits_for_a_flight_that_is_nearly_there():
    units = Units(10_000, 1_000)
    plan = make_plan(units)
    prefetch = plan.sweep(0, 9_999, 1 << 30, Priority.PREFETCH)
    assert prefetch is not None
    prefetch.started = True
    prefetch.position = 100
    assert plan.demand(150) == []


def test_demand_does_not_wait_for_a_flight_that_has_not_started():
    plan = make_plan(Units(100))
    queued = plan.sweep(0, 99, 1 << 30, Priority.PREFETCH)
    assert queued is not None
    started = plan.demand(0)
    assert started[0].priority is Priority.DEMAND
    assert not queued.covers(0)


@given(
    st.lists(st.tuples(st.sampled_from("dpbl"), st.integers(0, 199)), max_size=60),
    st.sets(st.integers(0, 199)),
)
def test_no_unit_is_ever_in_two_flights(steps, stored):
    units = Units(200, 40_000)
    units.there = set(stored)
    plan = make_plan(units)
    flights = []
    for kind, unit in steps:
        if kind == "d" and unit not in units.there:
            flights += plan.demand(unit)
            assert plan.covering(unit) is not None
        elif kind == "p":
            flight = plan.sweep(0, unit, 1 << 20, Priority.PREFETCH)
            flights += [flight] if flight else []
        elif kind == "b":
            flight = plan.sweep(0, 199, 4 << 20, Priority.BACKGROUND)
            flights += [flight] if flight else []
        elif flights:
            flight = flights.pop(unit % len(flights))
            units.there |= set(range(flight.position, flight.last + 1))
            flight.position = flight.last + 1
            plan.landed(flight)
        seen: set[int] = set()
        for flight in flights:
            covered = set(range(flight.position, flight.last + 1))
            assert not covered & seen
            seen |= covered
