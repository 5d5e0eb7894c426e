"""Copies between all transports: what stays, what changes, what is refused."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lab import oci
from lab.oci import StoredImage
from lab.simregistry import SimRegistry
from layerstore.copy.context import CopyContext
from layerstore.copy.copyimage import CopyOptions, Platforms, copy_between, copy_image
from layerstore.copy.dirlayout import DirDestination, DirSource
from layerstore.copy.manifestedit import Family
from layerstore.copy.ocilayout import OciLayout
from layerstore.copy.policy import Policy
from layerstore.copy.progress import Item, PullItem, Quiet
from layerstore.copy.recompress import Form
from layerstore.copy.transport import BlobStream
from layerstore.errors import (
    InvalidManifest,
    LayerstoreError,
    NetworkError,
    NotFound,
    PolicyRejected,
    UnsupportedFormat,
    UsageError,
    VerificationError,
)
from layerstore.formats import Compression, LayerStream
from layerstore.image import Descriptor, Digest, Platform, Reference, media_types

MakeImage = Callable[..., StoredImage]
NAMES = ("oci:{}:x", "oci-archive:{}:x", "dir:{}", "docker-archive:{}:busy:1")
STORAGE = "containers-storage:[overlay@{0}/root+{0}/run]localhost/busy:1"
REGISTRY = "docker://HOST{}:1"


def manifest_of(name: str, ctx: CopyContext, place: Path) -> dict[str, Any]:
    """The manifest that a copy to a directory shows."""
    copy_image(name, f"dir:{place}", ctx)
    found: dict[str, Any] = json.loads((place / "manifest.json").read_bytes())
    return found


def blob(layout: Path, digest: str) -> bytes:
    raw = (layout / "blobs" / digest.replace(":", "/")).read_bytes()
    assert hashlib.sha256(raw).hexdigest() == digest.partition(":")[2]
    return raw


@pytest.fixture(scope="module")
def registry_host() -> Iterator[str]:
    """Of a registry for all pairs of places."""
    with SimRegistry() as registry:
        yield registry.host


@pytest.mark.parametrize("second", [*NAMES, STORAGE, REGISTRY])
@pytest.mark.parametrize("first", [*NAMES, STORAGE, REGISTRY])
def test_an_image_goes_through_any_two_places(
    tmp_path: Path,
    make_image: MakeImage,
    accepting: CopyContext,
    registry_host: str,
    first: str,
    second: str,
) -> None:
    image = make_image(layers=3)
    # a repository of its own for each pair: nothing of others may be found there
    there = f"{registry_host}/pairs/{secrets.token_hex(8)}"
    one, two = (
        kind.replace("HOST{}", f"{there}/{name}").format(tmp_path / name)
        for kind, name in ((first, "one"), (second, "two"))
    )
    results = [
        copy_image(image.source, one, accepting),
        copy_image(one, two, accepting),
        copy_image(two, f"oci:{tmp_path}/end:x", accepting),
    ]
    if not {"docker-archive:{}:busy:1", STORAGE}.intersection((first, second)):
        assert {result.digest for result in results} == {image.digest}
    end = json.loads(results[-1].manifest)
    assert end["mediaType"] == media_types.OCI_MANIFEST
    config = json.loads(blob(tmp_path / "end", end["config"]["digest"]))
    assert config["rootfs"]["diff_ids"] == [layer.diff_id for layer in image.layers]
    for layer, old in zip(end["layers"], image.layers, strict=True):
        plain = gzip.decompress(blob(tmp_path / "end", layer["digest"]))
        assert f"sha256:{hashlib.sha256(plain).hexdigest()}" == old.diff_id
    files = [name for kind, name in ((first, "one"), (second, "two")) if kind != REGISTRY]
    assert sorted(os.listdir(tmp_path)) == sorted(["end", "source", *files])


def test_a_registry_gets_and_gives_the_bytes(
    tmp_path: Path, make_image: MakeImage, accepting: CopyContext
) -> None:
    image = make_image()
    with SimRegistry() as registry:
        there = f"docker://{registry.host}/a/b:1"
        copy_image(image.source, there, accepting)
        again = f"docker://{registry.host}/c/d:1"
        result = copy_image(there, again, accepting)
        assert result.digest == image.digest
        # the second time the registry was asked to take the blobs over, nothing moved
        assert not [
            one
            for one in registry.log
            if one.method == "GET"
            and "/a/b/blobs/" in one.path
            and image.layers[0].digest in one.path
        ]
        pinned = f"docker://{registry.host}/c/e@{image.digest}"
        assert copy_image(image.source, pinned, accepting).digest == image.digest
        untagged = f"docker://{registry.host}/c/f@@unknown-digest@@"
        copy_image(image.source, untagged, accepting)
        assert {name for repository, name in registry.manifests if repository == "c/f"} == {
            image.digest
        }
        copy_image(
            f"docker://{registry.host}/c/f:old@{image.digest}", f"dir:{tmp_path}/d", accepting
        )
        with pytest.raises(UsageError, match="names its digest"):
            copy_image(image.source, pinned, accepting, CopyOptions(format=Family.DOCKER))


def test_a_broken_connection_is_taken_up_where_it_broke(
    tmp_path: Path, make_image: MakeImage, accepting: CopyContext
) -> None:
    image = make_image(compression="none")
    with SimRegistry() as registry:
        there = f"docker://{registry.host}/a/b:1"
        plain = CopyOptions(preserve_digests=True)
        copy_image(image.source, there, accepting, plain)
        registry.fault("reset", r"/blobs/sha256", times=2, after=500)
        result = copy_image(there, f"dir:{tmp_path}/d", accepting)
        assert result.digest == image.digest
        registry.fault("flip", r"/blobs/sha256", after=100)
        with pytest.raises(VerificationError):
            copy_image(there, f"dir:{tmp_path}/e", accepting)
    assert not (tmp_path / "e").exists()


# -- what changes --------------------------------------------------------------------


def test_manifests_are_put_into_other_words_and_back(
    tmp_path: Path, make_image: MakeImage, accepting: CopyContext
) -> None:
    image = make_image()
    docker = CopyOptions(format=Family.DOCKER)
    copy_image(image.source, f"dir:{tmp_path}/d", accepting, docker)
    found = json.loads((tmp_path / "d/manifest.json").read_bytes())
    assert found["mediaType"] == media_types.DOCKER_MANIFEST
    assert found["config"]["mediaType"] == media_types.DOCKER_CONFIG
    assert [layer["mediaType"] for layer in found["layers"]] == [media_types.DOCKER_LAYER_GZIP] * 2
    assert [layer["digest"] for layer in found["layers"]] == [one.digest for one in image.layers]
    back = copy_image(f"dir:{tmp_path}/d", f"oci:{tmp_path}/o:x", accepting)
    assert json.loads(back.manifest) == json.loads((image.blob(image.digest)).read_bytes())
    with pytest.raises(UsageError, match="v2s2"):
        copy_image(image.source, f"oci:{tmp_path}/o:y", accepting, docker)
    with pytest.raises(UsageError, match="preserved"):
        copy_image(
            f"dir:{tmp_path}/d",
            f"oci:{tmp_path}/o:y",
            accepting,
            CopyOptions(preserve_digests=True),
        )
    for target in (f"docker-archive:{tmp_path}/a:x",):
        with pytest.raises(UsageError, match="preserved"):
            copy_image(image.source, target, accepting, CopyOptions(preserve_digests=True))


@pytest.mark.parametrize("form", [Form.ZSTD, Form.GZIP, Form.PLAIN])
def test_layers_are_packed_as_asked(
    tmp_path: Path, make_image: MakeImage, accepting: CopyContext, form: Form
) -> None:
    image = make_image(compression="none")
    options = CopyOptions(compression=form, level=None if form is Form.PLAIN else 1)
    result = copy_image(image.source, f"oci:{tmp_path}/o:x", accepting, options)
    for layer, old in zip(json.loads(result.manifest)["layers"], image.layers, strict=True):
        raw = (tmp_path / "o/blobs" / layer["digest"].replace(":", "/")).read_bytes()
        assert len(raw) == layer["size"]
        with (tmp_path / "o/blobs" / layer["digest"].replace(":", "/")).open("rb") as file:
            stream = LayerStream(file)
            assert stream.compression is form.compression
            plain = b""
            while data := stream.read(1 << 20):
                plain += data
        assert Digest.of(plain) == old.diff_id
        end = "" if form is Form.PLAIN else f"+{form.value}"
        assert layer["mediaType"] == media_types.OCI_LAYER + end
    assert (result.digest == image.digest) is (form is Form.PLAIN)


def test_plain_layers_are_packed_for_layouts_and_registries_only(
    tmp_path: Path, make_image: MakeImage, accepting: CopyContext
) -> None:
    image = make_image(compression="none")
    assert manifest_of(image.source, accepting, tmp_path / "d")["layers"][0]["mediaType"] == (
        media_types.OCI_LAYER
    )
    copy_image(image.source, f"oci:{tmp_path}/o:x", accepting)
    layers = manifest_of(f"oci:{tmp_path}/o:x", accepting, tmp_path / "e")["layers"]
    assert layers[0]["mediaType"] == media_types.OCI_LAYER_GZIP


def test_a_layer_in_another_form_is_taken_unless_forced(
    tmp_path: Path, make_image: MakeImage, accepting: CopyContext
) -> None:
    image = make_image()
    layout = f"oci:{tmp_path}/o"
    copy_image(image.source, f"{layout}:gzip", accepting)
    zstd = CopyOptions(compression=Form.ZSTD)
    assert copy_image(image.source, f"{layout}:a", accepting, zstd).digest == image.digest
    forced = replace(zstd, force_compression=True)
    result = copy_image(image.source, f"{layout}:b", accepting, forced)
    assert result.digest != image.digest
    # zstd has no place in Docker's manifests: it becomes gzip again
    docker = copy_image(
        f"{layout}:b", f"dir:{tmp_path}/d", accepting, CopyOptions(format=Family.DOCKER)
    )
    kinds = {layer["mediaType"] for layer in json.loads(docker.manifest)["layers"]}
    assert kinds == {media_types.DOCKER_LAYER_GZIP}


def test_annotations_that_speak_of_the_bytes_fall_with_them(
    tmp_path: Path, accepting: CopyContext
) -> None:
    notes = {"containerd.io/snapshot/stargz/toc.digest": f"sha256:{'0' * 64}", "mine": "stays"}
    source = oci.LayerSource(bytes(1024), annotations=notes)
    image = oci.write_image(tmp_path / "source", "x", [source], oci.RunConfig())
    for form, kept in ((Form.GZIP, notes), (Form.ZSTD, {"mine": "stays"})):
        options = CopyOptions(compression=form)
        result = copy_image(image.source, f"dir:{tmp_path}/{form.value}", accepting, options)
        assert json.loads(result.manifest)["layers"][0]["annotations"] == kept


def test_bytes_that_belie_their_media_type_are_unpacked_all_the_same(
    tmp_path: Path, make_image: MakeImage, accepting: CopyContext
) -> None:
    """Skopeo's old dir: says gzip where it wrote plain layers."""
    image = make_image(compression="none")
    copy_image(image.source, f"dir:{tmp_path}/d", accepting)
    path = tmp_path / "d/manifest.json"
    path.write_bytes(path.read_bytes().replace(b"layer.v1.tar", b"layer.v1.tar+gzip"))
    copy_image(f"dir:{tmp_path}/d", f"docker-archive:{tmp_path}/a:x", accepting)
    copy_image(f"dir:{tmp_path}/d", f"oci:{tmp_path}/o:x", accepting)
    copy_image(f"docker-archive:{tmp_path}/a", f"dir:{tmp_path}/e", accepting)
    for layer in json.loads((tmp_path / "e/manifest.json").read_bytes())["layers"]:
        assert layer["mediaType"] == media_types.DOCKER_LAYER


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"compression": Form.ZSTD, "format": Family.DOCKER}, "zstd"),
        ({"compression": Form.GZIP, "level": 10}, "1 to 9"),
        ({"compression": Form.ZSTD, "level": 23}, "1 to 22"),
        ({"level": 0}, "1 to 9"),
    ],
)
def test_options_that_contradict_each_other(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        CopyOptions(**changes)


# -- indexes -------------------------------------------------------------------------


@pytest.fixture
def index(make_image: MakeImage) -> StoredImage:
    both = [make_image(one, architecture=one) for one in ("amd64", "arm64")]
    return oci.write_index(both[0].layout, "index", both)


def test_an_index_is_copied_as_a_whole_or_one_image_of_it(
    tmp_path: Path, index: StoredImage, accepting: CopyContext
) -> None:
    everything = CopyOptions(platforms=Platforms.ALL)
    there = f"dir:{tmp_path}/d"
    assert copy_image(index.source, there, accepting, everything).digest == index.digest
    archive = f"oci-archive:{tmp_path}/a:x"
    assert copy_image(there, archive, accepting, everything).digest == index.digest
    for architecture in ("amd64", "arm64"):
        ctx = replace(accepting, platform=Platform("linux", architecture))
        result = copy_image(archive, f"oci:{tmp_path}/{architecture}:x", ctx)
        config = json.loads(
            blob(tmp_path / architecture, json.loads(result.manifest)["config"]["digest"])
        )
        assert config["architecture"] == architecture
    with pytest.raises(NotFound, match="riscv64"):
        copy_image(archive, there, replace(accepting, platform=Platform("linux", "riscv64")))
    with pytest.raises(UnsupportedFormat, match="index"):
        copy_image(index.source, f"docker-archive:{tmp_path}/b:x", accepting, everything)


def test_an_index_in_other_words(
    tmp_path: Path, index: StoredImage, accepting: CopyContext
) -> None:
    options = CopyOptions(platforms=Platforms.ALL, format=Family.DOCKER)
    result = copy_image(index.source, f"dir:{tmp_path}/d", accepting, options)
    document = json.loads(result.manifest)
    assert document["mediaType"] == media_types.DOCKER_LIST
    for entry in document["manifests"]:
        raw = (tmp_path / "d" / f"{entry['digest'][7:]}.manifest.json").read_bytes()
        assert (len(raw), str(Digest.of(raw))) == (entry["size"], entry["digest"])
        assert json.loads(raw)["mediaType"] == entry["mediaType"] == media_types.DOCKER_MANIFEST
    everything = CopyOptions(platforms=Platforms.ALL)
    back = copy_image(f"dir:{tmp_path}/d", f"oci:{tmp_path}/o:x", accepting, everything)
    assert json.loads(back.manifest)["mediaType"] == media_types.OCI_INDEX


def test_an_index_alone(tmp_path: Path, index: StoredImage, accepting: CopyContext) -> None:
    options = CopyOptions(platforms=Platforms.INDEX_ONLY)
    copy_image(index.source, f"dir:{tmp_path}/d", accepting, options)
    assert sorted(os.listdir(tmp_path / "d")) == ["manifest.json", "version"]


# -- signatures and policy -----------------------------------------------------------


def test_signatures_go_along_where_they_can(
    tmp_path: Path, make_image: MakeImage, accepting: CopyContext
) -> None:
    copy_image(make_image().source, f"dir:{tmp_path}/a", accepting)
    (tmp_path / "a/signature-1").write_bytes(b"one")
    (tmp_path / "a/signature-2").write_bytes(b"two")
    copy_image(f"dir:{tmp_path}/a", f"dir:{tmp_path}/b", accepting)
    assert [(tmp_path / "b" / f"signature-{n}").read_bytes() for n in (1, 2)] == [b"one", b"two"]
    for target in (f"oci:{tmp_path}/o:x", f"docker-archive:{tmp_path}/x"):
        with pytest.raises(UnsupportedFormat, match="remove-signatures"):
            copy_image(f"dir:{tmp_path}/a", target, accepting)
    with pytest.raises(UsageError, match="signatures"):
        copy_image(
            f"dir:{tmp_path}/a",
            f"dir:{tmp_path}/c",
            accepting,
            CopyOptions(format=Family.DOCKER),
        )
    without = CopyOptions(remove_signatures=True)
    copy_image(f"dir:{tmp_path}/a", f"dir:{tmp_path}/b", accepting, without)
    assert "signature-1" not in os.listdir(tmp_path / "b")


def test_signatures_of_the_images_of_an_index(
    tmp_path: Path, index: StoredImage, accepting: CopyContext
) -> None:
    everything = CopyOptions(platforms=Platforms.ALL)
    copy_image(index.source, f"dir:{tmp_path}/a", accepting, everything)
    stem = json.loads((tmp_path / "a/manifest.json").read_bytes())["manifests"][1]["digest"][7:]
    (tmp_path / "a" / f"{stem}.signature-1").write_bytes(b"one")
    copy_image(f"dir:{tmp_path}/a", f"dir:{tmp_path}/b", accepting, everything)
    assert (tmp_path / "b" / f"{stem}.signature-1").read_bytes() == b"one"
    ctx = replace(accepting, platform=Platform("linux", "arm64"))
    copy_image(f"dir:{tmp_path}/a", f"dir:{tmp_path}/c", ctx)
    assert (tmp_path / "c/signature-1").read_bytes() == b"one"


def test_the_policy_is_asked_before_anything_is_written(
    tmp_path: Path, make_image: MakeImage, accepting: CopyContext
) -> None:
    source = make_image().source
    policy = {
        "default": [{"type": "insecureAcceptAnything"}],
        "transports": {"oci": {str(tmp_path / "source"): [{"type": "reject"}]}},
    }
    ctx = replace(accepting, policy=Policy.parse(json.dumps(policy).encode()))
    with pytest.raises(PolicyRejected):
        copy_image(source, f"oci-archive:{tmp_path}/a:x", ctx)
    assert os.listdir(tmp_path) == ["source"]


# -- what is refused -----------------------------------------------------------------


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("harm", ["flip", "longer", "shorter", "gone"])
def test_a_damaged_layer_leaves_nothing_behind(
    tmp_path: Path, make_image: MakeImage, accepting: CopyContext, target: str, harm: str
) -> None:
    image = make_image()
    path = image.blob(image.layers[1].digest)
    raw = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        harmed = {
            "flip": raw[:-1] + bytes([raw[-1] ^ 1]),
            "longer": raw + b"x",
            "shorter": raw[:-1],
        }
        path.write_bytes(harmed[harm])
    with pytest.raises(NotFound if harm == "gone" else VerificationError) as caught:
        copy_image(image.source, target.format(tmp_path / "out"), accepting)
    assert image.layers[1].digest in str(caught.value)
    if target.startswith("oci:"):  # whole blobs may stay in a layout, but no image
        assert not (tmp_path / "out/index.json").exists()
    else:
        assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("what", ["config", "manifest"])
def test_damaged_documents_are_refused(
    tmp_path: Path, make_image: MakeImage, accepting: CopyContext, what: str
) -> None:
    image = make_image()
    raw = json.loads(image.blob(image.digest).read_bytes())
    path = image.blob(raw["config"]["digest"] if what == "config" else image.digest)
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    with pytest.raises(VerificationError):
        copy_image(image.source, f"dir:{tmp_path}/out", accepting)
    assert os.listdir(tmp_path) == ["source"]


def test_a_manifest_and_a_config_that_do_not_belong_together(
    tmp_path: Path, make_image: MakeImage, accepting: CopyContext
) -> None:
    image = make_image()
    document = json.loads(image.blob(image.digest).read_bytes())
    document["layers"].pop()
    layout = OciLayout(image.layout, "odd")
    layout.put_manifest(json.dumps(document).encode(), media_types.OCI_MANIFEST, top=True)
    with pytest.raises(InvalidManifest, match="diff IDs"):
        copy_image(f"oci:{image.layout}:odd", f"dir:{tmp_path}/out", accepting)


def test_an_artifact_is_copied_but_not_changed(tmp_path: Path, accepting: CopyContext) -> None:
    layout = OciLayout(tmp_path / "source", "art")
    blobs = [b"{}", b"any bytes"]
    for raw in blobs:
        layout.put_blob(Digest.of(raw), partial(iter, (raw,)), len(raw))
    document = {
        "schemaVersion": 2,
        "mediaType": media_types.OCI_MANIFEST,
        "config": {"mediaType": "application/x", "digest": str(Digest.of(blobs[0])), "size": 2},
        "layers": [{"mediaType": "text/x", "digest": str(Digest.of(blobs[1])), "size": 9}],
    }
    raw = json.dumps(document).encode()
    layout.put_manifest(raw, media_types.OCI_MANIFEST, top=True)
    source = f"oci:{tmp_path}/source:art"
    zstd = CopyOptions(compression=Form.ZSTD)
    assert copy_image(source, f"oci-archive:{tmp_path}/a:x", accepting, zstd).manifest == raw
    with pytest.raises(UnsupportedFormat):
        copy_image(source, f"docker-archive:{tmp_path}/b:x", accepting)
    with pytest.raises(UnsupportedFormat):
        copy_image(source, f"dir:{tmp_path}/b", accepting, CopyOptions(format=Family.DOCKER))


def test_a_failure_stops_what_is_under_way(
    tmp_path: Path, make_image: MakeImage, accepting: CopyContext
) -> None:
    image = make_image(layers=6)
    image.blob(image.layers[5].digest).write_bytes(b"damaged")

    class Slow(OciLayout):
        def open_blob(self, digest: Digest, size: int) -> Any:
            stream = super().open_blob(digest, size)
            if digest == image.layers[0].digest:
                return _Endless(stream)
            return stream

    source = Slow(image.layout, image.tag)
    destination = DirDestination(tmp_path / "out")
    with pytest.raises(VerificationError):
        copy_between(source, destination, accepting)
    destination.close()
    assert os.listdir(tmp_path) == ["source"]


class _Endless:
    """A stream that gives a byte now and then, for as long as anybody listens."""

    def __init__(self, stream: BlobStream) -> None:
        self._stream = stream
        self._rest = threading.Event()

    def read(self, n: int, /) -> bytes:
        self._rest.wait(0.02)
        return self._stream.read(1)

    def __enter__(self) -> _Endless:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stream.__exit__(*error)


# -- a source that has lost its blobs -------------------------------------------------


class Storage(OciLayout):
    """As a graph root: layers are there as tar streams, their blobs are gone."""

    def gives_blob(self, digest: Digest) -> bool:
        return False

    def open_blob(self, digest: Digest, size: int) -> Any:
        raise NotFound("the blob is gone", subject=digest)

    def layer_diff(self, layer: Descriptor, diff_id: Digest) -> Any:
        return super().open_blob(diff_id, 0)


def test_layers_without_blobs_come_from_their_tar_streams(
    tmp_path: Path, make_image: MakeImage, accepting: CopyContext
) -> None:
    image = make_image()
    plain = make_image("plain", compression="none")
    source = Storage(image.layout, image.tag)
    ends: dict[str, str] = {"dir": media_types.OCI_LAYER, "oci": media_types.OCI_LAYER_GZIP}
    for transport, kind in ends.items():
        there = tmp_path / transport
        destination = DirDestination(there) if transport == "dir" else OciLayout(there, "x")
        result = copy_between(source, destination, accepting)
        layers = json.loads(result.manifest)["layers"]
        assert [layer["mediaType"] for layer in layers] == [kind, kind]
        if transport == "dir":
            assert [layer["digest"] for layer in layers] == [one.digest for one in plain.layers]
    # what the destination has is not made again: the manifest stays
    copy_image(image.source, f"oci:{tmp_path}/has:x", accepting)
    again = copy_between(source, OciLayout(tmp_path / "has", "y"), accepting)
    assert again.digest == image.digest
    options = CopyOptions(preserve_digests=True)
    with pytest.raises(UnsupportedFormat, match="not its blob"):
        copy_between(source, OciLayout(tmp_path / "new", "y"), accepting, options)


# -- what is told --------------------------------------------------------------------


class Listening(Quiet):
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.moved: list[Digest] = []
        self.left: list[Digest] = []

    def message(self, text: str, /) -> None:
        self.lines.append(text)

    def copying(self, kind: Any, digest: Digest, total: int | None, /) -> PullItem:
        if kind == "blob":
            self.moved.append(digest)
        return Item()

    def skipped(self, digest: Digest, how: str, /) -> None:
        self.left.append(digest)


def test_what_moves_and_what_does_not_is_told(
    tmp_path: Path, make_image: MakeImage, accepting: CopyContext
) -> None:
    image = make_image()
    for moved in (2, 0):
        heard = Listening()
        copy_image(image.source, f"oci:{tmp_path}/o:x", replace(accepting, listener=heard))
        assert (len(heard.moved), len(heard.left)) == (moved, 2 - moved)
        assert heard.lines == [
            "Getting image source signatures",
            "Writing manifest to image destination",
        ]


# -- directories ---------------------------------------------------------------------


def test_a_directory_is_replaced_only_if_it_holds_an_image(
    tmp_path: Path, make_image: MakeImage, accepting: CopyContext
) -> None:
    first, second = make_image("a"), make_image("b", layers=1)
    there = tmp_path / "d"
    there.mkdir()
    inode = there.stat().st_ino
    copy_image(first.source, f"dir:{there}", accepting)
    copy_image(second.source, f"dir:{there}", accepting)
    assert there.stat().st_ino == inode
    assert len(os.listdir(there)) == 4  # manifest, version, config, one layer
    assert DirSource(there).manifest().digest == second.digest
    (there / "version").unlink()
    with pytest.raises(UsageError, match="other things"):
        copy_image(first.source, f"dir:{there}", accepting)
    assert len(os.listdir(there)) == 3
    second.blob(second.layers[0].digest).write_bytes(b"")
    (there / "version").write_bytes(b"Directory Transport Version: 1.1\n")
    with pytest.raises(LayerstoreError):
        copy_image(second.source, f"dir:{there}", accepting)
    assert len(os.listdir(there)) == 4
    with pytest.raises(LayerstoreError):
        DirDestination(there / "version")


def test_pipes_under_the_names_of_blobs_hang_nobody(
    tmp_path: Path, make_image: MakeImage, accepting: CopyContext
) -> None:
    image = make_image()
    path = image.blob(image.layers[0].digest)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(LayerstoreError, match="not a regular file"):
        copy_image(image.source, f"dir:{tmp_path}/d", accepting)


def test_no_registry(tmp_path: Path, make_image: MakeImage, accepting: CopyContext) -> None:
    with pytest.raises(NetworkError):
        copy_image(make_image().source, "docker://127.0.0.1:1/a:b", accepting)


def test_further_names(tmp_path: Path, make_image: MakeImage, accepting: CopyContext) -> None:
    options = CopyOptions(tags=(Reference.parse("busy:2"), Reference.parse("busy:3")))
    source = make_image().source
    archive = f"docker-archive:{tmp_path}/a"
    copy_image(source, f"{archive}:busy:1", accepting, options)
    for tag in (1, 2, 3):
        copy_image(f"{archive}:busy:{tag}", f"dir:{tmp_path}/{tag}", accepting)
    with pytest.raises(UsageError):
        copy_image(source, f"dir:{tmp_path}/x", accepting, options)


def test_compressions_have_forms() -> None:
    assert {form.compression for form in Form if form is not Form.AS_IS} == set(Compression)
