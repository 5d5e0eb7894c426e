"""Archives of ``docker save`` in all their forms, the malformed ones included."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerstore import limits
from layerstore.copy.context import CopyContext
from layerstore.copy.copyimage import copy_image
from layerstore.copy.dockerarchive import DockerArchive, DockerArchiveWriter, parse_name
from layerstore.copy.transport import Pieces
from layerstore.errors import (
    ContentError,
    InvalidLayer,
    InvalidManifest,
    LayerstoreError,
    LimitExceeded,
    NotFound,
    UsageError,
    VerificationError,
)
from layerstore.image import Digest, Reference, media_types, parse_manifest
from layerstore.image.manifest import Manifest

LAYERS = [b"first".ljust(1024, b"\0"), b"second".ljust(2048, b"\0")]
DIFF_IDS = [str(Digest.of(layer)) for layer in LAYERS]
CONFIG = json.dumps(
    {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": DIFF_IDS}}
).encode()
CONFIG_HEX = hashlib.sha256(CONFIG).hexdigest()


@contextlib.contextmanager
def opened(path: Path) -> Iterator[DockerArchive]:
    with contextlib.closing(DockerArchive(path)) as archive:
        yield archive


def made_up(path: Path) -> bytes:
    """The manifest of the first image."""
    with opened(path) as archive:
        return archive.image(0).manifest().raw


def write(path: Path, files: dict[str, bytes], manifest: Any = None) -> Path:
    with tarfile.open(path, "w") as tar:
        if manifest is not None:
            raw = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
            files = files | {"manifest.json": raw}
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def entry(config: str, layers: list[str], *tags: str) -> dict[str, Any]:
    return {"Config": config, "RepoTags": list(tags) or None, "Layers": layers}


def old_form(path: Path) -> Path:
    files = {f"{CONFIG_HEX}.json": CONFIG, "1/layer.tar": LAYERS[0], "2/layer.tar": LAYERS[1]}
    names = ["1/layer.tar", "2/layer.tar"]
    return write(path, files, [entry(f"{CONFIG_HEX}.json", names, "busy:1", "localhost/b:2")])


def new_form(path: Path) -> Path:
    names = [f"blobs/sha256/{each.partition(':')[2]}" for each in (*DIFF_IDS, "x:" + CONFIG_HEX)]
    files = dict(zip(names, (*LAYERS, CONFIG), strict=True))
    return write(path, files, [entry(names[2], names[:2], "busy:1", "localhost/b:2")])


def packed_form(path: Path) -> Path:
    files = {"config": CONFIG, "a": gzip.compress(LAYERS[0]), "b": LAYERS[1]}
    return write(path, files, [entry("config", ["a", "b"], "busy:1", "localhost/b:2")])


@pytest.mark.parametrize("form", [old_form, new_form, packed_form])
def test_every_form_gives_the_same_image(tmp_path: Path, form: Any) -> None:
    with opened(form(tmp_path / "a.tar")) as archive:
        assert [str(name) for name in archive.images[0].names] == [
            "docker.io/library/busy:1",
            "localhost/b:2",
        ]
        source = archive.image(0)
        manifest = parse_manifest(source.manifest().raw, media_types.DOCKER_MANIFEST)
        assert isinstance(manifest, Manifest)
        assert [layer.digest for layer in manifest.layers] == DIFF_IDS
        assert [layer.size for layer in manifest.layers] == [1024, 2048]
        assert source.blob(Digest.of(CONFIG), 10_000) == CONFIG
        for diff_id, content in zip(DIFF_IDS, LAYERS, strict=True):
            with source.open_blob(Digest(diff_id), len(content)) as stream:
                assert b"".join(iter(partial(stream.read, 10_000), b"")) == content


def test_images_are_found_by_name_and_number(tmp_path: Path) -> None:
    with opened(old_form(tmp_path / "a.tar")) as archive:
        names = (None, "@0", "busy:1", "docker.io/busy:1")
        assert [archive.find(which) for which in names] == [0] * 4
        for which in ("@1", "busy:2", "busy"):
            with pytest.raises(NotFound):
                archive.find(which)
        with pytest.raises(UsageError):
            archive.find(f"busy@sha256:{'0' * 64}")


@pytest.mark.parametrize(
    ("which", "names"),
    [
        (None, ["docker.io/library/busy:1", "localhost/b:2"]),
        ("@0", ["docker.io/library/busy:1", "localhost/b:2"]),
        ("localhost/b:2", ["localhost/b:2"]),
    ],
)
def test_an_image_is_pulled_under_the_names_it_was_asked_for_by(
    tmp_path: Path, which: str | None, names: list[str]
) -> None:
    archive = DockerArchive(old_form(tmp_path / "a.tar"))
    with contextlib.closing(archive.source(which)) as source:
        assert list(map(str, source.names)) == names


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"[",
        b"{}",
        b"[]",
        b"[{}]",
        b'[{"Config": 5}]',
        b"null",
        b"[" * 100_000,
        [entry("", [])],
        [entry("/etc/passwd", [])],
        [entry("../config", [])],
        [entry("config", ["a", "../b"])],
        [entry("config", ["a"])],
        [entry("config", ["a", "b"], "NO NAME")],
        [entry("config", ["a", "b"], "[::1]:5000/evil:1")],  # Podman cannot bear it in storage
        [entry("a", ["a", "b"])],
    ],
)
def test_malformed_manifests_are_refused(tmp_path: Path, manifest: Any) -> None:
    files = {"config": CONFIG, "a": LAYERS[0], "b": LAYERS[1]}
    path = write(tmp_path / "a.tar", files, manifest)
    with pytest.raises(ContentError) as caught:
        made_up(path)
    assert str(path) in str(caught.value) or not caught.value.subject


def test_without_a_manifest_nothing_is_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidManifest, match="missing"):
        DockerArchive(write(tmp_path / "a.tar", {"x": b""}))
    with pytest.raises(InvalidManifest, match=r"before 1\.10"):
        DockerArchive(write(tmp_path / "b.tar", {"repositories": b"{}"}))


def test_content_that_is_not_what_it_should_be(
    tmp_path: Path, accepting: CopyContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"config": CONFIG, "a": LAYERS[0], "b": b"other".ljust(2048, b"\0")}
    path = write(tmp_path / "a.tar", files, [entry("config", ["a", "b"])])
    with pytest.raises(VerificationError, match=DIFF_IDS[1]):
        copy_image(f"docker-archive:{path}", f"dir:{tmp_path}/out", accepting)
    assert os.listdir(tmp_path) == ["a.tar"]
    name = f"{CONFIG_HEX}.json"
    path = write(
        tmp_path / "a.tar", {name: CONFIG + b" ", "a": b"", "b": b""}, [entry(name, ["a", "b"])]
    )
    with pytest.raises(VerificationError, match="file name"):
        made_up(path)
    files = {"config": CONFIG, "a": gzip.compress(bytes(1 << 20)), "b": gzip.compress(b"")[:-4]}
    path = write(tmp_path / "a.tar", files, [entry("config", ["a", "b"])])
    with pytest.raises(InvalidLayer):
        made_up(path)
    monkeypatch.setattr(limits, "ARCHIVE_BYTES", 1 << 19)
    with pytest.raises(LimitExceeded):
        made_up(path)


@given(st.binary(max_size=200))
def test_any_manifest_is_read_or_refused(tmp_path_factory: Any, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.tar"
    with contextlib.suppress(LayerstoreError):
        DockerArchive(write(path, {}, raw)).close()


@pytest.mark.parametrize("text", ["", ":x", "file:"])
def test_names_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        parse_name(text)


# -- writing -------------------------------------------------------------------------


def given_bytes(data: bytes) -> Pieces:
    return lambda: (data,)


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "new.tar"
    writer = DockerArchiveWriter(path)
    for names, layers in (["busy:1", "busy:2"], LAYERS), (["other:1"], LAYERS):
        image = writer.image([Reference.parse(name) for name in names])
        manifest = {
            "schemaVersion": 2,
            "mediaType": media_types.DOCKER_MANIFEST,
            "config": {
                "mediaType": media_types.DOCKER_CONFIG,
                "digest": str(Digest.of(CONFIG)),
                "size": len(CONFIG),
            },
            "layers": [
                {
                    "mediaType": media_types.DOCKER_LAYER,
                    "digest": str(Digest.of(layer)),
                    "size": len(layer),
                }
                for layer in layers
            ],
        }
        for layer in layers:
            digest = Digest.of(layer)
            if image.known_size(digest) is None:
                image.put_blob(digest, given_bytes(layer), len(layer))
            assert image.has_blob(digest, len(layer))
        image.put_config(Digest.of(CONFIG), CONFIG)
        image.put_manifest(json.dumps(manifest).encode(), media_types.DOCKER_MANIFEST, top=True)
        image.commit()
    assert not path.exists()
    writer.finish()
    with opened(path) as archive:
        assert len(archive.images) == 1  # one image under three names
        assert len(archive.images[0].names) == 3
    with tarfile.open(path) as tar:
        names = tar.getnames()
        member = tar.extractfile("repositories")
        assert member is not None
        repositories = json.loads(member.read())
        assert len(names) == len(set(names))
        top = repositories["docker.io/library/busy"]["2"]
        assert tar.getmember(f"{top}/layer.tar").linkname == f"../{DIFF_IDS[1][7:]}.tar"
    with pytest.raises(UsageError, match="exists"):
        DockerArchiveWriter(path)


def test_an_archive_without_an_image_is_none(tmp_path: Path) -> None:
    writer = DockerArchiveWriter(tmp_path / "new.tar")
    with pytest.raises(UsageError):
        writer.image([]).commit()
    with pytest.raises(UsageError):
        writer.finish()
    writer.abort()
    assert os.listdir(tmp_path) == []
