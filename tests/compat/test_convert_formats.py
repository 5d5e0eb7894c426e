"""What `convert` writes in forms other than eStargz, in the hands of the tools they are meant for.

zstd:chunked: Podman and Skopeo take it as an ordinary layer and, where they can, as a partial
pull, for which they ask for byte ranges; and Skopeo writes the same table of contents itself.
"""

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lab import ctrremote, debian, images, oci, torture
from lab import rig as lab
from lab.podman import Flavour, PodmanEnv
from lab.recording import RecordingProxy
from lab.registry import DebianRegistry
from lab.rig import MakeRig, PlainTree, Push, Pushed
from lab.trees import Tree
from lab.trixie import TrixieTools
from layerstore.copy.convert import ConvertOptions, ConvertResult, convert
from layerstore.copy.layerform import ExternalToc, LayerForm, ZstdChunked
from layerstore.formats import LayerStream, iter_toc, read_toc
from layerstore.image import Digest

HELLO = "hello from small amd64: 199 files\n"
PARTIAL = '[storage.options.pull_options]\nenable_partial_images = "true"\n'
KEY = "io.github.containers.zstd-chunked."

MakePodmanEnv = Callable[..., PodmanEnv]


def converted(
    image: oci.StoredImage, form: LayerForm, directory: Path, push: Push, name: str
) -> tuple[Pushed, ConvertResult]:
    layout = directory / name.replace("/", "-").replace(":", "-")
    result = convert(image.source, f"oci:{layout}:latest", ConvertOptions(form=form))
    return push(oci.read_image(layout, "latest"), name), result


@pytest.fixture(scope="session")
def chunked(workspace: Path, push: Push) -> Pushed:
    """The small image as zstd:chunked; its diff IDs and config are those it had."""
    image = images.small_image()
    pushed, result = converted(image, ZstdChunked(), workspace, push, "zstd/small:1")
    diff_ids = [layer.diff_id for layer in image.layers]
    assert [layer.diff_id for layer in result.images[0].layers] == diff_ids
    manifests = [json.loads(each.blob(each.digest).read_bytes()) for each in (image, pushed.image)]
    assert manifests[0]["config"] == manifests[1]["config"]
    return pushed


def changed(expected: Tree, actual: Tree) -> Sequence[str]:
    """What differs but for what partial pulls never set: times of directories and symlinks.

    Far times are cut elsewhere.
    """
    untimed = [
        name
        for name, node in expected.items()
        if node.kind in ("directory", "symlink") or name.startswith(b"torture/times/")
    ]
    return lab.differing(expected, actual, any_mtime=untimed)


def statuses(face: RecordingProxy, image: oci.StoredImage) -> dict[str, set[int]]:
    """How the registry answered, by layer."""
    found: dict[str, set[int]] = {}
    for request in lab.blob_requests(face, image):
        found.setdefault(request.path.rpartition("/")[2], set()).add(request.status)
    return found


def test_an_ordinary_layer_for_everybody(
    flavour: Flavour,
    make_podman_env: MakePodmanEnv,
    recorded: RecordingProxy,
    chunked: Pushed,
    plain_tree: PlainTree,
    push: Push,
) -> None:
    plain = push(images.small_image(), "ordinary/small:1")
    off = PARTIAL.replace("true", "false")
    env = make_podman_env(flavour, registries=(recorded.host,), storage_extra=off)
    name = f"{recorded.host}/{chunked.name}"
    recorded.clear()
    env.podman("pull", name)
    assert set(map(frozenset, statuses(recorded, chunked.image).values())) == {frozenset({200})}
    assert env.podman("run", "--rm", name).stdout == HELLO
    assert lab.differing(plain_tree(plain), lab.image_tree(env, name)) == []
    records = {record["diff-digest"] for record in lab.graph_layers(env)}
    assert records >= {layer.diff_id for layer in images.small_image().layers}
    if flavour == "debian13":
        env.podman("system", "check")


@pytest.mark.parametrize("tool", ["podman", "skopeo"])
def test_a_partial_pull(
    tool: str,
    make_podman_env: MakePodmanEnv,
    recorded: RecordingProxy,
    chunked: Pushed,
    plain_tree: PlainTree,
    push: Push,
) -> None:
    plain = push(images.small_image(), "ordinary/small:1")
    env = make_podman_env("debian13", registries=(recorded.host,), storage_extra=PARTIAL)
    name = f"{recorded.host}/{chunked.name}"
    recorded.clear()
    if tool == "podman":
        env.podman("pull", name)
    else:
        env.skopeo(
            "copy", "--src-tls-verify=false", f"docker://{name}", f"containers-storage:{name}"
        )
    ranges = [r for r in lab.blob_requests(recorded, chunked.image) if r.range]
    assert {request.status for request in ranges} == {206}
    found = statuses(recorded, chunked.image)
    assert set(map(frozenset, found.values())) == {frozenset({206})}
    assert len(found) == len(chunked.image.layers)
    assert env.podman("run", "--rm", name).stdout == HELLO
    assert changed(plain_tree(plain), lab.image_tree(env, name)) == []
    # the client computed these from the tar-split and found them to be the config's
    records = lab.graph_layers(env)
    assert {record.get("diff-digest") for record in records} >= {
        layer.diff_id for layer in images.small_image().layers
    }
    assert all(record["toc-digest"] for record in records)


def test_a_partial_pull_of_every_kind_of_entry(
    make_podman_env: MakePodmanEnv,
    recorded: RecordingProxy,
    workspace: Path,
    push: Push,
    plain_tree: PlainTree,
) -> None:
    image = torture.torture_image()
    plain = push(image, "ordinary/torture:1")
    pushed, result = converted(image, ZstdChunked(), workspace, push, "zstd/torture:1")
    env = make_podman_env("debian13", registries=(recorded.host,), storage_extra=PARTIAL)
    name = f"{recorded.host}/{pushed.name}"
    recorded.clear()
    env.podman("pull", name)
    # Layers come whole, as intended, of which a partial pull gives another tree: with names that
    # are no UTF-8, pipes and devices, a file beside its own whiteout, a directory without entry,
    # a hard link to a file with capabilities.
    whole = {
        layer.digest
        for layer in result.images[0].layers
        if KEY + "tarsplit-position" not in layer.annotations
    }
    assert 0 < len(whole) < len(result.images[0].layers)
    for layer, found in statuses(recorded, pushed.image).items():
        assert (200 in found) == (layer in whole), layer
    assert changed(plain_tree(plain), lab.image_tree(env, name)) == []


@pytest.mark.parametrize("form", [ZstdChunked(), ExternalToc()], ids=["zstd", "external"])
def test_the_store_serves_it(
    form: LayerForm,
    flavour: Flavour,
    make_rig: MakeRig,
    registry: DebianRegistry,
    workspace: Path,
    push: Push,
    plain_tree: PlainTree,
) -> None:
    image = images.small_image()
    plain = push(image, "ordinary/small:1")
    repository = f"served/{flavour}-{'external' if form.external else 'zstd'}"
    pushed, _ = converted(image, form, workspace, push, f"{repository}:1")
    if form.external:
        tocs = oci.StoredImage(pushed.image.layout, "latest-esgztoc", "", 0, "")
        push(tocs, f"{repository}:1-esgztoc")
    rig = make_rig(flavour)
    name = rig.image(pushed.name)
    rig.env.podman("pull", name)
    assert lab.extracted_layers(rig.env) == []
    assert rig.env.podman("run", "--rm", name).stdout == HELLO
    assert lab.differing(plain_tree(plain), lab.image_tree(rig.env, name)) == []


def test_a_layer_without_its_table_of_contents_is_an_ordinary_one(
    flavour: Flavour,
    make_podman_env: MakePodmanEnv,
    recorded: RecordingProxy,
    workspace: Path,
    push: Push,
    plain_tree: PlainTree,
) -> None:
    image = images.small_image()
    plain = push(image, "ordinary/small:1")
    pushed, result = converted(image, ExternalToc(), workspace, push, f"external/{flavour}:1")
    env = make_podman_env(flavour, registries=(recorded.host,), storage_extra=PARTIAL)
    name = f"{recorded.host}/{pushed.name}"
    recorded.clear()
    env.podman("pull", name)
    assert env.podman("run", "--rm", name).stdout == HELLO
    assert lab.differing(plain_tree(plain), lab.image_tree(env, name)) == []
    records = {record["diff-digest"] for record in lab.graph_layers(env)}
    assert records >= {layer.diff_id for layer in image.layers}
    # the image of the tables of contents can be copied like any other
    source = f"oci:{pushed.image.layout}:latest-esgztoc"
    env.skopeo("copy", "--quiet", source, f"docker://{name}-esgztoc")
    raw = env.skopeo("inspect", "--raw", f"docker://{name}-esgztoc").stdout.encode()
    assert Digest.of(raw) == result.toc_image_digest
    assert len(json.loads(raw)["layers"]) == len(image.layers)


@pytest.fixture
def newer_ctr_remote(workspace: Path, trixie: TrixieTools) -> Path:
    """Debian 13's, the first that knows external TOCs, started with that Debian's loader."""
    try:
        packages = debian.download(("stargz-snapshotter",), "trixie")
    except debian.DebianError as error:
        pytest.skip(f"Debian 13's ctr-remote cannot be had: {error}")
    root = workspace / "ctr-remote"
    debian.unpack([path for path in packages if path.name.startswith("stargz")], root)
    script = root / "ctr-remote"
    libraries = trixie.root / "usr/lib"
    script.write_text(
        f"#!/bin/sh\nexec {libraries}64/ld-linux-x86-64.so.2 --library-path"
        f' {libraries}/x86_64-linux-gnu {root}/usr/bin/ctr-remote "$@"\n'
    )
    script.chmod(0o755)
    return script


def test_ctr_remote_makes_the_same_image_of_tables_of_contents(
    newer_ctr_remote: Path, workspace: Path, tmp_path: Path, push: Push, make_rig: MakeRig
) -> None:
    image = images.small_image()
    layout = tmp_path / "ours"
    convert(image.source, f"oci:{layout}:1", ConvertOptions(form=ExternalToc()))
    name = "lab.local/converted:1"
    flags = ("--oci", "--estargz", "--estargz-external-toc", "--estargz-keep-diff-id")
    scratch = workspace / "external"
    scratch.mkdir()
    with ctrremote.containerd(scratch) as daemon:
        with tarfile.open(scratch / "source.tar", "w") as archive:
            archive.add(image.layout, arcname=".")
        base = ("--no-unpack", "--base-name", "lab.local/source")
        daemon.run("ctr", "image", "import", *base, str(scratch / "source.tar"))
        source = f"lab.local/source:{image.tag}"
        daemon.run(str(newer_ctr_remote), "image", "convert", *flags, source, name)
        exported = scratch / "exported.tar"
        daemon.run("ctr", "image", "export", str(exported), name, f"{name}-esgztoc")
    theirs = tmp_path / "theirs"
    with tarfile.open(exported) as archive:
        archive.extractall(theirs, filter="data")
    assert shape(theirs, "1") == shape(layout, "1")
    assert shape(theirs, "1-esgztoc") == shape(layout, "1-esgztoc")
    for tocs in (tables(theirs), tables(layout)):
        assert len(tocs) == len(image.layers)
    assert tables(theirs) == tables(layout)
    # and what ctr-remote made is served as ours is
    reference = "external/ctr-remote:1"
    push(oci.StoredImage(theirs, "1-esgztoc", "", 0, ""), f"{reference}-esgztoc")
    push(oci.read_image(theirs, "1"), reference)
    rig = make_rig("debian13")
    rig.env.podman("pull", rig.image(reference))
    assert lab.extracted_layers(rig.env) == []
    assert rig.env.podman("run", "--rm", rig.image(reference)).stdout == HELLO


def document(layout: Path, digest: str) -> Any:
    return json.loads((layout / "blobs" / digest.replace(":", "/")).read_bytes())


def manifest_of(layout: Path, tag: str) -> Any:
    entries = json.loads((layout / "index.json").read_bytes())["manifests"]
    (found,) = [one for one in entries if one["annotations"][oci.REF_NAME] == tag]
    return document(layout, found["digest"])


def shape(layout: Path, tag: str) -> Any:
    """A manifest with its config, without digests and sizes of packed bytes."""
    manifest = manifest_of(layout, tag)
    config = document(layout, manifest["config"]["digest"])
    config.pop("history", None)
    return {
        "mediaType": manifest["mediaType"],
        "config": (manifest["config"]["mediaType"], config),
        "layers": [(one["mediaType"], set(one["annotations"])) for one in manifest["layers"]],
    }


def tables(layout: Path) -> list[list[tuple[str, str, int, str]]]:
    """What each layer's table of contents tells, found by way of the layer's digest."""
    tocs = {
        one["annotations"]["containerd.io/snapshot/stargz/layer.digest"]: one["digest"]
        for one in manifest_of(layout, "1-esgztoc")["layers"]
    }
    found = []
    for layer in manifest_of(layout, "1")["layers"]:
        blob = layout / "blobs" / tocs[layer["digest"]].replace(":", "/")
        toc = read_toc(blob.read_bytes())
        key = "containerd.io/snapshot/stargz/toc.digest"
        assert layer["annotations"][key] == Digest.of(toc)
        found.append([(e.name, e.type, e.size, e.digest) for e in iter_toc(toc)])
    return found


def unpacked(data: bytes) -> bytes:
    stream = LayerStream(io.BytesIO(data))
    found = bytearray()
    while piece := stream.read(1 << 20):
        found += piece
    return bytes(found)


def frame(image: oci.StoredImage, layer: dict[str, Any], name: str) -> bytes:
    offset, length = map(int, layer["annotations"][KEY + name].split(":")[:2])
    return unpacked(image.blob(layer["digest"]).read_bytes()[offset : offset + length])


def metadata(image: oci.StoredImage, layer: dict[str, Any]) -> list[dict[str, Any]]:
    """The TOC but for where contents lie, which is the writer's choice."""
    ours = {"offset", "endOffset", "chunkSize", "chunkOffset", "chunkDigest", "chunkType"}
    entries = json.loads(frame(image, layer, "manifest-position"))["entries"]
    return [
        {key: value for key, value in entry.items() if key not in ours}
        for entry in entries
        if entry["type"] != "chunk"
    ]


def test_skopeo_writes_the_same(
    make_podman_env: MakePodmanEnv, workspace: Path, chunked: Pushed
) -> None:
    env = make_podman_env("debian13")
    layout = workspace / "skopeo-zstd"
    source = images.small_image().source
    env.skopeo("copy", "--dest-compress-format", "zstd:chunked", source, f"oci:{layout}:latest")
    theirs = oci.read_image(layout, "latest")
    manifests = [
        json.loads(image.blob(image.digest).read_bytes()) for image in (theirs, chunked.image)
    ]
    assert manifests[0]["config"] == manifests[1]["config"]
    for their, our in zip(manifests[0]["layers"], manifests[1]["layers"], strict=True):
        assert their["mediaType"] == our["mediaType"]
        assert set(their["annotations"]) == set(our["annotations"])
        assert metadata(theirs, their) == metadata(chunked.image, our)
        splits = (
            frame(theirs, their, "tarsplit-position"),
            frame(chunked.image, our, "tarsplit-position"),
        )
        assert splits[0] == splits[1]


def test_an_older_skopeo_keeps_it_bit_by_bit(
    make_podman_env: MakePodmanEnv, registry: DebianRegistry, chunked: Pushed
) -> None:
    env = make_podman_env("debian12")
    layout = env.tmp / "copied"
    env.skopeo("copy", f"docker://{registry.host}/{chunked.name}", f"oci:{layout}:latest")
    assert oci.read_image(layout, "latest").layers == chunked.image.layers
