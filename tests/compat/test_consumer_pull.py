"""What `layerstore pull` puts into a graph root, both generations of Podman use, and the reverse."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab import ctrremote, images, oci, sparse, tars
from lab import rig as lab
from lab.fresh import fresh
from lab.images import tar_bytes
from lab.oci import StoredImage
from lab.podman import Flavour, PodmanEnv
from lab.recording import RecordingProxy
from lab.registry import DebianRegistry
from lab.rig import MakeRig, PlainTree, Push, Pushed
from layerstore.image.annotations import ESTARGZ_TOC_DIGEST

pytestmark = pytest.mark.compat

HELLO = "hello from small amd64: 199 files\n"


def pulled(env: PodmanEnv, image: str, *flags: str) -> dict[str, Any]:
    """`layerstore pull --json` of one image."""
    result = env.layerstore("pull", "--quiet", "--json", *flags, image)
    (found,) = json.loads(result.stdout)
    return dict(found)


def hows(report: dict[str, Any]) -> list[str]:
    return [layer["how"] for layer in report["layers"]]


def use(env: PodmanEnv, image: str, saved: Path) -> None:
    """Everything that people do with an image."""
    assert image.rpartition(":")[0] in env.podman("images").stdout
    (inspected,) = json.loads(env.podman("inspect", image).stdout)
    assert len(inspected["RootFS"]["Layers"]) == 3
    assert env.podman("run", "--rm", image).stdout == HELLO
    env.podman("run", "--detach", "--name", "used", image, "sleep", "600")
    assert env.podman("exec", "used", "cat", "/etc/marker").stdout == "amd64\n"
    env.podman("exec", "used", "sh", "-c", "echo new > /app/new; rm /data/noted")
    env.podman("commit", "--quiet", "used", "localhost/committed:1")
    env.podman("rm", "--force", "--time=0", "used")
    said = env.podman("run", "--rm", "localhost/committed:1", "cat", "/app/new").stdout
    assert said == "new\n"
    # Old Podman cannot make a Docker archive of an image with zstd layers.
    way = ("--format", "oci-archive") if "zstd" in image else ()
    env.podman("save", "--quiet", *way, "-o", saved, image)
    assert saved.stat().st_size > 12 << 20
    saved.unlink()
    env.podman("rmi", "localhost/committed:1")


def nothing_wrong(env: PodmanEnv) -> None:
    """As far as the tools can tell."""
    if env.flavour == "debian13":
        assert env.podman("system", "check", "--quick").stdout == ""
        assert env.podman("system", "check").stdout == ""
        env.containers_storage(*storage(env), "check")
    env.layerstore("check", "storage")


def storage(env: PodmanEnv) -> list[str]:
    return ["--graph", str(env.graph_root), "--run", str(env.run_root)]


def nothing_left(env: PodmanEnv) -> None:
    overlay = env.graph_root / "overlay"
    kept = {"l", "staging", "tempdirs", ".has-mount-program", "backingFsBlockDev"}
    assert {path.name for path in overlay.iterdir()} - kept == set()
    assert list((overlay / "l").iterdir()) == []
    assert not list(overlay.glob("tempdirs/*"))
    assert json.loads((env.graph_root / "overlay-layers/layers.json").read_bytes() or b"[]") == []
    partial = env.graph_root / "layerstore/partial"
    assert not partial.exists() or list(partial.iterdir()) == []


@pytest.fixture(params=["plain", "estargz", "zstd:chunked", "old zstd:chunked", "uncompressed"])
def form(
    request: pytest.FixtureRequest,
    push: Push,
    small: Pushed,
    workspace: Path,
    registry: DebianRegistry,
) -> Pushed:
    """The small image, in each form that layers have."""
    plain = images.small_image()
    match request.param:
        case "plain":
            return push(plain, "consumer/plain:1")
        case "estargz":
            return small
        case "old zstd:chunked":
            return push(ctrremote.converted(plain, "zstdchunked"), "consumer/oldzstd:1")
        case kind:
            request.getfixturevalue("trixie")
            return _packed(workspace, registry, kind, plain)


def _packed(workspace: Path, registry: DebianRegistry, kind: str, image: StoredImage) -> Pushed:
    """`image` with its layers packed as the new tools pack them."""
    name = f"consumer/{kind.replace(':', '-')}:1"
    marker = workspace / f"packed-{kind.partition(':')[0]}"  # Podman mounts nothing below a colon
    if not marker.exists():
        target = f"docker://{registry.host}/{name}"
        with PodmanEnv(marker.with_suffix(".env"), "debian13", registries=(registry.host,)) as env:
            if kind == "uncompressed":
                env.skopeo("copy", "--quiet", "--dest-decompress", image.source, f"dir:{marker}")
                env.skopeo("copy", "--quiet", "--preserve-digests", f"dir:{marker}", target)
            else:
                source = f"{registry.host}/consumer/packed:1"
                env.skopeo("copy", "--quiet", image.source, f"docker://{source}")
                env.podman("pull", "--quiet", source)
                way = (f"--compression-format={kind}", "--force-compression")
                env.podman("push", "--quiet", *way, source, target)
                marker.mkdir()
    return Pushed(name, image)


# -- without a layer store -----------------------------------------------------------------


def test_podman_uses_what_we_pull(
    podman_env: PodmanEnv,
    recorded: RecordingProxy,
    form: Pushed,
    plain_tree: PlainTree,
    workspace: Path,
) -> None:
    env = podman_env
    image = f"{recorded.host}/{form.name}"
    ours = pulled(env, image)
    assert hows(ours) == ["pulled"] * 3
    ids = env.podman("images", "--quiet", "--no-trunc").stdout.split()
    assert ids == [f"sha256:{ours['id']}"]
    assert lab.differing(plain_tree(form), lab.image_tree(env, image)) == []
    use(env, image, workspace / f"used-{env.flavour}.tar")
    nothing_wrong(env)
    # What is there, neither of us fetches again.
    recorded.clear()
    assert env.podman("pull", "--quiet", image).stdout.strip() == ours["id"]
    assert pulled(env, image)["id"] == ours["id"]
    layers = {layer["digest"] for layer in ours["layers"]}
    assert not [r for r in recorded.requests() if r.path.rpartition("/")[2] in layers]
    env.podman("rmi", image)
    nothing_left(env)


def test_we_use_what_podman_pulled(
    podman_env: PodmanEnv, recorded: RecordingProxy, form: Pushed
) -> None:
    env = podman_env
    image = f"{recorded.host}/{form.name}"
    theirs = env.podman("pull", "--quiet", image).stdout.strip()
    recorded.clear()
    ours = pulled(env, image)
    assert ours["id"] == theirs
    assert hows(ours) == ["shared"] * 3
    nothing_wrong(env)


def test_the_records_are_those_that_podman_writes(
    make_podman_env: Callable[..., PodmanEnv],
    flavour: Flavour,
    registry: DebianRegistry,
    form: Pushed,
) -> None:
    same_records(make_podman_env(flavour), make_podman_env(flavour), f"{registry.host}/{form.name}")


def test_the_records_of_an_image_of_an_index_are_those_that_podman_writes(
    make_podman_env: Callable[..., PodmanEnv],
    flavour: Flavour,
    push: Push,
    registry: DebianRegistry,
) -> None:
    index = push(images.small_index(), "consumer/index:1")
    same_records(
        make_podman_env(flavour), make_podman_env(flavour), f"{registry.host}/{index.name}"
    )


def same_records(theirs: PodmanEnv, ours: PodmanEnv, image: str) -> None:
    theirs.podman("pull", "--quiet", image)
    ours.layerstore("pull", "--quiet", image)

    def records(env: PodmanEnv, name: str) -> list[dict[str, Any]]:
        found = json.loads((env.graph_root / f"overlay-{name}/{name}.json").read_bytes())
        for record in found:
            del record["created"]
            # Which documents come first, and what is said where there is nothing to say.
            record.pop("metadata", None)
            for key in ("big-data-sizes", "big-data-digests"):
                items = record.get(key, {})
                for name in [name for name in items if name.startswith("signature-")]:
                    del items[name]
            record["big-data-names"] = sorted(
                key for key in record.get("big-data-names", []) if not key.startswith("signature")
            )
        return list(found)

    assert records(ours, "layers") == records(theirs, "layers")
    assert records(ours, "images") == records(theirs, "images")


def test_an_index_is_pulled_for_the_platform_asked_for(
    podman_env: PodmanEnv, push: Push, registry: DebianRegistry
) -> None:
    env = podman_env
    index = push(images.small_index(), "consumer/index:1")
    image = f"{registry.host}/{index.name}"
    ours = pulled(env, image)
    assert env.podman("run", "--rm", image).stdout == HELLO
    theirs = env.podman("pull", "--quiet", image).stdout.strip()
    assert theirs == ours["id"]
    by_digest = f"{registry.host}/consumer/index@{ours['digest']}"
    assert env.podman("image", "inspect", "--format", "{{.Id}}", by_digest).stdout.strip() == theirs
    arm = pulled(env, image, "--platform", "linux/arm64")
    assert env.podman("inspect", "--format", "{{.Architecture}}", image).stdout.strip() == "arm64"
    assert arm["digest"] == ours["digest"]
    assert arm["id"] != ours["id"]


def test_what_podman_pulled_of_an_index_is_an_image_like_any_other(
    podman_env: PodmanEnv, flavour: Flavour, push: Push, registry: DebianRegistry
) -> None:
    env = podman_env
    index = push(images.small_index(), "consumer/index:1")
    image = f"{registry.host}/{index.name}"
    theirs = env.podman("pull", "--quiet", image).stdout.strip()
    (document,) = json.loads(env.layerstore("inspect", image).stdout)
    (wanted,) = json.loads(env.podman("image", "inspect", image).stdout)
    if flavour == "debian12":  # where it is the index's
        del wanted["Digest"]
    for key in wanted.keys() & {"Id", "Digest", "RepoDigests", "Architecture", "Parent"}:
        assert document[key] == wanted[key], key
    assert len(json.loads(env.layerstore("history", "--json", image).stdout)) == len(
        json.loads(env.podman("history", "--format", "json", image).stdout)
    )
    for policy in ("missing", "never", "newer"):
        assert pulled(env, image, "--policy", policy)["id"] == theirs
    copy = f"{registry.host}/consumer/index-of-one:1"
    env.layerstore("push", image, copy)
    env.layerstore("save", "--output", env.tmp / "index.tar", image)
    env.podman("rmi", image)
    assert env.podman("pull", "--quiet", copy).stdout.strip() == theirs
    env.podman("rmi", copy)
    env.podman("load", "--input", env.tmp / "index.tar")
    assert env.podman("run", "--rm", "--pull=never", image).stdout == HELLO
    nothing_wrong(env)


def test_it_says_what_podman_says(
    podman_env: PodmanEnv, registry: DebianRegistry, small: Pushed
) -> None:
    env = podman_env
    image = f"{registry.host}/{small.name}"
    ours = env.layerstore("pull", image)
    env.podman("rmi", image)
    theirs = env.podman("pull", image)
    assert ours.stdout == theirs.stdout

    def lines(said: str) -> list[str]:
        # the order of blobs is arbitrary; old Podman always stores signatures
        return sorted(line for line in said.splitlines() if line != "Storing signatures")

    assert lines(ours.stderr) == lines(theirs.stderr)
    gone = env.layerstore("pull", f"{registry.host}/no/such:1", check=False)
    assert gone.returncode == 1
    assert gone.stdout == ""
    assert "no/such" in gone.stderr


# -- with a layer store ---------------------------------------------------------------------


def test_beside_the_new_podman_a_pull_is_lazy(
    make_rig: MakeRig, small: Pushed, plain_tree: PlainTree, workspace: Path
) -> None:
    rig = make_rig("debian13", config="background_fetch = false\n")
    image = rig.image(small.name)
    ours = pulled(rig.env, image)
    assert hows(ours) == ["als"] * 3
    assert lab.blob_requests(rig.client, small.image) == []
    assert rig.share(small.image) < 0.05
    assert len(lab.store_layers(rig.env, rig.store)) == 3
    assert rig.env.podman("run", "--rm", image).stdout == HELLO
    assert lab.differing(plain_tree(small), lab.image_tree(rig.env, image), seconds=True) == []
    use(rig.env, image, workspace / "lazy.tar")
    nothing_wrong(rig.env)
    assert {layer["uses"] for layer in rig.service.status()["layers"]} == {1}
    rig.env.podman("rmi", "--all", "--force")
    assert {layer["uses"] for layer in rig.service.status()["layers"]} == {0}
    nothing_left(rig.env)


def test_the_new_podman_finds_our_lazy_layers_and_we_its(make_rig: MakeRig, small: Pushed) -> None:
    rig = make_rig("debian13")
    image = rig.image(small.name)
    ours = pulled(rig.env, image)
    rig.env.podman("pull", "--quiet", image)
    # Podman's id leaves the config out, ours does not: two images, but the same layers.
    assert [layer["id"] for layer in ours["layers"]] == [
        record["id"] for record in lab.graph_layers(rig.env)
    ]
    rig.env.podman("rmi", "--all", "--force")
    theirs = rig.env.podman("pull", "--quiet", image).stdout.strip()
    again = pulled(rig.env, image)
    assert again["id"] == theirs
    assert hows(again) == ["toc"] * 3
    assert {layer["uses"] for layer in rig.service.status()["layers"]} == {1}


def test_beside_an_old_podman_a_pull_is_whole(
    make_rig: MakeRig, small: Pushed, workspace: Path
) -> None:
    rig = make_rig("debian12")
    image = rig.image(small.name)
    ours = pulled(rig.env, image)
    assert hows(ours) == ["pulled"] * 3
    assert all("Podman" in miss for miss in ours["layerStoreMisses"])
    use(rig.env, image, workspace / "old.tar")


def test_beside_an_old_podman_a_pull_is_lazy_in_its_dialect(
    make_rig: MakeRig, small: Pushed, workspace: Path
) -> None:
    rig = make_rig("debian12")
    image = rig.image(small.name)
    ours = pulled(rig.env, image, "--dialect-l")
    assert hows(ours) == ["als"] * 3
    assert lab.blob_requests(rig.client, small.image) == []
    use(rig.env, image, workspace / "old-lazy.tar")
    assert rig.env.podman("pull", "--quiet", image).stdout.strip() == ours["id"]
    assert hows(pulled(rig.env, image, "--dialect-l")) == ["shared"] * 3
    nothing_wrong(rig.env)
    rig.env.podman("rmi", "--all", "--force")
    assert {layer["uses"] for layer in rig.service.status()["layers"]} == {0}
    nothing_left(rig.env)


def test_what_the_old_podman_pulled_lazily_is_believed_in_its_dialect_only(
    make_rig: MakeRig, small: Pushed
) -> None:
    rig = make_rig("debian12")
    image = rig.image(small.name)
    theirs = rig.env.podman("pull", "--quiet", image).stdout.strip()
    believed = pulled(rig.env, image, "--dialect-l")
    assert (believed["id"], hows(believed)) == (theirs, ["shared"] * 3)
    checked = pulled(rig.env, image)
    assert hows(checked) == ["pulled"] * 3
    assert checked["id"] != theirs
    assert rig.env.podman("run", "--rm", image).stdout == HELLO
    nothing_wrong(rig.env)


def test_some_layers_from_the_store_and_some_not(
    make_rig: MakeRig, mixed: Pushed, workspace: Path
) -> None:
    rig = make_rig("debian13")
    ours = pulled(rig.env, rig.image(mixed.name))
    assert hows(ours) == ["als", "pulled", "als"]
    use(rig.env, rig.image(mixed.name), workspace / "mixed.tar")
    nothing_wrong(rig.env)


def test_a_store_that_died_is_a_miss(make_rig: MakeRig, small: Pushed) -> None:
    rig = make_rig("debian13")
    image = rig.image(small.name)
    lazy = pulled(rig.env, image)
    # The mount stays behind, and every call into it fails.
    rig.service.stop(9)
    again = pulled(rig.env, image)
    assert hows(again) == ["pulled"] * 3
    assert again["id"] != lazy["id"]
    rig.service.start()
    assert rig.env.podman("run", "--rm", image).stdout == HELLO


# -- the attack ---------------------------------------------------------------------------------


def test_a_toc_never_answers_for_honest_layers(
    make_podman_env: Callable[..., PodmanEnv],
    trixie: object,
    workspace: Path,
    push: Push,
    registry: DebianRegistry,
) -> None:
    """An image of an honest blob and diff ID, and a TOC of the attacker's; then the honest one.

    The layer store is a directory that shows what the TOC says, and states the honest digests.
    """
    honest = push(images.small_image(), "good/image:1")
    toc = "sha256:" + "ab" * 32

    def change(manifest: dict[str, Any], config: dict[str, Any]) -> None:
        manifest["layers"][2]["annotations"] = {ESTARGZ_TOC_DIGEST: toc}

    layout = workspace / "attack"
    lab.edited(images.small_image(), layout, change)
    evil = push(oci.read_image(layout, "latest"), "evil/image:1")
    name = f"{registry.host}/{evil.name}"
    store = workspace / "evil-store"
    place = store / base64.b64encode(name.encode()).decode() / toc
    (place / "diff/app").mkdir(parents=True)
    (place / "diff/app/hello").write_text("#!/bin/sh\necho evil\n")
    (place / "diff/app/hello").chmod(0o755)
    layer = honest.image.layers[2]
    info = {"toc-digest": toc, "diff-size": 10240, "compression": 2}
    claims = {"diff-digest": layer.diff_id, "compressed-diff-digest": layer.digest}
    (place / "info").write_text(json.dumps({**info, **claims}))
    (place / "blob").write_bytes(b"")
    for puller in ("podman", "layerstore"):
        env = make_podman_env("debian13", additional_layer_store=store)
        if puller == "podman":
            # Podman takes the claims over into its records.
            env.podman("pull", "--quiet", name)
        else:
            assert hows(pulled(env, name)) == ["pulled", "pulled", "als"]
        assert env.podman("run", "--rm", name).stdout == "evil\n"
        ours = pulled(env, f"{registry.host}/{honest.name}")
        # Of the layers below, all is known; only the attacker's comes anew.
        assert hows(ours)[2] == "pulled"
        assert env.podman("run", "--rm", f"{registry.host}/{honest.name}").stdout == HELLO
        assert env.podman("run", "--rm", name).stdout == "evil\n"


# -- pushes ---------------------------------------------------------------------------------------


def test_a_lazy_image_is_pushed_byte_for_byte(
    make_rig: MakeRig, small: Pushed, registry: DebianRegistry
) -> None:
    rig = make_rig("debian13")
    image = rig.image(small.name)
    ours = pulled(rig.env, image)
    target = f"{registry.host}/consumer/pushed-lazy:1"
    sent = json.loads(rig.env.layerstore("push", "--quiet", "--json", image, target).stdout)
    assert sent["digest"] == ours["digest"] == small.image.digest
    rig.env.podman("rmi", "--all", "--force")
    rig.env.podman("pull", "--quiet", target)
    assert rig.env.podman("run", "--rm", target).stdout == HELLO


def test_a_pushed_image_is_the_same_for_podman(
    podman_env: PodmanEnv, form: Pushed, registry: DebianRegistry
) -> None:
    env = podman_env
    image = f"{registry.host}/{form.name}"
    ours = pulled(env, image)
    target = f"{registry.host}/consumer/pushed-{env.flavour}:{form.name.split('/')[1][:4]}"
    env.layerstore("push", "--quiet", image, target)
    env.podman("rmi", "--all", "--force")
    assert env.podman("pull", "--quiet", target).stdout.strip() == ours["id"]
    assert env.podman("run", "--rm", target).stdout == HELLO


def test_what_podman_committed_is_pushed(
    podman_env: PodmanEnv, small: Pushed, registry: DebianRegistry
) -> None:
    env = podman_env
    image = f"{registry.host}/{small.name}"
    env.podman("pull", "--quiet", image)
    env.podman("run", "--name", "made", image, "sh", "-c", "echo mine > /app/mine")
    env.podman("commit", "--quiet", "made", "localhost/mine:1")
    env.podman("rm", "--force", "made")
    target = f"{registry.host}/consumer/mine-{env.flavour}:1"
    env.layerstore("push", "--quiet", "localhost/mine:1", target)
    env.podman("rmi", "--all", "--force")
    assert env.podman("run", "--rm", target, "cat", "/app/mine").stdout == "mine\n"


@pytest.fixture(scope="session", params=sparse.VERSIONS)
def with_holes(request: pytest.FixtureRequest, workspace: Path, push: Push) -> Pushed:
    """A layer with sparse files, on an empty base."""
    place = fresh("sparse-", workspace)
    layers = [tar_bytes([tars.directory(b"base")]), sparse.sparse_tar(place, request.param)]
    config = oci.RunConfig()
    image = oci.write_image(place / "image", "1", map(oci.LayerSource, layers), config)
    return push(image, f"sparse/{request.param}:1")


def test_layers_with_sparse_files_are_podmans_and_come_back(
    podman_env: PodmanEnv, registry: DebianRegistry, with_holes: Pushed, plain_tree: PlainTree
) -> None:
    """Podman itself can only pull them."""
    image = f"{registry.host}/{with_holes.name}"
    pulled(podman_env, image)
    assert lab.differing(plain_tree(with_holes), lab.image_tree(podman_env, image)) == []
    podman_env.podman("save", "-q", "--format=oci-archive", "-o", podman_env.tmp / "theirs", image)
    podman_env.layerstore("save", "-q", "--format=oci-dir", "-o", podman_env.tmp / "ours", image)
    nothing_wrong(podman_env)
    podman_env.layerstore("check", "storage", "--full")
    podman_env.podman("rmi", image)
    podman_env.podman("pull", image)
    failed = podman_env.layerstore("push", image, f"dir:{podman_env.tmp}/pushed", check=False)
    assert failed.returncode == 1
    assert "its files in the storage give sha256:" in failed.stderr
    assert "take the image from where it came from" in failed.stderr


def test_a_sparse_layer_that_podman_pulled_is_pulled_anew_for_another_base(
    podman_env: PodmanEnv, registry: DebianRegistry, with_holes: Pushed, push: Push, workspace: Path
) -> None:
    def without_base(manifest: lab.Document, config: lab.Document) -> None:
        for layers in manifest["layers"], config["rootfs"]["diff_ids"], config["history"]:
            del layers[0]

    layout = lab.edited(with_holes.image, fresh("edited-", workspace) / "image", without_base)
    other = push(oci.read_image(layout, "1"), f"other-{with_holes.name}")
    theirs, image = (f"{registry.host}/{each.name}" for each in (with_holes, other))
    podman_env.podman("pull", theirs)
    pulled(podman_env, image)
    podman_env.podman("rmi", theirs)
    # no copy of the layer that Podman had, which cannot be given back
    podman_env.podman("save", "-q", "--format=oci-archive", "-o", podman_env.tmp / "saved", image)
    podman_env.layerstore("check", "storage")
