"""The root answers at once: with a registry that hangs, ten thousand lookups, a disk that stands still."""

import contextlib
import hashlib
import os
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import pytest

from lab import rig as lab
from lab.rig import MakeRig, Push, Pushed, layer_path
from lab.simimages import Publisher
from lab.simregistry import SimRegistry
from lab.store import LayerstoreService
from lab.waiting import until
from layerstore.image import annotations

LOOKUPS = 10_000
THREADS = 300
MIB = 1 << 20
THAW_SECONDS = 30.0  # should the test hang itself
PATIENCE = 10.0  # for something that may not wait, on a machine that is busy
HELLO = "hello from small amd64: 199 files\n"

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def hung() -> Iterator[str]:
    """The host of a registry that takes connections and says nothing."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(4096)
        yield f"127.0.0.1:{listening.getsockname()[1]}"


class Flood:
    """Threads that look for layers of images that nobody has heard of."""

    def __init__(self, store: Path, host: str, first: int, count: int) -> None:
        self._store = store
        self._host = host
        self._numbers = iter(range(first, first + count))
        self._lock = threading.Lock()
        self.found = 0
        self.done = 0
        self.threads = [threading.Thread(target=self._run, daemon=True) for _ in range(THREADS)]
        for thread in self.threads:
            thread.start()

    def _run(self) -> None:
        while True:
            with self._lock:
                number = next(self._numbers, None)
            if number is None:
                return
            digest = f"sha256:{hashlib.sha256(str(number).encode()).hexdigest()}"
            reference = f"{self._host}/flood/image{number}:1"
            self.found += (layer_path(self._store, reference, digest) / "diff").exists()
            self.done += 1

    @property
    def goes_on(self) -> bool:
        return any(thread.is_alive() for thread in self.threads)

    def wait(self) -> None:
        for thread in self.threads:
            thread.join(120)
        assert not self.goes_on


def latency(root: Path) -> float:
    """Seconds that the root takes to answer: the kernel never remembers these answers."""
    begin = time.perf_counter()
    os.statvfs(root)
    (root / "no-reference").exists()
    return time.perf_counter() - begin


def latencies(root: Path, goes_on: Callable[[], bool]) -> list[float]:
    found = [latency(root)]
    while goes_on():
        found.append(latency(root))
        time.sleep(0.005)
    return found


def for_seconds(seconds: float) -> Callable[[], bool]:
    until = time.monotonic() + seconds
    return lambda: time.monotonic() < until


def test_a_flood_of_lookups_at_a_registry_that_hangs(
    make_rig: MakeRig, push: Push, small: Pushed, hung: str
) -> None:
    rig = make_rig("debian13", config="background_fetch = false\n")
    image = rig.image(small.name)
    rig.env.podman("pull", "-q", image)
    assert rig.env.podman("run", "--rm", image).stdout == HELLO
    before = statistics.median(latencies(rig.store, for_seconds(1.0)))

    flood = Flood(rig.store, hung, 0, LOOKUPS)
    with ThreadPoolExecutor(1) as pool:
        measured = pool.submit(latencies, rig.store, lambda: flood.goes_on)
        begin = time.monotonic()
        assert rig.env.podman("images", "-q").stdout
        assert rig.env.podman("run", "--rm", image).stdout == HELLO
        # a registry that lives finds a worker, too
        other = push(small.image, "flood/other:1")
        rig.env.podman("pull", "-q", rig.image(other.name))
        assert time.monotonic() - begin < 3 * PATIENCE
        assert len(lab.store_layers(rig.env, rig.store)) == 3
        flood.wait()
        during = measured.result()
    assert flood.done == LOOKUPS
    assert flood.found == 0
    # the loop has its share of a machine that is busy with the flood itself
    assert statistics.median(during) < 30 * before + 0.02
    assert max(during) < PATIENCE / 2

    status = rig.service.status()
    refused = {reason for reason in status["lookups"] if reason not in ("known", "resolved")}
    assert refused <= {"outage", "busy", "network", "timeout"}
    assert sum(status["lookups"][reason] for reason in refused) == LOOKUPS
    assert status["lookups"]["resolved"] == 2 * 3
    assert status["fuse"]["events"]["open"] <= 1
    assert status["fuse"]["events"]["handler_errors"] == 0

    first = rig.service.rss_bytes()
    Flood(rig.store, hung, LOOKUPS, LOOKUPS // 2).wait()
    assert rig.service.rss_bytes() - first < 12 * MIB


@contextlib.contextmanager
def own_disk(directory: Path) -> Iterator[Path]:
    """A small file system of its own."""
    image, place = directory / "disk.img", directory / "state"
    place.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(256 * MIB)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


class Frozen:
    """Whoever writes there waits until it thaws, soon at the latest.  A context manager."""

    def __init__(self, place: Path) -> None:
        self._place = str(place)
        self._frozen = False
        self._soon = threading.Timer(THAW_SECONDS, self.thaw)

    def __enter__(self) -> Self:
        subprocess.run(["fsfreeze", "-f", self._place], check=True)
        self._frozen = True
        self._soon.start()
        return self

    def thaw(self) -> None:
        self._soon.cancel()
        if self._frozen:
            self._frozen = False
            subprocess.run(["fsfreeze", "-u", self._place], check=True)

    def __exit__(self, *_: object) -> None:
        self.thaw()


def uncached(path: Path) -> bytes:
    """A file's contents, from the store and not from what the kernel keeps of them."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read()


def missing(call: Callable[[], None]) -> None:
    """What the protocol's signals answer."""
    with pytest.raises(FileNotFoundError):
        call()


def reads_from_memory(service: LayerstoreService, data: bytes) -> bool:
    """Whether the server has the object of these contents open for reading: it is complete."""
    name = hashlib.sha256(data).hexdigest()
    for fd in Path(f"/proc/{service.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            flags = int(Path(str(fd).replace("/fd/", "/fdinfo/")).read_text().split()[3], 8)
            if str(fd.readlink()).replace("/", "").endswith(name):
                return flags & os.O_ACCMODE == os.O_RDONLY
    return False


def test_a_disk_that_stands_still(workspace: Path) -> None:
    files = {f"large{number}": os.urandom(9 * MIB) for number in range(2)}  # of several chunks
    files |= {f"file{number}": os.urandom(300_000) for number in range(20)}
    directory = workspace / "slow-disk"
    with SimRegistry() as registry, own_disk(directory) as state:
        image = Publisher(registry).push("slow/disk", "1", [files])
        conf = directory / "registries.conf"
        conf.write_text(f'[[registry]]\nlocation = "{registry.host}"\ninsecure = true\n')
        environment = {**os.environ, "CONTAINERS_REGISTRIES_CONF": str(conf)}
        name = image.manifest["layers"][0]["annotations"][annotations.ESTARGZ_TOC_DIGEST]
        reference = f"{registry.host}/slow/disk:1"
        with LayerstoreService(directory, environment=environment) as service:
            diff = layer_path(service.mountpoint, reference, name) / "diff"
            assert diff.is_dir()
            service.wait_complete()  # from here on, a first read writes objects
            until(
                lambda: (
                    uncached(diff / "file0") == files["file0"]
                    and reads_from_memory(service, files["file0"])
                )
            )
            before = statistics.median(latencies(service.mountpoint, for_seconds(1.0)))
            later = {path: data for path, data in files.items() if path != "file0"}

            def read() -> None:
                assert uncached(diff / "file0") == files["file0"]

            steps: dict[str, Callable[[], object]] = {
                "read": read,
                "list": lambda: os.listdir(diff),
                "info": (diff.parent / "info").read_bytes,
                "use": lambda: missing((diff.parent / "use").touch),
                "release": lambda: missing(diff.parent.rmdir),
            }
            with ThreadPoolExecutor(len(files)) as pool, Frozen(state) as disk:
                reads = {path: pool.submit((diff / path).read_bytes) for path in later}
                time.sleep(1.0)
                assert not all(read.done() for read in reads.values())  # they want to write
                during = latencies(service.mountpoint, for_seconds(2.0))
                took = {}
                for what, step in steps.items():
                    begin = time.monotonic()
                    step()
                    took[what] = time.monotonic() - begin
                assert {what for what, seconds in took.items() if seconds > PATIENCE} == set()
                assert statistics.median(during) < 30 * before + 0.02
                assert max(during) < PATIENCE / 2
                disk.thaw()
                assert {path: read.result(60) for path, read in reads.items()} == later
            assert service.status()["read_errors"] == 0
