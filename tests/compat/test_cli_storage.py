"""Each verb of ours on a graph root that the real Podman works on, too, and the reverse."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lab import images
from lab.podman import CommandError, PodmanEnv
from lab.rig import Pushed, Rig
from lab.waiting import until
from lab.zygote import Zygote
from layerstore.image import Digest

NAME = "localhost/small:1"


class Ours:
    """The command line of layerstore in a Podman environment."""

    def __init__(self, env: PodmanEnv, zygote: Zygote) -> None:
        self._env = env
        self.zygote = zygote

    def __call__(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.zygote.command(*arguments, environment=self._env.environment(), check=check)

    def json(self, *arguments: str) -> Any:
        return json.loads(self(*arguments, "--json").stdout)


@pytest.fixture
def env(podman_env: PodmanEnv) -> PodmanEnv:
    podman_env.skopeo("copy", "-q", images.small_image().source, f"containers-storage:{NAME}")
    return podman_env


@pytest.fixture
def ours(env: PodmanEnv, zygote: Zygote) -> Ours:
    return Ours(env, zygote)


def same_text(env: PodmanEnv, ours: Ours, *arguments: str) -> str:
    """What both print, which is the same but for the seconds between the two calls."""
    theirs, shown = env.podman(*arguments).stdout, ours(*arguments).stdout
    if theirs != shown:
        assert _ageless(shown) == _ageless(theirs)
    return theirs


def _ageless(text: str) -> str:
    aged = re.sub(r"(Less than a|About a|\d+) (second|minute)s? ago", "now", text)
    return re.sub(r" +", " ", aged)


def commit(env: PodmanEnv, container: str, name: str) -> str:
    return env.podman("commit", "-q", container, name).stdout.strip()


def build(env: PodmanEnv) -> tuple[str, str]:
    """An image in two steps, the first of which loses its name: their ids."""
    env.podman("create", "--name", "c1", NAME, "sh")
    step = commit(env, "c1", "built:1")
    env.podman("create", "--name", "c2", "built:1", "sh")
    last = commit(env, "c2", "built:1")
    return step, last


def untidy(env: PodmanEnv, container: str) -> None:
    """Add, change and delete files in a container, some of them those of the engine."""
    top = Path(env.podman("mount", container).stdout.strip())
    for name in ("run/x", "proc/a", "tmp/q", "etc"):
        (top / name).mkdir(parents=True, exist_ok=True)
    (top / "etc/hosts").write_text("engine's\n")
    (top / "etc/ours").write_text("new\n")
    (top / "app/hello").unlink()
    (top / "data/small/001.txt").write_text("changed\n")
    env.podman("umount", container)


# -- reading --------------------------------------------------------------------------


def test_lists_have_the_same_text(env: PodmanEnv, ours: Ours) -> None:
    env.podman("tag", NAME, "quay.io/team/app:v1")
    (document,) = ours.json("inspect", NAME)
    digest = f"quay.io/other/app@{document['Digest']}"
    env.containers_storage("add-names", "--name", digest, document["Id"])
    for arguments in (
        ("images",),
        ("images", "-a"),
        ("images", "-q"),
        ("images", "-q", "--no-trunc"),
        ("images", "--digests", "--no-trunc"),
        ("images", "--noheading"),
        ("images", "app"),
        ("images", "a*"),
        ("images", "nothing"),
        ("images", "--filter", "reference=quay.io/*/*"),
        ("images", "--filter", "dangling=true"),
    ):
        same_text(env, ours, *arguments)


def test_intermediate_images_and_history_have_the_same_text(env: PodmanEnv, ours: Ours) -> None:
    step, _ = build(env)
    assert step[:12] not in same_text(env, ours, "images")
    assert step[:12] in ours("images", "-a").stdout
    ids = ("images", "-aq")
    assert set(ours(*ids).stdout.split()) == set(env.podman(*ids).stdout.split())
    # 5.4 writes sizes without a space; time passes between the two calls.
    assert _steps(ours("history", "built:1").stdout) == _steps(
        env.podman("history", "built:1").stdout
    )
    assert same_text(env, ours, "history", "-q", NAME).splitlines()[1:] == ["<missing>"] * 2


def test_a_base_that_several_steps_lie_above_stays(env: PodmanEnv, ours: Ours) -> None:
    context = env.directory / "context"
    context.mkdir()
    (context / "f").write_text("x")
    steps = context / "Containerfile"
    steps.write_text(f"FROM {NAME}\nCOPY f /f\n")
    base = env.podman("build", "-q", "-t", "base", "-f", steps, context).stdout.strip()
    steps.write_text("FROM localhost/base\nENV a=b\nCOPY f /g\nENV c=d\n")
    build = ("build", "-q", "--layers=false", "-t", "app", "-f", steps, context)
    app = env.podman(*build).stdout.strip()
    env.podman("untag", "base")
    # Podman sorts by full seconds, in which both may have been made.
    lines = [_ageless(shown("images").stdout).splitlines() for shown in (env.podman, ours)]
    assert sorted(lines[0]) == sorted(lines[1])
    assert base[:12] in same_text(env, ours, "images", "--filter", "dangling=true")
    (theirs,) = json.loads(env.podman("image", "inspect", "app").stdout)
    (document,) = ours.json("inspect", "app")
    assert document["Parent"] == theirs["Parent"] == ""
    assert _steps(ours("history", "app").stdout) == _steps(env.podman("history", "app").stdout)
    assert f"Deleted: {app}\n" in ours("rmi", "app").stdout
    assert base[:12] in same_text(env, ours, "images")


def _steps(text: str) -> list[str]:
    without_age = re.sub(r"(Less than a|About a|\d+) (second|minute|year)s? ago", "", text)
    return re.sub(r"(\d)(kB|MB|B)\b", r"\1 \2", without_age).split()


_EMPTY_TAR = b"\0" * 1024
_OCI = "application/vnd.oci.image"


def _layout(place: Path, created: str | None, history: list[Any] | None) -> str:
    """An image whose config tells so much, as a source of copies."""
    blobs = place / "blobs/sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, kind: str) -> dict[str, Any]:
        digest = Digest.of(data)
        (blobs / digest.hex).write_bytes(data)
        return {"mediaType": f"{_OCI}.{kind}", "digest": digest, "size": len(data)}

    layer = put(_EMPTY_TAR, "layer.v1.tar")
    rootfs = {"type": "layers", "diff_ids": [layer["digest"]]}
    config: dict[str, Any] = {"architecture": "amd64", "os": "linux", "rootfs": rootfs}
    config |= {} if created is None else {"created": created}
    config |= {} if history is None else {"history": history}
    described = put(json.dumps(config).encode(), "config.v1+json")
    manifest = {"schemaVersion": 2, "config": described, "layers": [layer]}
    entry = put(json.dumps(manifest).encode(), "manifest.v1+json")
    (place / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    (place / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    return f"oci:{place}"


@pytest.mark.parametrize("tool", ["skopeo", "ours"])
@pytest.mark.parametrize(
    ("created", "history"),
    [
        ("0001-01-01T00:00:00+23:00", None),
        ("9999-12-31T23:59:59-23:59", []),
        ("2024-01-01T00:00:00.50+02:00", [None]),
        (None, [{"created_by": "x"}, {"created": "1500-01-01T00:00:00Z", "empty_layer": True}]),
    ],
)
def test_images_without_history_or_usual_times(
    podman_env: PodmanEnv,
    zygote: Zygote,
    tool: str,
    created: str | None,
    history: list[Any] | None,
) -> None:
    env, ours = podman_env, Ours(podman_env, zygote)
    source = _layout(env.directory / "odd", created, history)
    copy = env.skopeo if tool == "skopeo" else ours
    copy("copy", "-q", source, "containers-storage:localhost/odd:1")
    same_text(env, ours, "images")
    assert _steps(ours("history", "odd:1").stdout) == _steps(env.podman("history", "odd:1").stdout)
    steps = json.loads(env.podman("history", "--format", "json", "odd:1").stdout)
    assert [one["created"] for one in ours.json("history", "odd:1")] == [
        one["created"] for one in steps
    ]
    (theirs,) = json.loads(env.podman("images", "--format", "json").stdout)
    (listed,) = ours.json("images")
    assert (listed["Created"], listed["CreatedAt"]) == (theirs["Created"], theirs["CreatedAt"])
    (told,) = json.loads(env.podman("image", "inspect", "odd:1").stdout)
    assert ours.json("inspect", "odd:1")[0]["History"] == (told["History"] or [])


def test_inspect_has_all_that_podman_tells(env: PodmanEnv, ours: Ours) -> None:
    build(env)
    for name in (NAME, "built:1"):
        (theirs,) = json.loads(env.podman("image", "inspect", name).stdout)
        (document,) = ours.json("inspect", name)
        layers = document.pop("Layers")
        assert document == theirs
        assert [layer["DiffID"] for layer in layers] == theirs["RootFS"]["Layers"]
        assert all(layer["Source"] == "local" for layer in layers)
        assert all(Path(layer["DiffPath"]).is_dir() for layer in layers)


def test_json_of_images_agrees(env: PodmanEnv, ours: Ours) -> None:
    build(env)
    theirs = {
        each["Id"]: each for each in json.loads(env.podman("images", "-a", "--format=json").stdout)
    }
    found = ours.json("images", "-a")
    assert {each["Id"] for each in found} == set(theirs)
    for each in found:
        other = theirs[each["Id"]]
        for key in ("ParentId", "RepoDigests", "Size", "Digest", "Created", "CreatedAt"):
            assert each[key] == other[key], key
        for key in ("Names", "History"):
            assert each[key] == (other.get(key) or []), key
        assert each["Containers"] == other["Containers"]


def test_images_of_an_additional_store_are_marked(
    podman_env: PodmanEnv, env: PodmanEnv, ours: Ours, tmp_path: Path
) -> None:
    with PodmanEnv(podman_env.directory / "own", podman_env.flavour) as own:
        own.configure_storage(additional_image_stores=[env.graph_root])
        mine = Ours(own, ours.zygote)
        assert same_text(own, mine, "images").splitlines()[1].endswith("true")
        refused = mine("rmi", NAME, check=False)
        assert refused.returncode == 2
        assert "read-only" in refused.stderr
        mine("tag", NAME, "mine:1")
        assert "localhost/mine" in own.podman("images", "--noheading").stdout
        assert env.podman("images", "--noheading").stdout.count("\n") == 1


@pytest.mark.parametrize("name", ["c1", NAME])
def test_diff_has_the_same_text(env: PodmanEnv, ours: Ours, name: str) -> None:
    env.podman("create", "--name", "c1", NAME, "sh")
    untidy(env, "c1")
    assert same_text(env, ours, "diff", name).count("\n") > 5
    theirs = json.loads(env.podman("diff", "--format=json", name).stdout)
    assert {key: found for key, found in ours.json("diff", name).items() if found} == theirs


# -- names ----------------------------------------------------------------------------


def test_names_that_we_give_are_podmans(env: PodmanEnv, ours: Ours) -> None:
    ours("tag", NAME, "other:2", "quay.io/team/app:v1")
    names = ["localhost/other:2", "quay.io/team/app:v1", NAME]
    (listed, *_) = json.loads(env.podman("images", "--format=json").stdout)
    assert listed["Names"] == names
    (document,) = json.loads(env.podman("image", "inspect", "other:2").stdout)
    assert document["NamesHistory"] == names
    ours("untag", NAME, "other:2")
    assert env.podman("image", "exists", "other:2", check=False).returncode == 1
    env.podman("tag", NAME, "third:3")
    assert "localhost/third" in ours("images").stdout
    env.podman("untag", NAME, "third:3")
    assert "localhost/third" not in ours("images").stdout
    ours("untag", NAME)
    assert env.podman("images", "--noheading").stdout.startswith("<none>")


def test_a_name_moves_to_the_image_that_gets_it(env: PodmanEnv, ours: Ours) -> None:
    build(env)
    ours("tag", NAME, "built:1")
    (document,) = json.loads(env.podman("image", "inspect", "built:1").stdout)
    assert NAME in document["RepoTags"]


# -- removing ---------------------------------------------------------------------------


def test_what_we_remove_is_gone_for_podman(env: PodmanEnv, ours: Ours) -> None:
    ours("tag", NAME, "other:2")
    image = env.podman("images", "-q", "--no-trunc").stdout.split()[0].removeprefix("sha256:")
    refused = ours("rmi", image, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert ours("rmi", NAME).stdout == f"Untagged: {NAME}\n"
    assert ours("rmi", "other:2").stdout == f"Untagged: localhost/other:2\nDeleted: {image}\n"
    assert env.podman("images", "-aq").stdout == ""
    assert json.loads((env.graph_root / "overlay-layers/layers.json").read_text() or "[]") == []
    assert [path for path in (env.graph_root / "overlay").iterdir() if len(path.name) == 64] == []


def test_what_podman_removes_is_gone_for_us(env: PodmanEnv, ours: Ours) -> None:
    env.podman("rmi", NAME)
    assert ours("images", "-aq").stdout == ""
    missing = ours("rmi", NAME, check=False)
    assert (missing.returncode, missing.stderr.count("\n")) == (1, 1)
    assert ours("rmi", "--ignore", NAME).stdout == ""


def test_images_of_containers_stay_and_steps_go_with_the_last(env: PodmanEnv, ours: Ours) -> None:
    step, last = build(env)
    used = ours("rmi", NAME, check=False)
    assert used.returncode == 2
    container = env.podman("inspect", "--format={{.Id}}", "c1").stdout.strip()
    assert container in used.stderr
    env.podman("rm", "c2")
    both = f"Untagged: localhost/built:1\nDeleted: {last}\nDeleted: {step}\n"
    assert ours("rmi", "built:1").stdout == both
    assert env.podman("images", "-aq").stdout.count("\n") == 1
    env.podman("start", "-a", "c1")


def test_all_images_go_but_those_of_containers(env: PodmanEnv, ours: Ours) -> None:
    build(env)
    env.podman("rm", "c2")
    ours("tag", "built:1", "again:1")
    left = ours("rmi", "--all", check=False)
    assert left.returncode == 2
    assert left.stderr.count("\n") == 1
    assert env.podman("images", "--noheading", "-a").stdout.split()[:2] == ["localhost/small", "1"]


def test_prune_removes_what_podman_would(env: PodmanEnv, ours: Ours) -> None:
    env.podman("create", "--name", "c1", NAME, "sh")
    commit(env, "c1", "built:1")
    ours("untag", "built:1")
    assert ours("prune", check=False).returncode == 2  # nobody to ask
    pruned = ours("prune", "--force").stdout.splitlines()
    assert pruned[0].startswith("Deleted: ")
    assert pruned[-1].startswith("Total reclaimed space: ")
    assert env.podman("images", "-aq").stdout.count("\n") == 1
    assert env.podman("image", "prune", "--force").stdout == ""
    env.podman("rm", "c1")
    report = ours.json("prune", "--force", "--all")
    assert report["Untagged"] == [NAME]
    assert report["SpaceReclaimed"] > 14_000_000
    assert env.podman("images", "-aq").stdout == ""


# -- mounting -----------------------------------------------------------------------------


def test_mounts_of_images_are_counted_together(env: PodmanEnv, ours: Ours) -> None:
    path = Path(ours("mount", NAME).stdout.strip())
    assert (path / "app/hello").exists()
    with pytest.raises(OSError, match="Read-only"):
        (path / "new").write_text("")
    assert env.podman("image", "mount", NAME).stdout.strip() == str(path)
    (listed,) = ours.json("mount")
    assert (listed["type"], listed["mountpoint"], listed["count"]) == ("image", str(path), 2)
    image = ours("umount", NAME).stdout.strip()
    assert image == listed["id"]
    assert path.is_mount()
    env.podman("image", "umount", NAME)
    assert not path.is_mount()
    assert ours("umount", NAME).stdout == ""
    env.podman("image", "mount", NAME)
    assert ours("umount", "--all").stdout.strip() == image
    assert env.podman("image", "mount").stdout == ""


def test_mounts_of_containers_can_be_written_to(env: PodmanEnv, ours: Ours) -> None:
    container = env.podman("create", "--name", "c1", NAME, "cat", "/ours").stdout.strip()
    path = Path(ours("mount", "--read-write", "c1").stdout.strip())
    (path / "ours").write_text("written by us\n")
    assert env.podman("mount").stdout.split() == [container[:12], str(path)]
    assert env.podman("start", "-a", "c1").stdout == "written by us\n"
    assert ours("umount", "c1").stdout == "c1\n"
    until(lambda: not path.is_mount())  # Podman's own clean-up may come after this
    with pytest.raises(CommandError, match="only be mounted for reading"):
        ours("mount", "--read-write", NAME)


# -- layers of an additional layer store ---------------------------------------------------


def test_lazy_images_are_told_mounted_compared_and_given_back(
    rig: Rig, small: Pushed, zygote: Zygote
) -> None:
    image, ours = rig.image(small.name), Ours(rig.env, zygote)
    rig.env.podman("pull", image)
    same_text(rig.env, ours, "images", "--digests")
    (document,) = ours.json("inspect", image)
    (theirs,) = json.loads(rig.env.podman("image", "inspect", image).stdout)
    layers = document.pop("Layers")
    assert document == theirs
    assert {(layer["Source"], layer["Lazy"]) for layer in layers} == {
        ("additional-layer-store", True)
    }
    for layer in layers:
        assert Path(layer["AdditionalLayer"]).is_relative_to(rig.store)
        assert Path(layer["DiffPath"]).resolve() == Path(layer["AdditionalLayer"]) / "diff"
    same_text(rig.env, ours, "diff", image)
    path = Path(ours("mount", image).stdout.strip())
    assert (path / "app/hello").read_bytes()
    assert ours("umount", image).stdout.strip() == document["Id"]
    assert {layer["uses"] for layer in rig.service.status()["layers"]} == {1}
    assert ours.json("rmi", image)["Deleted"] == [document["Id"]]
    assert {layer["uses"] for layer in rig.service.status()["layers"]} == {0}


# -- errors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "nope"),
        ("history", "nope"),
        ("tag", "nope", "x"),
        ("untag", "nope"),
        ("rmi", "nope"),
        ("mount", "nope"),
        ("umount", "nope"),
        ("diff", "nope"),
    ],
)
@pytest.mark.parametrize("flavour", ["debian12"], indirect=True)
def test_what_is_not_there_is_one_line_and_status_1(
    podman_env: PodmanEnv, arguments: tuple[str, ...], zygote: Zygote
) -> None:
    failed = Ours(podman_env, zygote)(*arguments, check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith("layerstore: ")
    assert "nope" in failed.stderr
    assert failed.stderr.count("\n") == 1
