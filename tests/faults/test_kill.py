"""`kill -9` at 100 random points of pull, rmi, push and load: nothing half-made is ever seen.

LAYERSTORE_SEED chooses the points; LAYERSTORE_KILLS is how many there are in all.
"""

import contextlib
import http.client
import itertools
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import stress
from lab.delayproxy import DelayProxy
from lab.oci import StoredImage
from lab.podman import PodmanEnv
from lab.registry import DebianRegistry
from lab.rig import MakeRig, Push, Rig, graph_layers
from lab.zygote import Zygote
from layerstore.copy.prune import prune
from layerstore.graphroot.check import Weight, check
from layerstore.graphroot.records import INCOMPLETE
from layerstore.graphroot.storageconf import StorageConfig
from layerstore.graphroot.store import Store

KILLS = int(os.environ.get("LAYERSTORE_KILLS", "100"))
SHARES = {"pull": 0.3, "pull-lazy": 0.1, "rmi": 0.25, "push": 0.15, "load": 0.2}
DELAY = 0.02  # each way to the registry
LOCAL = "localhost/local:1"
LATE = 1.1  # so far behind the end the last points lie
TOLERANCE = 64 << 10  # bytes that locks, empty tables and directories may differ by

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def seed() -> int:
    chosen = int(os.environ.get("LAYERSTORE_SEED") or random.randrange(1 << 32))
    print(f"LAYERSTORE_SEED={chosen}")
    return chosen


@pytest.fixture(scope="module")
def slow(registry: DebianRegistry) -> Iterator[DelayProxy]:
    """The registry at the end of a long line, so that there is time to be killed in."""
    with DelayProxy(registry.host, delay=DELAY) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def stored() -> StoredImage:
    return stress.image("free", "killed")


class Victim:
    """A graph root, our program that is killed, and both Podmans that look at what is left."""

    def __init__(self, rig: Rig, other: PodmanEnv, zygote: Zygote, image: str) -> None:
        self.rig = rig
        self.env = rig.env
        self.podmans = itertools.cycle((rig.env, other))
        self.zygote = zygote
        self.image = image
        self.registry = image.partition("/")[0]
        self.number = 0

    def ours(self, *arguments: str) -> float:
        """Something that has to succeed; the seconds it took."""
        status, seconds = self.zygote.run(*arguments)
        assert status == 0, f"{arguments} ended with {status}: {self.zygote.said()}"
        return seconds

    def has(self, name: str) -> bool:
        return any(name in image.names for image in self.store().images())

    def store(self) -> Store:
        """A fresh look that changes nothing."""
        config = StorageConfig(self.env.graph_root, self.env.run_root)
        return Store.open(config, read_only=True)

    def nothing_half_made(self, point: str) -> None:
        """For those who look after a kill: first Podman, which deletes what is incomplete, or us."""
        looks = [self._podman_looks, self._we_look]
        self.number += 1
        if self.number % 2:
            looks.reverse()
        for look in looks:
            look(point)

    def _podman_looks(self, point: str) -> None:
        env = next(self.podmans)
        listed = json.loads(env.podman("images", "-a", "--format", "json").stdout)
        assert {image["Id"] for image in listed} == {image.id for image in self.store().images()}
        if self.number % 5 == 0:
            shown = json.loads(env.containers_storage("layers", "--json").stdout) or []
            assert not any(INCOMPLETE in layer.get("flags", {}) for layer in shown), point
            for image in listed:
                printed = env.podman("run", "--pull=never", "--name=look", image["Id"]).stdout
                env.podman("rm", "look")
                assert printed == "free killed\n", point

    def _we_look(self, point: str) -> None:
        store = self.store()
        for image in store.images():
            image.manifest()
            image.config()
            assert image.layers(), point
        report = check(store, full=True)
        damage = [found for found in report.findings if found.weight is Weight.DAMAGE]
        assert damage == [], point

    def nothing_staged(self) -> None:
        """What somebody who died had put somewhere is gone after our next command."""
        root = self.env.graph_root
        places = [root / "overlay/tempdirs", root / "overlay/staging", self.env.tmp]
        places.append(root / "layerstore/partial")
        left = [path for place in places if place.exists() for path in place.iterdir()]
        assert left == []


class Pull:
    """A pull into an empty graph root, or one that has what pulls before could finish."""

    def __init__(self, victim: Victim, *flags: str) -> None:
        self.victim = victim
        self.command = ("pull", "-q", "--tls-verify=false", *flags, victim.image)

    def prepare(self) -> None:
        if self.victim.has(self.victim.image):
            self.victim.ours("rmi", self.victim.image)

    def afterwards(self) -> None:
        assert self.victim.has(self.victim.image)


class Load(Pull):
    """The same from an archive."""

    def __init__(self, victim: Victim, archive: Path) -> None:
        super().__init__(victim)
        self.command = ("load", "-q", "-i", str(archive))

    def prepare(self) -> None:
        if self.victim.has(LOCAL):
            self.victim.ours("rmi", LOCAL)

    def afterwards(self) -> None:
        assert self.victim.has(LOCAL)


class Remove:
    """Removing the only image, which was loaded."""

    def __init__(self, victim: Victim, archive: Path) -> None:
        self.victim = victim
        self.archive = archive
        self.command = ("rmi", "--ignore", LOCAL)

    def prepare(self) -> None:
        self.victim.ours("load", "-q", "-i", str(self.archive))

    def afterwards(self) -> None:
        assert not self.victim.has(LOCAL)


class Pushing:
    """A push to a new repository each time, so that all blobs have to go there."""

    def __init__(self, victim: Victim, archive: Path) -> None:
        self.victim = victim
        victim.ours("load", "-q", "-i", str(archive))
        self.numbers = itertools.count()
        self.prepare()

    def prepare(self) -> None:
        self.repository = f"killed/push{next(self.numbers)}"
        target = f"{self.victim.registry}/{self.repository}:1"
        self.command = ("push", "-q", "--tls-verify=false", LOCAL, target)

    def _get(self, method: str, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.victim.registry, timeout=10)
        kinds = ("vnd.oci.image.manifest.v1+json", "vnd.docker.distribution.manifest.v2+json")
        accepted = {"Accept": ", ".join(f"application/{kind}" for kind in kinds)}
        with contextlib.closing(connection):
            connection.request(method, f"/v2/{self.repository}/{path}", headers=accepted)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def half_made(self) -> None:
        """A manifest that is there has all its blobs."""
        status, raw = self._get("GET", "manifests/1")
        if status == 200:
            manifest = json.loads(raw)
            for blob in (manifest["config"], *manifest["layers"]):
                assert self._get("HEAD", f"blobs/{blob['digest']}")[0] == 200

    def afterwards(self) -> None:
        assert self._get("GET", "manifests/1")[0] == 200
        self.half_made()


@pytest.fixture
def victim(
    make_rig: MakeRig,
    make_podman_env,
    workspace: Path,
    slow: DelayProxy,
    push: Push,
    push_lazy: Push,
    stored: StoredImage,
    operation: str,
) -> Iterator[Victim]:
    lazy = operation == "pull-lazy"
    name = f"killed/{'lazy' if lazy else 'plain'}:1"
    (push_lazy if lazy else push)(stored, name)
    rig = make_rig("debian12", slow.host)
    other = make_podman_env("debian13", registries=(slow.host,), beside=rig.env)
    with Zygote(rig.env.environment(), workspace / f"killed-{operation}.log") as zygote:
        yield Victim(rig, other, zygote, f"{slow.host}/{name}")


@pytest.fixture
def archive(stored: StoredImage, workspace: Path, make_podman_env) -> Path:
    path = workspace / "killed.tar"
    if not path.exists():
        made = f"docker-archive:{path}:{LOCAL}"
        make_podman_env().skopeo("copy", "-q", stored.source, made)
    return path


@pytest.mark.parametrize("operation", SHARES)
def test_a_kill_leaves_nothing_half_made(
    operation: str, victim: Victim, archive: Path, seed: int
) -> None:
    points = random.Random(f"{seed} {operation}")
    work: Pull | Remove | Pushing
    match operation:
        case "pull":
            work = Pull(victim, "--no-layer-stores")
        case "pull-lazy":
            work = Pull(victim, "--dialect-l")
        case "load":
            work = Load(victim, archive)
        case "rmi":
            work = Remove(victim, archive)
        case _:
            work = Pushing(victim, archive)
    needed = 0.0
    for _ in range(3):
        work.prepare()
        needed = max(needed, victim.ours(*work.command))
    work.afterwards()
    wanted, killed, tries = round(KILLS * SHARES[operation]), 0, 0
    began = time.monotonic()
    while killed < wanted:
        tries += 1
        assert tries < 10 * wanted, "it ends before it is killed"
        work.prepare()
        after = points.uniform(0, needed * LATE)
        status, _ = victim.zygote.run(*work.command, kill_after=after)
        point = f"seed {seed}: {operation} killed after {after:.3f} s of {needed:.3f} s"
        assert status in (0, -9), victim.zygote.said()
        killed += status == -9
        victim.nothing_half_made(point)
        if isinstance(work, Pushing):
            work.half_made()
        victim.ours(*work.command)
        work.afterwards()
        victim.nothing_staged()
    took = time.monotonic() - began
    print(f"{operation}: {needed:.3f} s long, killed {killed} times in {tries} tries, {took:.0f} s")
    for _ in range(3):  # and now nobody tries again
        work.prepare()
        victim.zygote.run(*work.command, kill_after=points.uniform(0, needed))
    space_is_reclaimed(victim)


def space_is_reclaimed(victim: Victim) -> None:
    env = victim.env
    victim.ours("rmi", "-a", "-f")
    victim.ours("prune", "-f")
    victim.ours("check", "storage", "--repair")
    config = StorageConfig(env.graph_root, env.run_root)
    for layer in graph_layers(env):  # younger than what `prune` dares to take
        assert INCOMPLETE not in layer.get("flags", {})
    prune(Store.open(config), grace_seconds=0)
    victim.nothing_staged()
    assert check(victim.store(), full=True).findings == ()
    assert graph_layers(env) == []
    assert {path.name for path in (env.graph_root / "overlay").iterdir()} <= {
        "l",
        ".has-mount-program",
    }
    assert list((env.graph_root / "overlay/l").iterdir()) == []
    for kind in ("layers", "images"):
        left = {path.name for path in (env.graph_root / f"overlay-{kind}").iterdir()}
        assert left <= {f"{kind}.json", f"volatile-{kind}.json", f"{kind}.lock"}
    for place in ("overlay", "overlay-layers", "overlay-images", "layerstore"):
        if (env.graph_root / place).exists():
            assert used_bytes(env.graph_root / place) < TOLERANCE
    assert stress.held_locks(env.graph_root, env.run_root) == []
    assert all(layer["uses"] == 0 for layer in victim.rig.service.status()["layers"])


def used_bytes(directory: Path) -> int:
    found = [directory, *directory.rglob("*")]
    return sum(path.lstat().st_blocks * 512 for path in found)
