"""The store's disk use under real Podman: the limit holds, and what went comes back right."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from lab import images
from lab import rig as lab
from lab.podman import Flavour
from lab.rig import MakeRig, PlainTree, Push, Pushed, Rig

MIB: Final = 1 << 20
HELLO: Final = "hello from small amd64: 199 files\n"
LIMIT: Final = 60 * MIB
BIG: Final = 8 * MIB
"""Of noise in each image: as much in its blob, and as much again in its files."""


@pytest.fixture(scope="module")
def several(push_lazy: Push) -> list[Pushed]:
    """Images that share their lowest layer; what is large in them is not shared."""
    sizes = [BIG + number * 4096 for number in range(4)]
    return [
        push_lazy(images.small_image(big_bytes=size), f"disk/image{number}:1")
        for number, size in enumerate(sizes)
    ]


def noise_of(number: int) -> str:
    """SHA-256 of an image's large file, as its recipe makes it."""
    return hashlib.sha256(images.noise(BIG + number * 4096)).hexdigest()


def layerstore(rig: Rig, *arguments: str) -> Any:
    """A verb with ``--json``, asked of the rig's service."""
    result = subprocess.run(
        [sys.executable, "-m", "layerstore.cli", *arguments, "--json"],
        env=rig.env.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def ask(rig: Rig, *arguments: str) -> Any:
    return layerstore(rig, *arguments, "--root", str(rig.service.root))


def disk_bytes(root: Path) -> int:
    """As ``du`` counts, without the mount point."""
    total = 0
    for directory, _, names in os.walk(root):
        for path in (directory, *(f"{directory}/{name}" for name in names)):
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(path).st_blocks * 512
    return total


@contextlib.contextmanager
def sampled(root: Path) -> Iterator[list[int]]:
    """Look at the disk use all the time."""
    found: list[int] = []
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(0.02):
            found.append(disk_bytes(root))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def read_big(rig: Rig, pushed: Pushed) -> str:
    """What a fresh container reads of the large file."""
    command = ("run", "--rm", rig.image(pushed.name), "sha256sum", "/data/big.bin")
    return rig.env.podman(*command).stdout.split()[0]


@pytest.mark.parametrize("flavour", ["debian12"], indirect=True)  # mounts are the same for both
def test_the_limit_holds_and_running_containers_go_last(
    flavour: Flavour, make_rig: MakeRig, several: list[Pushed]
) -> None:
    rig = make_rig(flavour, config=f"[disk]\nlimit = {LIMIT}\nkeep_free_percent = 0\n")
    runs, *others = several
    with sampled(rig.service.root) as samples:
        rig.env.podman("pull", "-q", rig.image(runs.name))
        rig.env.podman("run", "-d", "--name", "runs", rig.image(runs.name), "sleep", "600")
        shown = rig.env.podman("exec", "runs", "sha256sum", "/data/big.bin").stdout
        assert shown.split()[0] == noise_of(0)
        for number, pushed in enumerate(others, 1):
            rig.env.podman("pull", "-q", rig.image(pushed.name))
            assert read_big(rig, pushed) == noise_of(number)
        report = ask(rig, "df")
        # what was evicted comes back
        assert read_big(rig, others[0]) == noise_of(1)
    assert len(samples) > 20
    assert max(samples) <= LIMIT
    assert report["used"] <= report["limit"] == LIMIT
    standings = {layer["standing"] for layer in report["layers"]}
    assert standings == {"running", "idle"}
    (large,) = (
        layer for layer in report["layers"] if layer["blob"] + layer["files"] > BIG
        and rig.image(runs.name) in layer["references"]
    )  # fmt: skip
    assert large["standing"] == "running"
    assert large["blob"] > BIG, "the running container's layer was not touched"
    assert large["files"] >= BIG
    log = rig.service.log()
    assert "event=evicted" in log
    assert "standing=running" not in log
    assert rig.env.podman("exec", "runs", "sha256sum", "/data/big.bin").stdout == shown
    rig.env.podman("rm", "-f", "-t", "0", "runs")


def test_what_is_materialized_needs_no_store(
    flavour: Flavour, make_rig: MakeRig, small: Pushed, plain_tree: PlainTree, tmp_path: Path
) -> None:
    rig = make_rig(flavour)
    image = rig.image(small.name)
    rig.env.podman("pull", "-q", image)
    rig.env.podman("run", "-d", "--name", "runs", image, "sleep", "600")
    assert len(layerstore(rig, "materialize", image)) == 3
    assert layerstore(rig, "materialize", "--all") == []
    assert all(layer["uses"] == 0 for layer in rig.service.status()["layers"])
    # who runs keeps the lazy layers
    assert rig.env.podman("exec", "runs", "cat", "/etc/marker").returncode == 0
    rig.env.podman("rm", "-f", "-t", "0", "runs")
    assert layerstore(rig, "check", "storage", "--full")["findings"] == []
    assert rig.service.stop() == 0
    if flavour == "debian13":  # older ones have no such verb
        assert "rror" not in rig.env.podman("system", "check").stdout
    assert rig.env.podman("run", "--rm", image).stdout == HELLO
    assert lab.differing(plain_tree(small), lab.image_tree(rig.env, image)) == []
    archive = tmp_path / "saved.tar"
    rig.env.podman("save", "-q", "--format", "oci-archive", "-o", str(archive), image)
    assert archive.stat().st_size > MIB
    rig.env.podman("push", "-q", image, f"oci:{tmp_path / 'pushed'}")
    assert lab.extracted_layers(rig.env)
    rig.env.podman("rmi", image)
    assert lab.graph_layers(rig.env) == []


@pytest.mark.parametrize("flavour", ["debian13"], indirect=True)
def test_what_no_graph_root_refers_to_is_collected(
    flavour: Flavour, make_rig: MakeRig, several: list[Pushed]
) -> None:
    rig = make_rig(flavour)
    gone, stays = several[:2]
    for number, pushed in enumerate((gone, stays)):
        rig.env.podman("pull", "-q", rig.image(pushed.name))
        assert read_big(rig, pushed) == noise_of(number)
    rig.service.wait_complete()
    assert ask(rig, "gc", "--dry-run")["removed"] == []
    rig.env.podman("rmi", rig.image(gone.name))
    told = ask(rig, "gc", "--dry-run")
    assert {one["standing"] for one in told["removed"]} == {"unreferenced"}
    assert 2 * BIG < told["size"] < 3 * BIG
    before = disk_bytes(rig.service.root)
    assert ask(rig, "df")["unreferenced"] == told["size"]
    done = ask(rig, "gc")
    assert done == told | {"dry_run": False}
    assert abs(before - disk_bytes(rig.service.root) - done["size"]) < MIB
    # not a byte of the other image went, and the service is not needed to look
    rig.provider.clear()
    assert read_big(rig, stays) == noise_of(1)
    assert rig.provider.requests() == []
    rig.env.podman("pull", "-q", rig.image(gone.name))
    assert read_big(rig, gone) == noise_of(0)
    assert rig.service.stop() == 0
    all_of_it = ask(rig, "gc", "--all")
    assert {one["standing"] for one in all_of_it["removed"]} == {"idle"}
    assert disk_bytes(rig.service.root) < 4 * MIB
    rig.service.start()
    assert read_big(rig, stays) == noise_of(1)
