"""`kill -9` of the server at 100 random moments, under load: nobody who uses the store notices.

Five processes read, map, walk, start containers and pull (lab/loads.py), and compare everything
with what a plain pull extracted.  The server is killed at moments that hurt (lab/serverkills.py):
in the middle of requests, of lookups, of fetches, and while it takes over from the one before.

LAYERSTORE_SERVER_KILLS is how many there are in all, LAYERSTORE_SEED chooses the moments.
"""

import collections
import contextlib
import os
import random
import re
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from lab.loadcrew import Crew
from lab.loads import Kind, Progress, forget_names
from lab.serverkills import Kill, ServerKiller
from lab.workbench import Workbench
from layerstore import fuse, service

KILLS = int(os.environ.get("LAYERSTORE_SERVER_KILLS", "100"))
SHARES = {"nothing": 0.3, "registry": 0.25, "upgrades": 0.25, "evictions": 0.2}
LIMIT = '[disk]\nlimit = "48 MiB"\n'  # less than all images need, so that room is made all the time
LOADS: tuple[Kind, ...] = ("read", "mmap", "walk", "containers", "pulls")
UPGRADES = 10
KEEPERS = 3
EVERY = 3  # so many kills between two restarts of the registry, or two upgrades

NEVER = {
    *("read-failed", "bytes-refused", "file-refused", "blob-refused", "layer-quarantined"),
    *("keeper-failed", "server-killed", "requests-failed", "uses-not-saved", "index-damaged"),
}

pytestmark = pytest.mark.timeout(600 + KILLS * 10)


@pytest.fixture(scope="module")
def seed() -> int:
    chosen = int(os.environ.get("LAYERSTORE_SEED") or random.randrange(1 << 32))
    print(f"LAYERSTORE_SEED={chosen}")
    return chosen


@pytest.fixture(scope="module")
def bench(workspace: Path, trixie: object) -> Iterator[Workbench]:
    with Workbench(workspace / "bench") as running:
        yield running


@pytest.mark.parametrize("beside", SHARES)
def test_nobody_notices_that_the_server_is_killed(bench: Workbench, seed: int, beside: str) -> None:
    wanted = max(1, round(KILLS * SHARES[beside]))
    choice = random.Random(f"{seed} {beside}")
    logged = len(bench.rig.service.log())
    with limited(bench, beside == "evictions"), bench.crew(f"{seed} {beside}", LOADS) as crew:
        killer = ServerKiller(bench.rig.service, bench.control, crew, choice)
        kills = []
        for number in range(wanted):
            if number % EVERY == 0:
                disturb(bench, beside, by_signal=number % 2 == 0)
            kills.append(killer.kill())
            forget_names()
            crew.check()
            if beside == "registry":
                bench.upstream.start()
        killer.serving()
        wait_until(lambda: all(done.operations for done in crew.progress().values()), 60)
        done = crew.finish()
    tell(kills, done)
    everybody_worked(done)
    the_kills_hurt(kills)
    assert bench.rig.service.status()["read_errors"] == 0
    events = collections.Counter(re.findall(r"event=(\S+)", bench.rig.service.log()[logged:]))
    print(dict(events))
    assert "Traceback" not in bench.rig.service.log()
    assert not events.keys() & NEVER
    # without its registry the store knows no new reference: then Podman pulls plainly
    assert beside == "registry" or "lookup-refused" not in events
    assert (beside == "evictions") == ("evicted" in events)


@contextlib.contextmanager
def limited(bench: Workbench, wanted: bool) -> Iterator[None]:
    """With little disk for a while."""
    store = bench.rig.service
    if wanted:
        store.configure(LIMIT)
        service.reload(store.root)
    try:
        yield
    finally:
        if wanted:
            store.configure("")
            service.reload(store.root)


def test_nobody_notices_ten_upgrades(bench: Workbench, seed: int) -> None:
    """A file that is open all the time, and a container that runs all the time."""
    store = bench.rig.service
    keeper, pids = store.keeper_pid, {store.pid}
    with bench.crew(f"{seed} upgrades", ("stream", "resident")) as crew:
        for _ in range(UPGRADES):
            before = crew.progress()
            said = bench.rig.env.layerstore("reload", "--root", store.root).stdout
            assert said == f"a new server serves, pid {store.pid}\n"
            pids.add(store.pid)
            forget_names()
            wait_until(partial(moved, before, crew))
            crew.check()
        done = crew.finish()
    assert len(pids) == 1 + UPGRADES
    assert store.keeper_pid == keeper
    everybody_worked(done)
    assert store.status()["read_errors"] == 0


def moved(before: dict[str, Progress], crew: Crew) -> bool:
    now = crew.progress()
    return all(now[name].bytes > before[name].bytes for name in ("stream-0", "resident-1"))


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["both killed", "stopped"])
def test_the_mount_outlives_its_keeper(bench: Workbench, seed: int, how: str) -> None:
    """As under systemd, which keeps the descriptors meanwhile: a crash of all, `restart`."""
    store = bench.rig.service
    waiting = 0
    with bench.crew(f"{seed} {how}") as crew:
        for _ in range(KEEPERS):
            wait_until(lambda: bench.control.waiting() > 0)
            mount = fuse.find_mount(store.mountpoint)
            ended = store.stop(signal.SIGKILL if how == "both killed" else signal.SIGTERM)
            assert ended == (-signal.SIGKILL if how == "both killed" else 0)
            waiting += bench.control.waiting() > 0
            assert fuse.find_mount(store.mountpoint) == mount
            store.start()
            forget_names()
            crew.check()
        done = crew.finish()
    everybody_worked(done)
    assert waiting
    assert store.status()["read_errors"] == 0


def disturb(bench: Workbench, what: str, *, by_signal: bool) -> None:
    if what == "registry":
        bench.upstream.stop()
    elif what == "upgrades" and by_signal:  # does not wait: the next kill may meet the hand-over
        os.kill(bench.rig.service.keeper_pid, signal.SIGHUP)
    elif what == "upgrades":
        service.reload(bench.rig.service.root)


def tell(kills: Sequence[Kill], done: dict[str, Progress]) -> None:
    print(f"\n{len(kills)} kills:", dict(collections.Counter(kill.moment for kill in kills)))
    restarts = [kill.restart_seconds for kill in kills if kill.restart_seconds is not None] or [0.0]
    waiting = sum(kill.waiting > 0 for kill in kills)
    print(
        f"{waiting} with requests under way, {sum(kill.requests for kill in kills)} requests read;"
        f" served again after {statistics.median(restarts):.2f} s, at most {max(restarts):.2f} s"
    )
    for name, progress in done.items():
        print(
            f"{name:14} {progress.operations:7} operations {progress.bytes >> 20:5} MiB,"
            f" the longest took {progress.longest_seconds:.2f} s"
        )


def everybody_worked(done: dict[str, Progress]) -> None:
    for name, progress in done.items():
        assert progress.operations > 0, name
        assert (progress.errors, progress.wrong) == (0, 0), name


def the_kills_hurt(kills: Sequence[Kill]) -> None:
    """The servers that died had been asked, and most of them were being asked when they died."""
    assert len({kill.pid for kill in kills}) == len(kills)
    lived = [kill for kill in kills if kill.moment != "starting"]
    assert all(kill.requests or kill.waiting for kill in lived)
    assert sum(kill.waiting > 0 for kill in kills) * 3 > len(kills) - 5  # of few, any may miss
