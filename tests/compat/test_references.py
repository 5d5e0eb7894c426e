"""Which image a lookup means: moved tags, several platforms, stores without references."""

import json
import time
from collections.abc import Callable

import pytest

from lab import images
from lab import rig as lab
from lab.oci import StoredImage
from lab.podman import Flavour, PodmanEnv
from lab.rig import MakeRig, PlainTree, Push, Pushed, Rig
from layerstore import limits

HELLO = "hello from small amd64: 199 files\n"


@pytest.fixture(scope="session")
def second(push_lazy: Push) -> Pushed:
    """The small image with another top layer."""
    return push_lazy(images.small_image(marker="second"), "lazy/second:1")


@pytest.fixture(scope="session")
def multi(push_lazy: Push) -> Pushed:
    """An index of small images for amd64 and arm64."""
    return push_lazy(images.small_index(), "lazy/multi:1")


def test_a_layer_that_is_there_twice_is_pulled_plainly(
    rig: Rig, repeated: Pushed, small: Pushed, plain_tree: PlainTree
) -> None:
    """It has one path in the store, and overlayfs takes no directory twice."""
    image = rig.image(repeated.name)
    rig.env.podman("pull", image)
    assert len(lab.extracted_layers(rig.env)) == 2
    assert _fetched(rig, repeated.image) == {small.image.layers[1].digest}
    assert "lookup-refused reason=repeated-layer" in rig.service.log()
    assert rig.env.podman("run", "--rm", image).stdout == HELLO
    assert lab.differing(plain_tree(small), lab.image_tree(rig.env, image)) == []
    rig.env.podman("rmi", image)
    rig.env.podman("pull", image)
    assert rig.env.podman("run", "--rm", image).stdout == HELLO


def test_a_moved_tag_leaves_the_old_image_alone_and_brings_the_new_one_lazily(
    flavour: Flavour, make_rig: MakeRig, push: Push, small: Pushed, second: Pushed
) -> None:
    rig = make_rig(flavour, config="background_fetch = false\n")
    name = f"moving/{flavour}:latest"
    push(small.image, name)
    image = rig.image(name)
    old = rig.env.podman("pull", "-q", image).stdout.strip()
    push(second.image, name)
    time.sleep(limits.REFRESH_SECONDS)
    new = rig.env.podman("pull", "-q", image).stdout.strip()
    assert old != new
    assert rig.env.podman("run", "--rm", image).stdout == HELLO.replace("amd64", "amd64 second")
    # nothing of the old image's own layer was read before its tag moved away
    assert rig.env.podman("run", "--rm", old).stdout == HELLO
    lab.store_layers(rig.env, rig.store)
    for pushed in (small, second):
        assert lab.blob_requests(rig.client, pushed.image) == []
    rig.service.stop()
    rig.service.start()
    assert rig.env.podman("run", "--rm", old).stdout == HELLO
    assert "lookup-refused" not in rig.service.log()


def test_a_reference_by_digest(rig: Rig, small: Pushed) -> None:
    image = f"{rig.image(small.name).rpartition(':')[0]}@{small.image.digest}"
    rig.env.podman("pull", image)
    assert len(lab.store_layers(rig.env, rig.store)) == len(small.image.layers)
    assert rig.env.podman("run", "--rm", image).stdout == HELLO


def test_every_platform_of_an_index_is_lazy(rig: Rig, multi: Pushed) -> None:
    image = rig.image(multi.name)
    for platform in ("linux/amd64", "linux/arm64"):
        host = platform == "linux/amd64"
        rig.env.podman("pull", *(() if host else ("--platform", platform)), image)
        (inspected,) = json.loads(rig.env.podman("inspect", image).stdout)
        assert f"{inspected['Os']}/{inspected['Architecture']}" == platform
        # the programs are the same in both: what differs is what the image says
        output = rig.env.podman("run", "--rm", "--pull=never", image).stdout
        assert output == HELLO.replace("amd64", inspected["Architecture"])
    assert len(lab.store_layers(rig.env, rig.store)) >= 4
    whole = [r for r in rig.client.requests() if "/blobs/" in r.path and r.bytes > 100_000]
    assert whole == []


def test_a_store_without_references_serves_what_it_knows(
    flavour: Flavour,
    make_rig: MakeRig,
    make_podman_env: Callable[..., PodmanEnv],
    push: Push,
    small: Pushed,
    second: Pushed,
) -> None:
    rig = make_rig(flavour)
    rig.env.podman("pull", rig.image(small.name))
    other = make_podman_env(
        flavour,
        registries=(rig.client.host,),
        storage_extra=f'additionallayerstores = ["{rig.store}"]',
    )
    # under a name that the store has never heard of
    renamed = push(small.image, f"renamed/{flavour}:1")
    other.podman("pull", rig.image(renamed.name))
    assert lab.blob_requests(rig.client, small.image) == []
    assert len(lab.store_layers(other, rig.store)) == len(small.image.layers)
    assert other.podman("run", "--rm", rig.image(renamed.name)).stdout == HELLO

    other.podman("pull", rig.image(second.name))
    assert _fetched(rig, second.image) == {second.image.layers[-1].digest}
    assert other.podman("run", "--rm", rig.image(second.name)).stdout == HELLO.replace(
        "amd64", "amd64 second"
    )


def _fetched(rig: Rig, image: StoredImage) -> set[str]:
    """The layers that Podman fetched itself."""
    return {r.path.rpartition("/")[2] for r in lab.blob_requests(rig.client, image)}
