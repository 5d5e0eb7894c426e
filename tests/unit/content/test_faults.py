"""Failures among several readers, and layers that are streamed whole: nobody waits for ever."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from layerstore.content import Priority
from layerstore.content.flight import FlightPlan
from layerstore.content.pace import Pace
from layerstore.errors import ContentError, StorageError
from layerstore.formats import decompress_member, members


class Asked:
    """One fetch and its outcome."""

    def __init__(self, fetch: Callable[..., None], *arguments: int) -> None:
        self._done = threading.Event()
        self.errors: list[Exception | None] = []
        fetch(*arguments, self._finish)

    def _finish(self, error: Exception | None) -> None:
        self.errors.append(error)
        self._done.set()

    def ended(self, seconds: float = 5.0) -> bool:
        return self._done.wait(seconds)


def test_the_stream_of_a_whole_blob_begins_anew_when_it_broke(make_lab):
    lab = make_lab([os.urandom(60_000) for _ in range(20)], chunk_size=60_000)
    lab.source.ignore_ranges = True
    lab.source.break_after = 700_000
    asked = Asked(lab.content.fetch, 15, 0, 1)
    assert asked.ended(8)
    assert asked.errors == [None]
    for number, data in enumerate(lab.layer.files):
        assert lab.read(number) == data


def test_a_reader_that_fails_costs_no_other_reader(make_lab):
    lab = make_lab([b"A" * 300, b"B" * 300])

    def fail(error: Exception | None) -> None:
        raise RuntimeError("on purpose")

    lab.source.gate.clear()
    lab.content.fetch(0, 0, 1, fail)
    others = [Asked(lab.content.fetch, 0, 0, 1), Asked(lab.content.fetch, 1, 0, 1)]
    lab.source.gate.set()
    assert all(other.ended() for other in others)
    assert [other.errors for other in others] == [[None], [None]]


def test_a_disk_that_fails_ends_the_fetch_with_its_error(make_lab, monkeypatch):
    lab = make_lab([b"A" * 3000])

    def full(*_: object, **__: object) -> None:
        raise StorageError("cannot open: No space left on device")

    monkeypatch.setattr(lab.objects, "partial", full)
    asked = Asked(lab.content.fetch, 0, 0, 1)
    assert asked.ended()
    assert isinstance(asked.errors[0], StorageError)


def test_a_reader_near_a_background_fetch_does_not_wait_while_that_rests(make_lab):
    lab = make_lab([os.urandom(60_000) for _ in range(40)], chunk_size=60_000)
    lab.source.pause = 0.02
    scheduler = lab.content._fetcher._scheduler
    sweep = threading.Thread(target=lab.content.complete_step, daemon=True)
    sweep.start()
    time.sleep(0.1)
    elsewhere = threading.Event()  # another layer's long fetch: background work rests
    scheduler.submit(Priority.DEMAND, elsewhere.wait)
    time.sleep(0.1)
    here = sum(lab.content._blob.present[unit] for unit in range(41))
    asked = Asked(lab.content.fetch, min(here + 3, 39), 0, 1)
    assert asked.ended(2)
    elsewhere.set()
    sweep.join(10)


def test_those_who_join_the_stream_of_a_whole_blob_hurry_it():
    class Units:
        units = 1000

        def extent(self, unit: int) -> tuple[int, int]:
            return unit * 10_000, (unit + 1) * 10_000

        def is_member(self, unit: int) -> bool:
            return True

        def stored(self, unit: int) -> bool:
            return False

    plan = FlightPlan(Units(), Pace())
    stream = plan.sweep(0, 999, 1 << 20, Priority.BACKGROUND)
    assert stream is not None
    stream.started = True
    plan.spread(stream)
    assert not stream.urgent
    assert plan.demand(700) == []
    assert stream.urgent
    stream.position = 701
    assert not stream.urgent


def test_wrong_bytes_that_several_readers_meet_at_once_count_once(make_lab, monkeypatch):
    lab = make_lab([b"A" * 100])
    right = lab.source.blob
    lab.source.blob = bytes(len(right))
    assert lab.fetch(0) is None
    lab.source.blob = right
    together = threading.Barrier(3)
    real = decompress_member

    def slow(data: bytes, *, limit: int) -> bytes:
        together.wait(5)
        return real(data, limit=limit)

    monkeypatch.setattr(members, "decompress_member", slow)
    refused: list[ContentError] = []

    def read() -> None:
        try:
            lab.content.read_stored(0, 0, 100)
        except ContentError as error:
            refused.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    monkeypatch.setattr(members, "decompress_member", real)
    assert len(refused) == 3
    assert lab.content.stats.failed_units == 1
    assert lab.read(0) == b"A" * 100


def test_a_blob_without_a_head_is_repaired(make_lab, monkeypatch):
    """Where the first member begins at byte 0, the head has no bytes to fetch."""
    monkeypatch.setattr(type(make_lab([b"a"]).layer), "HEAD", b"")
    lab = make_lab([b"one" * 30, b"two" * 30])
    right = lab.source.blob
    lab.source.blob = right[:-1] + b"?"
    assert lab.content.complete_step()
    lab.source.blob = right
    while lab.content.complete_step():
        pass
    assert lab.content.read_blob(0, len(right)) == right


def test_many_readers_of_the_blob_are_answered_by_one_fetch(make_lab):
    lab = make_lab([os.urandom(500) for _ in range(50)])
    lab.source.gate.clear()
    readers = [Asked(lab.content.fetch_blob) for _ in range(20)]
    lab.source.gate.set()
    assert all(reader.ended() for reader in readers)
    assert all(reader.errors == [None] for reader in readers)
    assert lab.content._blob_waiting == []
    assert lab.content.read_blob(0, 1 << 20) == lab.layer.blob


def test_a_row_of_many_units_is_planned_in_time():
    """A blob of 200,000 members, asked for from end to end: the plan's lock is held meanwhile."""

    class Units:
        units = 200_000

        def extent(self, unit: int) -> tuple[int, int]:
            return unit * 20_000, (unit + 1) * 20_000

        def is_member(self, unit: int) -> bool:
            return True

        def stored(self, unit: int) -> bool:
            return False

    plan = FlightPlan(Units(), Pace())
    begin = time.process_time()
    for unit in range(Units.units):
        plan.demand(unit)
    assert time.process_time() - begin < 5
