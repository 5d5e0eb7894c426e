"""`--store DIR`: a graph root of ours that Podman and CRI-O read as an additional image store."""

import json
from pathlib import Path

import pytest

from lab import images
from lab.podman import CommandError, Flavour, PodmanEnv
from lab.rig import MakeRig, Push, Pushed, Rig

HELLO = "hello from small amd64: 199 files\n"


class Site:
    """Two client graph roots of one flavour that share a published store; layers are lazy."""

    def __init__(self, rig: Rig, other: PodmanEnv) -> None:
        self.rig = rig
        self.published = rig.env.directory / "published"
        self.clients = (rig.env, other)

    def pull(self, image: str, *flags: str) -> str:
        clients = [f"--client={env.graph_root}" for env in self.clients]
        # Podman 4 cannot bear layers that are known by their TOC only
        lazily = "--dialect-l" if self.rig.flavour == "debian12" else "--toc-layers"
        done = self.rig.env.layerstore(
            "pull", "--store", self.published, lazily, *clients, *flags, image
        )
        for env in self.clients:
            env.configure_storage(
                additional_layer_store=self.rig.store, additional_image_stores=[self.published]
            )
        return done.stdout.strip()

    def ours(self, *arguments: str, check: bool = True):
        return self.rig.env.layerstore(*arguments, "--store", self.published, check=check)

    def layer_directories(self) -> set[str]:
        return {
            path.name
            for path in (self.published / "overlay").iterdir()
            if len(path.name) == 64 and path.is_dir()
        }


@pytest.fixture
def site(flavour: Flavour, make_rig: MakeRig, make_podman_env) -> Site:
    rig = make_rig(flavour)
    return Site(rig, make_podman_env(flavour, registries=(rig.client.host,)))


def test_images_appear_without_a_pull_and_run_lazily(site: Site, small: Pushed) -> None:
    image = site.rig.image(small.name)
    identity = site.pull(image)
    site.rig.client.clear()
    for env in site.clients:
        (shown,) = json.loads(env.podman("images", "--format", "json").stdout)
        assert (shown["Id"], shown["Names"]) == (identity, [image])
        assert shown["ReadOnly"] is True
        assert env.podman("run", "--rm", "--pull=never", image).stdout == HELLO
        # nothing of it is in the client's own graph root
        own = env.graph_root / "overlay-images/images.json"
        assert not own.exists() or json.loads(own.read_bytes()) == []
    assert site.rig.client.requests() == []
    for name in site.layer_directories():
        assert (site.published / "overlay" / name / "additionallayer").exists()
    assert json.loads(site.ours("check", "storage", "--json").stdout)["clean"]


def test_a_name_that_a_client_gives(site: Site, small: Pushed) -> None:
    """Podman 4 writes a record without big data for it, Podman 5 one with a copy."""
    image = site.rig.image(small.name)
    site.pull(image)
    for env in site.clients:
        env.podman("tag", image, "localhost/tagged:1")
        ours = json.loads(env.layerstore("images", "--json").stdout)
        assert {name for one in ours for name in one["Names"]} == {image, "localhost/tagged:1"}
        for name in ("tagged:1", image):
            (document,) = json.loads(env.layerstore("inspect", name).stdout)
            (theirs,) = json.loads(env.podman("image", "inspect", name).stdout)
            assert document["Id"] == theirs["Id"]
        saved = env.tmp / "tagged.tar"
        env.layerstore("save", "--output", saved, "localhost/tagged:1")
        again = env.layerstore("pull", "--json", "--policy", "missing", "localhost/tagged:1")
        assert json.loads(again.stdout)[0]["id"] == theirs["Id"]
        assert json.loads(env.layerstore("check", "storage", "--json").stdout)["clean"]
        env.layerstore("untag", "localhost/tagged:1", "localhost/tagged:1")
        assert env.podman("run", "--rm", "--pull=never", image).stdout == HELLO


def test_removal_waits_for_running_and_stopped_containers(site: Site, small: Pushed) -> None:
    image = site.rig.image(small.name)
    site.pull(image)
    layers = site.layer_directories()
    running, stopped = site.clients
    running.podman("run", "-d", "--name", "busy", image, "/bin/sh", "-c", "sleep 1000")
    stopped.podman("create", "--name", "asleep", image)

    refused = site.ours("rmi", image, check=False)
    assert refused.returncode != 0
    assert "busy" in refused.stderr or "asleep" in refused.stderr
    site.ours("rmi", "--force", image)
    site.ours("prune", "--force", "--grace", "0")
    for env in site.clients:
        assert env.podman("images", "-q").stdout == ""
    assert site.layer_directories() == layers
    assert running.podman("exec", "busy", "/bin/echo", "still").stdout == "still\n"
    assert stopped.podman("start", "-a", "asleep").stdout == HELLO

    running.podman("rm", "--force", "--time=0", "busy")
    site.ours("prune", "--force", "--grace", "0")
    assert site.layer_directories() == layers  # the stopped one still needs them
    stopped.podman("rm", "asleep")
    site.ours("prune", "--force")
    assert site.layer_directories() == layers  # somebody may just have chosen the image
    site.ours("prune", "--force", "--grace", "0")
    assert site.layer_directories() == set()
    assert json.loads(site.ours("check", "storage", "--json").stdout)["clean"]


def test_a_mount_of_an_unknown_client_keeps_layers(
    site: Site, small: Pushed, make_podman_env, flavour: Flavour
) -> None:
    image = site.rig.image(small.name)
    site.pull(image)
    stranger = make_podman_env(flavour)
    stranger.configure_storage(
        additional_layer_store=site.rig.store, additional_image_stores=[site.published]
    )
    stranger.podman("run", "-d", "--name", "unknown", image, "/bin/sh", "-c", "sleep 1000")
    layers = site.layer_directories()
    site.ours("rmi", image)
    site.ours("prune", "--force", "--grace", "0")
    assert site.layer_directories() == layers
    assert stranger.podman("exec", "unknown", "/bin/echo", "still").stdout == "still\n"
    stranger.podman("rm", "--force", "--time=0", "unknown")
    site.ours("prune", "--force", "--grace", "0")
    assert site.layer_directories() == set()


def test_a_moved_tag_is_an_update_beside_running_containers(
    site: Site, push: Push, push_lazy: Push
) -> None:
    first = push_lazy(images.small_image(marker="first"), "moving/store:1")
    image = site.rig.image(first.name)
    old = site.pull(image)
    client = site.clients[0]
    client.podman("run", "-d", "--name", "old", image, "/bin/sh", "-c", "sleep 1000")
    push_lazy(images.small_image(marker="second"), "moving/store:1")
    new = site.pull(image)
    assert new != old
    (shown,) = json.loads(client.podman("images", "--format", "json", image).stdout)
    assert shown["Id"] == new
    assert "second" in client.podman("run", "--rm", "--pull=never", image).stdout
    assert client.podman("exec", "old", "/bin/echo", "alive").stdout == "alive\n"
    site.ours("prune", "--force", "--grace", "0")
    assert client.podman("exec", "old", "/bin/echo", "alive").stdout == "alive\n"
    assert client.podman("image", "exists", old, check=False).returncode == 0
    client.podman("rm", "--force", "--time=0", "old")
    site.ours("prune", "--force", "--grace", "0")
    assert client.podman("image", "exists", old, check=False).returncode == 1
    assert "second" in client.podman("run", "--rm", "--pull=never", image).stdout


def test_the_store_is_named_rightly(make_podman_env, tmp_path: Path) -> None:
    env = make_podman_env()
    for arguments, says in (
        (("images", "--store", tmp_path), "no published image store"),
        (("images", "--store", tmp_path, "--root", tmp_path), "--store names the storage"),
        (("pull", "--client", "/x", "name"), "--client goes with --store"),
        (("pull", "--store", tmp_path / "new", "--client", "x", "name"), "absolute"),
    ):
        with pytest.raises(CommandError, match=says) as caught:
            env.layerstore(*arguments)
        assert caught.value.result.returncode == 2
