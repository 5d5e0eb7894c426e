"""Making room on the disk: what goes, what stays, and that what went comes back right."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lab.simimages import without_tocs
from lab.waiting import until
from layerstore import limits
from layerstore.content import DiskRoom
from layerstore.content.room import FileSystem
from layerstore.errors import NoRoom, UnknownObject
from layerstore.provider import Needs, Ordinary, Policy, View
from layerstore.provider.eviction import Standing

MIB = limits.MIB
LIMIT = 24 * MIB
HIGH = int(LIMIT * limits.DISK_HIGH)


def ref(registry, repository: str) -> str:
    return f"{registry.host}/{repository}:1"


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def files(seed: int, size: int = 1 * MIB, count: int = 4) -> dict[str, bytes]:
    return {f"data/{number}": noise(seed * 100 + number, size) for number in range(count)}


class Client:
    """Stands for the graph roots: what is linked and mounted."""

    def __init__(self) -> None:
        self.referenced: set[int] = set()
        self.mounted: set[int] = set()
        self.known = True

    def __call__(self) -> Needs:
        return Needs(self.referenced, self.mounted, self.known)


@pytest.fixture
def client(asker) -> Client:
    client = Client()
    use(asker, client)
    return client


def use(asker, client: Client, **more: Any) -> None:
    policy = Policy(
        disk=DiskRoom(limit=LIMIT, keep_free=0.0), ordinary=more.pop("ordinary", Ordinary.AUTO)
    )
    asker.options = {"background": False, "prefetch": False, "policy": policy, "needs": client}
    asker.options |= more
    asker.restart()


def pull(asker, registry, publisher, client: Client, seed: int, **more: Any) -> View:
    """Push an image, and take its one layer as a client does."""
    image = publisher.push(f"app{seed}", "1", [files(seed, **more)])
    view: View = asker.view(ref(registry, f"app{seed}"), image.layers[0].toc_digest)
    client.referenced.add(view.key)
    return view


def read_all(asker, view: View, seed: int, **more: Any) -> None:
    for name, data in files(seed, **more).items():
        assert asker.read(view, name) == data


def disk_bytes(root: Path) -> int:
    total = 0
    for directory, _, names in os.walk(root):
        for path in (directory, *(f"{directory}/{name}" for name in names)):
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(path).st_blocks * 512
    return total


def standings(asker) -> dict[int, str]:
    return {one["slot"]: one["standing"] for one in asker.store.disk_use.report()["layers"]}


def layer_of(asker, view: View) -> dict[str, Any]:
    layers: list[dict[str, Any]] = asker.store.disk_use.report()["layers"]
    (found,) = (one for one in layers if one["slot"] == view.slot)
    return found


def test_the_limit_holds_while_more_is_read_than_fits(asker, registry, publisher, client):
    peak = 0
    views = {seed: pull(asker, registry, publisher, client, seed) for seed in range(1, 7)}
    for _ in range(2):
        for seed, view in views.items():
            read_all(asker, view, seed)
            peak = max(peak, disk_bytes(asker.root))
    assert asker.store.housekeeper.evicted_bytes > 8 * MIB
    assert peak <= LIMIT


def test_layers_go_by_who_needs_them(asker, registry, publisher, client):
    running, idle, gone, kept = (
        pull(asker, registry, publisher, client, seed) for seed in (1, 2, 3, 4)
    )
    client.mounted.add(running.key)
    client.referenced.discard(gone.key)
    asker.store._state.kept.keep("kept", "[]")
    asker.store._state.kept.keep_layer("kept", kept.slot)
    for seed, view in ((3, gone), (1, running), (4, kept), (2, idle)):
        read_all(asker, view, seed)
        asker.store.housekeeper._note_used(exactly=True)
    expected = {gone: "unreferenced", idle: "idle", running: "running", kept: "pinned"}
    assert standings(asker) == {view.slot: word for view, word in expected.items()}
    order = [one["slot"] for one in asker.store.disk_use.report()["layers"]]
    assert order == [gone.slot, idle.slot, running.slot, kept.slot]
    client.known = False  # a graph root cannot be read: nobody is unreferenced
    assert standings(asker)[gone.slot] == "idle"


def test_what_gc_tells_is_what_it_does(asker, registry, publisher, client):
    views = [pull(asker, registry, publisher, client, seed) for seed in (1, 2)]
    for seed, view in enumerate(views, 1):
        read_all(asker, view, seed)
    client.referenced.discard(views[0].key)
    told = asker.store.disk_use.collect(dry_run=True, everything=False)
    assert [one["standing"] for one in told["removed"]] == ["unreferenced"]
    before = disk_bytes(asker.root)
    done = asker.store.disk_use.collect(dry_run=False, everything=False)
    assert done == told | {"dry_run": False}
    freed = before - disk_bytes(asker.root)
    assert abs(freed - done["size"]) < 256 * limits.KIB
    assert asker.store.disk_use.collect(dry_run=True, everything=False)["removed"] == []
    (rest,) = asker.store.disk_use.collect(dry_run=True, everything=True)["removed"]
    assert rest["standing"] == "idle"
    for seed, view in enumerate(views, 1):
        read_all(asker, view, seed)


def test_a_shared_file_stays_for_the_layer_that_is_wanted_more(asker, registry, publisher, client):
    common = {"lib/shared": noise(999, MIB)}
    views = []
    for seed in (1, 2):
        image = publisher.push(f"app{seed}", "1", [common | files(seed, count=1)])
        views.append(asker.view(ref(registry, f"app{seed}"), image.layers[0].toc_digest))
        for name, data in (common | files(seed, count=1)).items():
            assert asker.read(views[-1], name) == data
    client.referenced.add(views[1].key)
    (gone,) = asker.store.disk_use.collect(dry_run=False, everything=False)["removed"]
    assert gone["standing"] == "unreferenced"
    registry.fault("reset", times=100)
    assert asker.read(views[1], "lib/shared") == common["lib/shared"]


@pytest.mark.parametrize("form", ["lazy", "ordinary"])
def test_an_evicted_layer_is_read_anew_by_ranges(asker, registry, publisher, client, form):
    change = without_tocs if form == "ordinary" else None
    use(asker, client, ordinary=Ordinary.EAGER)
    image = publisher.push("app", "1", [files(1, size=MIB // 2, count=6)], change=change)
    layer = image.layers[0]
    name = layer.toc_digest if form == "lazy" else layer.digest
    view = asker.view(ref(registry, "app"), name)
    asker.store.layers.hasten(view.slot, lambda _: None)
    until(lambda: asker.store._state.layer(view.slot).verified)
    asker.store.disk_use.collect(dry_run=False, everything=True)
    assert not asker.store._state.is_complete(view.slot)
    assert layer_of(asker, view)["blob"] < 64 * limits.KIB
    asker.restart()
    before = registry.count("GET", layer.digest)
    assert asker.read(view, "data/5") == files(1, size=MIB // 2, count=6)["data/5"]
    assert registry.count("GET", layer.digest) > before
    stored = asker.store.layers.open(view.slot).content.stored_bytes
    # a small gzip blob can be entered at its beginning only
    assert 0 < stored < layer.size / (2 if form == "lazy" else 0.5), "only a range was fetched"
    assert asker.view(ref(registry, "app"), name) == view


def test_a_reader_of_what_is_evicted_reads_on(asker, registry, publisher, client):
    view = pull(asker, registry, publisher, client, 1, size=256 * limits.KIB, count=8)
    wrong: list[str] = []
    stop = threading.Event()

    def keep_reading() -> None:
        while not stop.is_set():
            for name, data in files(1, size=256 * limits.KIB, count=8).items():
                try:
                    if asker.read(view, name) != data:
                        wrong.append(name)
                except AssertionError:
                    continue  # it went between fetch and read: the file system asks again

    readers = [threading.Thread(target=keep_reading) for _ in range(3)]
    for reader in readers:
        reader.start()
    evictions = 0
    for _ in range(15):
        evictions += bool(asker.store.disk_use.collect(dry_run=False, everything=True)["size"])
        time.sleep(0.05)
    stop.set()
    for reader in readers:
        reader.join(30)
    assert wrong == []
    assert evictions > 5
    assert asker.store.layers.stats.failed_units == 0, "no byte was ever wrong"


@pytest.mark.parametrize("point", ["after the database", "after the bitmap", "after the blob"])
def test_a_crash_in_the_middle_leaves_no_complete_layer_without_its_bytes(
    asker, registry, publisher, client, monkeypatch, point
):
    view = pull(asker, registry, publisher, client, 1)
    asker.store.layers.hasten(view.slot, lambda _: None)
    until(lambda: asker.store._state.layer(view.slot).verified)
    real = Path.unlink

    class Killed(BaseException):
        pass

    def unlink(path: Path, missing_ok: bool = False) -> None:
        mine = path.parent.name == str(view.slot)
        if mine and point == "after the database":
            raise Killed
        real(path, missing_ok)
        if mine and path.name == {"after the bitmap": "blob.map", "after the blob": "blob"}[point]:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(Killed):
            asker.store.disk_use.collect(dry_run=False, everything=True)
    asker.close()
    with contextlib.closing(sqlite3.connect(asker.root / "state.sqlite")) as db:
        assert db.execute("SELECT complete FROM layers").fetchall() == [(0,)]
    asker.open()
    assert not asker.store.layers.open(view.slot).content.complete
    read_all(asker, view, 1)


def test_what_arrives_after_the_eviction_makes_no_layer_complete(
    asker, registry, publisher, client
):
    """A background fetch that was under way ends on the file that is gone."""
    view = pull(asker, registry, publisher, client, 1)
    old = asker.store.layers.open(view.slot).content
    assert asker.store.layers.drop_blob(view.slot) >= 0
    while old.complete_step():
        pass
    assert old.complete
    asker.store.layers.mark_complete(view.slot)
    assert not asker.store._state.is_complete(view.slot)


def test_an_evicted_layer_is_not_fetched_again_before_it_is_missed(
    asker, registry, publisher, client
):
    use(asker, client, background=True)
    view = pull(asker, registry, publisher, client, 1)
    until(lambda: asker.store._state.is_complete(view.slot))
    asker.store.disk_use.collect(dry_run=False, everything=True)
    sent = registry.count("GET", "/blobs/")
    for _ in range(2):
        asker.store.housekeeper._look()
        asker.restart()
        assert view.slot in asker.store.layers.deferred
    assert registry.count("GET", "/blobs/") == sent
    assert asker.read(view, "data/0") == files(1)["data/0"]  # now somebody misses it
    asker.store.housekeeper._note_used(exactly=True)
    asker.store.housekeeper._look()
    until(lambda: asker.store._state.is_complete(view.slot))


def test_background_fetching_stops_at_the_high_mark(asker, registry, publisher, client):
    views = [pull(asker, registry, publisher, client, seed, count=6) for seed in (1, 2, 3, 4, 5)]
    use(asker, client, background=True)
    until(lambda: asker.store.layers.deferred and not asker.store._scheduler.busy)
    time.sleep(0.5)
    assert disk_bytes(asker.root) <= HIGH + MIB
    done = [view for view in views if asker.store._state.is_complete(view.slot)]
    assert 0 < len(done) < len(views)
    assert asker.store.housekeeper.evicted_bytes == 0


def test_recency_survives_a_restart(asker, registry, publisher, client):
    first, second = (pull(asker, registry, publisher, client, seed) for seed in (1, 2))
    asker.store.housekeeper._note_used(exactly=True)
    read_all(asker, first, 1)
    asker.restart()
    order = [one["slot"] for one in asker.store.disk_use.report()["layers"]]
    assert order == [second.slot, first.slot]


def test_pinned_layers_stay_and_reads_do_not_pass_the_limit(asker, registry, publisher, client):
    state = asker.store._state
    state.kept.keep("kept", "[]")
    for seed in (1, 2, 3):
        view = pull(asker, registry, publisher, client, seed)
        state.kept.keep_layer("kept", view.slot)
        if seed < 3:
            read_all(asker, view, seed)
    read_all(asker, view, 3)  # from memory
    assert disk_bytes(asker.root) <= LIMIT
    assert Standing.PINNED.word in standings(asker).values()
    assert asker.store.housekeeper.evicted_bytes == 0


def test_a_pinned_image_is_completed_and_stays(asker, registry, publisher, client):
    publisher.push("app", "1", [files(1), files(2, count=1)])
    job = asker.store.fetches.start(ref(registry, "app"), (), keep=True)
    until(lambda: asker.store.fetches.status(job)["done"])
    assert asker.store.disk_use.pinned()["images"] == [
        {"reference": ref(registry, "app"), "layers": 2, "complete": True}
    ]
    assert asker.store.disk_use.collect(dry_run=False, everything=True)["removed"] == []
    asker.restart()
    assert asker.store.disk_use.collect(dry_run=True, everything=True)["removed"] == []
    assert set(standings(asker).values()) == {"pinned"}
    asker.store.disk_use.unpin(ref(registry, "app"))
    with pytest.raises(UnknownObject):
        asker.store.disk_use.unpin(ref(registry, "app"))
    assert len(asker.store.disk_use.collect(dry_run=True, everything=True)["removed"]) == 2


def test_a_pin_that_was_broken_off_goes_on_after_a_restart(asker, registry, publisher, client):
    image = publisher.push("app", "1", [files(1)])
    registry.fault("latency", match=image.layers[0].digest, seconds=0.5, times=1)
    job = asker.store.fetches.start(ref(registry, "app"), (), keep=True)
    asker.store.fetches.cancel(job)
    until(lambda: asker.store.fetches.status(job)["done"])
    assert [one["complete"] for one in asker.store.disk_use.pinned()["images"]] == [False]
    asker.restart()
    asker.store.fetches.resume_kept()
    until(lambda: asker.store.disk_use.pinned()["images"][0]["complete"])


def small_disk(asker, free: int, monkeypatch) -> None:
    """Let the store see a file system of 1 GiB with so much free, besides what it frees itself."""
    keeper = asker.store.housekeeper
    monkeypatch.setattr(
        keeper._room,
        "file_system",
        lambda: FileSystem(1024 * MIB, free + keeper.evicted_bytes),
    )


def test_a_full_disk_is_answered_by_eviction_at_once(
    asker, registry, publisher, client, monkeypatch
):
    views = [pull(asker, registry, publisher, client, seed) for seed in (1, 2)]
    for seed, view in enumerate(views, 1):
        read_all(asker, view, seed)
    client.mounted.add(views[1].key)
    small_disk(asker, 60 * MIB, monkeypatch)
    asker.store._objects.disk.room_wanted()  # as the first write does that fails
    until(lambda: asker.store.housekeeper.evicted_bytes > 4 * MIB)
    assert layer_of(asker, views[0])["blob"] < MIB
    assert layer_of(asker, views[1])["blob"] > 4 * MIB, "as much went as was wanted, no more"


def test_the_reserve_costs_only_what_nobody_refers_to(
    asker, registry, publisher, client, monkeypatch
):
    policy = Policy(disk=DiskRoom(keep_free=0.5))
    asker.options |= {"policy": policy}
    asker.restart()
    views = [pull(asker, registry, publisher, client, seed) for seed in (1, 2)]
    for seed, view in enumerate(views, 1):
        read_all(asker, view, seed)
    client.referenced.discard(views[0].key)
    small_disk(asker, 100 * MIB, monkeypatch)
    asker.store.housekeeper._rest_until.clear()  # it has looked at this machine's disk already
    asker.store.housekeeper._look()
    assert layer_of(asker, views[0])["blob"] < MIB
    assert layer_of(asker, views[1])["blob"] > 4 * MIB
    with pytest.raises(NoRoom):
        asker.store._room.charge(1, ahead=True)
    asker.store._room.charge(1)  # a read may
