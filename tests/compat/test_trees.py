"""Large and foreign images: through the store they are the same trees as from a plain pull."""

from pathlib import Path

import pytest

from lab import ctrremote, images, oci, tars
from lab import rig as lab
from lab.debian import DebianError
from lab.podman import Flavour
from lab.rig import MakeRig, PlainTree, Push, Pushed, Rig


@pytest.fixture(scope="session")
def python(push_lazy: Push) -> Pushed:
    """Debian with Python and its numeric libraries, some 250 MB packed."""
    try:
        return push_lazy(images.python_image(), "lazy/python:1")
    except DebianError as error:
        pytest.skip(f"the packages cannot be had: {error}")


@pytest.fixture(scope="session")
def foreign(push: Push) -> Pushed:
    """The small image as Debian's ctr-remote converts it."""
    return push(ctrremote.converted(images.small_image()), "lazy/foreign:1")


@pytest.mark.parametrize("config", ["background_fetch = false\n", ""], ids=["demand", "background"])
def test_the_python_image(
    make_rig: MakeRig, python: Pushed, plain_tree: PlainTree, config: str
) -> None:
    """Read file by file as they are asked for, and read while the rest arrives anyway."""
    flavour: Flavour = "debian13" if config else "debian12"
    rig = make_rig(flavour, config=config)
    image = rig.image(python.name)
    rig.env.podman("pull", image)
    assert lab.blob_requests(rig.client, python.image) == []
    said = rig.env.podman("run", "--rm", image).stdout
    assert said.startswith("hello from pandas")
    if config:
        print(f"share of the blobs fetched by the start: {rig.share(python.image):.1%}")
        assert rig.share(python.image) < 0.6
    assert lab.differing(plain_tree(python), lab.image_tree(rig.env, image)) == []
    if not config:
        rig.service.wait_complete()
    fetched = sum(request.bytes for request in lab.blob_requests(rig.provider, python.image))
    assert fetched < python.image.compressed_size * 1.1
    assert rig.service.status()["read_errors"] == 0


def test_an_image_of_ctr_remote(rig: Rig, foreign: Pushed, plain_tree: PlainTree) -> None:
    image = rig.image(foreign.name)
    rig.env.podman("pull", image)
    assert len(lab.store_layers(rig.env, rig.store)) == len(foreign.image.layers)
    assert lab.differing(plain_tree(foreign), lab.image_tree(rig.env, image), seconds=True) == []
    assert "lookup-refused" not in rig.service.log()


@pytest.fixture(scope="session")
def hollow(push_lazy: Push, workspace: Path) -> Pushed:
    """A busybox with layers on top that hold no file: of an empty archive, and of a whiteout."""
    base = images.tar_bytes(images.base_members())
    removal = images.tar_bytes([tars.whiteout(b"opt/plugins/old")])
    sources = [oci.LayerSource(tar) for tar in (base, bytes(1024), removal)]
    config = oci.RunConfig(cmd=("ls", "/opt/plugins"))
    return push_lazy(oci.write_image(workspace / "hollow", "1", sources, config), "lazy/hollow:1")


def test_layers_without_files(rig: Rig, hollow: Pushed, plain_tree: PlainTree) -> None:
    image = rig.image(hollow.name)
    rig.env.podman("pull", image)
    assert len(lab.store_layers(rig.env, rig.store)) == len(hollow.image.layers)
    assert rig.env.podman("run", "--rm", image).stdout == "deep\n"
    # directories without an entry of their own get the time of the day from an extraction
    implicit = {b"opt", b"opt/plugins"}
    tree = lab.image_tree(rig.env, image)
    assert lab.differing(plain_tree(hollow), tree, any_mtime=implicit) == []
