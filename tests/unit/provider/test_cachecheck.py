"""Flipped bits in everything that the store keeps: all are found, none is served, all are mended."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gzip
import hashlib
import io
import json
import os
import random
import sqlite3
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lab import simimages, tars
from layerstore import limits
from layerstore.errors import ContentError, ServiceError
from layerstore.formats import EstargzOptions, write_estargz
from layerstore.provider import Ordinary, Policy, View, ordinary

FLIPS = int(os.environ.get("LAYERSTORE_FLIPS", "3"))
CHANCE = random.Random(int(os.environ.get("LAYERSTORE_SEED", "0")))
LARGE = CHANCE.randbytes(200_000)
WHOLE = {"a": b"a" * 500, "b": CHANCE.randbytes(3000), "large": LARGE}
PART = {"c": b"c" * 700, "d": CHANCE.randbytes(5000), "huge": CHANCE.randbytes(400_000)}
PLAIN = {f"p{n}": CHANCE.randbytes(40_000) for n in range(4)}


@dataclasses.dataclass
class Cache:
    """A store with a complete lazy layer, a part of another one, and an ordinary layer."""

    asker: Any
    whole: View
    part: View
    plain: View

    def directory(self, view: View) -> Path:
        return Path(self.asker.root, "layers", str(view.slot))

    def check(self, *, repair: bool = False) -> dict[str, Any]:
        checks = self.asker.store.checks
        job = checks.start(repair=repair)
        until = time.monotonic() + 60
        status: dict[str, Any] = {"done": False}
        while not status["done"]:
            assert time.monotonic() < until
            time.sleep(0.005)
            status = checks.status(job)
        assert status["error"] == ""
        assert status["checked_bytes"] > 0
        return status

    def kinds(self, *, repair: bool = False) -> set[str]:
        found = self.check(repair=repair)["findings"]
        assert all(bool(one["repaired"]) == repair for one in found), found
        return {one["kind"] for one in found}

    def everything_reads_right(self) -> None:
        self.whole = self.asker.view(self.whole.reference, self.whole.name)  # perhaps anew
        for view, files in ((self.whole, WHOLE), (self.part, PART), (self.plain, PLAIN)):
            for name, data in files.items():
                if name != "huge":
                    assert self.read(view, name) == data, name

    def have(self, view: View, name: str) -> None:
        """The first bytes of a file are here, and the piece of the blob that they are in."""
        layer = self.asker.store.layers.open(view.slot)
        entry = layer.index.entry_of_path(name.encode())
        piece = layer.index.chunk(layer.index.content(entry).first_chunk).member + 1
        fetched: list[Exception | None] = []
        layer.content._fetcher.demand([piece], fetched.append)
        while not fetched:
            time.sleep(0.01)
        assert fetched == [None]
        assert layer.content.read_stored(entry, 0, 1000) is not None

    def all_of(self, view: View) -> None:
        """The blob is here, and verified."""
        store = self.asker.store
        done: list[Exception | None] = []
        store.layers.hasten(view.slot, done.append)
        while not done:
            time.sleep(0.01)
        assert done == [None]
        assert store.layers.verified(view.slot).wait(20)

    def read(self, view: View, name: str) -> bytes:
        for _ in range(2):  # wrong pieces of blobs are fetched again, as the file system does it
            with contextlib.suppress(ContentError):
                return bytes(self.asker.read(view, name))
        return bytes(self.asker.read(view, name))


def packed(publisher, repository: str, files: dict[str, bytes]):
    """An ordinary layer in gzip, of several checkpoints."""

    def change(manifest: dict[str, Any]) -> None:
        tar = io.BytesIO()
        tars.write_tar(tar, [tars.regular(name.encode(), data) for name, data in files.items()])
        blob = gzip.compress(tar.getvalue(), 1)
        diff_id = "sha256:" + hashlib.sha256(tar.getvalue()).hexdigest()
        config = {"os": "linux", "rootfs": {"type": "layers", "diff_ids": [diff_id]}}
        raw = json.dumps(config).encode()
        registry = publisher.registry
        manifest["config"] |= {"digest": registry.add_blob(repository, raw), "size": len(raw)}
        manifest["layers"] = [
            {
                "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                "digest": registry.add_blob(repository, blob),
                "size": len(blob),
            }
        ]

    return publisher.push(repository, "1", [files], change=change)


@pytest.fixture
def cache(asker, publisher, registry, monkeypatch) -> Cache:
    monkeypatch.setattr(limits, "CHECKPOINT_MIN_BYTES", 0)
    monkeypatch.setattr(ordinary, "_SPACING", 32_000)
    small = partial(write_estargz, options=EstargzOptions(chunk_size=65_536))
    monkeypatch.setattr(simimages, "write_estargz", small)
    asker.options["policy"] = Policy(ordinary=Ordinary.EAGER)
    asker.restart()
    asker.store._objects.ledger.sync()

    def view(repository: str, name: str) -> View:
        found: View = asker.view(f"{registry.host}/{repository}:1", name)
        return found

    image = publisher.push("whole", "1", [WHOLE])
    whole = view("whole", image.layers[0].toc_digest)
    image = publisher.push("part", "1", [PART])
    part = view("part", image.layers[0].toc_digest)
    image = packed(publisher, "plain", PLAIN)
    plain = view("plain", image.manifest["layers"][0]["digest"])
    cache = Cache(asker, whole, part, plain)
    cache.all_of(whole)
    cache.everything_reads_right()
    cache.have(part, "huge")
    return cache


def flip(path: Path, first: int = 0, end: int | None = None) -> None:
    """Flip a bit of a file, keeping its times: the disk did it."""
    found = path.stat()
    at = CHANCE.randrange(first, found.st_size if end is None else end)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes((byte ^ 1 << CHANCE.randrange(8),)))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def an_object(cache: Cache) -> None:
    flip(CHANCE.choice(sorted(cache.asker.root.glob("content/objects/*/*"))))


def a_partial_object(cache: Cache) -> None:
    cache.have(cache.part, "huge")
    path = next(one for one in cache.asker.root.glob("content/partial/*") if one.suffix != ".map")
    flip(path, 0, 1000)


def its_bitmap(cache: Cache) -> None:
    path = next(cache.asker.root.glob("content/partial/*.map"))
    assert cache.asker.close() is None
    path.write_bytes(b"\xff" * path.stat().st_size)
    cache.asker.open()


def a_whole_blob(cache: Cache) -> None:
    view = CHANCE.choice((cache.whole, cache.plain))
    cache.all_of(view)
    flip(cache.directory(view) / "blob")


def a_piece_of_a_blob(cache: Cache) -> None:
    cache.have(cache.part, "d")
    layer = cache.asker.store.layers.open(cache.part.slot)
    entry = layer.index.entry_of_path(b"d")
    member = layer.index.member(layer.index.chunk(layer.index.content(entry).first_chunk).member)
    # ten bytes of gzip's header, and what follows the file, are not its contents
    flip(cache.directory(cache.part) / "blob", member.offset + 30, member.offset + 4000)


def bits_of_a_blob(cache: Cache) -> None:
    path = cache.directory(cache.part) / "blob.map"
    cache.asker.close()
    path.write_bytes(b"\xff" * path.stat().st_size)
    cache.asker.open()


def missing_bits(cache: Cache) -> None:
    cache.all_of(cache.whole)
    path = cache.directory(cache.whole) / "blob.map"
    cache.asker.close()
    path.write_bytes(bytes((path.read_bytes()[0] & ~2,)) + path.read_bytes()[1:])
    cache.asker.open()


def an_index(cache: Cache) -> None:
    flip(cache.directory(CHANCE.choice((cache.whole, cache.part, cache.plain))) / "index")


def checkpoints(cache: Cache) -> None:
    flip(cache.directory(cache.plain) / "checkpoints")


def a_toc(cache: Cache) -> None:
    flip(cache.directory(CHANCE.choice((cache.whole, cache.part))) / "toc.zst")


def a_view(cache: Cache) -> None:
    """A name leads to another layer, or another name to the layer."""
    cache.asker.close()
    change = CHANCE.choice((f"slot = {cache.part.slot}", "name = replace(name, '3', '4')"))
    with sqlite3.connect(cache.asker.root / "state.sqlite") as database:
        found = "SELECT 1 FROM views WHERE key = ?"
        assert database.execute(found, (cache.whole.key,)).fetchone()
        database.execute(f"UPDATE views SET {change}, number = 7 WHERE key = ?", (cache.whole.key,))
    database.close()
    cache.asker.open()


def a_document(cache: Cache) -> None:
    cache.asker.close()
    with sqlite3.connect(cache.asker.root / "state.sqlite") as database:
        rows = database.execute("SELECT digest, body FROM documents").fetchall()
        digest, body = CHANCE.choice(rows)
        at = CHANCE.randrange(len(body))
        body = body[:at] + bytes((body[at] ^ 1,)) + body[at + 1 :]
        database.execute("UPDATE documents SET body = ? WHERE digest = ?", (body, digest))
    database.close()
    cache.asker.open()


DAMAGE: dict[Callable[[Cache], None], set[str]] = {
    an_object: {"object"},
    a_partial_object: {"partial"},
    its_bitmap: {"partial"},
    a_whole_blob: {"blob"},
    a_piece_of_a_blob: {"blob"},
    bits_of_a_blob: {"blob"},
    missing_bits: {"bitmap"},
    an_index: {"index"},
    checkpoints: {"checkpoints"},
    a_toc: {"toc"},
    a_document: {"state"},
    a_view: {"state"},
}


def test_an_undamaged_cache_is_clean(cache: Cache):
    status = cache.check()
    assert status["findings"] == []
    assert (status["layers"], status["more_findings"]) == (3, 0)
    assert status["objects"] == len(list(cache.asker.root.glob("content/objects/*/*")))
    assert status["checked_bytes"] <= status["total_bytes"]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda one: one.__name__)
def test_every_flipped_bit_is_found_and_never_served(cache: Cache, damage: Callable[[Cache], None]):
    for _ in range(FLIPS):
        damage(cache)
        assert cache.kinds() == DAMAGE[damage]
        cache.everything_reads_right()
        damage(cache)
        assert cache.kinds(repair=True) == DAMAGE[damage]
        cache.everything_reads_right()
        assert cache.kinds() == set(), "it was repaired"


def test_a_repair_needs_no_registry_where_the_blob_is_here(cache: Cache, registry):
    an_object(cache)
    a_toc(cache)
    flip(cache.directory(cache.plain) / "index")
    fault = registry.fault("reset")
    assert cache.kinds(repair=True) == {"object", "toc", "index"}
    for view, files in ((cache.whole, WHOLE), (cache.plain, PLAIN)):
        for name, data in files.items():
            assert cache.read(view, name) == data
    assert cache.kinds() == set()
    assert fault.hits == 0


def replaced(path: Path, how: str) -> None:
    """A person, or a broken file system, has put something else in the place of a file."""
    if path.is_dir():
        path.rename(path.with_name(f"new-{path.name}"))
    else:
        path.unlink(missing_ok=True)
    if how == "directory":
        path.mkdir()
        (path / "in it").write_bytes(b"x")
    elif how == "file":
        path.write_bytes(b"x")
    else:
        path.symlink_to("nowhere")


PLACES = {
    "object": "directory link",
    "layers": "file link",
    "index": "directory link",
    "toc.zst": "directory",
    "blob": "directory link",
    "blob.map": "directory",
    "checkpoints": "directory",
}


def in_its_place(cache: Cache, place: str) -> tuple[View, Path]:
    if place == "object":
        digest = hashlib.sha256(WHOLE["b"]).hexdigest()
        return cache.whole, cache.asker.root / "content/objects" / digest[:2] / digest[2:]
    view = cache.plain if place == "checkpoints" else cache.whole
    directory = cache.directory(view)
    return view, directory if place == "layers" else directory / place


@pytest.mark.parametrize(
    ("place", "how"), [(place, how) for place, all_how in PLACES.items() for how in all_how.split()]
)
def test_what_stands_in_the_place_of_a_file_is_removed(cache: Cache, place: str, how: str):
    _, path = in_its_place(cache, place)
    cache.asker.close()
    replaced(path, how)
    cache.asker.open()
    told = cache.check()["findings"]
    assert [(one["kind"], one["subject"]) for one in told] == [("leftover", str(path))]
    done = cache.check(repair=True)["findings"]
    assert all(one["repaired"] for one in done), done
    assert done[0]["repaired"] == "removed"
    cache.all_of(cache.whole)
    cache.everything_reads_right()
    assert cache.check()["findings"] == []
    assert not cache.asker.store._objects.disk.full


@pytest.mark.parametrize("place", ["object", "layers", "index", "toc.zst", "checkpoints"])
def test_layers_are_read_whatever_stands_in_the_place_of_their_files(cache: Cache, place: str):
    view, path = in_its_place(cache, place)
    cache.asker.close()
    replaced(path, "file" if place == "layers" else "directory")
    cache.asker.open()
    for name, data in (WHOLE if view is cache.whole else PLAIN).items():
        assert cache.read(view, name) == data
    assert not cache.asker.store._objects.disk.full


def test_an_object_that_the_disk_does_not_give_does_not_end_the_check(cache: Cache, monkeypatch):
    def fail(digest: bytes) -> bool:
        raise OSError(errno.EIO, "Input/output error")

    count = len(list(cache.asker.root.glob("content/objects/*/*")))
    monkeypatch.setattr(cache.asker.store._objects, "intact", fail)
    found = cache.check()["findings"]
    assert [one["kind"] for one in found] == ["object"] * count
    assert found[0]["detail"] == "it cannot be read: Input/output error"


def test_leftovers_are_found_and_removed(cache: Cache):
    root = cache.asker.root
    (root / "layers/77").mkdir()
    (root / "layers/77/blob").write_bytes(b"x")
    (root / "content/objects/00/abc").write_bytes(b"x")
    (root / "content/partial" / ("0" * 64)).write_bytes(b"x")
    assert [one["kind"] for one in cache.check()["findings"]] == ["leftover"] * 3
    assert [one["kind"] for one in cache.check(repair=True)["findings"]] == ["leftover"] * 3
    assert cache.check()["findings"] == []


def test_one_check_at_a_time_and_it_can_be_cancelled(cache: Cache, monkeypatch):
    def slowly(*_: object) -> bool:
        time.sleep(0.1)
        return True

    checks = cache.asker.store.checks
    monkeypatch.setattr(type(cache.asker.store._objects), "intact", slowly)
    job = checks.start(repair=False)
    with pytest.raises(ServiceError, match="already"):
        checks.start(repair=False)
    checks.cancel(job)
    until = time.monotonic() + 20
    while not checks.status(job)["done"]:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert "cancelled" in checks.status(job)["error"]
