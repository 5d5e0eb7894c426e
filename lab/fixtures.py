"""The real tools as fixtures: a registry for the session, one Podman environment per test.

A plug-in of pytest, loaded by tests/conftest.py: tests/compat and tests/faults share it.
"""

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import images, oci
from lab import trixie as lab_trixie
from lab.debian import DebianError
from lab.fresh import fresh
from lab.podman import FLAVOURS, Flavour, PodmanEnv, unmount_below
from lab.recording import RecordingProxy
from lab.registry import DebianRegistry
from lab.rig import Document, MakeRig, Push, Pushed, Rig, edited, image_tree
from lab.trees import Tree
from lab.zygote import Zygote

MakePodmanEnv = Callable[..., PodmanEnv]


@pytest.fixture(scope="session")
def workspace() -> Iterator[Path]:
    """A directory on a real file system (overlay on tmpfs or on overlay may not work)."""
    path = fresh("layerstore-compat-")
    yield path
    unmount_below(path)
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def registry(workspace: Path) -> Iterator[DebianRegistry]:
    """One docker-registry for all tests: push under names of your own."""
    if not Path("/usr/bin/docker-registry").exists():
        pytest.skip("docker-registry is not installed: run tools/bootstrap")
    with DebianRegistry(workspace / "registry") as running:
        yield running


@pytest.fixture
def recorded(registry: DebianRegistry) -> Iterator[RecordingProxy]:
    """The same registry behind a proxy that records requests, ranges and bytes of this test."""
    with RecordingProxy(registry.host) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def zygote(workspace: Path) -> Iterator[Zygote]:
    """Our program, ready to run in any environment."""
    with Zygote({"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}, workspace / "zygote") as running:
        yield running


@pytest.fixture(scope="session")
def trixie() -> lab_trixie.TrixieTools:
    """Debian 13's tools."""
    try:
        return lab_trixie.ensure()
    except DebianError as error:
        pytest.skip(f"Debian 13's tools cannot be had: {error}")


@pytest.fixture(params=FLAVOURS)
def flavour(request: pytest.FixtureRequest) -> Flavour:
    """Each of the two Debians in turn; override by indirect parametrisation."""
    chosen: Flavour = request.param
    return chosen


@pytest.fixture
def make_podman_env(
    request: pytest.FixtureRequest, workspace: Path, registry: DebianRegistry
) -> Iterator[MakePodmanEnv]:
    """``make(flavour, **options of PodmanEnv)``: environments that are cleaned up after the test.

    The session's registry is always marked insecure, besides ``registries``.
    """
    made: list[PodmanEnv] = []
    numbers = itertools.count()

    def make(
        flavour: Flavour = "debian12", *, registries: tuple[str, ...] = (), **options: Any
    ) -> PodmanEnv:
        if flavour == "debian13":
            request.getfixturevalue("trixie")
        if not Path("/usr/bin/podman").exists():
            pytest.skip("podman is not installed: run tools/bootstrap")
        directory = fresh(f"env{next(numbers)}-", workspace)
        env = PodmanEnv(directory, flavour, registries=(registry.host, *registries), **options)
        made.append(env)
        return env

    yield make
    for env in reversed(made):
        env.cleanup()


@pytest.fixture
def podman_env(
    flavour: Flavour, make_podman_env: MakePodmanEnv, recorded: RecordingProxy
) -> PodmanEnv:
    """A fresh environment of each flavour; the registry and its recorded face are insecure."""
    return make_podman_env(flavour, registries=(recorded.host,))


# -- the store ---------------------------------------------------------------------


@pytest.fixture(scope="session")
def push(workspace: Path, registry: DebianRegistry) -> Iterator[Push]:
    """``push(image, "repository:tag")``: the layout's bytes go to the registry as they are."""
    if not Path("/usr/bin/skopeo").exists():
        pytest.skip("skopeo is not installed: run tools/bootstrap")
    with PodmanEnv(workspace / "pusher", registries=(registry.host,)) as env:

        def copy(image: oci.StoredImage, name: str) -> Pushed:
            target = f"docker://{registry.host}/{name}"
            env.skopeo("copy", "--quiet", "--all", "--preserve-digests", image.source, target)
            return Pushed(name, image)

        yield copy


@pytest.fixture(scope="session")
def push_lazy(workspace: Path, push: Push) -> Push:
    """``push_lazy(image, "repository:tag")``: converted by layerstore, then pushed."""

    def convert_and_push(image: oci.StoredImage, name: str) -> Pushed:
        layout = fresh("converted-", workspace)
        return push(images.lazy(image, layout / "lazy"), name)

    return convert_and_push


@pytest.fixture(scope="session")
def small(push_lazy: Push) -> Pushed:
    """The small image, lazy."""
    return push_lazy(images.small_image(), "lazy/small:1")


@pytest.fixture(scope="session")
def mixed(push: Push, small: Pushed, workspace: Path) -> Pushed:
    """The small image, its middle layer ordinary and the others lazy."""
    plain = images.small_image()

    def change(manifest: Document, config: Document) -> None:
        manifest["layers"][1] = json.loads(plain.blob(plain.digest).read_bytes())["layers"][1]
        config["rootfs"]["diff_ids"][1] = plain.layers[1].diff_id

    layout = edited(small.image, workspace / "mixed", change)
    name = plain.layers[1].digest
    shutil.copy(plain.blob(name), layout / "blobs" / name.replace(":", "/"))
    return push(oci.read_image(layout, "latest"), "mixed/small:1")


@pytest.fixture(scope="session")
def repeated(push: Push, small: Pushed, workspace: Path) -> Pushed:
    """The small image with its middle layer twice."""

    def change(manifest: Document, config: Document) -> None:
        for layers in manifest["layers"], config["rootfs"]["diff_ids"]:
            layers.insert(2, layers[1])
        config["history"].insert(2, config["history"][1])

    layout = edited(small.image, workspace / "repeated", change)
    return push(oci.read_image(layout, "latest"), "repeated/small:1")


@pytest.fixture(scope="session")
def plain_tree(workspace: Path, registry: DebianRegistry) -> Callable[[Pushed], Tree]:
    """The files of an image as a plain `podman pull` extracts them; each image once."""
    known: dict[str, Tree] = {}

    def tree(pushed: Pushed) -> Tree:
        if pushed.name not in known:
            place = fresh("plain-", workspace)
            with PodmanEnv(place, registries=(registry.host,)) as env:
                env.podman("pull", "--quiet", f"{registry.host}/{pushed.name}")
                known[pushed.name] = image_tree(env, f"{registry.host}/{pushed.name}")
        return known[pushed.name]

    return tree


@pytest.fixture
def make_rig(
    request: pytest.FixtureRequest, workspace: Path, registry: DebianRegistry
) -> Iterator[MakeRig]:
    """``make(flavour, **options of Rig)``: a Podman with a running store beside it."""
    if not Path("/dev/fuse").exists():
        pytest.skip("there is no /dev/fuse here")
    with contextlib.ExitStack() as stack:

        def make(flavour: Flavour = "debian12", upstream: str | None = None, **options: Any) -> Rig:
            if flavour == "debian13":
                request.getfixturevalue("trixie")
            place = fresh("rig-", workspace)
            return stack.enter_context(Rig(place, flavour, upstream or registry.host, **options))

        yield make


@pytest.fixture
def rig(flavour: Flavour, make_rig: MakeRig) -> Rig:
    """A store between each flavour of Podman and the session's registry."""
    return make_rig(flavour)
