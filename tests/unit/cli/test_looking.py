"""`explain`, `inspect-layer`, `fetch` and the indexes of layers, on images of many kinds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import tars
from lab.simimages import Image, Publisher, without_tocs
from lab.simregistry import SimRegistry
from lab.waiting import until
from layerstore.service.control import ControlServer
from layerstore.service.indexing import index_methods

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def many(publisher: Publisher, registry: SimRegistry) -> tuple[str, list[Image]]:
    """An index of two images, of what BuildKit attests about them, and of an artifact."""
    images = [
        publisher.push("app", None, [{"name": name.encode()}], architecture=name, change=change)
        for name, change in (("amd64", None), ("arm64", without_tocs))
    ]
    others = [publisher.attestation("app"), publisher.artifact("app")]
    publisher.push_index("app", "1", images, others)
    return f"{registry.host}/app:1", images


@pytest.fixture
def served(verb: Run, asker: Any, tmp_path: Path) -> Iterator[None]:
    """A service has the store that the verbs ask for."""
    root = tmp_path / "root"
    root.mkdir()
    methods = {"status": lambda _: asker.store.status()} | index_methods(asker.store)
    server = ControlServer(root, methods)
    yield
    server.close()


@pytest.mark.parametrize("name", ["fetch", "pin", "explain"])
def test_all_images_of_an_index_are_those_that_are_images(
    verb: Run, many: tuple[str, list[Image]], name: str
) -> None:
    reference, images = many
    status, out, err = verb(name, reference, "--all-platforms", "--json")
    assert (status, err) == (0, "")
    said = json.loads(out)
    layers = said["layers"] if "layers" in said else [one for im in said for one in im["layers"]]
    assert [one["digest"] for one in layers] == [one.layers[0].digest for one in images]


def test_indexes_of_all_images_are_saved(
    verb: Run, many: tuple[str, list[Image]], tmp_path: Path
) -> None:
    reference, images = many
    assert verb("fetch", reference, "--all-platforms", "-q") == (0, "", "")
    status, out, err = verb(
        "save-index", reference, "--all-platforms", "-o", str(tmp_path / "saved"), "--json"
    )
    assert (status, err) == (0, "")
    assert [one["blob_digest"] for one in json.loads(out)] == [images[1].layers[0].digest]


def test_a_layer_is_looked_for_in_all_images_of_an_index(
    verb: Run, many: tuple[str, list[Image]]
) -> None:
    reference, images = many
    for image in images:
        status, out, err = verb("inspect-layer", reference, image.layers[0].digest)
        assert (status, err) == (0, "")
        assert " /name" in out


def test_an_index_without_an_image_is_told(
    verb: Run, publisher: Publisher, registry: SimRegistry
) -> None:
    publisher.push_index("app", "1", [], [publisher.attestation("app")])
    status, _, err = verb("explain", f"{registry.host}/app:1", "--all-platforms")
    assert (status, err) == (1, f"layerstore: {registry.host}/app:1: the index has no image\n")


def test_names_do_not_command_the_terminal(
    verb: Run, publisher: Publisher, registry: SimRegistry
) -> None:
    image = publisher.push(
        "app",
        "1",
        [
            [
                tars.regular(b"nl\n\x1b[31mred", b"", xattrs={b"user.\r": b"v"}),
                tars.symlink(b"link", b"to\x9b\tthere"),
                tars.regular("größe".encode(), b""),
                tars.regular("left\u202eright".encode(), b""),
                tars.regular(b"raw\xff", b""),
            ]
        ],
    )
    arguments = ("inspect-layer", f"{registry.host}/app:1", image.layers[0].digest)
    status, out, err = verb(*arguments)
    assert (status, err) == (0, "")
    assert all(line.isprintable() for line in out.splitlines())
    lines = sorted(line.partition(" /")[2] for line in out.split("\n") if " /" in line)
    assert lines == [
        "", "größe", "left\\u202eright", "link -> to\\x9b\\tthere", "nl\\n\\x1b[31mred", "raw\\xff",
    ]  # fmt: skip
    assert "    user.\\r=" in out
    # JSON has them as they are
    paths = [json.loads(line).get("path") for line in verb(*arguments, "--json")[1].splitlines()]
    assert "/nl\n\x1b[31mred" in paths


@pytest.mark.usefixtures("served")
def test_what_is_here_of_a_layer_is_not_told_of_an_image_that_lies_about_it(
    verb: Run, publisher: Publisher, registry: SimRegistry, asker: Any
) -> None:
    def other_diff_id(manifest: dict[str, Any]) -> None:
        without_tocs(manifest)
        raw = json.dumps(
            {
                "architecture": "amd64",
                "os": "linux",
                "rootfs": {"type": "layers", "diff_ids": ["sha256:" + "7" * 64]},
            }
        ).encode()
        manifest["config"] |= {"digest": registry.add_blob("app", raw), "size": len(raw)}

    publisher.push("app", "true", [{"a": b"a" * 500}], change=without_tocs)
    publisher.push("app", "false", [{"a": b"a" * 500}], change=other_diff_id)
    job = asker.store.fetches.start(f"{registry.host}/app:true", ())
    until(lambda: asker.store.fetches.status(job)["done"])
    for tag, here in (("true", "verified"), ("false", "no")):
        status, out, err = verb("explain", f"{registry.host}/app:{tag}", "--json")
        assert (status, err) == (0, "")
        assert [one["here"] for one in json.loads(out)[0]["layers"]] == [here]


@pytest.mark.usefixtures("served")
def test_errors_about_indexes_begin_with_what_they_are_about(
    verb: Run, many: tuple[str, list[Image]], tmp_path: Path
) -> None:
    reference, images = many
    nonsense = tmp_path / "nonsense"
    nonsense.write_bytes(b"nonsense")
    status, out, err = verb("load-index", str(nonsense))
    assert (status, out) == (1, "")
    assert err.startswith(f"layerstore: {nonsense}: no file of indexes")
    save = ("save-index", reference, "-o", str(tmp_path / "saved"), "--platform")
    status, out, err = verb(*save, "linux/arm64")
    assert (status, out) == (1, "")
    assert err.startswith(f"layerstore: layer {images[1].layers[0].digest}: ")
    assert "layerstore fetch" in err
    # of lazy layers there is nothing to save
    status, out, err = verb(*save, "linux/amd64")
    assert (status, out) == (1, "")
    assert err.startswith(f"layerstore: {reference}: all layers have a TOC")
    assert not (tmp_path / "saved").exists()


def test_a_layer_that_cannot_be_read_is_one_line(
    verb: Run, publisher: Publisher, registry: SimRegistry
) -> None:
    image = publisher.push("app", "1", [{"a": b"a" * 500}], change=without_tocs)
    digest = image.layers[0].digest
    registry.blobs[digest] = b"nonsense"
    status, out, err = verb("inspect-layer", f"{registry.host}/app:1", digest)
    assert (status, out) == (1, "")
    assert "event=" not in err
    assert err.count("\n") == 1
