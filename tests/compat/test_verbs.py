"""Everyday commands of Podman, Skopeo and Buildah on a lazily pulled image."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import rig as lab
from lab.podman import PodmanEnv
from lab.rig import PlainTree, Pushed, Rig

HELLO = "hello from small amd64: 199 files\n"


@pytest.fixture
def pulled(rig: Rig, small: Pushed) -> str:
    """The small image, pulled through the store; its reference."""
    image = rig.image(small.name)
    rig.env.podman("pull", image)
    return image


@pytest.fixture
def elsewhere(rig: Rig, workspace: Path) -> Iterator[PodmanEnv]:
    """An environment of the same flavour that knows no store."""
    with PodmanEnv(
        rig.env.directory.with_name("elsewhere"),
        rig.flavour,
        registries=(rig.client.host, rig.client.upstream),
    ) as env:
        yield env


def test_run_exec_and_commit(rig: Rig, pulled: str) -> None:
    env = rig.env
    assert env.podman("run", "--rm", pulled).stdout == HELLO
    container = env.podman("run", "-d", pulled, "sleep", "600").stdout.strip()
    assert env.podman("exec", container, "cat", "/opt/plugins/new").stdout == "a new plug-in\n"
    seen = env.podman("exec", container, "ls", "-A", "/opt/plugins", "/usr/share/doc").stdout
    assert seen == "/opt/plugins:\nnew\n\n/usr/share/doc:\nkept\n"
    # a file of a lower layer is copied up when it is changed
    env.podman("exec", container, "sh", "-c", "echo more >>/data/small/001.txt; rm /data/third")
    env.podman("commit", "-q", container, "changed:1")
    env.podman("rm", "-f", "--time=0", container)
    changed = env.podman(
        "run", "--rm", "changed:1", "sh", "-c", "cat /data/small/001.txt; ls /data/third || true"
    )
    assert changed.stdout == "file 1\nfile 1\nmore\n"
    assert "No such file" in changed.stderr


def test_lists_and_reports(rig: Rig, pulled: str, small: Pushed) -> None:
    env = rig.env
    (listed,) = json.loads(env.podman("images", "--format=json").stdout)
    assert pulled in listed["Names"]
    (inspected,) = json.loads(env.podman("inspect", pulled).stdout)
    assert inspected["Digest"] == small.image.digest
    assert inspected["RootFS"]["Layers"] == [layer.diff_id for layer in small.image.layers]
    usage = env.podman("system", "df", "-v").stdout
    assert f"{small.name.partition(':')[0]}" in usage
    assert env.podman("image", "tree", pulled).stdout.count("─ ID: ") == len(small.image.layers)
    assert env.podman("system", "df", "--format=json").stdout
    size = listed["Size"]
    # dialect L knows the archives' sizes, dialect T adds up the files
    assert 13_000_000 < size < 16_000_000


def test_the_mounted_image_has_the_files_of_a_plain_pull(
    rig: Rig, pulled: str, small: Pushed, plain_tree: PlainTree
) -> None:
    with lab.mounted(rig.env, pulled) as path:
        assert (path / "etc/marker").read_text() == "amd64\n"
        assert path.stat().st_mode & 0o7777 == 0o755
    tree = lab.image_tree(rig.env, pulled)
    assert lab.differing(plain_tree(small), tree, seconds=True) == []


@pytest.mark.parametrize("form", ["oci-archive", "docker-archive"])
def test_a_saved_image_has_the_same_content(
    rig: Rig, pulled: str, elsewhere: PodmanEnv, small: Pushed, plain_tree: PlainTree, form: str
) -> None:
    saved = rig.env.directory.with_name("saved.tar")
    rig.env.podman("save", "--format", form, "-o", saved, pulled)
    elsewhere.podman("load", "-i", saved)
    tree = lab.image_tree(elsewhere, pulled)
    assert lab.differing(plain_tree(small), tree, seconds=True) == []


def test_a_pushed_image_has_the_same_content(
    rig: Rig, pulled: str, elsewhere: PodmanEnv, small: Pushed, plain_tree: PlainTree
) -> None:
    pushed = rig.image(f"pushed/small:{rig.flavour}")
    rig.env.podman("push", pulled, pushed)
    elsewhere.podman("pull", pushed)
    assert lab.extracted_layers(elsewhere)
    assert lab.differing(plain_tree(small), lab.image_tree(elsewhere, pushed), seconds=True) == []
    assert elsewhere.podman("run", "--rm", pushed).stdout == HELLO


def test_skopeo_copies_into_the_storage(rig: Rig, small: Pushed) -> None:
    rig.env.skopeo(
        "copy", f"docker://{rig.image(small.name)}", "containers-storage:localhost/copied:1"
    )
    assert lab.blob_requests(rig.client, small.image) == []
    assert len(lab.store_layers(rig.env, rig.store)) == len(small.image.layers)
    assert rig.env.podman("run", "--rm", "localhost/copied:1").stdout == HELLO


def test_buildah_builds_on_it(rig: Rig, small: Pushed, elsewhere: PodmanEnv) -> None:
    env = rig.env
    container = env.buildah("from", rig.image(small.name)).stdout.strip()
    assert lab.blob_requests(rig.client, small.image) == []
    env.buildah("run", container, "--", "sh", "-c", "echo built >/etc/marker; rm -r /opt")
    built = rig.image(f"built/small:{rig.flavour}")
    env.buildah("commit", "--rm", container, built)
    assert env.podman("run", "--rm", built).stdout == HELLO.replace("amd64", "built")
    env.podman("push", built)
    elsewhere.podman("pull", built)
    assert elsewhere.podman("run", "--rm", built).stdout == HELLO.replace("amd64", "built")
    assert lab.differing(lab.image_tree(env, built), lab.image_tree(elsewhere, built)) == []
