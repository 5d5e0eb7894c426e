"""Use counts: a hint for the store's own housekeeping, exact as long as clients behave."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lab import rig as lab
from lab.podman import FLAVOURS, Flavour, PodmanEnv
from lab.rig import MakeRig, Pushed, Rig

HELLO = "hello from small amd64: 199 files\n"


def uses(rig: Rig) -> set[int]:
    """The counts of all layers."""
    return {layer["uses"] for layer in rig.service.status()["layers"]}


def test_a_pull_takes_one_use_and_rmi_gives_it_back(rig: Rig, small: Pushed) -> None:
    image = rig.image(small.name)
    rig.env.podman("pull", image)
    assert uses(rig) == {1}
    rig.env.podman("run", "--rm", image)
    rig.env.podman("save", "-o", rig.env.tmp / "saved.tar", image)
    assert uses(rig) == {1}
    rig.env.podman("rmi", image)
    assert uses(rig) == {0}


def test_an_image_is_lazy_again_after_the_last_rmi(rig: Rig, small: Pushed) -> None:
    """stargz-store drops the layers at the last release, yet thinks that it has them."""
    image = rig.image(small.name)
    for _ in range(3):
        rig.env.podman("pull", image)
        assert len(lab.store_layers(rig.env, rig.store)) == len(small.image.layers)
        assert uses(rig) == {1}
        assert rig.env.podman("run", "--rm", image).stdout == HELLO
        rig.env.podman("rmi", image)
    assert lab.blob_requests(rig.client, small.image) == []
    assert "lookup-refused" not in rig.service.log()


def test_counts_survive_a_restart(rig: Rig, small: Pushed) -> None:
    image = rig.image(small.name)
    rig.env.podman("pull", image)
    assert rig.service.stop() == 0
    rig.service.start()
    assert uses(rig) == {1}
    rig.env.podman("rmi", image)
    assert uses(rig) == {0}
    rig.service.stop()
    rig.service.start()
    assert uses(rig) == {0}


def test_graph_roots_share_the_store(
    flavour: Flavour, make_rig: MakeRig, make_podman_env: Callable[..., PodmanEnv], small: Pushed
) -> None:
    rig = make_rig(flavour)
    other = make_podman_env(
        flavour, registries=(rig.client.host,), additional_layer_store=rig.store
    )
    image = rig.image(small.name)
    rig.env.podman("pull", image)
    other.podman("pull", image)
    assert uses(rig) == {2}
    rig.env.podman("rmi", image)
    assert uses(rig) == {1}
    assert other.podman("run", "--rm", image).stdout == HELLO
    other.podman("rmi", image)
    assert uses(rig) == {0}


def test_a_lost_graph_root_is_no_harm(rig: Rig, small: Pushed, workspace: Path) -> None:
    """Who removes a graph root never says so: counts stay, and nothing depends on them."""
    image = rig.image(small.name)
    rig.env.podman("pull", image)
    rig.env.graph_root.rename(rig.env.directory / "lost")
    rig.env.graph_root.mkdir()
    rig.env.podman("pull", image)
    assert rig.env.podman("run", "--rm", image).stdout == HELLO
    assert uses(rig) == {2}


def test_both_dialects_share_what_was_fetched(
    make_rig: MakeRig, make_podman_env: Callable[..., PodmanEnv], small: Pushed
) -> None:
    """Podman 4 and 5 at once on one store: two names, one layer."""
    rig = make_rig("debian12")
    image = rig.image(small.name)
    envs = [
        make_podman_env(flavour, registries=(rig.client.host,), additional_layer_store=rig.store)
        for flavour in FLAVOURS
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda env: env.podman("pull", image), envs))
        ran = pool.map(lambda env: env.podman("run", "--rm", image).stdout, envs)
        assert list(ran) == [HELLO, HELLO]
    rig.service.wait_complete()
    assert len(rig.service.status()["layers"]) == len(small.image.layers)
    assert uses(rig) == {2}
    assert rig.share(small.image) < 1.05
    for env in envs:
        assert len(lab.store_layers(env, rig.store)) == len(small.image.layers)
        env.podman("rmi", image)
    assert uses(rig) == {0}
