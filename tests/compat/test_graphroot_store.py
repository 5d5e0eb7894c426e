"""A graph root that we write, under the real tools, and theirs under ours."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab import handmade, images, tars
from lab.oci import StoredImage
from lab.podman import PodmanEnv
from layerstore.errors import InUse, UnknownObject
from layerstore.graphroot.identity import image_id, layer_id
from layerstore.graphroot.images import Image
from layerstore.graphroot.records import INCOMPLETE, LayerRecord
from layerstore.graphroot.stage import stage_layer
from layerstore.graphroot.storageconf import StorageConfig
from layerstore.graphroot.store import Store
from layerstore.image import Digest

MakePodmanEnv = Callable[..., PodmanEnv]
NAME = "localhost/small:1"
OTHER = "docker.io/library/small:2"
ROUNDS = 6
KILLS = 24


def open_store(env: PodmanEnv, *stores: Path) -> Store:
    return Store.open(
        StorageConfig(env.graph_root, env.run_root, additional_image_stores=tuple(stores))
    )


def put(store: Store, image: StoredImage, *names: str) -> Image:
    """Put an image of a layout into a graph root, as a pull does."""

    def blob(digest: str) -> Path:
        return image.layout / "blobs" / digest.replace(":", "/")

    manifest = blob(image.digest).read_bytes()
    config = blob(json.loads(manifest)["config"]["digest"]).read_bytes()
    parent = ""
    with store.staging() as staging:
        for layer in image.layers:
            diff_id = Digest.parse(layer.diff_id)
            with blob(layer.digest).open("rb") as source:
                staged = stage_layer(
                    staging.new(),
                    source,
                    blob_digest=Digest.parse(layer.digest),
                    blob_size=layer.size,
                    diff_id=diff_id,
                    whiteouts=store.whiteouts,
                )
            parent = store.put_layer(layer_id(parent, diff_id=diff_id), parent, staged).id
    return store.put_image(
        image_id=image_id(Digest.of(config)),
        layer=parent,
        names=names,
        manifest=manifest,
        config=config,
        created=json.loads(config)["created"],
    )


def skopeo_copy(env: PodmanEnv, image: StoredImage, name: str = NAME) -> None:
    env.skopeo("copy", "--quiet", image.source, f"containers-storage:{name}")


def records(env: PodmanEnv, kind: str) -> list[dict[str, Any]]:
    path = env.graph_root / f"overlay-{kind}/{kind}.json"
    loaded: list[dict[str, Any]] = json.loads(path.read_text() or "[]") if path.exists() else []
    return loaded


def listing(env: PodmanEnv) -> list[str]:
    """Names, kinds, modes and owners of all that belongs to layers and images."""
    lines = []
    for top in ("overlay", "overlay-layers", "overlay-images"):
        for directory, subdirectories, files in os.walk(env.graph_root / top):
            for name in (*subdirectories, *files):
                path = Path(directory, name)
                facts = path.lstat()
                # short names are random, and links have none of these
                shown = re.sub("/l/[A-Z2-7]{26}$", "/l/NAME", str(path.relative_to(env.graph_root)))
                lines.append(f"{shown} {facts.st_mode:o} {facts.st_uid}:{facts.st_gid}")
    return sorted(lines)


def no_check_errors(env: PodmanEnv) -> None:
    if env.flavour == "debian13":
        checked = env.podman("system", "check")
        assert checked.stdout == checked.stderr == ""


def nothing_left(env: PodmanEnv) -> None:
    root = env.graph_root
    assert os.listdir(root / "overlay/l") == []
    assert {path.name for path in (root / "overlay").iterdir()} <= {"l", ".has-mount-program"}
    for kind in ("layers", "images"):
        left = {path.name for path in (root / f"overlay-{kind}").iterdir()}
        assert left <= {f"{kind}.json", f"volatile-{kind}.json", f"{kind}.lock"}


def test_their_tools_take_what_we_wrote(podman_env: PodmanEnv) -> None:
    env, stored = podman_env, images.small_image()
    image = put(open_store(env), stored, NAME, OTHER)

    (shown,) = json.loads(env.podman("image", "inspect", NAME).stdout)
    assert shown["Id"] == image.id
    assert shown["RepoTags"] == [NAME, OTHER]
    assert shown["Digest"] == stored.digest
    assert shown["Size"] == image.size()
    assert shown["RootFS"]["Layers"] == [layer.diff_id for layer in stored.layers]
    listed = json.loads(env.podman("images", "--format", "json").stdout)
    assert all(entry["Names"] == [NAME, OTHER] for entry in listed)  # once for each name
    for name in (NAME, "small:2", f"docker.io/library/small@{stored.digest}", image.id[:5]):
        env.podman("image", "exists", name)
        assert open_store(env).image(name).id == image.id
    assert env.podman("run", "--rm", NAME).stdout.startswith("hello from small")

    layers = json.loads(env.containers_storage("layers", "--json").stdout)
    assert [layer["id"] for layer in layers] == [layer.id for layer in image.layers()]
    (entry,) = json.loads(env.containers_storage("images", "--json").stdout)
    assert entry["id"] == image.id
    assert entry["names"] == [NAME, OTHER]
    text = env.containers_storage("image", NAME).stdout
    assert f"Top Layer: {image.top_layer}" in text
    manifest = env.containers_storage("get-image-data", image.id, "manifest").stdout
    assert manifest.encode() == image.manifest()
    no_check_errors(env)

    assert "Untagged" in env.podman("rmi", OTHER).stdout
    assert open_store(env).image(image.id).names == (NAME,)
    assert f"Deleted: {image.id}" in env.podman("rmi", NAME).stdout
    store = open_store(env)
    assert store.layers() == []
    assert store.images() == []
    nothing_left(env)


def test_we_write_what_they_would(make_podman_env: MakePodmanEnv, podman_env: PodmanEnv) -> None:
    theirs, ours = podman_env, make_podman_env(podman_env.flavour)
    stored = images.small_image()
    skopeo_copy(theirs, stored)
    ours.podman("images")  # lets Podman make what it makes in any graph root
    put(open_store(ours), stored, NAME)

    def layers(env: PodmanEnv) -> list[list[tuple[str, Any]]]:
        return [
            [(key, "" if key == "created" else value) for key, value in record.items()]
            for record in records(env, "layers")
        ]

    assert layers(ours) == layers(theirs)
    (our_image,), (their_image,) = records(ours, "images"), records(theirs, "images")
    if podman_env.flavour == "debian13":
        assert our_image == their_image
        assert listing(ours) == listing(theirs)
    else:  # which writes empty signatures
        (signature,) = set(their_image["big-data-names"]) - set(our_image["big-data-names"])
        assert signature.startswith("signature-")
        assert set(listing(ours)) < set(listing(theirs))
        assert len(listing(theirs)) - len(listing(ours)) == 1
    assert list(our_image) == list(their_image)


def test_modes_of_layers_are_inherited_as_theirs_are(
    make_podman_env: MakePodmanEnv, podman_env: PodmanEnv
) -> None:
    theirs, ours = podman_env, make_podman_env(podman_env.flavour)
    store = open_store(ours)
    archives = [
        [tars.directory(b"./", mode=0o700), tars.regular(b"a")],  # "." does not count
        [tars.regular(b"b")],
        [tars.directory(b"/", mode=0o1711), tars.regular(b"c")],  # "/" does
        [tars.regular(b"d")],  # without the sticky bit
        [tars.directory(b"/", mode=0o2777, uid=7, gid=8), tars.regular(b"e")],
        [tars.regular(b"f")],
    ]
    parent = our_parent = ""
    for number, members in enumerate(archives):
        path = theirs.directory / f"{number}.tar"
        path.write_bytes(images.tar_bytes(members))
        below = [parent] if parent else []
        their_id = theirs.containers_storage("import-layer", "-f", path, *below).stdout.split()[0]
        our_layer = handmade.put_layer(store, members, our_parent)
        expected = (theirs.graph_root / "overlay" / their_id / "diff").stat()
        found = our_layer.diff_path.stat()
        assert oct(found.st_mode) == oct(expected.st_mode), number
        if theirs.flavour == "debian13":  # the older one leaves all to root
            assert (found.st_uid, found.st_gid) == (expected.st_uid, expected.st_gid)
        parent, our_parent = their_id, our_layer.id


def test_we_take_what_they_wrote(podman_env: PodmanEnv) -> None:
    env, stored = podman_env, images.small_image()
    skopeo_copy(env, stored)
    env.podman("tag", NAME, "quay.io/a/b:1")
    store = open_store(env)
    image = store.image("quay.io/a/b:1")
    assert set(image.names) == {NAME, "quay.io/a/b:1"}
    assert str(image.digest) == stored.digest
    assert [layer.diff_id for layer in image.layers()] == [one.diff_id for one in stored.layers]
    size = json.loads(env.podman("image", "inspect", NAME).stdout)[0]["Size"]
    assert image.size() == size

    env.podman("run", "--detach", "--rm", "--name", "sleeper", NAME, "sleep", "1000")
    container = store.container("sleeper")
    assert container.image_id == image.id
    assert container.record.volatile == (env.flavour == "debian13")
    assert store.layer("sleeper-layer").id == container.layer_id
    with pytest.raises(InUse, match=container.id):
        store.remove_image(image.id, force=True)
    with pytest.raises(InUse):
        store.delete_layer(image.top_layer)
    assert store.prune(all_images=True) == []
    env.podman("exec", "sleeper", "/bin/busybox", "true")

    env.podman("rm", "--force", "--time", "0", "sleeper")
    removed = store.remove_image(image.id, force=True)
    assert removed.deleted_image == image.id
    assert json.loads(env.podman("images", "--all", "--format", "json").stdout) == []
    nothing_left(env)


def test_layers_below_a_container_stay_when_its_image_is_gone(podman_env: PodmanEnv) -> None:
    env = podman_env
    skopeo_copy(env, images.small_image())
    env.podman("create", "--name", "made", NAME)
    env.podman("commit", "--quiet", "made", "localhost/committed:1")
    store = open_store(env)
    image, committed = store.image(NAME), store.image("committed:1")
    assert [layer.id for layer in committed.layers()][:-1] == [one.id for one in image.layers()]
    removed = store.remove_image("committed:1")
    assert removed.deleted_layers == (committed.top_layer,)
    with pytest.raises(InUse):
        store.remove_image(NAME)
    assert env.podman("start", "--attach", "made").stdout.startswith("hello from small")


def test_a_mounted_image_is_unmounted_as_podman_does(podman_env: PodmanEnv) -> None:
    env = podman_env
    skopeo_copy(env, images.small_image())
    place = env.podman("image", "mount", NAME).stdout.strip()
    assert (Path(place) / "bin/busybox").exists()
    open_store(env).remove_image(NAME)
    assert place not in Path("/proc/self/mounts").read_text()
    assert (env.run_root / "overlay-layers/mountpoints.json").read_text() == "[]"
    env.podman("images")
    nothing_left(env)


def test_podman_deletes_what_we_left_half_made(podman_env: PodmanEnv) -> None:
    env, stored = podman_env, images.small_image()
    store = open_store(env)
    with store.layer_area.editing() as edit:
        edit.put(LayerRecord("a" * 64, flags={INCOMPLETE: True}))
        edit.save()
        (store.layer_area.overlay.home / ("a" * 64)).mkdir()
    env.containers_storage("layers")
    assert records(env, "layers") == []
    assert put(store, stored, NAME).layers()
    assert env.podman("run", "--rm", NAME).stdout.startswith("hello from small")


def test_lost_links_come_back(podman_env: PodmanEnv) -> None:
    env = podman_env
    skopeo_copy(env, images.small_image())
    store = open_store(env)
    for link in (env.graph_root / "overlay/l").iterdir():
        link.unlink()
    top = store.layer(store.image(NAME).top_layer)
    assert all(path.is_dir() for path in top.lower_dirs)
    assert env.podman("run", "--rm", NAME).stdout.startswith("hello from small")


def test_our_graph_root_as_their_additional_image_store(
    make_podman_env: MakePodmanEnv, podman_env: PodmanEnv
) -> None:
    shared = make_podman_env(podman_env.flavour)
    image = put(open_store(shared), images.small_image(), NAME)
    env = podman_env
    env.configure_storage(additional_image_stores=[shared.graph_root])
    (entry,) = json.loads(env.podman("images", "--format", "json").stdout)
    assert entry["Id"] == image.id
    assert entry["ReadOnly"] is True
    assert env.podman("run", "--rm", NAME).stdout.startswith("hello from small")
    assert not (env.graph_root / "overlay" / image.top_layer).exists()


def test_we_and_they_build_on_an_additional_image_store(
    make_podman_env: MakePodmanEnv, podman_env: PodmanEnv
) -> None:
    shared = make_podman_env(podman_env.flavour)
    skopeo_copy(shared, images.small_image())
    env = podman_env
    env.configure_storage(additional_image_stores=[shared.graph_root])
    store = open_store(env, shared.graph_root)
    below = store.image(NAME)
    assert below.read_only
    child = handmade.put_layer(store, [tars.regular(b"etc/ours", b"made by us\n")], below.top_layer)
    manifest, config = handmade.documents([*below.layers(), child])
    built = store.put_image(
        image_id=image_id(Digest.of(config)),
        layer=child.id,
        names=["localhost/built:1"],
        manifest=manifest,
        config=config,
    )
    shown = env.podman("run", "--rm", "built:1", "/bin/busybox", "cat", "/etc/ours").stdout
    assert shown == "made by us\n"
    # (`podman system check` misses the layers of the other store, whoever built on them)
    # an image of the other store gets a name of ours; the other store does not change
    before = (shared.graph_root / "overlay-images/images.json").read_bytes()
    store.add_names(below.id, ["localhost/renamed:1"])
    assert env.podman("run", "--rm", "renamed:1").stdout.startswith("hello from small")
    assert store.remove_image(built.id).deleted_layers == (child.id,)
    assert (shared.graph_root / "overlay-images/images.json").read_bytes() == before


def churn(
    graph_root: Path, run_root: Path, number: int, rounds: int = ROUNDS, begun: Any = None
) -> None:
    """Put, name and remove images that share their base with those of others."""
    store = Store.open(StorageConfig(graph_root, run_root))
    if begun is not None:
        begun.set()
    base = [tars.regular(b"base", b"x" * 10_000)]
    for turn in range(rounds):
        own = [tars.regular(b"own", f"{number} {turn}".encode())]
        name = f"localhost/churn{number}:{turn}"
        for _ in range(50):
            # somebody may delete the base between two steps: then from the beginning
            with contextlib.suppress(UnknownObject):
                handmade.put_image(store, [name], [base, own])
                break
        else:
            raise AssertionError("the base was deleted 50 times")
        store.add_names(store.image(name).id, ["localhost/churn:latest"])
        assert len(store.image(name).layers()) == 2
        if turn % 2:
            store.remove_names(store.image(name).id, ["localhost/churn:latest"])
            store.remove_image(name, force=True)
        store.prune()


def test_several_processes_at_once(podman_env: PodmanEnv) -> None:
    env = podman_env
    skopeo_copy(env, images.small_image())
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=churn, args=(env.graph_root, env.run_root, number))
        for number in range(3)
    ]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        env.podman("tag", NAME, "localhost/tagged:1")
        env.podman("run", "--rm", "tagged:1", "/bin/busybox", "true")
        env.podman("untag", NAME, "localhost/tagged:1")
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    store = open_store(env)
    names = {name for image in store.images() for name in image.names}
    expected = {f"localhost/churn{number}:{turn}" for number in range(3) for turn in (0, 2, 4)}
    assert names - {"localhost/churn:latest"} == expected | {NAME}
    for image in store.images():
        assert image.layers()
        image.manifest()
    assert env.podman("run", "--rm", NAME).stdout.startswith("hello from small")
    no_check_errors(env)
    for image in store.images():
        store.remove_image(image.id, force=True)
    nothing_left(env)


def test_killed_at_any_point_nothing_half_made_stays(podman_env: PodmanEnv) -> None:
    env = podman_env
    skopeo_copy(env, images.small_image())
    kept = open_store(env).image(NAME)
    context = multiprocessing.get_context("spawn")
    for number in range(KILLS):
        begun = context.Event()
        worker = context.Process(
            target=churn, args=(env.graph_root, env.run_root, number, 10_000, begun)
        )
        worker.start()
        assert begun.wait(60)
        worker.join(0.007 * number)
        worker.kill()
        worker.join()
        assert worker.exitcode == -signal.SIGKILL
        store = open_store(env)
        for image in store.images():
            assert image.layers()
            image.manifest()
            image.config()
    env.podman("images")
    no_check_errors(env)
    assert env.podman("run", "--rm", NAME).stdout.startswith("hello from small")
    with store.image_area.editing():
        pass  # which sweeps
    known = {layer.id for layer in store.layers()}
    assert set(store.layer_area.overlay.layers()) == known
    splits = {path.name for path in store.layer_area.directory.glob("*.tar-split.gz")}
    assert splits == {f"{layer}.tar-split.gz" for layer in known}
    assert {path.name for path in store.image_area.directory.iterdir() if path.is_dir()} == {
        image.id for image in store.images()
    }
    assert not store.layer_area.overlay.tempdirs.exists()
    assert store.image(kept.id).layers() == kept.layers()
    for image in store.images():
        store.remove_image(image.id, force=True)
    for layer in reversed(store.layers()):  # committed, but never in an image
        store.delete_layer(layer.id)
    nothing_left(env)
