"""Every form of layer in use, through the store and without it, with all kinds of clients."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import pytest

from lab import ctrremote, images, oci
from lab import rig as lab
from lab.podman import Flavour, PodmanEnv
from lab.registry import DebianRegistry
from lab.rig import MakeRig, PlainTree, Push, Pushed, Rig
from layerstore.copy.convert import ConvertOptions, convert
from layerstore.copy.layerform import ExternalToc

pytestmark = pytest.mark.compat

HELLO: Final = "hello from small amd64: 199 files\n"

Form = Literal[
    "estargz", "external TOC", "zstd:chunked", "zstd:chunked v0", "tar.gz", "tar.zst", "mixed"
]
FORMS: Final[tuple[Form, ...]] = Form.__args__  # type: ignore[attr-defined]
Client = Literal["podman 4", "podman 5", "skopeo"]

# Of how many of the three layers each kind of client finds one in the store.
LAZY: Final[dict[Form, int]] = {
    "estargz": 3, "external TOC": 3, "zstd:chunked": 3, "zstd:chunked v0": 3,
    "tar.gz": 0, "tar.zst": 0, "mixed": 2,
}  # fmt: skip

MakePodmanEnv = Callable[..., PodmanEnv]


@pytest.fixture(scope="session")
def forms(
    workspace: Path, push: Push, registry: DebianRegistry, trixie: object
) -> Callable[[Form], Pushed]:
    """The small image in one form, as the tools of the field write it; pushed once."""
    known: dict[Form, Pushed] = {}

    def made(form: Form) -> Pushed:
        if form not in known:
            name = "forms/" + form.translate(str.maketrans(": .", "---")).lower() + ":1"
            known[form] = _push(form, name, workspace, push, registry)
        return known[form]

    return made


def _push(form: Form, name: str, workspace: Path, push: Push, registry: DebianRegistry) -> Pushed:
    plain = images.small_image()
    if form == "estargz":
        return push(ctrremote.converted(plain), name)
    if form == "zstd:chunked v0":
        return push(ctrremote.converted(plain, "zstdchunked"), name)
    if form == "tar.gz":
        return push(plain, name)
    if form == "mixed":
        return push(_mixed(workspace), name)
    layout = workspace / f"form-{form.replace(' ', '-').replace(':', '-')}"
    if form == "external TOC":
        convert(plain.source, f"oci:{layout}:latest", ConvertOptions(form=ExternalToc()))
        with PodmanEnv(workspace / "made-tocs", registries=[registry.host]) as env:
            target = f"docker://{registry.host}/{name}-esgztoc"
            env.skopeo("copy", "--quiet", f"oci:{layout}:latest-esgztoc", target)
        return push(oci.read_image(layout, "latest"), name)
    kind = "zstd:chunked" if form == "zstd:chunked" else "zstd"
    with PodmanEnv(workspace / f"made-{kind[:5]}", "debian13") as env:
        env.skopeo("copy", "--dest-compress-format", kind, plain.source, f"oci:{layout}:latest")
    return push(oci.read_image(layout, "latest"), name)


def _mixed(workspace: Path) -> oci.StoredImage:
    """eStargz, tar.gz and zstd:chunked (v0) in one image."""
    lazy, plain = ctrremote.converted(images.small_image()), images.small_image()
    zstd = ctrremote.converted(images.small_image(), "zstdchunked")

    def change(manifest: lab.Document, config: lab.Document) -> None:
        for number, other in ((1, plain), (2, zstd)):
            whole = json.loads(other.blob(other.digest).read_bytes())
            manifest["layers"][number] = whole["layers"][number]
            config["rootfs"]["diff_ids"][number] = other.layers[number].diff_id

    layout = lab.edited(lazy, workspace / "mixed-forms", change)
    for number, other in ((1, plain), (2, zstd)):
        digest = other.layers[number].digest
        shutil.copy(other.blob(digest), layout / "blobs" / digest.replace(":", "/"))
    return oci.read_image(layout, "latest")


def _pull(rig: Rig, client: Client, name: str) -> str:
    """Bring an image into the graph root; how Podman names it there."""
    image = rig.image(name)
    if client == "skopeo":
        rig.env.skopeo("copy", "--quiet", f"docker://{image}", f"containers-storage:{image}")
    else:
        rig.env.podman("pull", "--quiet", image)
    return image


@pytest.mark.parametrize("client", ["podman 4", "podman 5", "skopeo"])
@pytest.mark.parametrize("form", FORMS)
def test_a_life(
    form: Form,
    client: Client,
    forms: Callable[[Form], Pushed],
    make_rig: MakeRig,
    plain_tree: PlainTree,
    registry: DebianRegistry,
) -> None:
    flavour: Flavour = "debian12" if client == "podman 4" else "debian13"
    pushed = forms(form)
    rig = make_rig(flavour)
    image = _pull(rig, client, pushed.name)

    extracted = len(lab.extracted_layers(rig.env))
    assert len(pushed.image.layers) - extracted == LAZY[form]
    fetched = {r.path.rpartition("/")[2] for r in lab.blob_requests(rig.client, pushed.image)}
    assert len(fetched) == extracted
    assert rig.env.podman("run", "--rm", image).stdout == HELLO
    differing = lab.differing(plain_tree(pushed), lab.image_tree(rig.env, image), seconds=True)
    assert differing == []

    # save, load, push: the contents are those of the tar streams
    saved = rig.env.tmp / "saved.tar"
    # a docker-archive cannot hold zstd: Podman 4 says so instead of decompressing
    rig.env.podman("save", "--quiet", "--format", "oci-archive", "-o", saved, image)
    copied = f"{registry.host}/copied/{pushed.name.partition('/')[2]}-{flavour}"
    rig.env.podman("push", "--quiet", image, copied)
    rig.env.podman("rmi", image)
    assert lab.graph_layers(rig.env) == []
    rig.env.podman("load", "--quiet", "-i", saved)
    assert rig.env.podman("run", "--rm", image).stdout == HELLO
    saved.unlink()
    config = json.loads(rig.env.skopeo("inspect", "--config", f"docker://{copied}").stdout)
    assert config["rootfs"]["diff_ids"] == [layer.diff_id for layer in pushed.image.layers]
    errors = [line for line in rig.service.log().splitlines() if " ERROR " in line]
    assert errors == []


@pytest.mark.parametrize("form", ["tar.gz", "tar.zst"])
def test_the_next_graph_root_pays_nothing_for_ordinary_layers(
    form: Form,
    forms: Callable[[Form], Pushed],
    make_rig: MakeRig,
    plain_tree: PlainTree,
) -> None:
    pushed = forms(form)
    rig = make_rig("debian12")
    image = _pull(rig, "podman 4", pushed.name)
    assert len(lab.extracted_layers(rig.env)) == len(pushed.image.layers)
    _wait_for_ingests(rig, len(pushed.image.layers))
    rig.env.podman("rmi", image)
    rig.client.clear()
    rig.provider.clear()

    _pull(rig, "podman 4", pushed.name)
    assert len(lab.store_layers(rig.env, rig.store)) == len(pushed.image.layers)
    assert lab.blob_requests(rig.client, pushed.image) == []
    assert rig.env.podman("run", "--rm", image).stdout == HELLO
    assert lab.differing(plain_tree(pushed), lab.image_tree(rig.env, image)) == []
    saved = rig.env.tmp / "saved.tar"
    rig.env.podman("save", "--quiet", "--format", "oci-archive", "-o", saved, image)
    saved.unlink()
    assert lab.blob_requests(rig.provider, pushed.image) == []
    for layer in lab.graph_layers(rig.env):  # all of it was verified, so all of it is claimed
        assert layer["compressed-diff-digest"] in lab.sizes(pushed.image)


def _wait_for_ingests(rig: Rig, layers: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        known = rig.service.status()["layers"]
        if sum(layer["verified"] for layer in known) >= layers:
            return
        time.sleep(0.1)
    raise AssertionError(f"not taken in: {rig.service.log()[-2000:]}")


def test_an_eager_store_serves_ordinary_layers_at_the_first_pull(
    forms: Callable[[Form], Pushed], make_rig: MakeRig
) -> None:
    pushed = forms("tar.gz")
    rig = make_rig("debian12", config='[ordinary]\npolicy = "eager"\n')
    image = _pull(rig, "podman 4", pushed.name)
    assert len(lab.store_layers(rig.env, rig.store)) == len(pushed.image.layers)
    assert lab.blob_requests(rig.client, pushed.image) == []
    assert rig.env.podman("run", "--rm", image).stdout == HELLO


def test_a_second_image_that_shares_layers_or_files_costs_nothing(
    forms: Callable[[Form], Pushed], push: Push, make_rig: MakeRig
) -> None:
    rig = make_rig("debian12", config='[ordinary]\npolicy = "eager"\n')
    first = forms("tar.gz")
    _pull(rig, "podman 4", first.name)
    brought = lab.blob_requests(rig.provider, first.image)
    assert sorted(one.bytes for one in brought) == sorted(lab.sizes(first.image).values())
    content = rig.service.root / "content"
    before = _objects(content)
    # the same layers in another repository: the registry is not asked for a byte of them
    rig.provider.clear()
    _pull(rig, "podman 4", push(first.image, "forms/shared:2").name)
    assert lab.blob_requests(rig.provider, first.image) == []
    assert lab.blob_requests(rig.client, first.image) == []
    # the same files in other blobs: each of these comes once, and no file is stored again
    other = forms("tar.zst")
    _pull(rig, "podman 4", other.name)
    brought = lab.blob_requests(rig.provider, other.image)
    assert sorted(one.bytes for one in brought) == sorted(lab.sizes(other.image).values())
    assert _objects(content) == before


def _objects(content: Path) -> dict[str, tuple[int, int]]:
    """Each stored file, by its digest: which one on the disk it is, and its size."""
    found = {path.name: path.stat() for path in content.glob("objects/*/*")}
    return {name: (stat.st_ino, stat.st_size) for name, stat in found.items()}


def test_a_fetch_shows_a_bar_on_a_terminal_and_lines_elsewhere(
    forms: Callable[[Form], Pushed], make_rig: MakeRig
) -> None:
    rig = make_rig("debian12")
    pushed = forms("tar.gz")
    place = ("--root", str(rig.service.root), rig.image(pushed.name))
    own, terminal = pty.openpty()
    shown = bytearray()

    def collect() -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while data := os.read(own, 65536):
                shown.extend(data)

    thread = threading.Thread(target=collect)
    thread.start()
    command = [*rig.env.command("layerstore"), "fetch", *place]
    environment = {**rig.env.environment(), "TERM": "xterm", "COLUMNS": "120"}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=terminal, check=False, timeout=60
    )
    os.close(terminal)
    thread.join(10)
    os.close(own)
    assert done.returncode == 0, shown
    text = shown.decode()
    assert "\x1b[" in text  # a bar is drawn where it was before
    for layer in pushed.image.layers:
        assert layer.digest.removeprefix("sha256:")[:12] in text
    assert done.stdout.decode().endswith("all here and verified\n")

    plain = rig.env.layerstore("fetch", *place)
    lines = [f"Copying blob {layer.digest}" for layer in pushed.image.layers]
    assert sorted(plain.stderr.splitlines()) == sorted(lines)
    report = json.loads(rig.env.layerstore("fetch", "--json", *place).stdout)
    assert report["failure"] is None
    assert {one["digest"]: one["size"] for one in report["layers"]} == lab.sizes(pushed.image)
    assert {(one["state"], one["form"]) for one in report["layers"]} == {("complete", "tar+gzip")}


def test_a_node_that_was_given_the_index_serves_ordinary_layers_lazily(
    forms: Callable[[Form], Pushed],
    make_rig: MakeRig,
    plain_tree: PlainTree,
    workspace: Path,
) -> None:
    pushed = forms("tar.gz")
    having = make_rig("debian12")
    file = workspace / "given-index"
    for verb in (("fetch", "--quiet"), ("save-index", "-o", file)):
        having.env.layerstore(*verb, "--root", having.service.root, having.image(pushed.name))
    assert file.stat().st_size < sum(lab.sizes(pushed.image).values()) // 20

    rig = make_rig("debian12", config='background_fetch = false\n[ordinary]\npolicy = "known"\n')
    rig.env.layerstore("load-index", "--root", rig.service.root, file)
    image = _pull(rig, "podman 4", pushed.name)
    assert lab.extracted_layers(rig.env) == []
    assert lab.blob_requests(rig.client, pushed.image) == []
    assert rig.env.podman("run", "--rm", image).stdout == HELLO
    ranges = lab.blob_requests(rig.provider, pushed.image)
    assert {request.status for request in ranges} == {206}
    assert sum(one.bytes for one in ranges) < sum(lab.sizes(pushed.image).values())
    assert lab.differing(plain_tree(pushed), lab.image_tree(rig.env, image)) == []
