"""Ordinary images beside the store, and our images as ordinary ones for everybody else."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import layerstore
from lab import ctrremote, images, oci, trees
from lab import rig as lab
from lab.podman import Flavour, PodmanEnv
from lab.recording import RecordingProxy
from lab.registry import DebianRegistry
from lab.rig import PlainTree, Push, Pushed, Rig

HELLO = "hello from small amd64: 199 files\n"

MakePodmanEnv = Callable[..., PodmanEnv]


@pytest.fixture(scope="session")
def ordinary(push: Push) -> Pushed:
    """The small image as it was built."""
    return push(images.small_image(), "ordinary/small:1")


# -- ordinary images with a store configured ---------------------------------------


def test_an_ordinary_image_is_pulled_as_ever(
    rig: Rig, ordinary: Pushed, plain_tree: PlainTree
) -> None:
    image = rig.image(ordinary.name)
    rig.env.podman("pull", image)
    assert len(lab.extracted_layers(rig.env)) == len(ordinary.image.layers)
    whole = {
        r.path.rpartition("/")[2]: r.bytes for r in lab.blob_requests(rig.client, ordinary.image)
    }
    assert whole == lab.sizes(ordinary.image)
    assert rig.env.podman("run", "--rm", image).stdout == HELLO
    assert lab.differing(plain_tree(ordinary), lab.image_tree(rig.env, image)) == []
    # Podman 5 does not ask where no layer announces a table of contents
    asked = len(ordinary.image.layers) if rig.flavour == "debian12" else 0
    assert rig.service.log().count("reason=being-fetched") == asked
    assert rig.service.status()["lookups"].get("being-fetched", 0) == asked
    fetched = {r.path.rpartition("/")[2] for r in lab.blob_requests(rig.provider, ordinary.image)}
    assert len(fetched) == asked  # in the background, for the next graph root


def test_a_lazy_layer_between_ordinary_ones(rig: Rig, mixed: Pushed, plain_tree: PlainTree) -> None:
    image = rig.image(mixed.name)
    rig.env.podman("pull", image)
    assert len(lab.extracted_layers(rig.env)) == 1
    fetched = {r.path.rpartition("/")[2] for r in lab.blob_requests(rig.client, mixed.image)}
    assert fetched == {mixed.image.layers[1].digest}
    assert rig.env.podman("run", "--rm", image).stdout == HELLO
    assert lab.differing(plain_tree(mixed), lab.image_tree(rig.env, image)) == []


# -- our images without a store ------------------------------------------------------


def test_conversion_changes_nothing_that_a_plain_pull_shows(
    flavour: Flavour,
    make_podman_env: MakePodmanEnv,
    registry: DebianRegistry,
    ordinary: Pushed,
    small: Pushed,
    plain_tree: PlainTree,
) -> None:
    env = make_podman_env(flavour)
    env.podman("pull", f"{registry.host}/{small.name}")
    assert len(lab.extracted_layers(env)) == len(small.image.layers)
    tree = lab.image_tree(env, f"{registry.host}/{small.name}")
    assert lab.differing(plain_tree(ordinary), tree) == []
    assert env.podman("run", "--rm", f"{registry.host}/{small.name}").stdout == HELLO


def test_skopeo_copies_it_bit_by_bit(
    flavour: Flavour, make_podman_env: MakePodmanEnv, registry: DebianRegistry, small: Pushed
) -> None:
    env = make_podman_env(flavour)
    layout = env.tmp / "copied"
    env.skopeo("copy", f"docker://{registry.host}/{small.name}", f"oci:{layout}:latest")
    copied = oci.read_image(layout, "latest")
    assert copied.digest == small.image.digest
    assert copied.layers == small.image.layers
    inspected = json.loads(env.skopeo("inspect", f"docker://{registry.host}/{small.name}").stdout)
    assert inspected["Layers"] == [layer.digest for layer in small.image.layers]


@pytest.fixture
def containerd() -> Iterator[ctrremote.Containerd]:
    if shutil.which("containerd") is None:
        pytest.skip("containerd is not installed: run tools/bootstrap")
    # its overlay mounts need another file system than the overlay tests may run on
    with (
        tempfile.TemporaryDirectory(prefix="lab-ctr-", dir="/var/tmp") as scratch,
        ctrremote.containerd(Path(scratch)) as running,
    ):
        yield running


def test_containerd_pulls_and_unpacks_it(
    containerd: ctrremote.Containerd,
    registry: DebianRegistry,
    small: Pushed,
    tmp_path: Path,
    plain_tree: PlainTree,
) -> None:
    image = f"{registry.host}/{small.name}"
    containerd.run("ctr", "image", "pull", "--plain-http", image)
    mountpoint = tmp_path / "mounted"
    mountpoint.mkdir()
    containerd.run("ctr", "image", "mount", image, str(mountpoint))
    try:
        tree = trees.snapshot(mountpoint)
    finally:
        containerd.run("ctr", "image", "unmount", str(mountpoint))
    assert lab.differing(plain_tree(small), tree) == []


def test_containerd_imports_it(
    containerd: ctrremote.Containerd,
    small: Pushed,
    tmp_path: Path,
    registry: DebianRegistry,
    make_podman_env: MakePodmanEnv,
) -> None:
    archive = tmp_path / "image.tar"
    env = make_podman_env()
    env.skopeo(
        "copy", f"docker://{registry.host}/{small.name}", f"oci-archive:{archive}:lab.local/x:1"
    )
    containerd.run("ctr", "image", "import", str(archive))
    exported = tmp_path / "exported.tar"
    containerd.run("ctr", "image", "export", str(exported), "lab.local/x:1")
    layout = tmp_path / "layout"
    layout.mkdir()
    subprocess.run(["tar", "-xf", exported, "-C", layout], check=True)
    for layer in small.image.layers:
        blob = layout / "blobs" / layer.digest.replace(":", "/")
        assert blob.read_bytes() == small.image.blob(layer.digest).read_bytes()


def test_podman_5_takes_it_as_a_partial_pull(
    make_podman_env: MakePodmanEnv,
    recorded: RecordingProxy,
    small: Pushed,
    plain_tree: PlainTree,
) -> None:
    env = make_podman_env(
        "debian13",
        registries=(recorded.host,),
        storage_extra=(
            'pull_options = {enable_partial_images = "true", '
            'insecure_allow_unpredictable_image_contents = "true"}'
        ),
    )
    image = f"{recorded.host}/{small.name}"
    env.skopeo("copy", f"docker://{image}", f"containers-storage:{image}")
    requests = lab.blob_requests(recorded, small.image)
    assert requests
    assert {request.status for request in requests} == {206}
    assert all(request.range for request in requests)
    assert env.podman("run", "--rm", image).stdout == HELLO
    expected = plain_tree(small)
    # the partial pull of containers/storage 1.57 sets times of regular files only
    others = {path for path, node in expected.items() if node.kind != "file"}
    tree = lab.image_tree(env, image)
    assert lab.differing(expected, tree, any_mtime=others) == []


def test_convert_works_from_registry_to_registry(rig: Rig, ordinary: Pushed) -> None:
    """The verb that users type; the other tests' images are converted by the same code."""
    source, target = rig.image(ordinary.name), rig.image(f"converted/small:{rig.flavour}")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "layerstore.cli", "convert", "--json"),
            *(f"docker://{source}", f"docker://{target}"),
        ],
        env={**rig.env.environment(), "PYTHONPATH": str(Path(layerstore.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    (converted,) = json.loads(done.stdout)["images"]
    assert [layer["source"] for layer in converted["layers"]] == list(lab.sizes(ordinary.image))
    rig.client.clear()
    rig.env.podman("pull", target)
    assert len(lab.store_layers(rig.env, rig.store)) == len(ordinary.image.layers)
    assert not [r for r in rig.client.requests() if r.bytes > 100_000]
    assert rig.env.podman("run", "--rm", target).stdout == HELLO
