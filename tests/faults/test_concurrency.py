"""Eight rows of processes, ours and others', on one graph root for a while: nothing is lost.

Which programs may share a graph root, and how: what lies in it is containers/storage's, whose
locks and records all of them keep, so any versions may.  Podman's own database is another matter:
4.3.1 keeps it in bolt, 5.4.2 in SQLite, and neither reads what the other wrote.  So each has a
database of its own, as Podman and CRI-O on one machine do; the containers of the other one are
"external" to it, and it removes no image that they use.  Two things are left out, because
containers/storage 1.43 (Podman 4.3.1) cannot know them: volatile containers (`run --rm` of
Podman 5), whose layers it would delete, and layers that are known by their TOC only, with which it
cannot list images.  So the lazy layers beside 4.3.1 are those of dialect L, found by their blobs,
and those beside 5.4.2 of dialect T.  And Podman 4.3.1 pulls nothing lazily while others are at work:
it asks for storage.lock with layers.lock in hand (additionalLayer.PutAs), every Podman that starts
does the reverse, and so two Podmans alone, without any process of ours, wait for each other for ever.

LAYERSTORE_STRESS_SECONDS is for both tests together, LAYERSTORE_SEED chooses what happens.
"""

import json
import os
import random
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lab import stress
from lab.podman import PodmanEnv
from lab.registry import DebianRegistry
from lab.rig import Push, Rig, graph_layers
from lab.stress import Board, Target, Worker

SECONDS = float(os.environ.get("LAYERSTORE_STRESS_SECONDS", "50")) / 2
MEMBERS: dict[stress.Family, tuple[str, ...]] = {
    "kept": ("plain", "lazy"),
    "ours": ("one", "two", "lazy"),
    "free": ("one", "two", "lazy"),
}

# Podman 4 records diff IDs of lazy layers, so Podman 5 compares their trees with the archives, which
# hold files of the format that a layer store does not show.
# Where a lower layer was pulled plainly, its file shows instead of the hidden one above it.
HIDDEN = re.compile(
    r"(-/(stargz\.index\.json|\.(no\.)?prefetch\.landmark)|/stargz\.index\.json\(size:\S+\)),"
    r" layer content modified"
)

pytestmark = pytest.mark.timeout(int(SECONDS) + 900)


@pytest.fixture(scope="session")
def seed() -> int:
    chosen = int(os.environ.get("LAYERSTORE_SEED") or random.randrange(1 << 32))
    print(f"LAYERSTORE_SEED={chosen}")
    return chosen


@pytest.fixture(scope="session")
def targets(registry: DebianRegistry, push: Push, push_lazy: Push) -> Callable[[str], list[Target]]:
    """The images, pushed once, by their names at a host."""
    found: list[tuple[stress.Family, str, str]] = []
    for family, members in MEMBERS.items():
        for member in members:
            stored = stress.image(family, member)
            name = f"stress/{family}-{member}:1"
            (push_lazy if member == "lazy" else push)(stored, name)
            found.append((family, member, name))
    return lambda host: [
        Target(family, f"{family}-{member}", f"{host}/{name}", f"{family} {member}\n")
        for family, member, name in found
    ]


@pytest.mark.parametrize("stores", ["blob-digest", "toc"])
def test_eight_rows_of_processes(
    make_rig, make_podman_env, registry: DebianRegistry, targets, seed: int, stores: str
) -> None:
    old = stores == "blob-digest"
    rig: Rig = make_rig("debian12" if old else "debian13")
    first: PodmanEnv = rig.env
    images: list[Target] = targets(rig.client.host)
    plain = make_podman_env("debian13", registries=(rig.client.host,), beside=first)
    theirs = (
        make_podman_env("debian12", registries=(rig.client.host,), beside=first) if old else first
    )
    board = Board()

    def worker(name: str, kind: stress.Kind, env: PodmanEnv, *flags: str) -> Worker:
        return Worker(name, kind, env, images, board, seed, pull_flags=flags)

    lazily = ("--dialect-l",) if old else ("--toc-layers",)
    workers = [
        worker("ours-a", "ours", first, *lazily),
        worker("ours-b", "ours", first, *lazily),
        worker("ours-c", "ours", plain),
        worker("ours-d", "ours", plain),
        worker("podman-a", "podman", theirs, "--tls-verify=false"),
        worker("podman-b", "podman", theirs, "--tls-verify=false"),
        worker("podman-c", "podman", plain, "--tls-verify=false"),
        worker("storage", "storage", plain),
    ]
    for image in images:
        if image.family == "kept":
            first.podman("pull", "-q", image.name)

    before = set(threading.enumerate())  # those of the registry proxies come and go
    stress.run_all(workers, SECONDS)
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if "process_request" not in thread.name]
    tell(board)
    failures = "\n".join(map(str, board.failures))
    assert not board.failures, f"seed {seed}\n{failures}"
    nothing_is_lost(first, workers, images)
    nothing_is_wrong(first, plain)
    uses_are_right(first, rig)
    everything_runs([first, plain], images)
    nothing_is_left(first, rig, plain)


def tell(board: Board) -> None:
    print(f"\n{board.done.total()} commands, {board.excused.total()} failed as they may")
    for verb, count in sorted(board.done.items()):
        print(f"{count:6} {verb}")
    for excuse, count in sorted(board.excused.items()):
        print(f"{count:6} {excuse}")


def images_of(env: PodmanEnv) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(env.layerstore("images", "-a", "--json").stdout)
    return found


def names_in(env: PodmanEnv) -> set[str]:
    text = (env.graph_root / "overlay-images/images.json").read_text()
    return {name for record in json.loads(text) for name in record.get("names", ())}


def nothing_is_lost(env: PodmanEnv, workers: Sequence[Worker], images: Sequence[Target]) -> None:
    names = names_in(env)
    wanted = {image.name for image in images if image.family == "kept"}
    for worker in workers:
        wanted |= worker.kept.keys()
    assert len(wanted) > 2
    assert wanted <= names
    for one in workers:
        for name, target in one.kept.items():
            path = Path(env.layerstore("mount", name).stdout.strip())
            assert (path / "data/member").read_text() == target.prints, name
            env.layerstore("umount", name)


def nothing_is_wrong(first: PodmanEnv, second: PodmanEnv) -> None:
    """Neither by our check nor by Podman's, no lock held, nothing mounted."""
    assert stress.held_locks(first.graph_root, first.run_root) == []
    # An image that lost the name by which a worker mounted it stays mounted, and is counted so.
    first.podman("image", "unmount", "--all", "--force")
    mounted = stress.mounts_below(first.graph_root, first.run_root)
    assert set(mounted) <= {str(first.graph_root / "overlay")}
    checked = first.layerstore("check", "storage", "--full", "--json", check=False)
    findings = json.loads(checked.stdout)["findings"]
    assert [found for found in findings if found["weight"] != "notice"] == []
    assert checked.returncode == 0, checked.stderr
    new = second if second.flavour == "debian13" else first
    for check in (new.podman, new.containers_storage):
        words = ("system", "check") if check == new.podman else ("check",)
        result = check(*words, check=False)
        complaints = re.findall("layer [0-9a-f]{64}: .*", result.stdout + result.stderr)
        assert all(map(HIDDEN.search, complaints)), complaints
        if not complaints:
            assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def everything_runs(envs: Sequence[PodmanEnv], images: Sequence[Target]) -> None:
    """Each image that is there, under each Podman, whatever it is called."""
    prints = {image.prints for image in images}
    for env in envs:
        for image in images_of(env):
            output = env.podman("run", "--pull=never", "--name=last", image["Id"]).stdout
            env.podman("rm", "last")
            assert output in prints
            for name in image.get("Names") or ():
                if match := re.match(r"localhost/[^/]+/([a-z]+)-([a-z]+):", name):
                    assert output == f"{match[1]} {match[2]}\n", name


def uses(rig: Rig) -> list[int]:
    """How often each layer of the layer store is in use."""
    return [layer["uses"] for layer in rig.service.status()["layers"]]


def uses_are_right(env: PodmanEnv, rig: Rig) -> None:
    """The layers of the graph root are what the layer store counts: one use each."""
    layers = [env.graph_root / "overlay" / layer["id"] for layer in graph_layers(env)]
    lazy = [layer for layer in layers if (layer / "additionallayer").exists()]
    assert len(lazy) >= 3  # those of the kept image
    assert sum(uses(rig)) == len(lazy)


def nothing_is_left(env: PodmanEnv, rig: Rig, other: PodmanEnv) -> None:
    """When everything is removed: no files, no layers in use in the layer store."""
    for one in (env, other):
        one.podman("rm", "-a", "-f")
    env.layerstore("rmi", "-a", "-f")
    unused = graph_layers(env)
    for layer in reversed(unused):  # of pulls that others' removals made fail
        env.containers_storage("delete-layer", layer["id"])
    assert env.layerstore("check", "storage").stdout.startswith("0 layers, 0 images, 0 containers")
    left = {path.name for path in (env.graph_root / "overlay").iterdir()}
    assert left <= {"l", ".has-mount-program", "staging"}
    assert list((env.graph_root / "overlay/l").iterdir()) == []
    for kind in ("layers", "images"):
        left = {path.name for path in (env.graph_root / f"overlay-{kind}").iterdir()}
        assert left <= {f"{kind}.json", f"volatile-{kind}.json", f"{kind}.lock"}
    assert set(uses(rig)) == {0}
