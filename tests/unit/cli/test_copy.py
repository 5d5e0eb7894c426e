"""``copy``, ``save`` and ``load`` from the command line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import oci, tars
from lab.graphroot import layer_tar, open_store, put_image
from lab.oci import StoredImage
from layerstore.cli import main
from layerstore.graphroot.store import Store

Run = Callable[..., tuple[int, str, str]]
NAMES = ["localhost/app:1", "quay.io/team/app:v1"]
FORMATS = ("docker-archive", "oci-archive", "docker-dir", "oci-dir")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path)


@pytest.fixture
def image(store: Store) -> str:
    return put_image(store, [layer_tar(tars.regular(b"etc/base", b"base"))], *NAMES).id


@pytest.fixture
def layout(tmp_path: Path) -> StoredImage:
    tar = layer_tar(tars.regular(b"etc/base", b"base"))
    return oci.write_image(tmp_path / "layout", "x", [oci.LayerSource(tar)], oci.RunConfig())


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run(verb, *arguments)``: exit status, standard output and error."""
    home = tmp_path / "home"
    (home / ".config/containers").mkdir(parents=True)
    policy = {"default": [{"type": "insecureAcceptAnything"}]}
    (home / ".config/containers/policy.json").write_text(json.dumps(policy))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)

    def call(verb: str, *arguments: str | Path) -> tuple[int, str, str]:
        status = 0
        flags = ("--root", f"{tmp_path}/root", "--runroot", f"{tmp_path}/run")
        try:
            main((verb, *flags, *map(str, arguments)))
        except SystemExit as ended:
            status = int(ended.code or 0)
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return call


def test_copy(run: Run, layout: StoredImage, tmp_path: Path) -> None:
    file = tmp_path / "digest"
    status, out, err = run("copy", layout.source, f"dir:{tmp_path}/d", "--digestfile", file)
    assert (status, out, file.read_text()) == (0, "", layout.digest)
    assert err.splitlines() == [
        "Getting image source signatures",
        f"Copying blob {layout.layers[0].digest}",
        f"Copying config {json.loads(layout.blob(layout.digest).read_bytes())['config']['digest']}",
        "Writing manifest to image destination",
    ]
    status, out, err = run("copy", "-q", "--json", layout.source, f"oci:{tmp_path}/o:x")
    assert (status, err) == (0, "")
    assert json.loads(out)["digest"] == layout.digest


def test_copy_into_the_storage_and_out(run: Run, layout: StoredImage, tmp_path: Path) -> None:
    name = "containers-storage:localhost/new:1"
    status, out, _ = run("copy", "-q", "--json", layout.source, name)
    assert status == 0
    identity = json.loads(out)["imageId"]
    assert run("images", "-q", "--no-trunc", "localhost/new:1")[1] == f"sha256:{identity}\n"
    assert run("copy", "-q", name, f"docker-archive:{tmp_path}/a")[0] == 0
    assert run("copy", "-q", "--all", layout.source, name)[0] == 2


def test_copy_of_an_image_with_its_id(run: Run, layout: StoredImage, tmp_path: Path) -> None:
    storage = "containers-storage:"
    status, out, _ = run("copy", "-q", "--json", layout.source, f"{storage}localhost/new:1")
    assert status == 0
    identity = json.loads(out)["imageId"]
    last = str(layout.digest)
    sources = (f"localhost/new:1@{identity}", f"@{identity}", f"localhost/new@{identity[:12]}")
    for number, name in enumerate((*sources, f"localhost/new:1@{last}@{identity}")):
        assert run("copy", "-q", storage + name, f"dir:{tmp_path}/d{number}")[0] == 0, name
    for name, said in (
        (f"localhost/new:1@{'0' * 64}", "no such image"),
        (f"localhost/other:1@{identity}", "other names"),
        ("localhost/new:1@fff", "no ID"),
    ):
        status, _, err = run("copy", "-q", storage + name, f"dir:{tmp_path}/no")
        assert status in (1, 2)
        assert said in err
    assert run("untag", identity)[0] == 0
    for name in (f"@{identity}", f"localhost/again:1@{identity}", f"@{identity[:12]}"):
        assert run("copy", "-q", layout.source, storage + name)[0] == 0, name
    assert run("images", "--noheading")[1].split()[:3] == ["localhost/again", "1", identity[:12]]
    status, _, err = run("copy", "-q", layout.source, f"{storage}localhost/x:1@{'0' * 64}")
    assert (status, identity in err) == (2, True)


@pytest.mark.parametrize(
    "flags",
    [
        ("--all", "--multi-arch=system"),
        ("--dest-compress", "--dest-decompress"),
        ("--src-creds=a:b", "--src-no-creds"),
        ("--dest-compress-format=lzma",),
        ("--format=v2s1",),
        ("--dest-compress-level=0",),
        ("--additional-tag=a:b",),
        ("--platform=amd64",),
    ],
)
def test_flags_that_make_no_sense(
    run: Run, layout: StoredImage, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    before = sorted(os.listdir(tmp_path))
    status, _, err = run("copy", *flags, layout.source, f"dir:{tmp_path}/d")
    assert status == 2
    assert len(err.splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == before


def test_platforms_are_chosen(run: Run, layout: StoredImage, tmp_path: Path) -> None:
    arm = oci.write_image(
        layout.layout, "arm", [oci.LayerSource(bytes(1024))], oci.RunConfig(architecture="arm64")
    )
    index = oci.write_index(layout.layout, "both", [layout, arm])
    for flag, digest in (
        ("--platform=linux/arm64", arm.digest),
        ("--override-arch=arm64", arm.digest),
        ("--override-arch=amd64", layout.digest),
        ("--multi-arch=all", index.digest),
        ("--all", index.digest),
    ):
        status, out, _ = run("copy", "-q", "--json", flag, index.source, f"dir:{tmp_path}/d")
        assert (status, json.loads(out)["digest"]) == (0, digest)
    assert run("copy", "-q", "--override-os=plan9", index.source, f"dir:{tmp_path}/d")[0] == 1


def test_policies(run: Run, layout: StoredImage, tmp_path: Path) -> None:
    policy = tmp_path / "policy.json"
    policy.write_text('{"default": [{"type": "reject"}]}')
    target = f"dir:{tmp_path}/d"
    status, _, err = run("copy", "-q", "--policy", policy, layout.source, target)
    assert (status, "policy" in err) == (1, True)
    (tmp_path / "home/.config/containers/policy.json").write_text("{}")
    assert run("copy", "-q", layout.source, target)[0] == 2
    assert run("copy", "-q", "--insecure-policy", layout.source, target)[0] == 0


@pytest.mark.parametrize("form", FORMATS)
def test_save_and_load(run: Run, store: Store, image: str, tmp_path: Path, form: str) -> None:
    saved = tmp_path / "saved"
    status, out, err = run("save", "-q", "--json", "--format", form, "-o", saved, NAMES[0])
    names = [] if form == "docker-dir" else NAMES[:1]
    assert (status, json.loads(out), err) == (0, [{"Id": image, "Names": list(names)}], "")
    store.remove_image(image, force=True)
    status, out, err = run("load", "-q", "-i", saved)
    name = f"localhost{saved}:latest".lower() if form == "docker-dir" else NAMES[0]
    name = name.replace("[", "-").replace("]", "-")
    assert (status, err) == (0, "")
    if form != "docker-dir":
        assert out == f"Loaded image: {name}\n"
    assert [one.id for one in store.images()] == [image]


def test_several_names_and_several_images(
    run: Run, store: Store, image: str, tmp_path: Path
) -> None:
    other = put_image(store, [layer_tar(tars.regular(b"other", b"x"))], "localhost/other:1").id
    one, all_of_them = tmp_path / "one", tmp_path / "all"
    assert run("save", "-q", "-o", one, NAMES[0], "localhost/further:1")[0] == 0
    assert run("save", "-q", "-m", "-o", all_of_them, NAMES[0], image[:12], other)[0] == 0
    for identity in (image, other):
        store.remove_image(identity, force=True)
    out = run("load", "-q", "-i", one)[1]
    assert out == "Loaded image: localhost/app:1\nLoaded image: localhost/further:1\n"
    status, out, _ = run("load", "-q", "--json", "-i", all_of_them)
    assert status == 0
    # an image that was asked for by its id has no name in the archive
    assert json.loads(out) == [
        {"Id": image, "Names": ["localhost/app:1"]},
        {"Id": other, "Names": []},
    ]
    assert (
        run("load", "-q", "-i", all_of_them)[1].splitlines()[1] == f"Loaded image: sha256:{other}"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--format=oci-archive", NAMES[0], "b"),
        ("--format=oci-archive", "-m", NAMES[0]),
        ("--format=oci-dir", "--compress", NAMES[0]),
        ("--uncompressed", NAMES[0]),
        ("--format=zip", NAMES[0]),
        (NAMES[0], f"x@sha256:{'0' * 64}"),
    ],
)
def test_saves_that_make_no_sense(
    run: Run, image: str, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    assert run("save", "-q", "-o", tmp_path / "saved", *arguments)[0] == 2
    assert not (tmp_path / "saved").exists()


def test_what_is_not_there(run: Run, store: Store, tmp_path: Path) -> None:
    assert run("save", "-q", "-o", tmp_path / "saved", "nothing")[0] == 1
    assert run("save", "-q", "--format=oci-dir", "nothing")[0] == 2
    assert run("save", "-q", "--json", "nothing")[0] == 2  # standard output is the archive's
    assert run("load", "-q", "-i", tmp_path / "saved")[0] == 1
    (tmp_path / "saved").write_bytes(b"no archive")
    status, _, err = run("load", "-q", "-i", tmp_path / "saved")
    assert (status, len(err.splitlines())) == (1, 1)
    (tmp_path / "empty").mkdir()
    assert run("load", "-q", "-i", tmp_path / "empty")[0] == 1


def test_packed_and_plain_on_demand(run: Run, image: str, tmp_path: Path) -> None:
    for flags, end in (
        (("--format=docker-dir",), "diff.tar"),
        (("--format=docker-dir", "--compress"), "diff.tar.gzip"),
        (("--format=oci-dir",), "v1.tar+gzip"),
        (("--format=oci-dir", "--uncompressed"), "v1.tar"),
    ):
        place = tmp_path / "-".join(flags).replace("-", "")
        assert run("save", "-q", *flags, "-o", place, NAMES[0])[0] == 0
        source = f"dir:{place}" if "docker" in flags[0] else f"oci:{place}"
        out = run("copy", "-q", source, f"dir:{place}.out")
        assert out[0] == 0
        manifest = json.loads(Path(f"{place}.out/manifest.json").read_bytes())
        assert manifest["layers"][0]["mediaType"].endswith(end)
