"""The verbs of local storage from the command line, on a graph root of our own making."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab import tars
from lab.graphroot import layer_tar, open_store, put_container, put_image, put_layer
from layerstore.cli import main
from layerstore.graphroot.images import Image, with_names
from layerstore.graphroot.store import Store

BASE = layer_tar(tars.regular(b"etc/base", b"base"), tars.regular(b"etc/gone", b"x"))
MORE = layer_tar(tars.regular(b"etc/more", b"more"), tars.whiteout(b"etc/gone"))

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path)


@pytest.fixture
def image(store: Store) -> Image:
    return put_image(store, [BASE, MORE], "localhost/app:1", "quay.io/team/app:v1")


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """``run(verb, *arguments)`` on that graph root: exit status, standard output and error."""

    def call(verb: str, *arguments: str) -> tuple[int, str, str]:
        status = 0
        flags = ("--root", f"{tmp_path}/root", "--runroot", f"{tmp_path}/run")
        try:
            main((verb, *flags, *arguments))
        except SystemExit as ended:
            status = int(ended.code or 0)
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return call


def load(found: tuple[int, str, str]) -> Any:
    assert found[0] == 0, found[2]
    return json.loads(found[1])


def test_images(run: Run, image: Image) -> None:
    status, out, err = run("images")
    assert (status, err) == (0, "")
    heading, first, second = out.splitlines()
    assert heading.split() == ["REPOSITORY", "TAG", "IMAGE", "ID", "CREATED", "SIZE"]
    assert first.split()[:3] == ["localhost/app", "1", image.id[:12]]
    assert second.split()[:3] == ["quay.io/team/app", "v1", image.id[:12]]
    assert run("images", "-q")[1] == f"{image.id[:12]}\n"
    assert run("images", "-q", "--no-trunc")[1] == f"sha256:{image.id}\n"
    assert str(image.digest) in run("images", "--digests", "--noheading")[1]
    assert run("images", "--noheading", "nothing")[1] == ""
    (document,) = load(run("images", "--json"))
    assert document["Names"] == ["localhost/app:1", "quay.io/team/app:v1"]
    assert run("images", "--filter", "since=x")[0] == 2


def test_an_image_without_names_or_with_a_digest(run: Run, store: Store, image: Image) -> None:
    store.set_names(image.id, [f"quay.io/team/app@{image.digest}"])
    assert run("images", "-n")[1].split()[:2] == ["quay.io/team/app", "<none>"]
    # one row for all names without a tag, and none where there is a tag
    store.set_names(image.id, [f"quay.io/{one}/app@{image.digest}" for one in "ab"])
    assert [line.split()[:2] for line in run("images", "-n")[1].splitlines()] == [
        ["quay.io/a/app", "<none>"]
    ]
    store.set_names(image.id, [f"quay.io/a/app@{image.digest}", "quay.io/a/app:1"])
    assert [line.split()[:2] for line in run("images", "-n")[1].splitlines()] == [
        ["quay.io/a/app", "1"]
    ]
    store.set_names(image.id, [])
    assert run("images", "-n")[1].split()[:2] == ["<none>", "<none>"]
    assert run("images", "-n", "--filter", "dangling=false")[1] == ""


def test_inspect(run: Run, store: Store, image: Image) -> None:
    put_container(store, image, "c1")
    (document,) = load(run("inspect", "app:1"))
    assert document["Id"] == image.id
    (container,) = load(run("inspect", "c1", "--json"))
    assert container["Image"] == image.id
    (layer,) = load(run("inspect", "--type", "layer", image.top_layer))
    assert layer["Id"] == image.top_layer
    status, out, err = run("inspect", "nope", "app:1")
    assert (status, len(json.loads(out))) == (1, 1)
    assert err == 'layerstore: no such object: "nope"\n'
    for kind, name in (("container", "app:1"), ("image", "c1"), ("layer", "app:1")):
        assert run("inspect", "--type", kind, name)[0] == 1
    assert run("inspect")[0] == 2


def test_history(run: Run, image: Image) -> None:
    lines = run("history", "app:1")[1].splitlines()
    assert lines[0].split() == ["ID", "CREATED", "CREATED", "BY", "SIZE", "COMMENT"]
    assert lines[1].startswith(image.id[:12])
    assert lines[2].startswith("<missing>")
    assert run("history", "-q", "--no-trunc", "app:1")[1] == f"{image.id}\n<missing>\n"
    assert [step["CreatedBy"] for step in load(run("history", "--json", "app:1"))] == [
        "step 1",
        "step 0",
    ]


def test_history_shortens_long_steps(run: Run, store: Store) -> None:
    put_image(store, [BASE], "localhost/long:1", steps=[{"created_by": "x" * 100}])
    assert f" {'x' * 42}... " in run("history", "long:1")[1]
    assert "x" * 100 in run("history", "--no-trunc", "long:1")[1]


def test_names_come_and_go(run: Run, store: Store, image: Image) -> None:
    assert run("tag", "app:1", "b", "c:2")[:2] == (0, "")
    names = ("localhost/b:latest", "localhost/c:2", *image.names)
    assert store.image(image.id).names == names
    assert load(run("untag", "--json", "b", "c:2"))["Names"] == [names[0], *image.names]
    assert run("untag", "b", "c:2")[0] == 1
    assert run("untag", "b")[0] == 0
    assert store.image(image.id).names == ()
    status, _, err = run("tag", image.id, "Not A Name")
    assert (status, err.count("\n")) == (2, 1)


def test_a_name_that_podman_cannot_parse_is_not_given_but_can_be_taken_away(
    run: Run, store: Store, image: Image
) -> None:
    bad = "[::1]:5000/a:1"
    status, _, err = run("tag", "app:1", bad)
    assert status == 2
    assert "host name" in err
    table = store.image_area.table  # as somebody else may have written it
    with table.lock.writing():
        table.save([with_names(record, [bad, *record.names]) for record in table.load()])
    assert run("untag", bad, bad)[0] == 0
    assert store.image(image.id).names == image.names


def test_rmi(run: Run, store: Store, image: Image) -> None:
    assert run("rmi", image.id)[0] == 2
    assert run("rmi", "app:1")[1] == "Untagged: localhost/app:1\n"
    status, out, err = run("rmi", "nope", image.id)
    assert (status, err) == (1, "layerstore: nope: no such image\n")
    assert out == f"Untagged: quay.io/team/app:v1\nDeleted: {image.id}\n"
    assert (store.images(), store.layers()) == ([], [])
    assert run("rmi")[0] == run("rmi", "x", "--all")[0] == 2
    assert run("rmi", "--all") == (0, "", "")


def test_rmi_of_all(run: Run, store: Store, image: Image) -> None:
    other = put_image(store, [BASE], "localhost/other:1")
    put_container(store, other, "c1")
    status, out, err = run("rmi", "-a", "--json")
    assert status == 2
    assert "is used by container" in err
    assert json.loads(out) == {"Untagged": list(image.names), "Deleted": [image.id]}
    assert [kept.id for kept in store.images()] == [other.id]


def test_prune(run: Run, store: Store, image: Image, tmp_path: Path) -> None:
    loose = put_image(store, [MORE])
    young = put_layer(store, layer_tar(tars.regular(b"new")))
    partial = tmp_path / "root/layerstore/partial/sha256-00"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"x" * 1000)
    status, out, _ = run("prune", "-f")
    assert status == 0
    assert out.splitlines()[:2] == [f"Deleted: {loose.id}", f"Deleted layer: {loose.top_layer}"]
    assert out.splitlines()[-1].startswith("Total reclaimed space: ")
    assert not partial.exists()
    assert store.layer(young.id)  # somebody may be pulling its image
    report = load(run("prune", "-fa", "--json"))
    assert report["DeletedImages"] == [image.id]
    assert report["SpaceReclaimed"] == image.record.big_data_sizes["manifest"] * 2 + len(
        BASE
    ) + len(MORE) + len(store_config(image))


def store_config(image: Image) -> bytes:
    sizes = image.record.big_data_sizes
    return b" " * next(size for key, size in sizes.items() if key.startswith("sha256:"))


def test_diff(run: Run, image: Image) -> None:
    assert run("diff", "app:1")[1] == "C /etc\nD /etc/gone\nA /etc/more\n"
    assert load(run("diff", "--json", "app:1")) == {
        "changed": ["/etc"],
        "added": ["/etc/more"],
        "deleted": ["/etc/gone"],
    }


def test_a_graph_root_that_is_not_there_is_empty(run: Run, tmp_path: Path) -> None:
    assert run("images", "-q") == (0, "", "")
    assert not (tmp_path / "root").exists()


def test_nothing_is_mounted(run: Run, image: Image) -> None:
    assert run("mount") == (0, "", "")
    assert load(run("mount", "--json")) == []
    assert run("umount", "app:1") == (0, "", "")
    assert run("umount", "--all") == (0, "", "")
    assert run("umount")[0] == run("umount", "x", "-a")[0] == 2
    assert run("mount", "--read-write", "app:1")[0] == 2
