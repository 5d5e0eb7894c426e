"""Power fails at 50 random moments of a service's work: each time it restarts, and shows no wrong byte.

LAYERSTORE_SEED chooses the moments; LAYERSTORE_POWER_LOSSES is how many there are.  At every one the
disk is copied as it is (`lab.powerloss`); every other copy loses, in addition, whatever the service
cannot know to be synced.
"""

import contextlib
import gc
import hashlib
import itertools
import json
import os
import queue
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytest

from lab import powerloss
from lab.fresh import fresh
from lab.rig import layer_path
from lab.simimages import Image, Publisher, without_tocs
from lab.simregistry import SimRegistry
from lab.store import LayerstoreService
from layerstore.content import DiskRoom, ledger
from layerstore.errors import ContentError
from layerstore.image import Digest
from layerstore.provider import Layer, Ordinary, Policy, Refusal, Store, View
from layerstore.registry import RegistryClient, RegistrySettings
from layerstore.registry.registriesconf import RegistriesConf

LOSSES = int(os.environ.get("LAYERSTORE_POWER_LOSSES", "50"))
SERVED = 2  # so many of the copies are started as a real service, the others as a store in here
SECONDS = 0.2  # of work, between two losses
IMAGES = 10
DISK_BYTES = 160 << 20
SYNC_SECONDS = 2.5  # longer than the journal waits, so that names come without bytes

# The service is what it always is, but for how often it syncs and what it takes for the boot.
PATCH = """
import os, pathlib
from layerstore import limits
from layerstore.content import ledger
limits.SYNC_SECONDS = float(os.environ["TEST_SYNC_SECONDS"])
ledger._BOOT_ID = pathlib.Path(os.environ["TEST_BOOT_ID"])
"""

T = TypeVar("T")
EAGER = Policy(ordinary=Ordinary.EAGER, disk=DiskRoom(None, 0.0))

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def seed() -> int:
    chosen = int(os.environ.get("LAYERSTORE_SEED") or random.randrange(1 << 32))
    print(f"LAYERSTORE_SEED={chosen}")
    return chosen


@pytest.fixture
def place() -> Iterator[Path]:
    path = fresh("layerstore-power-")
    yield path
    shutil.rmtree(path)


class Images:
    """Images in a registry: lazy ones, and ordinary ones; some contents come in several of them."""

    def __init__(self, registry: SimRegistry, chance: random.Random) -> None:
        publisher = Publisher(registry)
        self.host = registry.host
        self.files: dict[tuple[int, int], dict[str, bytes]] = {}
        self.images: list[Image] = []
        shared = chance.randbytes(30_000)
        for number in range(IMAGES):
            layers = []
            for layer in range(2):
                files = {f"s{n}": chance.randbytes(chance.randrange(1, 9000)) for n in range(8)}
                files["shared"] = shared
                files["text"] = b"line %d\n" % number * 4000
                if layer:  # of several chunks
                    files["large"] = chance.randbytes(9 << 20 if number == 0 else 300_000)
                self.files[number, layer] = files
                layers.append(files)
            change = without_tocs if number % 3 == 2 else None
            self.images.append(publisher.push(f"power/{number}", "1", layers, change=change))

    def reference(self, number: int) -> str:
        return f"{self.host}/power/{number}:1"

    def names(self) -> Iterator[tuple[int, int, str]]:
        """(image, layer, the name under which it is looked up)."""
        for number, image in enumerate(self.images):
            for layer, written in enumerate(image.layers):
                lazy = number % 3 == 0
                yield number, layer, written.toc_digest if lazy else written.digest


class Work:
    """Clients of the service: one after the other takes an image, and all read meanwhile."""

    def __init__(self, images: Images, store: Path, seconds: float, chance: random.Random) -> None:
        self._images = images
        self._store = store
        self._pause = seconds / (2 * IMAGES + 1)
        self._chance = chance
        self._known: list[tuple[Path, dict[str, bytes]]] = []
        self.stop = threading.Event()
        self.reads = 0
        self.failures: list[str] = []
        self.threads = [threading.Thread(target=work) for work in (self._take, self._read)]

    def _take(self) -> None:
        for number, layer, name in self._images.names():
            diff = layer_path(self._store, self._images.reference(number), name) / "diff"
            if diff.is_dir():
                (diff.parent / "info").read_bytes()
                with contextlib.suppress(OSError):
                    (diff.parent / "use").touch()
                self._known.append((diff, self._images.files[number, layer]))
            else:
                self.failures.append(f"image {number}: layer {name} is not served")
            if self.stop.wait(self._pause):
                return

    def _read(self) -> None:
        while not self.stop.wait(0.004):
            if self._known:
                diff, files = self._chance.choice(self._known)
                name = self._chance.choice(sorted(files))
                if (diff / name).read_bytes() != files[name]:
                    self.failures.append(f"{diff / name} is wrong")
                self.reads += 1


def registries_conf(place: Path, host: str) -> Path:
    path = place / "registries.conf"
    path.write_text(f'[[registry]]\nlocation = "{host}"\ninsecure = true\n')
    return path


def make_service(place: Path, number: int, registries: Path, boot: str) -> LayerstoreService:
    """A service in a boot of its own; its root is ``state`` in the directory that is returned."""
    patch = place / "patch"
    patch.mkdir(exist_ok=True)
    (patch / "sitecustomize.py").write_text(PATCH)
    directory = place / f"service{number}"
    directory.mkdir()
    (directory / "boot").write_text(boot)
    environment = {
        **os.environ,
        "PYTHONPATH": str(patch),
        "TEST_SYNC_SECONDS": str(SYNC_SECONDS),
        "TEST_BOOT_ID": str(directory / "boot"),
    }
    config = (
        f'[registry]\nregistries_conf = "{registries}"\n[ordinary]\npolicy = "eager"\n'
        "[disk]\nkeep_free_percent = 0\n"
    )
    return LayerstoreService(directory, environment=environment, config=config)


def lose_power(place: Path, images: Images, registries: Path, chance: random.Random) -> list[Path]:
    """Copies of the disk of a working service, at random moments."""
    service = make_service(place, 0, registries, "before")
    copies: list[Path] = []
    seconds = LOSSES * SECONDS
    with powerloss.Disk(place / "disk", service.root, DISK_BYTES) as disk, service:
        work = Work(images, service.mountpoint, seconds * 0.8, chance)
        moments = sorted(chance.uniform(0, seconds) for _ in range(LOSSES))
        began = time.monotonic()
        for thread in work.threads:
            thread.start()
        for moment in moments:
            time.sleep(max(0.0, began + moment - time.monotonic()))
            copies.append(place / f"copy{len(copies)}")
            disk.power_loss(copies[-1])
        work.stop.set()
        for thread in work.threads:
            thread.join()
        log = service.log()
        service.stop(9)
        subprocess.run(["umount", "-l", str(service.mountpoint)], check=True)
    assert work.failures == [], log
    assert work.reads > 2 * LOSSES
    assert "event=sync-failed" not in log
    return copies


class Waited(Generic[T]):
    """A callback that is waited for."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[T] = queue.SimpleQueue()

    def __call__(self, value: T) -> None:
        self._queue.put(value)

    def result(self) -> T:
        return self._queue.get(timeout=30)


def read(layer: Layer, name: str) -> bytes | str:
    """All of a file, as the file system reads it: what is here, else fetched."""
    entry = layer.index.entry_of_path(name.encode())
    assert entry is not None
    size = layer.index.inode(entry).size
    pieces = []
    for offset in range(0, size, 1 << 17):
        for _ in range(3):
            with contextlib.suppress(ContentError):
                data = layer.content.read_cached(entry, offset, 1 << 17)
                data = data or layer.content.read_stored(entry, offset, 1 << 17)
                if data is not None:
                    pieces.append(bytes(data))
                    break
            fetched = Waited[Exception | None]()
            layer.content.fetch(entry, offset, 1 << 17, fetched)
            if (error := fetched.result()) is not None:
                return f"{name}: {error}"
        else:
            return f"{name}: nothing but wrong bytes"
    return b"".join(pieces)


class Restarted:
    """A store on what is left, in another boot."""

    def __init__(self, root: Path, images: Images) -> None:
        self._images = images
        settings = RegistrySettings(registries=RegistriesConf(), tls_verify=False)
        self._client = RegistryClient(settings)
        self.store = Store(root, self._client, policy=EAGER, background=False)
        self.known = len(self.store._state.views())

    def wrong(self) -> list[str]:
        """What is not as it should be."""
        found = []
        for number, layer, name in self._images.names():
            view = self._view(self._images.reference(number), name)
            if isinstance(view, Refusal):
                found.append(f"image {number} layer {layer}: {view.reason}: {view}")
                continue
            opened = self.store.layers.open(view.slot)
            for path, data in self._images.files[number, layer].items():
                got = read(opened, path)
                if got != data:
                    detail = got if isinstance(got, str) else f"{path}: other bytes"
                    found.append(f"image {number} layer {layer}: {detail}")
        return found

    def _view(self, reference: str, name: str) -> View | Refusal:
        answer = Waited[View | Refusal]()
        self.store.resolve(reference, Digest(name), answer)
        return answer.result()

    def wrong_blobs(self) -> list[str]:
        """Whole layers that are shown as complete and are not what they should be."""
        found = []
        for slot in {view.slot for view in self.store._state.views()}:
            layer = self.store.layers.open(slot)
            record, content = layer.record, layer.content
            data = content.read_blob(0, record.size)
            if data is not None and hashlib.sha256(data).hexdigest() != record.blob_digest.hex:
                found.append(f"blob {record.blob_digest}")
        return found

    def close(self) -> None:
        self.store.close()
        self._client.close()


def serve(place: Path, number: int, copy: Path, images: Images, registries: Path) -> list[str]:
    """Start the real service on a copy and read every file through the mount."""
    service = make_service(place, number, registries, f"boot {number}")
    found = []
    with powerloss.mounted(copy, service.root), service:
        for image, layer, name in images.names():
            diff = layer_path(service.mountpoint, images.reference(image), name) / "diff"
            if not diff.is_dir():
                found.append(f"image {image}: layer {name} is not served")
                continue
            for path, data in images.files[image, layer].items():
                try:
                    if (diff / path).read_bytes() != data:
                        found.append(f"image {image} layer {layer}: {path}: other bytes")
                except OSError as error:
                    found.append(f"image {image} layer {layer}: {path}: {error}")
        assert "event=read-failed" not in service.log()
        assert checked(service, "--repair")["clean"]
        assert checked(service)["findings"] == []
        service.stop()
    return found


def checked(service: LayerstoreService, *flags: str) -> dict[str, Any]:
    """`layerstore check cache` while the service runs."""
    command = [sys.executable, "-m", "layerstore.cli", "check", "cache", "--json", *flags]
    ended = subprocess.run(
        [*command, "--root", str(service.root)], capture_output=True, text=True, check=False
    )
    found: dict[str, Any] = json.loads(ended.stdout)
    assert found["clean"] == (ended.returncode == 0)
    assert found["objects"] > 10
    return found


def test_power_fails_at_random_moments(place: Path, seed: int, monkeypatch, caplog) -> None:
    chance = random.Random(seed)
    boot = place / "boot"
    monkeypatch.setattr(ledger, "_BOOT_ID", boot)
    numbers = itertools.count(1)
    spoilt = known = 0
    with SimRegistry() as registry:
        images = Images(registry, chance)
        registries = registries_conf(place, registry.host)
        registry.fault("latency", match="/blobs/", seconds=0.01)
        began = time.monotonic()
        copies = lose_power(place, images, registries, chance)
        registry.faults.clear()
        worked = time.monotonic() - began
        served = set(chance.sample(range(len(copies)), min(SERVED, len(copies))))
        for number, copy in enumerate(copies):
            point = f"seed {seed}: loss {number}"
            boot.write_text(point)
            if number % 2:
                with powerloss.mounted(copy, place / "mnt") as root:
                    spoilt += powerloss.spoil(root, chance)
            if number in served:
                assert serve(place, next(numbers), copy, images, registries) == [], point
                continue
            with powerloss.mounted(copy, place / "mnt") as root:
                restarted = Restarted(root, images)
                try:
                    known += restarted.known
                    assert restarted.wrong() == [], point
                    assert restarted.wrong_blobs() == [], point
                finally:
                    restarted.close()
                    del restarted
                    gc.collect()  # closes its files
            copy.unlink()
    damaged = caplog.text.count("event=object-damaged")
    print(
        f"{len(copies)} losses in {worked:.0f} s of work, {time.monotonic() - began:.0f} s in all:"
        f" {spoilt} files spoilt, {known} names known after the restarts,"
        f" {damaged} damaged objects noticed,"
        f" {caplog.text.count('event=bytes-refused')} damaged pieces of blobs"
    )
    if LOSSES >= 20:
        assert spoilt > LOSSES
        assert known > LOSSES
        assert damaged > 0
