"""Registries that give no answer: reads wait without a worker, one probes, all go on at once."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from lab.waiting import until
from layerstore import limits
from layerstore.content import Outages, Priority
from layerstore.content.outages import pause_after
from layerstore.errors import LayerstoreError, NetworkError, OutageError, RateLimited, RegistryError

HERE, ELSEWHERE = "registry.example", "other.example"
NO_ANSWER = NetworkError("no route to host")


@pytest.fixture
def outages(monkeypatch: pytest.MonkeyPatch) -> Iterator[Outages]:
    monkeypatch.setattr(limits, "OUTAGE_PROBE_SECONDS", 0.1)
    monkeypatch.setattr(limits, "OUTAGE_IDLE_SECONDS", 0.4)
    found = Outages(jitter=lambda: 1.0)
    yield found
    found.close()


class Reader:
    """Waits for places, and fails whenever it is the probe, until they answer."""

    def __init__(self, outages: Outages, places: str = HERE, *, until: float | None = 60) -> None:
        self.outages = outages
        self.places = places
        self.until = None if until is None else time.monotonic() + until
        self.probes = 0
        self.released = False
        self.error: LayerstoreError | None = None
        self.wait()

    def wait(self) -> None:
        self.outages.wait(self.places, self._again, self._give_up, until=self.until)

    def _again(self, probe: bool) -> None:
        if not probe:
            self.released = True
            return
        self.probes += 1
        asked = self.outages.asked(self.places)
        self.outages.unanswered(asked, NO_ANSWER, sure=True)
        self.wait()

    def _give_up(self, error: LayerstoreError) -> None:
        self.error = error


def begin(outages: Outages, places: str = HERE, error: LayerstoreError = NO_ANSWER) -> None:
    outages.unanswered(outages.asked(places), error, sure=True)


def test_one_probes_for_all_and_all_go_on_at_once(outages: Outages) -> None:
    begin(outages)
    readers = [Reader(outages) for _ in range(50)]
    until(lambda: sum(reader.probes for reader in readers) >= 4)
    assert sum(reader.probes for reader in readers) < 15
    assert not any(reader.released for reader in readers)
    outages.answered(outages.asked(HERE))
    until(lambda: all(reader.released for reader in readers))
    assert outages.since(HERE) is None
    status = outages.status()
    assert (status["begun"], status["ended"], status["now"]) == (1, 1, [])


def test_places_do_not_wait_for_each_other(outages: Outages) -> None:
    begin(outages)
    assert not outages.admits(HERE)
    assert outages.admits(ELSEWHERE)
    reader = Reader(outages, ELSEWHERE)
    assert reader.released


def test_a_wait_ends_with_the_reason_in_time(outages: Outages) -> None:
    begin(outages)
    started = time.monotonic()
    reader = Reader(outages, until=0.3)
    until(lambda: reader.error)
    assert 0.3 <= time.monotonic() - started < 3
    assert isinstance(reader.error, OutageError)
    assert "registry.example" in str(reader.error)
    assert "no route to host" in str(reader.error)
    late = Reader(outages, until=-1)  # the outage is older than it may wait
    assert isinstance(late.error, OutageError)
    assert outages.status()["expired"] == 2


def test_who_comes_when_nobody_waits_is_the_probe(outages: Outages) -> None:
    begin(outages)
    assert not outages.admits(HERE)  # it was asked a moment ago
    until(lambda: outages.admits(HERE))
    assert not outages.admits(HERE)  # the probe is under way
    outages.untried(HERE)
    until(lambda: outages.admits(HERE))


def test_no_more_requests_are_sent_where_one_hangs(
    outages: Outages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "OUTAGE_SUSPECT_SECONDS", 0.05)
    hanging = outages.asked(HERE)
    assert outages.admits(HERE)
    time.sleep(0.06)
    assert outages.admits(HERE)  # to find out
    assert not outages.admits(HERE)
    reader = Reader(outages)
    outages.answered(hanging)
    until(lambda: reader.released)
    assert outages.admits(HERE)
    assert outages.status()["begun"] == 0  # it was only slow


def test_background_work_asks_seldom_and_is_woken_by_others(outages: Outages) -> None:
    begin(outages)
    idle = Reader(outages, until=None)
    time.sleep(0.25)
    assert idle.probes == 0
    until(lambda: idle.probes == 1)
    outages.answered(outages.asked(HERE))
    until(lambda: idle.released)


def test_a_registry_that_wants_to_be_left_alone_is(outages: Outages) -> None:
    error = RateLimited("too many", status=429)
    error.pause = 0.5
    begin(outages, error=error)
    reader = Reader(outages)
    time.sleep(0.3)
    assert reader.probes == 0
    until(lambda: reader.probes)


def test_old_failures_say_nothing_about_places_that_answered_since(outages: Outages) -> None:
    old = outages.asked(HERE)
    outages.answered(outages.asked(HERE))
    outages.unanswered(old, NO_ANSWER, sure=True)
    assert outages.since(HERE) is None


def test_pauses_double_and_are_bounded() -> None:
    pauses = [pause_after(tries, lambda: 1.0) for tries in range(40)]
    assert pauses == sorted(pauses)
    assert pauses[1] == 2 * pauses[0]
    assert pauses[-1] == limits.OUTAGE_PROBE_SECONDS
    assert pause_after(3, lambda: 0.0) == pauses[3] / 2


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (NetworkError("reset"), True),
        (RegistryError("registry answered 503", status=503), True),
        (RateLimited("registry answered 429", status=429), True),
        (RegistryError("registry answered 404", status=404), False),
        (RegistryError("sent a range labelled ''"), False),
    ],
)
def test_what_counts_as_no_answer(error: LayerstoreError, passing: bool) -> None:
    assert error.passing is passing


# -- reads -----------------------------------------------------------------------------


class Fetching:
    """A fetch in the background of a test."""

    def __init__(self, fetch: Callable[..., None]) -> None:
        self.done = threading.Event()
        self.error: Exception | None = None
        self.seconds = 0.0
        self._began = time.monotonic()
        fetch(self._finish)

    def _finish(self, error: Exception | None) -> None:
        self.error = error
        self.seconds = time.monotonic() - self._began
        self.done.set()


def test_reads_wait_for_a_dead_registry_without_a_worker(make_lab, monkeypatch):
    monkeypatch.setattr(limits, "OUTAGE_PROBE_SECONDS", 0.1)
    lab = make_lab([os.urandom(600_000) for _ in range(40)], chunk_size=600_000, patience=60.0)
    lab.source.broken = True
    reads = [Fetching(partial(lab.content.fetch, number, 0, 1)) for number in range(40)]
    scheduler = lab.content._fetcher._scheduler
    until(lambda: len(lab.source.requests) > 45)
    assert not any(read.done.is_set() for read in reads)
    asked = len(lab.source.requests)
    time.sleep(0.5)
    assert len(lab.source.requests) - asked < 15
    free = threading.Event()
    scheduler.submit(Priority.DEMAND, free.set)
    assert free.wait(20)
    lab.source.broken = False
    assert all(read.done.wait(10) for read in reads)
    assert all(read.error is None for read in reads)
    assert lab.read(7) == lab.layer.files[7]


def test_a_dead_registry_is_an_error_after_the_time_of_the_policy(make_lab, monkeypatch):
    monkeypatch.setattr(limits, "OUTAGE_PROBE_SECONDS", 0.1)
    lab = make_lab([b"abc" * 100, b"def" * 100])
    lab.source.broken = True
    read = Fetching(partial(lab.content.fetch, 0, 0, 1))
    assert read.done.wait(20)
    assert isinstance(read.error, OutageError)
    assert 1.0 <= read.seconds < 10
    again = Fetching(partial(lab.content.fetch, 1, 0, 1))
    assert again.done.wait(20)
    assert isinstance(again.error, OutageError)
    assert again.seconds < 1  # it is gone for longer than a read waits
    lab.source.broken = False
    until(lambda: lab.fetch(0) is None)
    assert lab.read(0) == b"abc" * 100


def test_an_answer_that_contradicts_itself_is_asked_for_again_a_few_times(make_lab, monkeypatch):
    monkeypatch.setattr(limits, "BACKOFF_FIRST_SECONDS", 0.001)
    lab = make_lab([b"abc" * 100], patience=60.0)
    lab.source.error = RegistryError("sent a range labelled ''")
    assert isinstance(lab.fetch(0), RegistryError)
    assert len(lab.source.requests) == limits.FETCH_ATTEMPTS
    lab.source.error = None
    assert lab.read(0) == b"abc" * 100


def test_who_waits_for_a_background_fetch_that_fails_gets_a_flight_of_his_own(make_lab):
    lab = make_lab([os.urandom(50_000) for _ in range(10)], chunk_size=50_000, patience=60.0)
    lab.source.gate.clear()
    lab.source.break_after = 0
    errors: list[Exception] = []

    def sweep() -> None:
        try:
            lab.content.complete_step()
        except NetworkError as error:
            errors.append(error)

    background = threading.Thread(target=sweep, daemon=True)
    background.start()
    until(lambda: lab.source.requests)
    read = Fetching(partial(lab.content.fetch, 2, 0, 1))
    lab.source.gate.set()
    assert read.done.wait(10)
    assert read.error is None
    background.join(10)
    assert len(errors) == 1
