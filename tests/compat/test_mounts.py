"""Layers mounted by us and by Podman, with counts that both keep."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import images, oci, tars
from lab.oci import LayerSource, RunConfig
from lab.podman import Flavour, PodmanEnv
from layerstore.errors import MountError, UnknownObject
from layerstore.graphroot import mounts, overlaymount
from layerstore.graphroot.images import Image
from layerstore.graphroot.storageconf import StorageConfig
from layerstore.graphroot.store import Store

MakePodmanEnv = Callable[..., PodmanEnv]
NAME = "localhost/small:1"


def open_store(env: PodmanEnv) -> Store:
    return Store.open(StorageConfig.from_system(env=env.environment()))


def counts(env: PodmanEnv) -> dict[str, int]:
    path = env.run_root / "overlay-layers/mountpoints.json"
    if not path.exists():
        return {}
    return {each["id"]: each["count"] for each in json.loads(path.read_text() or "[]") or []}


def load(env: PodmanEnv) -> Image:
    env.skopeo("copy", "--quiet", images.small_image().source, f"containers-storage:{NAME}")
    return open_store(env).image(NAME)


@pytest.fixture
def env(flavour: Flavour, make_podman_env: MakePodmanEnv) -> PodmanEnv:
    return make_podman_env(flavour)


def test_we_mount_and_podman_unmounts(env: PodmanEnv) -> None:
    image = load(env)
    store = open_store(env)
    path = mounts.mount_image(store, image)
    assert path == env.graph_root / "overlay" / image.top_layer / "merged"
    assert (path / "etc/marker").read_text() == "amd64\n"
    assert not (path / "data/small/000.txt").exists()
    with pytest.raises(OSError, match="Read-only"):
        (path / "new").touch()
    assert counts(env) == {image.top_layer: 1}
    listed = json.loads(env.podman("image", "mount", "--format", "json").stdout)
    assert [each["mountpoint"] for each in listed] == [str(path)]
    assert (path / "etc/marker").exists()  # no command of Podman's hid or ended it
    env.podman("image", "unmount", NAME)
    assert counts(env) == {}
    assert not overlaymount.is_mounted(path)


def test_podman_mounts_and_we_unmount(env: PodmanEnv) -> None:
    image = load(env)
    path = Path(env.podman("image", "mount", NAME).stdout.strip())
    store = open_store(env)
    assert mounts.mounted(store)[0].path == path
    assert mounts.unmount_image(store, image) is False
    assert not overlaymount.is_mounted(path)
    assert counts(env) == {}
    with pytest.raises(UnknownObject):
        mounts.unmount_image(store, image)
    assert json.loads(env.podman("image", "mount", "--format", "json").stdout or "[]") in ([], None)
    assert env.podman("image", "mount", NAME).stdout.strip() == str(path)
    env.podman("image", "unmount", NAME)


def test_counts_are_shared(env: PodmanEnv) -> None:
    image = load(env)
    store = open_store(env)
    path = mounts.mount_image(store, image)
    assert env.podman("image", "mount", NAME).stdout.strip() == str(path)
    assert mounts.mount_image(store, image) == path
    assert counts(env) == {image.top_layer: 3}
    env.podman("image", "unmount", NAME)
    assert mounts.unmount_image(store, image) is True
    assert (path / "etc/marker").exists()
    assert mounts.unmount_image(store, image) is False
    assert not overlaymount.is_mounted(path)


def test_force_unmounts_whatever_the_count(env: PodmanEnv) -> None:
    image = load(env)
    store = open_store(env)
    for _ in range(3):
        path = mounts.mount_image(store, image)
    assert mounts.unmount_image(store, image, force=True) is False
    assert not overlaymount.is_mounted(path)
    assert counts(env) == {}


def test_a_mount_that_is_gone_is_made_again(env: PodmanEnv) -> None:
    image = load(env)
    store = open_store(env)
    path = mounts.mount_image(store, image)
    overlaymount.detach(path)  # as after a reboot, but with the list kept
    assert mounts.mount_image(store, image) == path
    assert (path / "etc/marker").exists()
    mounts.unmount_image(store, image, force=True)


def test_a_container_is_written_to_by_both(env: PodmanEnv) -> None:
    load(env)
    env.podman("create", "--name", "box", NAME)
    store = open_store(env)
    container = store.container("box")
    path = mounts.mount_container(store, container)
    (path / "app/note").write_text("ours\n")
    assert env.podman("mount", "box").stdout.strip() == str(path)
    (path / "etc/marker").write_text("changed\n")
    env.podman("umount", "box")
    assert mounts.unmount_container(store, container) is False
    run = env.podman("start", "--attach", "box").stdout
    assert run == "hello from small changed: 199 files\n"
    assert "A /app/note" in env.podman("diff", "box").stdout.splitlines()
    # `podman start` may return before the clean-up that conmon starts is through.
    deadline = time.monotonic() + 20
    while counts(env) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert counts(env) == {}


def test_a_running_container_stays_mounted(env: PodmanEnv) -> None:
    load(env)
    env.podman("run", "--detach", "--name", "box", NAME, "/bin/sleep", "60")
    store = open_store(env)
    container = store.container("box")
    path = mounts.mount_container(store, container)
    (path / "app/note").write_text("ours\n")
    assert env.podman("exec", "box", "/bin/cat", "/app/note").stdout == "ours\n"
    assert mounts.unmount_container(store, container) is True
    assert env.podman("exec", "box", "/bin/cat", "/app/note").stdout == "ours\n"
    env.podman("rm", "--force", "--time=0", "box")


def test_the_last_one_out_leaves_nothing_mounted(env: PodmanEnv) -> None:
    image = load(env)
    store = open_store(env)
    mounts.mount_image(store, image)
    assert overlaymount.is_mounted(env.graph_root / "overlay")
    mounts.unmount_image(store, image)
    below = os.fsencode(env.graph_root)
    assert [
        line for line in Path("/proc/self/mountinfo").read_bytes().splitlines() if below in line
    ] == []
    assert env.podman("run", "--rm", NAME).stdout.startswith("hello from small")


def test_layers_of_an_image_store_are_mounted_in_the_run_root(
    env: PodmanEnv, make_podman_env: MakePodmanEnv
) -> None:
    image = load(env)
    client = make_podman_env(env.flavour, additional_image_stores=(env.graph_root,))
    store = open_store(client)
    found = store.image(NAME)
    assert found.read_only
    path = mounts.mount_image(store, found)
    assert path == client.run_root / "overlay" / image.top_layer / "merged"
    assert (path / "etc/marker").read_text() == "amd64\n"
    with pytest.raises(MountError):
        mounts.mount_layer(store, found.top_layer, read_only=False)
    client.podman("run", "--rm", NAME)
    assert mounts.unmount_image(store, found) is False
    assert not path.exists()


@pytest.mark.parametrize("flavour", ["debian13"])  # c/storage 1.43 forks for such a mount
def test_more_layers_than_fit_into_a_page(env: PodmanEnv, tmp_path: Path) -> None:
    sources = [LayerSource(images.tar_bytes(images.base_members()))]
    sources += [
        LayerSource(images.tar_bytes([tars.regular(b"n%d" % number, b"x")]))
        for number in range(120)
    ]
    many = oci.write_image(tmp_path / "many", "1", sources, RunConfig(cmd=("/bin/true",)))
    env.skopeo("copy", "--quiet", many.source, "containers-storage:localhost/many:1")
    store = open_store(env)
    image = store.image("localhost/many:1")
    path = mounts.mount_image(store, image)
    assert {f"n{number}" for number in range(120)} <= set(os.listdir(path))
    env.podman("image", "unmount", "localhost/many:1")
    env.podman("create", "--name", "box", "localhost/many:1")
    container = store.container("box")
    merged = mounts.mount_container(store, container)
    (merged / "written").write_text("w")
    assert mounts.unmount_container(store, container) is False
    assert "A /written" in env.podman("diff", "box").stdout.splitlines()
