"""Static stores: what is in them, when it is seen, and what is never put there."""

from __future__ import annotations

import errno
import fcntl
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lab import oci, sparse, tars
from lab.oci import StoredImage
from lab.tars import Member
from layerstore.copy.ocilayout import OciLayout
from layerstore.copy.progress import Item, Kind, PullItem, Quiet
from layerstore.copy.staticstore import StaticStore
from layerstore.copy.statictoc import check_toc
from layerstore.copy.staticverify import VerifyResult, verify
from layerstore.copy.transport import BlobStream
from layerstore.copy.unpack import UnpackOptions, UnpackResult, unpack_image
from layerstore.errors import (
    InvalidLayer,
    NotFound,
    StorageError,
    UsageError,
    VerificationError,
)
from layerstore.formats import (
    FOOTER_BYTES,
    Compression,
    build_footer,
    parse_footer,
    write_estargz,
)
from layerstore.graphroot.als import LayerStores
from layerstore.graphroot.extract import apply_tar
from layerstore.graphroot.storageconf import LayerStoreSpec
from layerstore.graphroot.treecheck import tree_differences
from layerstore.image import Descriptor, Digest, Manifest, Platform, Reference, parse_manifest
from layerstore.image.annotations import ESTARGZ_TOC_DIGEST

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners and whiteouts need root")

REFERENCE = Reference.parse("registry.example/app:1")
PASSWD = tars.regular(b"etc/passwd", b"root\n", uid=1, gid=2)
BASE = (
    tars.directory(b"./", 0o711, uid=5, gid=6, mtime_ns=7_000_000_000),
    tars.directory(b"etc/", 0o750),
    PASSWD,
    tars.hard_link(b"etc/group", PASSWD),
    tars.symlink(b"link", b"etc/passwd"),
    tars.regular(b"deep/er/file", b"x" * 5000),
)
TOP = (
    tars.whiteout(b"etc/passwd"),
    tars.directory(b"deep/"),
    tars.opaque(b"deep"),
    tars.regular(b"deep/new", b"new"),
)


class Named(OciLayout):
    """A layout whose image has a reference, as one of a registry has; counts what is read."""

    def __init__(self, image: StoredImage, reference: Reference | None = REFERENCE) -> None:
        super().__init__(image.layout, image.tag)
        self._reference = reference
        self.opened: list[str] = []
        self.before: Callable[[], None] = lambda: None

    @property
    def reference(self) -> Reference | None:
        return self._reference

    def open_blob(self, digest: Digest, size: int) -> BlobStream:  # type: ignore[override]
        self.opened.append(digest)
        self.before()
        return super().open_blob(digest, size)


def tar(members: Sequence[Member]) -> bytes:
    out = io.BytesIO()
    tars.write_tar(out, members)
    return out.getvalue()


def ordinary(layout: Path, *layers: Sequence[Member], **config: Any) -> StoredImage:
    sources = [oci.LayerSource(tar(members)) for members in layers]
    return oci.write_image(layout, "1", sources, oci.RunConfig(**config))


def lazy(
    layout: Path,
    *layers: Sequence[Member],
    change: Callable[[dict[str, Any]], None] | None = None,
) -> StoredImage:
    """An image of eStargz layers; ``change`` spoils the manifest."""
    made = []
    for members in layers:
        out = io.BytesIO()
        result = write_estargz(io.BytesIO(tar(members)), out)
        made.append((out.getvalue(), result.toc_digest))
    sources = [
        oci.LayerSource(gzip.decompress(blob), annotations={ESTARGZ_TOC_DIGEST: str(toc)})
        for blob, toc in made
    ]
    image = oci.write_image(layout, "1", sources, oci.RunConfig())
    # the layout's own compression is not eStargz: put the real blobs in its place
    manifest = json.loads(image.blob(image.digest).read_bytes())
    for entry, (blob, _) in zip(manifest["layers"], made, strict=True):
        entry |= {"digest": store_blob(image, blob), "size": len(blob)}
    if change is not None:
        change(manifest)
    raw = json.dumps(manifest).encode()
    digest = store_blob(image, raw)
    index = json.loads((layout / "index.json").read_bytes())
    index["manifests"] = [
        one | {"digest": digest, "size": len(raw)}
        for one in index["manifests"]
        if one["digest"] == image.digest
    ]
    (layout / "index.json").write_bytes(json.dumps(index).encode())
    return oci.read_image(layout, "1")


def store_blob(image: StoredImage, data: bytes) -> str:
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    image.blob(digest).write_bytes(data)
    return digest


def source_layers(source: Named) -> Sequence[Descriptor]:
    manifest = parse_manifest(source.manifest().raw)
    assert isinstance(manifest, Manifest)
    return manifest.layers


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def fill(store: Path, image: StoredImage | Named, **options: Any) -> UnpackResult:
    source = image if isinstance(image, Named) else Named(image)
    return unpack_image(source, store, UnpackOptions(**options))


def names(store: Path) -> set[str]:
    return {str(name.path) for name in StaticStore(store).names()}


def damage(store: Path) -> list[str]:
    return [f"{one.path}: {one.what}" for one in verify(store).damage]


# -- what is in a store ------------------------------------------------------------


def test_a_layer_has_tree_blob_and_info(tmp_path: Path, store: Path) -> None:
    image = ordinary(tmp_path / "image", BASE, TOP)
    result = fill(store, image)
    assert [layer.how for layer in result.images[0].layers] == ["unpacked", "unpacked"]
    for layer in image.layers:
        path = store / layer.digest
        assert (path / "blob").read_bytes() == image.blob(layer.digest).read_bytes()
        unpacked = gzip.decompress((path / "blob").read_bytes())
        assert json.loads((path / "info").read_bytes()) == {
            "compressed-diff-digest": layer.digest,
            "compressed-size": layer.size,
            "diff-digest": layer.diff_id,
            "diff-size": len(unpacked),
            "compression": 2,
        }
    base, top = (store / layer.digest / "diff" for layer in image.layers)
    assert (base / "etc/passwd").read_bytes() == b"root\n"
    assert (base / "etc/group").samefile(base / "etc/passwd")
    assert stat.S_ISCHR((top / "etc/passwd").lstat().st_mode)
    assert os.getxattr(top / "deep", "trusted.overlay.opaque") == b"y"
    assert not (store / layer.digest / "tar-split.gz").exists()


def test_opaque_directories_are_opaque_for_rootless_mounts_too(tmp_path: Path, store: Path) -> None:
    image = ordinary(tmp_path / "image", TOP)
    fill(store, image)
    deep = store / image.layers[0].digest / "diff/deep"
    try:
        os.setxattr(tmp_path, "user.test", b"y")
    except OSError:
        pytest.skip("the file system has no user attributes")
    assert os.getxattr(deep, "user.overlay.opaque") == b"y"


def test_the_root_has_the_attributes_of_its_entry(tmp_path: Path, store: Path) -> None:
    image = ordinary(tmp_path / "image", BASE, TOP)
    fill(store, image)
    base, top = ((store / layer.digest / "diff").stat() for layer in image.layers)
    assert (base.st_mode & 0o7777, base.st_uid, base.st_gid) == (0o711, 5, 6)
    assert base.st_mtime_ns == 7_000_000_000
    assert (top.st_mode & 0o7777, top.st_uid, top.st_gid) == (0o755, 0, 0)


def test_a_lazy_layer_has_two_names_and_lies_there_once(tmp_path: Path, store: Path) -> None:
    image = lazy(tmp_path / "image", BASE)
    result = fill(store, image)
    (layer,) = result.images[0].layers
    assert layer.no_toc == ""
    assert names(store) == {layer.digest, layer.toc_digest}
    one, other = store / layer.digest, store / str(layer.toc_digest)
    assert (one / "diff/etc/passwd").samefile(other / "diff/etc/passwd")
    assert (one / "blob").samefile(other / "blob")
    info = json.loads((other / "info").read_bytes())
    assert info["toc-digest"] == layer.toc_digest
    assert info["flags"] == {"expected-layer-diffid": layer.diff_id}
    assert info["diff-digest"] == layer.diff_id
    assert info["compressed-diff-digest"] == layer.digest
    for path in (one, other):
        assert not Path(os.readlink(path)).is_absolute()
        # Podman walks through no link but its own
        assert not (path / "diff").is_symlink()


def test_a_second_toc_has_an_info_of_its_own(tmp_path: Path, store: Path) -> None:
    fill(store, lazy(tmp_path / "image", BASE))
    static = StaticStore(store)
    (digest,) = static.layers()
    second = f"sha256:{'3' * 64}"
    record = static.layer(digest)
    assert record is not None
    first = next(iter(record.tocs))
    record = msgspec.structs.replace(record, tocs={**record.tocs, second: record.tocs[first]})
    with static.writing():
        (static.layer_directory(digest) / "layer.json").write_bytes(msgspec.json.encode(record))
        for reference in (None, REFERENCE):
            assert static.add_name(record, reference, second)
            assert not static.add_name(record, reference, second)
    for name in static.names():
        path = store / name.path
        assert static.is_right(name) == (name.digest in (digest, first, second))
        asked = first if name.digest == digest else name.digest
        assert json.loads((path / "info").read_bytes())["toc-digest"] == asked
        assert (path / "diff/etc/passwd").read_bytes() == b"root\n"


def test_names_of_directories_become_links(tmp_path: Path, store: Path) -> None:
    """As stores were at first."""
    image = lazy(tmp_path / "image", BASE)
    fill(store, image)
    for name in StaticStore(store).names():
        path = store / name.path
        target = os.readlink(path)
        path.unlink()
        path.mkdir()
        for part in ("diff", "blob"):
            (path / part).symlink_to(f"../{target}/{part}")
        (path / "info").write_bytes((store / target / "info").read_bytes())
    fill(store, image)
    assert all((store / name.path).is_symlink() for name in StaticStore(store).names())
    assert damage(store) == []


def test_a_layer_with_sparse_files_is_unpacked(tmp_path: Path, store: Path) -> None:
    layers = [oci.LayerSource(sparse.sparse_tar(tmp_path, "1.0"))]
    fill(store, oci.write_image(tmp_path / "image", "1", layers, oci.RunConfig()))
    (name,) = names(store)
    diff = store / name / "diff"
    assert {file: (diff / file).read_bytes() for file in sparse.FILES} == sparse.FILES
    assert damage(store) == []


def test_names_with_a_reference(tmp_path: Path, store: Path) -> None:
    image = lazy(tmp_path / "image", BASE)
    fill(store, image, with_reference=True)
    level = "cmVnaXN0cnkuZXhhbXBsZS9hcHA6MQ=="
    assert {name.split("/")[0] for name in names(store)} == {level}
    fill(store, image)
    assert len(names(store)) == 4


@pytest.mark.parametrize("with_reference", [False, True])
def test_our_own_client_finds_the_layers(tmp_path: Path, store: Path, with_reference: bool) -> None:
    image = lazy(tmp_path / "image", BASE)
    result = fill(store, image, with_reference=with_reference)
    (layer,) = result.images[0].layers
    stores = LayerStores([LayerStoreSpec(store, with_reference)])
    found = stores.find_by_blob(REFERENCE, layer.digest)
    assert found is not None
    assert found.facts.diff_digest == layer.diff_id
    found = stores.find_by_toc(REFERENCE, Digest.parse(str(layer.toc_digest)))
    assert found is not None
    assert found.facts.expected_diff_id == layer.diff_id
    assert (found.path / "diff/etc/passwd").read_bytes() == b"root\n"
    stores.close()


def test_everything_can_be_read_whatever_the_umask(tmp_path: Path, store: Path) -> None:
    image = ordinary(tmp_path / "image", BASE)
    before = os.umask(0o077)
    try:
        fill(store, image, with_reference=True)
    finally:
        os.umask(before)
    (name,) = StaticStore(store).names()
    path = store / name.path
    for directory in (store, path.parent, path, (path / "blob").resolve().parent):
        assert directory.stat().st_mode & 0o777 == 0o755, directory
    for file in (path / "info", path / "blob"):
        assert file.stat().st_mode & 0o777 == 0o644, file


# -- increments --------------------------------------------------------------------


def test_what_is_there_is_not_read_again(tmp_path: Path, store: Path) -> None:
    image = ordinary(tmp_path / "image", BASE, TOP)
    fill(store, image)
    source = Named(image)
    result = fill(store, source)
    assert [layer.how for layer in result.images[0].layers] == ["exists", "exists"]
    assert source.opened == []


def test_images_share_layers(tmp_path: Path, store: Path) -> None:
    one = ordinary(tmp_path / "one", BASE, TOP)
    other = ordinary(tmp_path / "other", BASE, [tars.regular(b"other", b"")])
    fill(store, one)
    source = Named(other)
    fill(store, source)
    assert source.opened == [other.layers[1].digest]
    assert len(StaticStore(store).layers()) == 3


def test_a_layer_that_is_listed_twice_is_not_read_and_has_no_name(
    tmp_path: Path, store: Path
) -> None:
    source = Named(lazy(tmp_path / "image", BASE, TOP, BASE))
    twice, once = source_layers(source)[:2]
    result = fill(store, source)
    assert [layer.how for layer in result.images[0].layers] == ["left out", "unpacked", "left out"]
    assert source.opened == [once.digest]
    assert names(store) == {once.digest, result.images[0].layers[1].toc_digest}
    # nor later, for an image that has it once
    other = Named(lazy(tmp_path / "other", BASE))
    assert [layer.digest for layer in source_layers(other)] == [twice.digest]
    assert fill(store, other).images[0].layers[0].how == "left out"
    assert other.opened == []
    assert len(names(store)) == 2
    # a client that asks with the other image's reference is another matter
    other = Named(lazy(tmp_path / "third", BASE), Reference.parse("registry.example/other:1"))
    assert fill(store, other, with_reference=True).images[0].layers[0].how == "unpacked"
    assert len(names(store)) == 4
    assert damage(store) == []


def test_an_image_that_repeats_what_is_there_is_refused_as_a_whole(
    tmp_path: Path, store: Path
) -> None:
    first = ordinary(tmp_path / "first", BASE)
    fill(store, first)
    (name,) = names(store)
    source = Named(ordinary(tmp_path / "second", TOP, BASE, BASE))
    with pytest.raises(UsageError, match="more than once") as refused:
        fill(store, source)
    assert str(store / name) in refused.value.advice
    assert source.opened == []
    assert names(store) == {name}
    assert fill(store, first).images[0].layers[0].how == "exists"
    (store / name).unlink()
    assert [layer.how for layer in fill(store, source).images[0].layers] == [
        "unpacked",
        "left out",
        "left out",
    ]


def test_what_one_platform_repeats_has_no_name_for_the_others(tmp_path: Path, store: Path) -> None:
    layers = {"amd64": (BASE, TOP), "arm64": (BASE, TOP, TOP)}
    layout = tmp_path / "index"
    made = [
        oci.write_image(
            layout,
            each,
            [oci.LayerSource(tar(members)) for members in layers[each]],
            oci.RunConfig(architecture=each),
        )
        for each in layers
    ]
    both = tuple(Platform.parse(f"linux/{each}") for each in layers)
    result = fill(store, oci.write_index(layout, "1", made), platforms=both)
    hows = [[layer.how for layer in image.layers] for image in result.images]
    assert hows == [["unpacked", "left out"], ["unpacked", "left out", "left out"]]
    assert len(names(store)) == 1


def test_layers_of_one_toc_have_their_blobs_names_only(tmp_path: Path, store: Path) -> None:
    """For clients of dialect T that is one layer twice, for the others it is two layers."""

    def alike(manifest: dict[str, Any]) -> None:
        manifest["layers"][1]["annotations"] = manifest["layers"][0]["annotations"]

    image = lazy(tmp_path / "image", BASE, TOP, change=alike)
    result = fill(store, image)
    assert names(store) == {layer.digest for layer in image.layers}
    assert all(layer.no_toc for layer in result.images[0].layers)


def test_a_blob_of_two_tocs_has_no_name(tmp_path: Path, store: Path) -> None:
    """Both names would lead to its one directory."""

    def other(manifest: dict[str, Any]) -> None:
        manifest["layers"][1]["annotations"][ESTARGZ_TOC_DIGEST] = f"sha256:{'3' * 64}"

    fill(store, lazy(tmp_path / "image", BASE, BASE, change=other))
    assert names(store) == set()


def test_a_toc_that_is_announced_later_is_added(tmp_path: Path, store: Path) -> None:
    def silent(manifest: dict[str, Any]) -> None:
        manifest["layers"][0].pop("annotations")

    fill(store, lazy(tmp_path / "silent", BASE, change=silent))
    assert len(names(store)) == 1
    source = Named(lazy(tmp_path / "image", BASE))
    fill(store, source)
    assert len(names(store)) == 2
    assert source.opened == []


@pytest.mark.parametrize("part", ["blob", "diff", "layer.json"])
def test_a_layer_that_lost_a_part_is_made_again(tmp_path: Path, store: Path, part: str) -> None:
    image = ordinary(tmp_path / "image", BASE)
    fill(store, image)
    victim = StaticStore(store).layer_directory(image.layers[0].digest) / part
    shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
    result = fill(store, image)
    assert result.images[0].layers[0].how == "unpacked"
    assert damage(store) == []


def test_a_name_that_lost_its_info_is_made_again(tmp_path: Path, store: Path) -> None:
    image = ordinary(tmp_path / "image", BASE)
    fill(store, image)
    (store / image.layers[0].digest / "info").unlink()
    assert len(damage(store)) == 1
    result = fill(store, image)
    assert result.images[0].layers[0].how == "exists"
    assert damage(store) == []


@pytest.mark.parametrize("target", ["nowhere", ".layerstore", "/"])
def test_a_name_that_leads_elsewhere_is_made_again(
    tmp_path: Path, store: Path, target: str
) -> None:
    image = ordinary(tmp_path / "image", BASE)
    fill(store, image)
    name = store / image.layers[0].digest
    name.unlink()
    name.symlink_to(target)
    assert damage(store) == [f"{name.name}: leads to no layer of this store"]
    result = fill(store, image)
    assert result.images[0].layers[0].how == "exists"
    assert damage(store) == []


# -- platforms ---------------------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path) -> StoredImage:
    layout = tmp_path / "index"
    made = [
        oci.write_image(
            layout,
            each,
            [oci.LayerSource(tar([tars.regular(b"arch", each.encode())]))],
            oci.RunConfig(architecture=each),
        )
        for each in ("amd64", "arm64")
    ]
    return oci.write_index(layout, "1", made)


def test_platforms_are_chosen(index: StoredImage, store: Path) -> None:
    both = (Platform.parse("linux/amd64"), Platform.parse("linux/arm64"))
    result = fill(store, index, platforms=both[1:])
    assert [str(image.platform) for image in result.images] == ["linux/arm64"]
    assert result.digest == index.digest
    result = fill(store, index, platforms=(*both, both[0]))
    assert [layer.how for image in result.images for layer in image.layers] == [
        "unpacked",
        "exists",
    ]
    with pytest.raises(NotFound):
        fill(store, index, platforms=(Platform.parse("linux/s390x"),))


def test_an_image_of_another_platform_is_refused(tmp_path: Path, store: Path) -> None:
    image = ordinary(tmp_path / "image", BASE, architecture="arm64")
    with pytest.raises(NotFound):
        fill(store, image, platforms=(Platform.parse("linux/amd64"),))


# -- what is refused ---------------------------------------------------------------


def assert_nothing_there(store: Path) -> None:
    assert names(store) == set()
    assert StaticStore(store).layers() == []
    assert list((store / ".layerstore/tmp").iterdir()) == []


def test_a_wrong_blob_is_not_published(tmp_path: Path, store: Path) -> None:
    image = ordinary(tmp_path / "image", BASE)
    path = image.blob(image.layers[0].digest)
    path.write_bytes(gzip.compress(b"\0" * 1024))
    with pytest.raises(VerificationError):
        fill(store, image)
    assert_nothing_there(store)


def test_a_layer_of_another_diff_id_is_not_published(tmp_path: Path, store: Path) -> None:
    image = with_diff_id(ordinary(tmp_path / "image", BASE), "0" * 64)
    with pytest.raises(VerificationError):
        fill(store, image)
    assert_nothing_there(store)


def test_a_config_that_lies_of_a_layer_that_is_there_is_refused(
    tmp_path: Path, store: Path
) -> None:
    fill(store, ordinary(tmp_path / "image", BASE))
    with pytest.raises(VerificationError):
        fill(store, with_diff_id(ordinary(tmp_path / "lying", BASE), "0" * 64))


def with_diff_id(image: StoredImage, diff_id: str) -> StoredImage:
    manifest = json.loads(image.blob(image.digest).read_bytes())
    config = json.loads(image.blob(manifest["config"]["digest"]).read_bytes())
    config["rootfs"]["diff_ids"] = [f"sha256:{diff_id}"]
    raw = json.dumps(config).encode()
    manifest["config"] |= {"digest": store_blob(image, raw), "size": len(raw)}
    raw = json.dumps(manifest).encode()
    index = json.loads((image.layout / "index.json").read_bytes())
    index["manifests"][0] |= {"digest": store_blob(image, raw), "size": len(raw)}
    (image.layout / "index.json").write_text(json.dumps(index))
    return image


@pytest.mark.parametrize("name", [b"../escape", b"/../escape"])
def test_hostile_archives_are_refused(tmp_path: Path, store: Path, name: bytes) -> None:
    image = ordinary(tmp_path / "image", [tars.regular(name, b"")])
    with pytest.raises(InvalidLayer):
        fill(store, image)
    assert_nothing_there(store)
    assert not list(tmp_path.rglob("escape"))


def test_a_toc_of_somebody_else_gives_no_name(tmp_path: Path, store: Path) -> None:
    """The attack: evil files under the TOC digest of an honest image."""
    honest = lazy(tmp_path / "honest", BASE)
    (entry,) = json.loads(honest.blob(honest.digest).read_bytes())["layers"]

    def claim(manifest: dict[str, Any]) -> None:
        manifest["layers"][0]["annotations"] = entry["annotations"]

    evil = lazy(tmp_path / "evil", [tars.regular(b"etc/passwd", b"evil\n")], change=claim)
    (layer,) = fill(store, evil).images[0].layers
    assert layer.toc_digest is None
    assert "expected sha256" in layer.no_toc
    assert names(store) == {layer.digest}
    (layer,) = fill(store, honest).images[0].layers
    assert layer.toc_digest == entry["annotations"][ESTARGZ_TOC_DIGEST]
    assert (store / str(layer.toc_digest) / "diff/etc/passwd").read_bytes() == b"root\n"


HONEST = tars.regular(b"bin/sh", b"honest", mode=0o755)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([tars.regular(b"bin/sh", b"evil!!", mode=0o755)], "/bin/sh has other contents"),
        ([tars.regular(b"bin/sh", b"longer!", mode=0o755)], "/bin/sh has 7 bytes, not 6"),
        ([tars.regular(b"bin/sh", b"honest", mode=0o4755)], "/bin/sh has the mode 4755, not 0755"),
        ([tars.regular(b"bin/sh", b"honest", mode=0o755, uid=9)], "belongs to 9:0, not 0:0"),
        ([tars.symlink(b"bin/sh", b"x")], "/bin/sh is of another type"),
        ([HONEST, tars.regular(b"bin/more", b"")], "/bin/more is not in the table"),
        ([], "the table of contents has 2 names, the archive 0"),
        ([tars.whiteout(b"bin/sh")], "/bin/sh is of another type"),
        ([tars.directory(b"bin/"), tars.opaque(b"bin"), HONEST], "/bin hides the layers below"),
        (
            [tars.regular(b"bin/sh", b"honest", mode=0o755, xattrs={b"user.x": b"y"})],
            "/bin/sh has other extended attributes",
        ),
    ],
)
def test_a_toc_that_describes_another_tree_gives_no_name(
    tmp_path: Path, store: Path, members: list[Member], said: str
) -> None:
    """Two views of one blob: the TOC of an honest layer behind the tar stream of another."""
    toc, blob = forged([HONEST], members)
    path = tmp_path / "blob"
    path.write_bytes(blob)
    diff = tmp_path / "diff"
    diff.mkdir()
    apply_tar(io.BytesIO(gzip.decompress(blob)), diff)
    with pytest.raises(VerificationError, match=re.escape(said)):
        check_toc(path, diff, {ESTARGZ_TOC_DIGEST: str(toc)}, Compression.GZIP)


def test_a_toc_that_describes_the_tree_gives_a_name(tmp_path: Path) -> None:
    """That the forgery above is right but for what is forged."""
    toc, blob = forged([HONEST], [HONEST])
    (tmp_path / "blob").write_bytes(blob)
    (tmp_path / "diff").mkdir()
    apply_tar(io.BytesIO(gzip.decompress(blob)), tmp_path / "diff")
    notes = {ESTARGZ_TOC_DIGEST: str(toc)}
    assert check_toc(tmp_path / "blob", tmp_path / "diff", notes, Compression.GZIP) == toc
    assert check_toc(tmp_path / "blob", tmp_path / "diff", {}, Compression.GZIP) is None


def forged(described: Sequence[Member], real: Sequence[Member]) -> tuple[Digest, bytes]:
    """A blob whose TOC describes other members than its tar stream has, and the TOC's digest."""
    out = io.BytesIO()
    toc = write_estargz(io.BytesIO(tar(described)), out).toc_digest
    blob = out.getvalue()
    footer = parse_footer(blob[-FOOTER_BYTES:], len(blob))
    # a landmark stands in every layer; here it also makes room for the places the TOC names
    members = [tars.regular(b".no.prefetch.landmark", b"\x0f"), *real]
    stream = b"".join(piece for member in members for piece in tars.encode(member))
    packed = gzip.compress(stream, 0)
    return toc, packed + blob[footer.toc_offset : -FOOTER_BYTES] + build_footer(len(packed))


def test_a_blob_without_a_toc_gives_no_name(tmp_path: Path, store: Path) -> None:
    image = ordinary(tmp_path / "image", BASE)
    manifest = json.loads(image.blob(image.digest).read_bytes())
    manifest["layers"][0]["annotations"] = {ESTARGZ_TOC_DIGEST: f"sha256:{'0' * 64}"}
    raw = json.dumps(manifest).encode()
    index = json.loads((image.layout / "index.json").read_bytes())
    index["manifests"][0] |= {"digest": store_blob(image, raw), "size": len(raw)}
    (image.layout / "index.json").write_text(json.dumps(index))
    (layer,) = fill(store, image).images[0].layers
    assert (layer.toc_digest, bool(layer.no_toc)) == (None, True)
    assert names(store) == {layer.digest}


def test_a_reference_is_needed_for_its_level(tmp_path: Path, store: Path) -> None:
    source = Named(ordinary(tmp_path / "image", BASE), None)
    with pytest.raises(UsageError):
        fill(store, source, with_reference=True)
    assert not store.exists()


def test_a_directory_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store/precious").write_text("")
    with pytest.raises(UsageError):
        fill(tmp_path / "store", ordinary(tmp_path / "image", BASE))
    assert os.listdir(tmp_path / "store") == ["precious"]


# -- atomic and alone --------------------------------------------------------------


def test_nothing_is_seen_before_it_is_complete(tmp_path: Path, store: Path) -> None:
    """A reader that looks all the time finds nothing or everything."""
    image = lazy(tmp_path / "image", BASE, TOP)
    wanted = [layer.digest for layer in image.layers]
    stop, seen, wrong = threading.Event(), set[str](), list[str]()
    place = [store]

    def look() -> None:
        while not stop.is_set():
            for name in wanted:
                path = place[-1] / name
                if not path.exists():
                    continue
                seen.add(name)
                try:
                    json.loads((path / "info").read_bytes())
                    blob = (path / "blob").read_bytes()
                    if hashlib.sha256(blob).hexdigest() != name[7:] or not any(
                        (path / "diff").iterdir()
                    ):
                        wrong.append(name)
                except OSError as error:
                    wrong.append(str(error))

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for number in range(10):
            place.append(tmp_path / f"store-{number}")
            fill(place[-1], image)
            time.sleep(0.01)
    finally:
        stop.set()
        reader.join()
    assert wrong == []
    assert seen == set(wanted)


def test_a_crash_leaves_nothing_that_is_seen(tmp_path: Path, store: Path) -> None:
    image = ordinary(tmp_path / "image", BASE, TOP)
    source = Named(image)

    def die() -> None:
        if len(source.opened) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    source.before = die
    context = multiprocessing.get_context("fork")
    process = context.Process(
        target=unpack_image, args=(source, store, UnpackOptions(jobs=1)), daemon=True
    )
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    # the first layer was complete; whether it had its name yet is a race
    assert names(store) <= {image.layers[0].digest}
    (store / ".layerstore/tmp/left/over").mkdir(parents=True)
    result = fill(store, image)
    assert [layer.how for layer in result.images[0].layers] == ["exists", "unpacked"]
    assert damage(store) == []
    assert list((store / ".layerstore/tmp").iterdir()) == []


def test_runs_on_one_directory_wait_for_each_other(tmp_path: Path, store: Path) -> None:
    one = Named(ordinary(tmp_path / "one", BASE))
    other = Named(ordinary(tmp_path / "other", BASE, TOP))
    begun, go = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        assert go.wait(10)

    one.before = hold
    said: list[str] = []

    class Listening(Quiet):
        def message(self, text: str, /) -> None:
            said.append(text)
            go.set()

    results: list[UnpackResult] = []
    first = threading.Thread(target=lambda: results.append(fill(store, one)))
    first.start()
    assert begun.wait(10)
    results.append(unpack_image(other, store, None, Listening()))
    first.join(10)
    assert said == ["Waiting for another run on the same directory..."]
    assert len(other.opened) == 1  # the first layer is the other run's
    assert len(results) == 2
    assert damage(store) == []


def test_a_failure_stops_the_other_layers(tmp_path: Path, store: Path) -> None:
    image = ordinary(tmp_path / "image", BASE, TOP, [tars.regular(b"more", b"")])
    source = Named(image)

    def fail() -> None:
        raise StorageError("no")

    source.before = fail
    with pytest.raises(StorageError):
        fill(store, source)
    assert_nothing_there(store)


def test_progress_is_told(tmp_path: Path, store: Path) -> None:
    image = ordinary(tmp_path / "image", BASE)
    told: list[object] = []

    class Watching(Item):
        def advance(self, n: int, /) -> None:
            told.append(n)

        def done(self) -> None:
            told.append("done")

    class Listening(Quiet):
        def copying(self, kind: Kind, digest: Digest, total: int | None, /) -> PullItem:
            told.append((kind, digest, total))
            return Watching()

        def skipped(self, digest: Digest, how: str, /) -> None:
            told.append((digest, how))

    (layer,) = image.layers
    unpack_image(Named(image), store, None, Listening())
    assert (told[0], told[-1]) == (("blob", layer.digest, layer.size), "done")
    assert sum(n for n in told if isinstance(n, int)) == layer.size
    told.clear()
    unpack_image(Named(image), store, None, Listening())
    assert told == [(layer.digest, "already exists")]


# -- verify ------------------------------------------------------------------------


@pytest.fixture
def filled(tmp_path: Path, store: Path) -> Path:
    fill(store, lazy(tmp_path / "image", BASE, TOP), with_reference=True)
    fill(store, lazy(tmp_path / "image2", BASE, TOP))
    return store


def test_an_intact_store_is_found_intact(filled: Path) -> None:
    assert verify(filled) == VerifyResult(layers=2, names=8, damage=())


def test_a_copy_is_found_intact(filled: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-a", filled, copy], check=True)
    shutil.rmtree(filled)
    assert damage(copy) == []
    copy.rename(tmp_path / "moved")
    assert damage(tmp_path / "moved") == []
    (tmp_path / "moved/.layerstore/lock").unlink()
    assert damage(tmp_path / "moved") == []


def base_of(store: Path) -> Path:
    """The directory of the layer of BASE."""
    return next(
        path
        for path in (store / ".layerstore/layers").iterdir()
        if (path / "diff/link").is_symlink()
    )


def change_owner(base: Path) -> None:
    os.chown(base / "diff/etc/passwd", 77, 2)


def change_link(base: Path) -> None:
    (base / "diff/link").unlink()
    (base / "diff/link").symlink_to("elsewhere")


def change_content(base: Path) -> None:
    path = base / "diff/deep/er/file"
    facts = path.stat()
    path.write_bytes(b"y" + path.read_bytes()[1:])
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def change_device(base: Path) -> None:
    (base / "diff/deep/er/file").unlink()
    os.mknod(base / "diff/deep/er/file", 0o600 | stat.S_IFCHR, os.makedev(1, 3))


def part_links(base: Path) -> None:
    path = base / "diff/etc/group"
    facts = path.stat()
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    os.chown(path, facts.st_uid, facts.st_gid)
    os.chmod(path, stat.S_IMODE(facts.st_mode))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (change_content, "/deep/er/file has other contents"),
        (change_owner, "/etc/passwd belongs to 77:2, not 1:2"),
        (change_link, "/link is a link to another name"),
        (change_device, "/deep/er/file is of another type"),
        (part_links, "/etc/passwd is a link to another file"),
        (lambda base: os.chmod(base / "diff", 0o700), "/ has the mode 0700, not 0711"),
        (lambda base: (base / "diff/deep/er/file").unlink(), "/deep/er/file is missing"),
        (lambda base: (base / "diff/more").mkdir(), "/more does not belong there"),
        (lambda base: os.utime(base / "diff/etc/passwd", (1, 1)), "has another time"),
        (lambda base: os.setxattr(base / "diff/etc", "user.a", b"b"), "/etc has other extended"),
        (lambda base: os.setxattr(base / "diff/etc", "trusted.overlay.opaque", b"y"), "/etc hides"),
        (lambda base: (base / "blob").write_bytes(b"junk"), "blob"),
        (lambda base: (base / "blob").unlink(), "No such file"),
        (lambda base: shutil.rmtree(base / "diff"), "cannot be opened"),
        (lambda base: (base / "layer.json").unlink(), "layer.json cannot be read"),
        (lambda base: (base / "layer.json").write_text("{"), "layer.json cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damage_of_a_layer_is_found(
    filled: Path, spoil: Callable[[Path], object], said: str
) -> None:
    base = base_of(filled)
    spoil(base)
    found = damage(filled)
    assert any(said in one and base.name in one for one in found), found


def test_a_blob_cut_short_is_found(filled: Path) -> None:
    blob = base_of(filled) / "blob"
    with blob.open("r+b") as file:
        file.truncate(blob.stat().st_size - 1)
    found = damage(filled)
    assert found[0].startswith(f"{blob.relative_to(filled)}: ")
    assert all("which is damaged" in one for one in found[1:])


def test_a_toc_that_is_not_the_layers_is_found(filled: Path) -> None:
    path = base_of(filled) / "layer.json"
    record = json.loads(path.read_bytes())
    other = f"sha256:{'1' * 64}"
    record["tocs"] = {other: {ESTARGZ_TOC_DIGEST: other}}
    path.write_text(json.dumps(record))
    assert any("not the layer of the TOC" in one for one in damage(filled))


def test_damage_of_names_is_found(filled: Path) -> None:
    base = base_of(filled).name
    other = next(name for name in StaticStore(filled).layers() if name != base)
    (filled / base / "info").write_text("{}")
    (filled / other).unlink()
    (filled / other).symlink_to(f".layerstore/layers/{base}")
    found = {str(one.path): one.what for one in verify(filled).damage}
    assert found.pop(other) == f"is no name of the layer {base}"
    assert base in found
    assert set(found.values()) == {"info is damaged"}


def test_names_that_lead_out_of_the_store_are_found(filled: Path) -> None:
    name = base_of(filled).name
    (filled / name).unlink()
    (filled / name).symlink_to(f"../elsewhere/.layerstore/layers/{name}")
    assert [str(one.path) for one in verify(filled).damage] == [name]


def test_a_name_of_another_layer_is_found(filled: Path) -> None:
    base = base_of(filled).name
    strange = f"sha256:{'2' * 64}"
    subprocess.run(["cp", "-a", filled / base, filled / strange], check=True)
    assert damage(filled) == [f"{strange}: is no name of the layer {base}"]


def test_nothing_is_checked_where_there_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        verify(tmp_path)
    with pytest.raises(UsageError):
        verify(tmp_path / "missing")


def test_a_store_without_locks_is_checked(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only file system of another machine may have none."""

    def none(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    assert damage(filled) == []


def test_the_store_is_not_changed_by_checking_it(filled: Path) -> None:
    def facts() -> list[tuple[str, int, int]]:
        return [
            (str(path), path.lstat().st_mtime_ns, path.lstat().st_size)
            for path in sorted(filled.rglob("*"))
        ]

    before = facts()
    verify(filled)
    assert facts() == before


def test_trees_that_differ_in_order_only_are_the_same(tmp_path: Path) -> None:
    for name, order in (("one", 1), ("other", -1)):
        for path in ["a/b", "a-b", "a", "a/b/c"][::order]:
            (tmp_path / name / path).mkdir(parents=True, exist_ok=True)
    assert list(tree_differences(tmp_path / "one", tmp_path / "other", made_after_ns=0)) == []
    (tmp_path / "other/a/b/c").rmdir()
    found = list(tree_differences(tmp_path / "one", tmp_path / "other", made_after_ns=0))
    assert found == ["/a/b/c is missing"]
