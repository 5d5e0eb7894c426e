"""Copies, both ways: what we write Skopeo and Podman read, what they write we read.

An image is the same when its config has the same digest: the config names the layers' diff
IDs, and both sides verify the layers against them.
"""

import gzip
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab import images
from lab.podman import CommandError, Flavour, PodmanEnv, run
from lab.registry import DebianRegistry
from lab.rig import Push, Pushed
from layerstore.image import Digest

pytestmark = pytest.mark.compat

Copy = Callable[..., Any]


def ours(
    env: PodmanEnv, *arguments: str | Path, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run layerstore in an environment of Podman's."""
    command = [sys.executable, "-m", "layerstore.cli", *map(str, arguments)]
    return run(command, env.environment() | {"PYTHONPATH": "src"}, stdin=stdin)


def copy(env: PodmanEnv, source: str, target: str, *flags: str) -> dict[str, Any]:
    result = ours(env, "copy", "--quiet", "--json", *flags, source, target)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture
def place(podman_env: PodmanEnv) -> Path:
    path = podman_env.directory / "place"
    path.mkdir()
    return path


@pytest.fixture(scope="session")
def config_of() -> Callable[[Path], str]:
    def config(layout: Path) -> str:
        entry = json.loads((layout / "index.json").read_bytes())["manifests"][0]
        raw = (layout / "blobs" / entry["digest"].replace(":", "/")).read_bytes()
        return str(json.loads(raw)["config"]["digest"])

    return config


def inspected(env: PodmanEnv, name: str) -> dict[str, Any]:
    """The raw manifest as Skopeo reads it."""
    found: dict[str, Any] = json.loads(env.skopeo("inspect", "--raw", name).stdout)
    return found


def skopeo_config(env: PodmanEnv, name: str) -> Digest:
    """The digest of the config as Skopeo reads it."""
    raw = subprocess.run(
        [*env.command("skopeo"), "inspect", "--config", "--raw", name],
        env=env.environment(),
        capture_output=True,
        check=True,
    ).stdout
    return Digest.of(raw)


LAYOUT_KINDS = ("oci:{}:x", "oci-archive:{}:x", "dir:{}", "docker-archive:{}:localhost/x:1")


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
def test_skopeo_reads_what_we_write(podman_env: PodmanEnv, place: Path, kind: str) -> None:
    image = images.small_image()
    target = kind.format(place / "ours")
    copy(podman_env, image.source, target)
    assert skopeo_config(podman_env, target) == skopeo_config(podman_env, image.source)
    # Copying makes Skopeo verify every blob.
    podman_env.skopeo("copy", "--quiet", target, f"dir:{place}/again")
    assert sorted(os.listdir(place)) == ["again", "ours"]


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
def test_we_read_what_skopeo_writes(podman_env: PodmanEnv, place: Path, kind: str) -> None:
    image = images.small_image()
    written = kind.format(place / "theirs")
    podman_env.skopeo("copy", "--quiet", image.source, written)
    copy(podman_env, written, f"oci:{place}/ours:x")
    assert skopeo_config(podman_env, f"oci:{place}/ours:x") == skopeo_config(
        podman_env, image.source
    )
    podman_env.skopeo("copy", "--quiet", f"oci:{place}/ours:x", f"dir:{place}/again")


@pytest.mark.parametrize("form", ["oci", "v2s2"])
def test_skopeo_takes_manifests_that_we_convert(
    podman_env: PodmanEnv, place: Path, registry: DebianRegistry, push: Push, form: str
) -> None:
    pushed = push(images.small_image(), "copy/plain:1")
    other = f"docker://{registry.host}/copy/{podman_env.flavour}:{form}"
    copy(podman_env, f"docker://{registry.host}/{pushed.name}", other, "--format", form)
    family = "oci" if form == "oci" else "docker"
    assert family in inspected(podman_env, other)["mediaType"]
    podman_env.skopeo("copy", "--quiet", other, f"dir:{place}/out")
    podman_env.podman("pull", "--quiet", other)
    shown = podman_env.podman("run", "--rm", other.removeprefix("docker://")).stdout
    assert shown.startswith("hello from small")


@pytest.mark.parametrize("packed", ["gzip", "zstd"])
def test_podman_runs_layers_that_we_pack(podman_env: PodmanEnv, place: Path, packed: str) -> None:
    image = images.small_image()
    target = f"oci-archive:{place}/packed.tar:localhost/packed:1"
    copy(podman_env, image.source, f"dir:{place}/plain", "--dest-decompress")
    flags = ("--dest-compress-format", packed, "--dest-compress-level", "2")
    copy(podman_env, f"dir:{place}/plain", target, *flags)
    kinds = {layer["mediaType"] for layer in inspected(podman_env, target)["layers"]}
    assert kinds == {f"application/vnd.oci.image.layer.v1.tar+{packed}"}
    podman_env.podman("load", "--quiet", "--input", place / "packed.tar")
    shown = podman_env.podman("run", "--rm", "localhost/packed:1").stdout
    assert shown.startswith("hello from small")


def test_a_copy_between_registries_keeps_every_byte(
    podman_env: PodmanEnv, registry: DebianRegistry, small: Pushed
) -> None:
    source = f"docker://{registry.host}/{small.name}"
    target = f"docker://{registry.host}/copied/{podman_env.flavour}:1"
    result = copy(podman_env, source, target, "--preserve-digests")
    assert result["digest"] == result["source"]
    assert (
        podman_env.skopeo("inspect", "--raw", source).stdout
        == podman_env.skopeo("inspect", "--raw", target).stdout
    )


def test_all_images_of_an_index_go_along(
    podman_env: PodmanEnv, registry: DebianRegistry, place: Path
) -> None:
    index = images.small_index()
    target = f"docker://{registry.host}/copied/index-{podman_env.flavour}:1"
    result = copy(podman_env, index.source, target, "--all")
    assert result["digest"] == index.digest
    podman_env.skopeo("copy", "--quiet", "--all", target, f"oci:{place}/theirs:x")
    # and back: theirs in a directory, ours from it
    podman_env.skopeo("copy", "--quiet", "--all", target, f"dir:{place}/dir")
    again = copy(podman_env, f"dir:{place}/dir", f"oci-archive:{place}/a.tar:x", "--all")
    assert again["digest"] == index.digest
    for architecture in ("amd64", "arm64"):
        copy(podman_env, target, f"dir:{place}/{architecture}", f"--platform=linux/{architecture}")
        config = inspected(podman_env, f"dir:{place}/{architecture}")["config"]["digest"]
        found = json.loads((place / architecture / config.partition(":")[2]).read_bytes())
        assert found["architecture"] == architecture


def test_an_index_becomes_a_list_of_docker_images(podman_env: PodmanEnv, place: Path) -> None:
    target = f"dir:{place}/list"
    copy(podman_env, images.small_index().source, target, "--all", "--format", "v2s2")
    assert "manifest.list" in inspected(podman_env, target)["mediaType"]
    podman_env.skopeo("copy", "--quiet", "--all", target, f"oci:{place}/again:x")


def test_a_lazy_image_keeps_its_layers(
    podman_env: PodmanEnv, registry: DebianRegistry, small: Pushed, place: Path
) -> None:
    """eStargz through a directory and back: digests and annotations stay."""
    source = f"docker://{registry.host}/{small.name}"
    target = f"docker://{registry.host}/copied/lazy-{podman_env.flavour}:1"
    copy(podman_env, source, f"oci-archive:{place}/lazy.tar:x")
    copy(podman_env, f"oci-archive:{place}/lazy.tar:x", target)
    assert inspected(podman_env, target) == inspected(podman_env, source)


def test_zstd_chunked_is_copied_and_unpacked(
    make_podman_env: Callable[..., PodmanEnv], registry: DebianRegistry
) -> None:
    env = make_podman_env("debian13")
    image = images.small_image()
    place = env.directory / "place"
    place.mkdir()
    # straight to a registry Skopeo may take over the blobs as they are elsewhere in it
    packed = f"oci:{place}/chunked:x"
    env.skopeo("copy", "--quiet", "--dest-compress-format=zstd:chunked", image.source, packed)
    target = f"docker://{registry.host}/copied/chunked:1"
    env.skopeo("copy", "--quiet", "--preserve-digests", packed, target)
    layers = inspected(env, target)["layers"]
    assert all("+zstd" in layer["mediaType"] for layer in layers)
    kept = copy(env, target, f"oci:{place}/kept:x")
    assert kept["digest"] == kept["source"]
    copy(env, target, f"docker-archive:{place}/plain.tar:localhost/chunked:1")
    loaded = env.podman("load", "--quiet", "--input", place / "plain.tar").stdout
    assert "localhost/chunked:1" in loaded
    assert skopeo_config(env, f"docker-archive:{place}/plain.tar") == skopeo_config(env, target)
    copy(env, target, f"docker://{registry.host}/copied/unchunked:1", "--format=v2s2")
    changed = inspected(env, f"docker://{registry.host}/copied/unchunked:1")["layers"]
    assert all(layer["mediaType"].endswith("tar.gzip") for layer in changed)


# -- save and load -----------------------------------------------------------------


FORMATS = ("docker-archive", "oci-archive", "docker-dir", "oci-dir")


@pytest.fixture
def stored(podman_env: PodmanEnv, registry: DebianRegistry, push: Push) -> str:
    """The name of an image in the storage of ``podman_env``."""
    pushed = push(images.small_image(), "copy/plain:1")
    name = f"{registry.host}/{pushed.name}"
    podman_env.podman("pull", "--quiet", name)
    return name


@pytest.mark.parametrize("form", FORMATS)
def test_podman_loads_what_we_save(
    podman_env: PodmanEnv, place: Path, stored: str, form: str
) -> None:
    before = podman_env.podman("inspect", "--format", "{{.Id}} {{.RootFS.Layers}}", stored).stdout
    ours(podman_env, "save", "--quiet", "--format", form, "--output", place / "saved", stored)
    assert os.listdir(place) == ["saved"]
    podman_env.podman("rmi", stored)
    said = podman_env.podman("load", "--quiet", "--input", place / "saved").stdout
    name = said.strip().rpartition(": ")[2]
    after = podman_env.podman("inspect", "--format", "{{.Id}} {{.RootFS.Layers}}", name).stdout
    assert after == before
    assert podman_env.podman("run", "--rm", name).stdout.startswith("hello from small")


@pytest.mark.parametrize("form", FORMATS)
def test_we_load_what_podman_saves(
    podman_env: PodmanEnv, place: Path, stored: str, form: str
) -> None:
    before = podman_env.podman("inspect", "--format", "{{.Id}} {{.RootFS.Layers}}", stored).stdout
    podman_env.podman("save", "--quiet", "--format", form, "--output", place / "saved", stored)
    podman_env.podman("rmi", stored)
    said = ours(podman_env, "load", "--quiet", "--input", place / "saved").stdout
    assert said.startswith("Loaded image: ")
    name = said.strip().rpartition(": ")[2]
    if form != "docker-dir":
        assert name == stored
    after = podman_env.podman("inspect", "--format", "{{.Id}} {{.RootFS.Layers}}", name).stdout
    assert after == before
    assert podman_env.podman("run", "--rm", name).stdout.startswith("hello from small")


def test_a_pulled_archive_or_layout_has_the_names_that_podman_gives(
    podman_env: PodmanEnv, place: Path
) -> None:
    small = images.small_image().source
    for target in ("oci:lay:plain", "oci:full:quay.io/a/b:c", "oci:bare", "dir:dir"):
        transport, _, rest = target.partition(":")
        podman_env.skopeo("copy", "-q", small, f"{transport}:{place}/{rest}")
    for target in ("oci-archive:o1:plain", "oci-archive:o2", "docker-archive:d1:m:1"):
        transport, _, rest = target.partition(":")
        flags = ("--additional-tag", "quay.io/z/y:2") if rest == "d1:m:1" else ()
        podman_env.skopeo("copy", "-q", *flags, small, f"{transport}:{place}/{rest}")

    def names() -> list[set[str]]:
        found = json.loads(podman_env.podman("images", "--format", "json").stdout)
        podman_env.podman("rmi", "--all", "--force")
        return [set(one.get("Names") or ()) for one in found]

    for transport, rest in (
        ("oci", "lay:plain"),
        ("oci", "full:quay.io/a/b:c"),
        ("oci", "bare"),
        ("dir", "dir"),
        ("oci-archive", "o1"),
        ("oci-archive", "o2"),
        ("docker-archive", "d1"),
        ("docker-archive", "d1:m:1"),
        ("docker-archive", "d1:@0"),
    ):
        if transport == "oci" and podman_env.flavour == "debian12":
            continue  # Podman 4 takes the path for the name
        name = f"{transport}:{place}/{rest}"
        podman_env.podman("pull", "-q", name)
        theirs = names()
        ours(podman_env, "pull", "-q", name)
        assert names() == theirs, name


def test_several_images_in_one_archive(podman_env: PodmanEnv, place: Path, stored: str) -> None:
    other = images.small_image(marker="other")
    podman_env.skopeo(
        "copy",
        "--quiet",
        other.source,
        f"containers-storage:{storage(podman_env)}localhost/other:1",
    )
    podman_env.podman("tag", stored, "localhost/again:2")
    names = {stored, "localhost/other:1", "localhost/again:2"}
    ours(podman_env, "save", "-q", "-m", "-o", place / "all.tar", *sorted(names))
    podman_env.podman("save", "-q", "-m", "-o", place / "theirs.tar", *sorted(names))
    for tool, file in (
        ("podman", "all.tar"),
        ("layerstore", "theirs.tar"),
        ("layerstore", "all.tar"),
    ):
        podman_env.podman("rmi", "--all", "--force")
        if tool == "podman":
            podman_env.podman("load", "-q", "-i", place / file)
        else:
            said = ours(podman_env, "load", "-q", "-i", place / file).stdout
            assert {line.removeprefix("Loaded image: ") for line in said.splitlines()} == names
        listed = podman_env.podman("images", "--format", "{{.Repository}}:{{.Tag}}").stdout
        assert set(listed.split()) == names


def storage(env: PodmanEnv) -> str:
    return f"[overlay@{env.graph_root}+{env.run_root}]"


def test_an_archive_through_pipes_packed_and_plain(
    podman_env: PodmanEnv, place: Path, stored: str
) -> None:
    python = [sys.executable, "-m", "layerstore.cli"]
    environment = podman_env.environment() | {"PYTHONPATH": "src"}
    saved = subprocess.run(
        [*python, "save", "-q", stored], env=environment, capture_output=True, check=True
    ).stdout
    (place / "saved.tar").write_bytes(saved)
    with tarfile.open(place / "saved.tar") as archive:
        assert "manifest.json" in archive.getnames()
    podman_env.podman("rmi", stored)
    loaded = subprocess.run(
        [*python, "load", "-q"],
        env=environment,
        input=gzip.compress(saved, 1),
        capture_output=True,
        check=True,
    ).stdout
    assert loaded.decode() == f"Loaded image: {stored}\n"
    podman_env.podman("run", "--rm", stored)


def test_archives_where_images_are_chosen_by_name_and_number(
    podman_env: PodmanEnv, place: Path, stored: str
) -> None:
    podman_env.podman("tag", stored, "localhost/again:2")
    ours(podman_env, "save", "-q", "-m", "-o", place / "a.tar", stored, "localhost/again:2")
    archive = f"docker-archive:{place}/a.tar"
    configs = {skopeo_config(podman_env, f"{archive}:{end}") for end in (stored, "@0")}
    for number, end in enumerate(("localhost/again:2", "@0", stored)):
        copy(podman_env, f"{archive}:{end}", f"dir:{place}/{number}")
        configs.add(skopeo_config(podman_env, f"dir:{place}/{number}"))
    assert len(configs) == 1
    with pytest.raises(CommandError, match="no such image"):
        copy(podman_env, f"{archive}:localhost/none:1", f"dir:{place}/none")
    assert not (place / "none").exists()


def test_the_storage_is_a_transport(podman_env: PodmanEnv, place: Path, stored: str) -> None:
    name = f"containers-storage:{storage(podman_env)}"
    copy(podman_env, f"{name}{stored}", f"oci:{place}/out:x")
    copy(podman_env, f"oci:{place}/out:x", f"{name}localhost/back:1")
    ids = podman_env.podman("inspect", "--format", "{{.Id}}", stored, "localhost/back:1").stdout
    assert len(set(ids.split())) == 1
    podman_env.podman("run", "--rm", "localhost/back:1")


@pytest.mark.parametrize("flavour", ["debian12"], indirect=True)
def test_digests_are_written_and_policies_heeded(
    podman_env: PodmanEnv, flavour: Flavour, place: Path
) -> None:
    image = images.small_image()
    file = place / "digest"
    copy(podman_env, image.source, f"oci:{place}/a:x", "--digestfile", str(file))
    assert file.read_text() == image.digest
    podman_env.policy.write_text(json.dumps({"default": [{"type": "reject"}]}))
    with pytest.raises(CommandError, match="policy rejects"):
        copy(podman_env, image.source, f"dir:{place}/b")
    assert not (place / "b").exists()
    copy(podman_env, image.source, f"dir:{place}/b", "--insecure-policy")
    shutil.rmtree(place / "b")
