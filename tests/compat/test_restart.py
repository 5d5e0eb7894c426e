"""The store is stopped, killed and started again under images that Podman keeps using."""

import signal
import time
from pathlib import Path

from lab import rig as lab
from lab.podman import Flavour
from lab.registry import DebianRegistry
from lab.rig import MakeRig, PlainTree, Pushed

HELLO = "hello from small amd64: 199 files\n"


def test_a_complete_image_runs_after_a_restart_without_a_registry(
    flavour: Flavour,
    make_rig: MakeRig,
    workspace: Path,
    small: Pushed,
    plain_tree: PlainTree,
) -> None:
    with DebianRegistry(workspace / f"gone-{flavour}") as own:
        rig = make_rig(flavour, own.host)
        rig.env.skopeo("copy", "-q", small.image.source, f"docker://{own.host}/{small.name}")
        image = rig.image(small.name)
        rig.env.podman("pull", image)
        rig.service.wait_complete()
    assert rig.service.stop() == 0
    rig.provider.clear()
    began = time.monotonic()
    rig.service.start()
    assert time.monotonic() - began < 15  # two seconds where nothing else runs
    assert rig.env.podman("run", "--rm", image).stdout == HELLO
    assert lab.differing(plain_tree(small), lab.image_tree(rig.env, image)) == []
    assert rig.provider.requests() == []


def test_a_partly_fetched_image_goes_on_after_a_restart(
    flavour: Flavour, make_rig: MakeRig, small: Pushed, plain_tree: PlainTree
) -> None:
    rig = make_rig(flavour, config="background_fetch = false\n")
    image = rig.image(small.name)
    rig.env.podman("pull", image)
    assert rig.env.podman("run", "--rm", image).stdout == HELLO
    half = rig.env.podman("run", "--rm", image, "sh", "-c", "head -c 5000000 /data/big.bin | wc -c")
    assert half.stdout == "5000000\n"
    before = rig.share(small.image)
    assert 0.3 < before < 0.95
    rig.service.stop()
    rig.service.start()
    # known without a question to the registry
    rig.provider.clear()
    assert rig.env.podman("run", "--rm", image).stdout == HELLO
    assert rig.provider.requests() == []
    assert lab.differing(plain_tree(small), lab.image_tree(rig.env, image)) == []
    # what was here was not fetched again
    assert before + rig.share(small.image) < 1.1


def test_a_killed_store_comes_back(
    flavour: Flavour, make_rig: MakeRig, small: Pushed, plain_tree: PlainTree
) -> None:
    rig = make_rig(flavour, config="background_fetch = false\n")
    image = rig.image(small.name)
    rig.env.podman("pull", image)
    rig.env.podman("run", "--rm", image, "head", "-c", "5000000", "/data/big.bin")
    assert rig.service.stop(signal.SIGKILL) == -signal.SIGKILL
    rig.service.start()
    assert rig.env.podman("run", "--rm", image).stdout == HELLO
    assert lab.differing(plain_tree(small), lab.image_tree(rig.env, image)) == []
    rig.env.podman("rmi", image)
    assert {layer["uses"] for layer in rig.service.status()["layers"]} == {0}
