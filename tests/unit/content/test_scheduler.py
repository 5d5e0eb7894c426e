from __future__ import annotations

import threading
import time

from lab.waiting import until
from layerstore import limits
from layerstore.content import Priority, Scheduler


def test_demand_finds_a_worker_while_prefetch_is_stuck():
    scheduler = Scheduler(4, prefetch=2, background=1, quiet_seconds=0.01)
    gate = threading.Event()
    for _ in range(10):
        scheduler.submit(Priority.PREFETCH, gate.wait)
    served = threading.Event()
    scheduler.submit(Priority.DEMAND, served.set)
    assert served.wait(20)
    gate.set()
    scheduler.close()


def test_background_rests_while_somebody_waits():
    scheduler = Scheduler(4, prefetch=1, background=1, quiet_seconds=0.05)
    gate = threading.Event()
    scheduler.submit(Priority.DEMAND, gate.wait)
    ran = threading.Event()
    scheduler.submit(Priority.BACKGROUND, ran.set)
    assert not ran.wait(0.3)
    gate.set()
    assert ran.wait(20)
    scheduler.close()


def test_a_failing_job_does_not_cost_a_worker():
    scheduler = Scheduler(1, prefetch=1, background=1, quiet_seconds=0.01)

    def fail() -> None:
        raise RuntimeError("on purpose")

    for _ in range(5):
        scheduler.submit(Priority.DEMAND, fail)
    served = threading.Event()
    scheduler.submit(Priority.DEMAND, served.set)
    assert served.wait(20)
    scheduler.close()


def test_give_way_ends_when_the_scheduler_closes():
    scheduler = Scheduler(2, prefetch=1, background=1, quiet_seconds=60)
    scheduler.submit(Priority.DEMAND, lambda: None)
    results: list[bool] = []
    thread = threading.Thread(
        target=lambda: results.append(scheduler.give_way(Priority.BACKGROUND))
    )
    until(lambda: scheduler.busy)
    thread.start()
    scheduler.close()
    thread.join(2)
    assert results == [False]


def test_reads_go_on_while_a_dead_registry_holds_every_worker(monkeypatch):
    monkeypatch.setattr(limits, "FETCH_RELIEF_SECONDS", 0.05)
    scheduler = Scheduler(2, prefetch=1, background=1, quiet_seconds=0.01)
    gate, ended = threading.Event(), threading.Semaphore(0)

    def stuck() -> None:
        gate.wait()
        ended.release()

    for _ in range(6):
        scheduler.submit(Priority.DEMAND, stuck)
    served = threading.Event()
    scheduler.submit(Priority.DEMAND, served.set)
    assert served.wait(20)
    gate.set()
    assert all(ended.acquire(timeout=5) for _ in range(6))
    until(lambda: not any(t.name == "relief" for t in threading.enumerate()))
    scheduler.close()


def test_relief_is_bounded_and_comes_only_to_the_stuck(monkeypatch):
    monkeypatch.setattr(limits, "FETCH_RELIEF_SECONDS", 0.02)
    monkeypatch.setattr(limits, "FETCH_RELIEF_WORKERS", 3)
    scheduler = Scheduler(2, prefetch=1, background=1, quiet_seconds=0.01)
    gate, begun = threading.Event(), []

    def stuck() -> None:
        begun.append(1)
        gate.wait()

    for _ in range(20):
        scheduler.submit(Priority.DEMAND, stuck)
    until(lambda: len(begun) == 5)
    time.sleep(0.2)
    assert len(begun) == 5
    assert sum(scheduler._allowed) == 2 + 3 + 1 + 1
    gate.set()
    until(lambda: len(begun) == 20)
    until(lambda: sum(scheduler._allowed) == 4)
    scheduler.close()
