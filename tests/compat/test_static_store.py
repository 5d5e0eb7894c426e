"""Static stores: Podman of both dialects runs images from plain directories."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import images, oci, torture
from lab import rig as lab
from lab.fresh import fresh
from lab.podman import Flavour, PodmanEnv
from lab.recording import RecordingProxy
from lab.registry import DebianRegistry
from lab.rig import PlainTree, Push, Pushed
from lab.trees import FORMAT_FILES, Tree, compare
from layerstore.copy.context import CopyContext
from layerstore.copy.staticverify import verify
from layerstore.copy.unpack import UnpackOptions, UnpackResult, unpack
from layerstore.errors import UsageError
from layerstore.registry import RegistrySettings

HELLO = "hello from small amd64: 199 files\n"

Make = Callable[..., PodmanEnv]


@pytest.fixture
def store(workspace: Path) -> Iterator[Path]:
    """Where the static store comes to be."""
    place = fresh("static-", workspace)
    yield place / "store"
    subprocess.run(["umount", "-q", "-R", place / "shared"], check=False)
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(params=[False, True], ids=["plain", "ref"])
def ref(request: pytest.FixtureRequest) -> bool:
    """Whether the store has the reference level."""
    return bool(request.param)


@pytest.fixture(scope="session")
def tortured(push_lazy: Push) -> Pushed:
    """Every kind of file, link, name and whiteout, lazy."""
    return push_lazy(torture.torture_image(), "lazy/torture:1")


@pytest.fixture(scope="session")
def ordinary(push: Push) -> Pushed:
    """The small image as it was built: tar.gz without any TOC."""
    return push(images.small_image(), "plain/small:1")


def fill(store: Path, image: str, *, ref: bool) -> UnpackResult:
    context = CopyContext(source_registry=RegistrySettings.from_system(tls_verify=False))
    return unpack(image, store, UnpackOptions(with_reference=ref), context)


def use(env: PodmanEnv, store: Path, *, ref: bool) -> None:
    suffix = ":ref" if ref else ""
    env.configure_storage(extra=f'additionallayerstores = ["{store}{suffix}"]')


def pull(env: PodmanEnv, face: RecordingProxy, pushed: Pushed, store: Path) -> str:
    """Pull; every layer must come from the store and none from the registry."""
    face.clear()
    image = f"{face.host}/{pushed.name}"
    env.podman("pull", image)
    assert lab.blob_requests(face, pushed.image) == []
    assert len(lab.store_layers(env, store)) == len({layer.digest for layer in pushed.image.layers})
    return image


def same(expected: Tree, actual: Tree) -> list[str]:
    """Differences; the format's own files are those of a plain pull here."""
    assert set(FORMAT_FILES) & set(expected) == set(FORMAT_FILES) & set(actual)
    found = compare(expected, actual, ignore={b"."}, any_mtime=torture.IMPLICIT_DIRECTORIES)
    return found[:20]


def test_an_image_runs_from_a_static_store(
    podman_env: PodmanEnv,
    recorded: RecordingProxy,
    small: Pushed,
    plain_tree: PlainTree,
    store: Path,
    ref: bool,
) -> None:
    fill(store, f"{recorded.host}/{small.name}", ref=ref)
    use(podman_env, store, ref=ref)
    image = pull(podman_env, recorded, small, store)
    assert podman_env.podman("run", "--rm", image).stdout == HELLO
    with lab.mounted(podman_env, image) as path:
        assert path.stat().st_mode & 0o7777 == 0o755
    assert same(plain_tree(small), lab.image_tree(podman_env, image)) == []
    podman_env.podman("rmi", image)
    assert lab.graph_layers(podman_env) == []
    assert verify(store).damage == ()


def test_a_store_with_both_layouts_serves_both(
    podman_env: PodmanEnv, recorded: RecordingProxy, small: Pushed, store: Path, ref: bool
) -> None:
    image = f"{recorded.host}/{small.name}"
    fill(store, image, ref=True)
    again = fill(store, image, ref=False)
    assert {layer.how for layer in again.images[0].layers} == {"exists"}
    use(podman_env, store, ref=ref)
    pull(podman_env, recorded, small, store)
    assert podman_env.podman("run", "--rm", image).stdout == HELLO


def test_ordinary_layers_are_found_by_their_blobs(
    make_podman_env: Make,
    recorded: RecordingProxy,
    ordinary: Pushed,
    plain_tree: PlainTree,
    store: Path,
    ref: bool,
) -> None:
    """Dialect L needs no TOC: what is here was verified as a whole."""
    env = make_podman_env("debian12", registries=(recorded.host,))
    fill(store, f"{recorded.host}/{ordinary.name}", ref=ref)
    use(env, store, ref=ref)
    image = pull(env, recorded, ordinary, store)
    assert env.podman("run", "--rm", image).stdout == HELLO
    assert same(plain_tree(ordinary), lab.image_tree(env, image)) == []


def test_the_torture_image(
    podman_env: PodmanEnv,
    recorded: RecordingProxy,
    tortured: Pushed,
    plain_tree: PlainTree,
    store: Path,
) -> None:
    fill(store, f"{recorded.host}/{tortured.name}", ref=True)
    use(podman_env, store, ref=True)
    image = pull(podman_env, recorded, tortured, store)
    assert same(plain_tree(tortured), lab.image_tree(podman_env, image)) == []


@pytest.mark.parametrize(
    ("flavour", "kind"),
    [("debian12", "zstd"), ("debian12", "zstd:chunked"), ("debian13", "zstd:chunked")],
)
def test_zstd_layers(
    podman_env: PodmanEnv,
    make_podman_env: Make,
    recorded: RecordingProxy,
    store: Path,
    workspace: Path,
    push: Push,
    kind: str,
) -> None:
    """zstd:chunked is found by its TOC, plain zstd by its blob only: never by Podman 5."""
    layout = fresh("zstd-", workspace)
    make_podman_env("debian13").skopeo(
        "copy",
        "--quiet",
        f"--dest-compress-format={kind}",
        images.small_image().source,
        f"oci:{layout}:latest",
    )
    pushed = push(oci.read_image(layout, "latest"), f"zstd/{kind.replace(':', '-')}:1")
    result = fill(store, f"{recorded.host}/{pushed.name}", ref=True)
    assert [layer.no_toc for layer in result.images[0].layers] == ["", "", ""]
    by_toc = {layer.toc_digest is not None for layer in result.images[0].layers}
    assert by_toc == {kind == "zstd:chunked"}
    use(podman_env, store, ref=True)
    image = pull(podman_env, recorded, pushed, store)
    assert podman_env.podman("run", "--rm", image).stdout == HELLO
    saved = podman_env.directory / "saved.tar"
    podman_env.podman("save", "-q", "--format=oci-archive", "-o", saved, image)
    assert verify(store).damage == ()


@pytest.mark.parametrize("how", ["bind", "copy", "move"])
def test_a_store_works_elsewhere(
    podman_env: PodmanEnv, recorded: RecordingProxy, small: Pushed, store: Path, how: str
) -> None:
    """From a read-only bind mount, and as a copy."""
    fill(store, f"{recorded.host}/{small.name}", ref=True)
    fill(store, f"{recorded.host}/{small.name}", ref=False)
    shared = store.with_name("shared")
    with contextlib.ExitStack() as stack:
        if how == "bind":
            shared.mkdir()
            subprocess.run(["mount", "--bind", store, shared], check=True)
            stack.callback(lambda: subprocess.run(["umount", "-l", shared], check=True))
            subprocess.run(["mount", "-o", "remount,bind,ro", shared], check=True)
        elif how == "copy":
            subprocess.run(["cp", "-a", store, shared], check=True)
            shutil.rmtree(store)
        else:
            store.rename(shared)
        assert verify(shared).damage == ()
        use(podman_env, shared, ref=how != "move")
        image = pull(podman_env, recorded, small, shared)
        container = podman_env.podman("run", "-d", image, "sleep", "600").stdout.strip()
        listed = podman_env.podman("exec", container, "ls", "-A", "/opt/plugins").stdout
        assert listed == "new\n"
        podman_env.podman("rm", "-f", "--time=0", container)
        podman_env.podman("rmi", image)


def test_layers_of_a_static_store_are_saved_and_pushed(
    podman_env: PodmanEnv,
    make_podman_env: Make,
    flavour: Flavour,
    recorded: RecordingProxy,
    registry: DebianRegistry,
    small: Pushed,
    plain_tree: PlainTree,
    store: Path,
) -> None:
    fill(store, f"{recorded.host}/{small.name}", ref=True)
    use(podman_env, store, ref=True)
    image = pull(podman_env, recorded, small, store)
    elsewhere = make_podman_env(flavour)
    for form in ("oci-archive", "docker-archive"):
        saved = podman_env.directory / f"{form}.tar"
        podman_env.podman("save", "-q", "--format", form, "-o", saved, image)
        elsewhere.podman("load", "-q", "-i", saved)
        assert same(plain_tree(small), lab.image_tree(elsewhere, image)) == []
        elsewhere.podman("rmi", image)
    target = f"{registry.host}/static/pushed-{flavour}:1"
    podman_env.podman("push", "-q", image, target)
    elsewhere.podman("pull", "-q", target)
    assert same(plain_tree(small), lab.image_tree(elsewhere, target)) == []
    assert elsewhere.podman("run", "--rm", target).stdout == HELLO


def test_a_layer_that_is_missing_is_pulled(
    podman_env: PodmanEnv, recorded: RecordingProxy, small: Pushed, store: Path
) -> None:
    """Part of an image from the store, part from the registry."""
    result = fill(store, f"{recorded.host}/{small.name}", ref=False)
    gone = result.images[0].layers[1]
    for name in (gone.digest, gone.toc_digest):
        (store / str(name)).unlink()
    use(podman_env, store, ref=False)
    image = f"{recorded.host}/{small.name}"
    recorded.clear()
    podman_env.podman("pull", image)
    asked = {
        request.path.rpartition("/")[2] for request in lab.blob_requests(recorded, small.image)
    }
    assert asked == {gone.digest}
    assert len(lab.extracted_layers(podman_env)) == 1
    assert podman_env.podman("run", "--rm", image).stdout == HELLO


def test_a_layer_that_an_image_has_twice_is_left_out(
    podman_env: PodmanEnv,
    recorded: RecordingProxy,
    repeated: Pushed,
    small: Pushed,
    plain_tree: PlainTree,
    store: Path,
    ref: bool,
) -> None:
    """It would have one directory in the store, and overlayfs takes no directory twice."""
    result = fill(store, f"{recorded.host}/{repeated.name}", ref=ref)
    twice = small.image.layers[1].digest
    hows = {layer.digest: layer.how for layer in result.images[0].layers}
    assert [digest for digest, how in hows.items() if how == "left out"] == [twice]
    use(podman_env, store, ref=ref)
    # also for an image that has the layer once: without the reference nobody can tell them apart
    for pushed in (repeated, small):
        fill(store, f"{recorded.host}/{pushed.name}", ref=ref)
        recorded.clear()
        image = f"{recorded.host}/{pushed.name}"
        podman_env.podman("pull", image)
        assert {request.path[-71:] for request in lab.blob_requests(recorded, pushed.image)} <= {
            twice
        }
        assert podman_env.podman("run", "--rm", image).stdout == HELLO
        assert same(plain_tree(small), lab.image_tree(podman_env, image)) == []
    assert len(lab.extracted_layers(podman_env)) == 2
    assert verify(store).damage == ()


def test_an_image_that_repeats_what_is_offered_already_is_refused(
    podman_env: PodmanEnv, recorded: RecordingProxy, repeated: Pushed, small: Pushed, store: Path
) -> None:
    """The image that has the layer once stays as it is; the other one has no way but another."""
    once, twice = (f"{recorded.host}/{pushed.name}" for pushed in (small, repeated))
    fill(store, once, ref=False)
    use(podman_env, store, ref=False)
    podman_env.podman("pull", once)
    before = set(store.rglob("*"))
    with pytest.raises(UsageError, match="more than once"):
        fill(store, twice, ref=False)
    assert set(store.rglob("*")) == before
    assert podman_env.podman("run", "--rm", once).stdout == HELLO
    podman_env.podman("pull", twice)
    failed = podman_env.podman("run", "--rm", twice, check=False)
    assert "too many levels of symbolic links" in failed.stderr  # or refusing would be wrong
    podman_env.podman("rmi", twice)
    # with the reference the two are told apart
    fill(store, twice, ref=True)
    fill(store, once, ref=True)
    use(podman_env, store, ref=True)
    podman_env.podman("pull", twice)
    assert podman_env.podman("run", "--rm", twice).stdout == HELLO
    assert podman_env.podman("run", "--rm", once).stdout == HELLO


def test_the_command_line(
    podman_env: PodmanEnv, recorded: RecordingProxy, small: Pushed, store: Path
) -> None:
    def layerstore(*arguments: object) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-m", "layerstore.cli", *map(str, arguments)]
        return subprocess.run(program, text=True, capture_output=True, check=False)

    image = f"docker://{recorded.host}/{small.name}"
    done = layerstore("unpack", image, store, "--ref", "--verify", "--tls-verify=false", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["Reference"] == f"{recorded.host}/{small.name}"
    assert report["Verified"]["Damage"] == []
    use(podman_env, store, ref=True)
    pull(podman_env, recorded, small, store)
    marker = next(store.glob(".layerstore/layers/*/diff/etc/marker"))
    marker.write_text("another\n")
    done = layerstore("unpack", "--verify", store)
    assert done.returncode == 1
    assert "/etc/marker has " in done.stderr
