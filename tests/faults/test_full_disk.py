"""The disk of a running store becomes full: nobody who reads notices, and nothing is lost.

The store has no limit and no reserve here, so that it meets the end of the disk itself.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import images
from lab.fresh import fresh
from lab.podman import Flavour
from lab.registry import DebianRegistry
from lab.rig import (
    PlainTree,
    Push,
    Pushed,
    Rig,
    differing,
    extracted_layers,
    mounted,
    store_layers,
)
from lab.smalldisk import Kind, SmallDisk
from lab.trees import Tree, forget_contents, snapshot

MIB = 1 << 20
SIZE = 64 * MIB  # of the disk
HELLO = "hello from small amd64: 199 files\n"


@contextlib.contextmanager
def store_on(
    kind: Kind, flavour: Flavour, workspace: Path, registry: DebianRegistry, config: str = ""
) -> Iterator[tuple[SmallDisk, Rig]]:
    if not Path("/dev/fuse").exists():
        pytest.skip("there is no /dev/fuse here")
    place = fresh("full-", workspace)
    with (
        SmallDisk(place / "layerstore" / "state", kind, SIZE) as disk,
        Rig(
            place, flavour, registry.host, config=f"{config}[disk]\nkeep_free_percent = 0\n"
        ) as rig,
    ):
        yield disk, rig


def wait_for(rig: Rig, condition: Callable[[dict[str, Any]], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition(status := rig.service.status()):
        assert time.monotonic() < end, (status, rig.service.log())
        time.sleep(0.1)


def is_right(rig: Rig, image: str, right: Tree) -> None:
    """Every file, its SHA-256 among others, is as a plain pull extracts it; read from the store."""
    with mounted(rig.env, image) as path:
        # of these files only: other tests may depend on what is in memory
        forget_contents(path)
        forget_contents(rig.service.root)
        assert differing(right, snapshot(path)) == []
    assert rig.env.podman("run", "--rm", image).stdout == HELLO


def break_down(disk: SmallDisk, seconds: float = 5) -> None:
    """Write where there is no room until the kernel gives the file system up, as it mostly does."""
    disk.fill()
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end:
        number += 1
        try:
            with (disk.directory / f"lost{number}").open("wb") as file:
                file.write(bytes(MIB))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if error.errno == errno.EROFS:
                return


def is_clean(disk: SmallDisk) -> None:
    """Nothing half-made is left."""
    assert disk.left("content/tmp") == []
    assert list((disk.directory / "layers").glob("new-*")) == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("kind", "flavour", "ahead"),
    [("tmpfs", "debian12", "background"), ("ext4", "debian13", "prefetch")],
)
def test_lazy_layers_outlast_a_full_disk(
    kind: Kind,
    flavour: Flavour,
    ahead: str,
    workspace: Path,
    registry: DebianRegistry,
    trixie: object,
    small: Pushed,
    push: Push,
    push_lazy: Push,
    plain_tree: PlainTree,
) -> None:
    if ahead == "prefetch":  # and nothing else is fetched before somebody reads
        early = images.lazy(images.small_image(), workspace / "early", ("data/big.bin",))
        small = push(early, "lazy/early:1")
    other = push_lazy(images.small_image(marker="full"), "lazy/full:1")
    right = plain_tree(small)
    config = f"background_fetch = {'false' if ahead == 'prefetch' else 'true'}\n"
    with store_on(kind, flavour, workspace, registry, config) as (disk, rig):
        image = rig.image(small.name)
        disk.fill(leave=3 * MIB)
        rig.env.podman("pull", "-q", image)
        assert len(store_layers(rig.env, rig.store)) == 3
        wait_for(rig, lambda status: status["disk"]["full"])
        assert rig.service.status()["content"]["fetched_bytes"][ahead]  # that is what met it
        disk.fill()
        is_right(rig, image, right)

        # what is new cannot be remembered: it is refused, and pulled plainly
        rig.env.podman("pull", "-q", rig.image(other.name))
        said = rig.env.podman("run", "--rm", rig.image(other.name)).stdout
        assert said == HELLO.replace("amd64", "amd64 full")
        status = rig.service.status()
        assert status["lookups"]["no-room"]
        assert len(extracted_layers(rig.env)) >= 1
        assert status["disk"]["failed_writes"]
        assert status["read_errors"] == 0

        # nothing was fetched for nothing: what came is little more than what was read
        assert rig.share(small.image) < 2

        # also a service that starts on the full disk serves what is known
        rig.service.stop()
        rig.service.start()
        is_right(rig, image, right)
        status = rig.service.status()
        assert status["disk"]["full"]
        assert not all(layer["complete"] for layer in status["layers"])

        disk.free()
        wait_for(rig, lambda now: not now["disk"]["full"])
        is_right(rig, image, right)
        rig.env.layerstore("fetch", image, "--root", rig.service.root)
        assert all(layer["verified"] for layer in rig.service.status()["layers"])
        asked = len(rig.provider.requests())
        is_right(rig, image, right)
        assert len(rig.provider.requests()) == asked
        assert rig.service.status()["read_errors"] == 0
        is_clean(disk)
        blobs = {
            hashlib.sha256(path.read_bytes()).hexdigest()
            for path in disk.left("layers")
            if path.name == "blob"
        }
        assert {layer.digest.removeprefix("sha256:") for layer in small.image.layers} == blobs
        log = rig.service.log()
        assert log.count("event=disk-full") == 2  # of either service once
        assert log.count("event=disk-back") == 1
        assert not re.search("event=(read-failed|bytes-refused)|Traceback", log)


@pytest.mark.timeout(300)
def test_lazy_layers_outlast_a_disk_that_loses_what_it_took(
    workspace: Path,
    registry: DebianRegistry,
    trixie: object,
    small: Pushed,
    plain_tree: PlainTree,
) -> None:
    """Its writes succeed, its syncs fail, and it becomes read only."""
    right = plain_tree(small)
    with store_on("thin", "debian13", workspace, registry) as (disk, rig):
        image = rig.image(small.name)
        disk.fill(leave=3 * MIB)
        rig.env.podman("pull", "-q", image)
        wait_for(rig, lambda status: status["disk"]["full"])
        is_right(rig, image, right)
        is_right(rig, image, right)
        status = rig.service.status()
        assert status["disk"]["failed_writes"]
        assert status["read_errors"] == 0
        break_down(disk)
        is_right(rig, image, right)
        assert rig.service.status()["read_errors"] == 0
        rig.service.stop()
        disk.free()
        disk.repair()
        rig.service.start()
        is_right(rig, image, right)
        wait_for(
            rig, lambda now: bool(now["layers"]) and all(one["verified"] for one in now["layers"])
        )
        is_right(rig, image, right)
        assert rig.service.status()["read_errors"] == 0
        assert "Traceback" not in rig.service.log()


@pytest.mark.timeout(300)
def test_an_ordinary_layer_without_room_is_taken_in_later(
    workspace: Path, registry: DebianRegistry, push: Push, plain_tree: PlainTree
) -> None:
    ordinary = push(images.small_image(), "plain/full:1")
    with store_on("ext4", "debian12", workspace, registry) as (disk, rig):
        image = rig.image(ordinary.name)
        disk.fill(leave=4 * MIB)
        fetched = rig.env.layerstore("fetch", image, "--root", str(rig.service.root), check=False)
        assert fetched.returncode
        assert "no-room" in fetched.stdout + fetched.stderr
        assert "event=ingest-failed" in rig.service.log()
        assert rig.service.status()["disk"]["failed_writes"]
        is_clean(disk)
        for layer in rig.service.status()["layers"]:
            assert layer["verified"]  # those that had room

        disk.free()
        wait_for(rig, lambda now: len([one for one in now["layers"] if one["verified"]]) == 3)
        rig.env.podman("pull", "-q", image)
        assert len(store_layers(rig.env, rig.store)) == 3
        is_right(rig, image, plain_tree(ordinary))
        is_clean(disk)

        # its files come out of the blob when they are gone, also without room for them
        rig.service.stop()
        for path in disk.left("content/objects"):
            path.unlink()
        disk.fill()
        rig.service.start()
        asked = len(rig.provider.requests())
        is_right(rig, image, plain_tree(ordinary))
        assert rig.service.status()["disk"]["full"]
        assert rig.service.status()["read_errors"] == 0
        assert len(rig.provider.requests()) == asked
        assert "Traceback" not in rig.service.log()
