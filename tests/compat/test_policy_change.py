"""The administrator changes the policy: the next pull obeys it, and who runs already runs on."""

from __future__ import annotations

import hashlib
import sqlite3
from typing import Final

import pytest

from lab import images
from lab import rig as lab
from lab.rig import MakeRig, Push, Pushed, Rig

HELLO: Final = "hello from small amd64: 199 files\n"
ON_DEMAND: Final = "prefetch = false\nbackground_fetch = false\n"
BIG: Final = hashlib.sha256(images.noise(images.SMALL_BIG_BYTES)).hexdigest()

CHANGES: Final = {
    "verified": (
        ON_DEMAND,
        'dialect_l = "verified"\n[ordinary]\npolicy = "known"\n',
        "not-here",
    ),
    "off": (ON_DEMAND, 'dialect_l = "off"\n', "dialect-l-off"),
    "ordinary-off": (
        ON_DEMAND + '[ordinary]\npolicy = "eager"\neager_seconds = 24\n',
        '[ordinary]\npolicy = "off"\n',
        "ordinary-layers-off",
    ),
}


@pytest.fixture(scope="module")
def ordinary(push: Push) -> Pushed:
    """The small image as it was built."""
    return push(images.small_image(), "ordinary/small:1")


def reload(rig: Rig, config: str) -> None:
    rig.service.configure(config)
    rig.env.layerstore("reload", "--root", rig.service.root)


def forget_uses(rig: Rig) -> None:
    """As if the use counts had been lost in a crash."""
    assert rig.service.stop() == 0
    with sqlite3.connect(rig.service.root / "state.sqlite") as state:
        state.execute("UPDATE uses SET count = 0")
    state.close()
    rig.service.start()


def linked(rig: Rig) -> int:
    """Layers of the graph root that are in the store; containers have others."""
    return len(lab.graph_layers(rig.env)) - len(lab.extracted_layers(rig.env))


def read_big(rig: Rig, container: str) -> str:
    done = rig.env.podman("exec", container, "sha256sum", "/data/big.bin")
    return done.stdout.split()[0]


@pytest.mark.parametrize("change", CHANGES)
def test_the_next_pull_obeys_the_policy_and_containers_run_on(
    make_rig: MakeRig, small: Pushed, ordinary: Pushed, change: str
) -> None:
    before, after, reason = CHANGES[change]
    pushed = ordinary if change == "ordinary-off" else small
    rig = make_rig("debian12", config=before)
    podman, image = rig.env.podman, rig.image(pushed.name)
    layers = len(pushed.image.layers)
    podman("pull", image)
    assert linked(rig) == layers
    for name in ("runs", "stopped"):
        podman("run", "-d", "--name", name, image, "sleep", "600")
    podman("stop", "-t", "0", "stopped")

    reload(rig, ON_DEMAND + after)
    # nothing of the large file was read before
    assert read_big(rig, "runs") == BIG
    podman("start", "stopped")
    assert read_big(rig, "stopped") == BIG
    assert podman("run", "--rm", image).stdout == HELLO
    podman("pull", image)
    if change != "verified":  # after it they would be complete, and checked
        podman("save", "-q", "-o", rig.env.tmp / "saved.tar", image)
    assert linked(rig) == layers
    log = rig.service.log()
    assert log.count("event=kept-in-use") == layers
    assert "lookup-refused" not in log or change == "ordinary-off"

    # who loses the counts finds the users in the graph root
    podman("rm", "-f", "-t", "0", "runs")
    podman("stop", "-t", "0", "stopped")
    forget_uses(rig)
    podman("start", "stopped")
    assert podman("run", "--rm", image).stdout == HELLO
    assert "lookup-refused" not in rig.service.log()[len(log) :]

    podman("rm", "-f", "-t", "0", "stopped")
    podman("rmi", image)
    log = rig.service.log()
    podman("pull", image)
    assert linked(rig) == 0
    assert podman("run", "--rm", image).stdout == HELLO
    refused = rig.service.log()[len(log) :].splitlines()
    refused = [line for line in refused if "event=lookup-refused" in line]
    assert len(refused) == layers
    for line in refused:
        assert f"reason={reason} reference={image}" in line


def test_a_pull_obeys_at_once_after_the_last_rmi(make_rig: MakeRig, small: Pushed) -> None:
    """As it was found: pull, rmi, reload, pull; and the other way round."""
    rig = make_rig("debian12", config=ON_DEMAND)
    podman, image = rig.env.podman, rig.image(small.name)
    for _ in range(2):
        podman("pull", image)
        assert linked(rig) == len(small.image.layers)
        podman("rmi", image)
        reload(rig, ON_DEMAND + 'dialect_l = "off"\n')
        podman("pull", image)
        assert linked(rig) == 0
        podman("rmi", image)
        reload(rig, ON_DEMAND)
