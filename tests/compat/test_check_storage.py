"""`layerstore check storage` on graph roots that Podman filled and somebody damaged."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab import oci, tars
from lab.images import tar_bytes
from lab.oci import LayerSource, RunConfig
from lab.podman import Flavour, PodmanEnv
from lab.registry import DebianRegistry
from lab.rig import Pushed, graph_layers

HELLO = "hello from small amd64: 199 files\n"


@pytest.fixture
def filled(
    flavour: Flavour, make_podman_env, registry: DebianRegistry, small: Pushed
) -> tuple[PodmanEnv, str]:
    """A graph root with one image, pulled plainly."""
    env = make_podman_env(flavour)
    image = f"{registry.host}/{small.name}"
    env.podman("pull", "-q", image)
    return env, image


def findings(env: PodmanEnv, *flags: str) -> tuple[int, list[dict[str, Any]]]:
    result = env.layerstore("check", "storage", "--json", *flags, check=False)
    assert result.stdout, result.stderr
    return result.returncode, json.loads(result.stdout)["findings"]


def kinds(found: list[dict[str, Any]]) -> set[str]:
    return {one["kind"] for one in found if one["weight"] != "notice"}


def layers_of(env: PodmanEnv) -> list[str]:
    """Ids, the base first."""
    return [record["id"] for record in graph_layers(env)]


def image_directory(env: PodmanEnv) -> Path:
    (directory,) = [path for path in (env.graph_root / "overlay-images").iterdir() if path.is_dir()]
    return directory


def test_nothing_is_wrong_with_what_podman_wrote(filled: tuple[PodmanEnv, str]) -> None:
    env, image = filled
    env.podman("create", "--name", "kept", image)
    assert findings(env, "--full") == (0, [])
    status, found = findings(env, "--full", "--repair")
    assert (status, found) == (0, [])
    assert env.podman("start", "-a", "kept").stdout == HELLO


def lose_short_link(env: PodmanEnv) -> None:
    link = (env.graph_root / "overlay" / layers_of(env)[0] / "link").read_text()
    (env.graph_root / "overlay/l" / link).unlink()


def lose_link_file(env: PodmanEnv) -> None:
    (env.graph_root / "overlay" / layers_of(env)[1] / "link").unlink()


def confuse_lower(env: PodmanEnv) -> None:
    (env.graph_root / "overlay" / layers_of(env)[-1] / "lower").write_text(
        "l/AAAAAAAAAAAAAAAAAAAAAAAAAA"
    )


def damage_manifest(env: PodmanEnv) -> None:
    path = image_directory(env) / "manifest"
    path.write_bytes(path.read_bytes()[:-2])


def leave_orphans(env: PodmanEnv) -> None:
    (env.graph_root / "overlay" / ("ab" * 32) / "diff").mkdir(parents=True)
    (env.graph_root / "overlay-layers" / f"{'cd' * 32}.tar-split.gz").write_bytes(b"")
    (env.graph_root / "overlay-images" / ("ef" * 32)).mkdir()


def give_name_twice(env: PodmanEnv) -> None:
    path = env.graph_root / "overlay-images/images.json"
    (record,) = json.loads(path.read_bytes())
    twin = {**record, "id": "12" * 32, "big-data-names": [], "layer": ""}
    path.write_text(json.dumps([twin, record]))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lose_short_link, {"layer-link-lost"}),
        (lose_link_file, {"layer-link-lost"}),
        (confuse_lower, {"layer-lower-wrong"}),
        (damage_manifest, {"image-data-damaged"}),
        (leave_orphans, {"orphan-directory", "orphan-file"}),
        (give_name_twice, {"duplicate-name"}),
    ],
)
def test_what_can_be_restored_is_restored(
    filled: tuple[PodmanEnv, str], damage: Callable[[PodmanEnv], None], expected: set[str]
) -> None:
    env, image = filled
    damage(env)
    status, found = findings(env)
    assert (status, kinds(found)) == (1, expected)
    assert not any(one["repaired"] for one in found)
    status, found = findings(env, "--repair")
    assert status == 0, found
    assert all(one["repaired"] for one in found if one["weight"] != "notice")
    assert findings(env, "--full") == (0, [])
    assert env.podman("run", "--rm", "--pull=never", image).stdout == HELLO


def lose_content(env: PodmanEnv) -> None:
    shutil.rmtree(env.graph_root / "overlay" / layers_of(env)[1])


def lose_record(env: PodmanEnv) -> None:
    path = env.graph_root / "overlay-layers/layers.json"
    records = json.loads(path.read_bytes())
    path.write_text(json.dumps([record for record in records if record is not records[1]]))


def change_file(env: PodmanEnv) -> None:
    diff = env.graph_root / "overlay" / layers_of(env)[0] / "diff"
    path = next(
        path for path in sorted(diff.rglob("*")) if path.is_file() and not path.is_symlink()
    )
    times = path.stat()
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def change_mode(env: PodmanEnv) -> None:
    (env.graph_root / "overlay" / layers_of(env)[0] / "diff/bin/busybox").chmod(0o4711)


def lose_tar_split(env: PodmanEnv) -> None:
    (env.graph_root / "overlay-layers" / f"{layers_of(env)[1]}.tar-split.gz").unlink()


def damage_config(env: PodmanEnv) -> None:
    path = max(
        (path for path in image_directory(env).iterdir() if path.name.startswith("=")),
        key=lambda path: b'"rootfs"' in path.read_bytes(),
    )
    path.write_bytes(path.read_bytes().replace(b"rootfs", b"rootfz"))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lose_content, "layer-content-missing"),
        (lose_record, "layer-missing"),
        (change_file, "layer-changed"),
        (change_mode, "layer-changed"),
        (lose_tar_split, "layer-changed"),
        (damage_config, "image-data-damaged"),
    ],
)
def test_what_cannot_be_restored_goes_and_can_be_pulled_again(
    filled: tuple[PodmanEnv, str], damage: Callable[[PodmanEnv], None], expected: str
) -> None:
    env, image = filled
    damage(env)
    status, found = findings(env, "--full")
    assert status == 1
    assert expected in kinds(found)
    if env.flavour == "debian13" and damage is not damage_config:  # Podman sees other sizes only
        assert env.podman("system", "check", check=False).returncode != 0
    status, found = findings(env, "--full", "--repair")
    assert status == 0, found
    assert findings(env, "--full")[0] == 0
    if env.flavour == "debian13":
        assert env.podman("system", "check").stdout == ""
    assert env.podman("image", "exists", image, check=False).returncode == 1
    env.podman("pull", "-q", image)
    assert env.podman("run", "--rm", "--pull=never", image).stdout == HELLO
    assert findings(env, "--full") == (0, [])


def test_nothing_that_a_container_needs_is_removed(filled: tuple[PodmanEnv, str]) -> None:
    env, image = filled
    env.podman("create", "--name", "precious", image)
    change_file(env)
    status, found = findings(env, "--full", "--repair")
    assert status == 1
    (changed,) = [one for one in found if one["kind"] == "layer-changed"]
    assert changed["users"] == ["precious"]
    assert "precious" in changed["detail"]
    assert not changed["repaired"]
    assert env.podman("start", "-a", "precious").stdout == HELLO


PLAIN = tars.regular(b"etc/plain", b"plain\n")


def sparse(place: Path) -> bytes:
    """An archive by GNU tar with a sparse file, as Podman takes it."""
    source = place / "source"
    (source / "etc").mkdir(parents=True)
    with (source / "sparse").open("wb") as file:
        file.write(b"begin")
        file.seek(1 << 20)
        file.write(b"end")
    (source / "etc/plain").write_bytes(b"plain\n")
    command = ["tar", "--format=pax", "-S", "-C", str(source), "-cf", "-", "sparse", "etc/plain"]
    return subprocess.run(command, check=True, capture_output=True).stdout


def odd_archives(place: Path) -> dict[str, bytes]:
    """Archives that Podman takes, and cannot put together again."""
    return {
        "sparse": sparse(place),
        "climbing": tar_bytes([PLAIN, tars.regular(b"../climbing", b"hello\n")]),
        "whiteout": tar_bytes([PLAIN, tars.regular(b"etc/.wh.gone", b"bytes\n")]),
        "replaced": tar_bytes(
            [PLAIN, tars.regular(b"opt/x/y", b"first\n"), tars.regular(b"opt/x", b"second\n")]
        ),
    }


@pytest.fixture
def pull_odd(
    flavour: Flavour,
    make_podman_env: Callable[[Flavour], PodmanEnv],
    registry: DebianRegistry,
    push: Callable[[oci.StoredImage, str], object],
    workspace: Path,
) -> Callable[[str, bytes], PodmanEnv]:
    """Has Podman pull an image with an archive as its layer; the graph root, always the same."""
    env = make_podman_env(flavour)

    def pull(name: str, archive: bytes) -> PodmanEnv:
        layout = workspace / f"check-odd-{flavour}-{name}"
        push(oci.write_image(layout, name, [LayerSource(archive)], RunConfig()), f"odd/{name}:1")
        env.podman("pull", "-q", f"{registry.host}/odd/{name}:1")
        return env

    return pull


def test_attributes_that_only_podman_takes_or_leaves_out_are_no_damage(
    pull_odd: Callable[[str, bytes], PodmanEnv],
) -> None:
    archive = tar_bytes(
        [
            tars.directory(b"d", xattrs={b"trusted.overlay.opaque": b"y"}),
            tars.regular(b"d/f", b"f\n", xattrs={b"user.empty": b"", b"user.overlay.x": b"y"}),
        ]
    )
    env = pull_odd("attributes", archive)
    assert findings(env, "--full", "--repair") == (0, [])


def test_an_archive_that_never_comes_back_is_no_damage(
    pull_odd: Callable[[str, bytes], PodmanEnv], tmp_path: Path
) -> None:
    env = [pull_odd(name, archive) for name, archive in odd_archives(tmp_path).items()][-1]
    status, found = findings(env, "--full", "--repair")
    assert (status, kinds(found)) == (0, set())
    assert [one["kind"] for one in found] == ["layer-archive-lost"] * 4
    assert len(layers_of(env)) == 4
    for layer in layers_of(env):
        (env.graph_root / "overlay" / layer / "diff/etc/plain").write_bytes(b"PLAIN\n")
    status, found = findings(env, "--full")
    assert status == 1
    assert [one["kind"] for one in found] == ["layer-changed"] * 4
    assert all(one["detail"].startswith("etc/plain: ") for one in found)


def test_a_table_that_cannot_be_read_is_left_alone(filled: tuple[PodmanEnv, str]) -> None:
    env, _ = filled
    path = env.graph_root / "overlay-layers/layers.json"
    damaged = path.read_bytes()[:-20]
    path.write_bytes(damaged)
    result = env.layerstore("check", "storage", "--repair", check=False)
    assert result.returncode == 1
    assert str(path) in result.stderr
    assert "Traceback" not in result.stderr
    assert path.read_bytes() == damaged
