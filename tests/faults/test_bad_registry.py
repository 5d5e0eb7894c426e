"""A registry that is bad in every way at once, and readers of several images that must not notice.

LAYERSTORE_SEED chooses the faults; LAYERSTORE_BAD_REGISTRY_MIB is how much is read.
"""

import hashlib
import os
import random
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.rig import layer_path
from lab.simimages import Image, Publisher
from lab.simregistry import Kind, SimRegistry
from lab.store import LayerstoreService
from layerstore.image import annotations

MIB = 1 << 20
SIZE = int(os.environ.get("LAYERSTORE_BAD_REGISTRY_MIB", "64")) * MIB
TOKEN_SECONDS = 2.0
IMAGES, LAYERS, READERS = 3, 2, 6
CONFIG = "background_fetch = false\nprefetch = false\n"
BLOBS = "/(blobs|storage)/"

pytestmark = pytest.mark.timeout(600)


FAULTS: tuple[tuple[Kind, str, float, dict[str, Any]], ...] = (
    ("latency", "", 0.2, {"seconds": 0.2}),
    ("stall", BLOBS, 0.02, {"after": 3000, "seconds": 1.5}),
    ("reset", BLOBS, 0.03, {}),
    ("reset", BLOBS, 0.03, {"after": 50_000}),
    ("short", BLOBS, 0.04, {"after": 70_000}),
    ("range", BLOBS, 0.03, {"value": "bytes 0-9/10"}),
    ("ignore-range", "/storage/", 0.03, {}),
    ("status", "", 0.03, {"status": 429, "headers": {"Retry-After": "1"}}),
    ("status", "", 0.04, {"status": 503}),
    ("chunked", BLOBS, 0.03, {}),
)


def spoil(registry: SimRegistry, blobs: Iterable[str]) -> set[str]:
    """Let everything go wrong at times, and at least once; the kinds."""
    for number, (kind, match, chance, options) in enumerate(FAULTS):
        registry.fault(kind, match, times=1, skip=3 * number, **options)
        registry.fault(kind, match, chance=chance, **options)
    # not the same bytes twice: what is wrong again and again is an error, and has to be
    for number, blob in enumerate(blobs):
        registry.fault("flip", f"/storage/.*{blob}", times=1, skip=number, after=200)
    return {"flip", *(kind for kind, *_ in FAULTS)}


class Files:
    """The images: ``digests`` of what lies where below the store, and ``blobs``."""

    def __init__(self, registry: SimRegistry, seed: int) -> None:
        self._random = random.Random(seed)
        self.digests: dict[tuple[str, str, str], str] = {}
        self.blobs: list[str] = []
        publisher = Publisher(registry)
        for number in range(IMAGES):
            layers = [self._layer() for _ in range(LAYERS)]
            image = publisher.push(f"bad/image{number}", "1", layers)
            self._note(f"{registry.host}/bad/image{number}:1", image, layers)

    def _layer(self) -> dict[str, bytes]:
        left = SIZE // IMAGES // LAYERS
        files: dict[str, bytes] = {}
        while left > 0:
            size = min(left, int(10 ** self._random.uniform(2, 6.7)))
            files[f"file{len(files)}"] = self._random.randbytes(size)
            left -= size
        return files

    def _note(self, reference: str, image: Image, layers: list[dict[str, bytes]]) -> None:
        for described, files in zip(image.manifest["layers"], layers, strict=True):
            self.blobs.append(described["digest"])
            name = described["annotations"][annotations.ESTARGZ_TOC_DIGEST]
            for path, data in files.items():
                self.digests[reference, name, path] = hashlib.sha256(data).hexdigest()


class Readers:
    """Threads that read all files in their own order and compare them.

    All of them first read one half of the files, and the other one when every token and address
    that the store was given has expired.
    """

    def __init__(self, store: Path, files: Files, seed: int) -> None:
        self._store = store
        self._files = files
        self.failures: list[str] = []
        keys = list(files.digests)
        random.Random(seed).shuffle(keys)
        self._halves = (keys[::2], keys[1::2])
        self._pause = threading.Barrier(READERS, lambda: time.sleep(TOKEN_SECONDS + 0.5))
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(seed + number),))
            for number in range(READERS)
        ]

    def run(self) -> None:
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.join()

    def _run(self, order: random.Random) -> None:
        first, second = (order.sample(half, len(half)) for half in self._halves)
        self._read(first)
        self._pause.wait()
        self._read(second)

    def _read(self, keys: list[tuple[str, str, str]]) -> None:
        for reference, name, path in keys:
            place = layer_path(self._store, reference, name) / "diff" / path
            try:
                right = hashlib.sha256(place.read_bytes()).hexdigest()
            except OSError as error:
                self.failures.append(f"{path}: {error}")
                continue
            if right != self._files.digests[reference, name, path]:
                self.failures.append(f"{path}: wrong bytes")


@pytest.fixture
def seed() -> int:
    chosen = int(os.environ.get("LAYERSTORE_SEED") or random.randrange(1 << 32))
    print(f"LAYERSTORE_SEED={chosen}")
    return chosen


@pytest.fixture
def registry(seed: int) -> Iterator[SimRegistry]:
    with SimRegistry(
        auth="bearer",
        anonymous=True,
        token_seconds=TOKEN_SECONDS,
        announced_seconds=300.0,  # it lies: they are refused long before
        redirect=True,
        redirect_seconds=1.0,
        seed=seed,
    ) as running:
        yield running


@pytest.fixture
def service(workspace: Path, registry: SimRegistry) -> Iterator[LayerstoreService]:
    directory = workspace / "bad-registry"
    directory.mkdir()
    conf = directory / "registries.conf"
    conf.write_text(f'[[registry]]\nlocation = "{registry.host}"\ninsecure = true\n')
    environment = {**os.environ, "CONTAINERS_REGISTRIES_CONF": str(conf)}
    with LayerstoreService(directory, environment=environment, config=CONFIG) as running:
        yield running


def test_readers_do_not_notice_a_registry_that_is_bad_in_every_way(
    registry: SimRegistry, service: LayerstoreService, seed: int
) -> None:
    files = Files(registry, seed)
    for reference, name in {key[:2] for key in files.digests}:
        assert (layer_path(service.mountpoint, reference, name) / "diff").is_dir()
    kinds = spoil(registry, files.blobs)
    began = time.monotonic()
    readers = Readers(service.mountpoint, files, seed)
    readers.run()
    seconds = time.monotonic() - began
    happened = registry.happened
    print(f"{seconds:.0f} s, {len(registry.log)} requests, {dict(happened)}")
    assert readers.failures == []
    assert {kind for kind in kinds if not happened[kind]} == set()
    assert happened["expired-token"]
    assert happened["expired-address"]
    status = service.status()
    assert status["read_errors"] == 0
    assert status["content"]["refused_units"] >= 1
    assert status["fuse"]["events"]["handler_errors"] == 0
    assert "Traceback" not in service.log()
    # nothing is fetched over and over: faults, and those who were far ahead of a stream
    fetched = status["content"]["fetched_bytes"]["demand"]
    assert fetched < 4 * SIZE
    assert service.log().count("event=outage-begun") == status["outages"]["begun"]
