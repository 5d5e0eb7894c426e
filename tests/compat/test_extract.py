"""What we extract is what Podman extracts: every layer's `diff`, file by file, and its tar-split."""

import base64
import gzip
import json
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lab import images, oci, tars, trees
from lab.oci import LayerSource, RunConfig, StoredImage
from lab.podman import FLAVOURS, PodmanEnv
from lab.tars import Member
from lab.torture import IMPLICIT_DIRECTORIES, torture_image
from layerstore.graphroot.export import export_diff
from layerstore.graphroot.stage import stage_layer
from layerstore.graphroot.staged import StagedLayer
from layerstore.graphroot.whiteouts import WhiteoutStyle
from layerstore.image import Digest

pytestmark = pytest.mark.compat


def odd_layers() -> list[list[Member]]:
    """What the torture image leaves out."""
    return [
        [
            tars.directory(b"./", mode=0o711, uid=7, gid=8),
            *images.base_members()[1:],
        ],
        [
            # "/" is heard, "./" is not
            Member(b"/", tars.DIRECTORY, mode=0o751, uid=9, gid=10),
            tars.regular(b"/absolute/file", b"below the root\n"),
            tars.regular(b"implicit/deep/file", b"parents without entries\n"),
            tars.regular(b"nothing/../lexical", b"without the directory\n"),
        ],
        [
            # whiteouts and what takes their place
            tars.whiteout(b"replaced", uid=5, gid=6),
            tars.directory(b"replaced"),
            tars.whiteout(b"owned", uid=5, gid=6),
            tars.whiteout(b"gone"),
            tars.whiteout(b"gone/below"),
            tars.whiteout(b"never/was/there"),
            tars.opaque(b"implicit"),
        ],
        [
            # one entry takes the place of another, reached through a link
            tars.directory(b"real", mode=0o755),
            tars.symlink(b"link", b"real"),
            tars.symlink(b"rooted", b"/real"),
            tars.symlink(b"up", b"../../../real"),
            tars.regular(b"link/file", b"first\n"),
            tars.regular(b"real/other", b"x\n"),
            tars.directory(b"real/sub"),
            tars.regular(b"real/sub/inside", b"y\n"),
            tars.regular(b"rooted/file", b"second\n"),
            tars.directory(b"up/other"),
            tars.regular(b"link/sub", b"no directory any more\n"),
            tars.directory(b"link/made/here/", mode=0o700, uid=3),
            tars.hard_link(b"linked", b"link/file"),
        ],
        [
            # rights that are handed down
            tars.directory(b"setgid", mode=0o2775, gid=50),
            tars.regular(b"setgid/mine", b"root's\n"),
            tars.directory(b"setgid/sub"),
            tars.regular(b"setgid/implicit/file", b"x\n"),
            tars.regular(b"capable", b"c\n", xattrs={b"user.a": b"b", b"security.selinux": b"x\0"}),
        ],
    ]


@dataclass(frozen=True)
class Extracted:
    record: dict[str, Any]
    theirs: Path  # diff as Podman made it
    tar_split: Path
    staged: StagedLayer
    env: PodmanEnv


def extract_both(name: str, image: StoredImage, env: PodmanEnv, place: Path) -> Iterator[Extracted]:
    """Pull with Podman, stage with us, layer by layer."""
    env.podman("pull", "--quiet", name)
    records = json.loads((env.graph_root / "overlay-layers/layers.json").read_text())
    by_blob = {record["compressed-diff-digest"]: record for record in records}
    for number, layer in enumerate(image.layers):
        record = by_blob[layer.digest]
        directory = place / str(number)
        directory.mkdir()
        with image.blob(layer.digest).open("rb") as source:
            staged = stage_layer(
                directory,
                source,
                blob_digest=Digest(layer.digest),
                blob_size=layer.size,
                diff_id=Digest(layer.diff_id),
                whiteouts=WhiteoutStyle.OVERLAY,
            )
        yield Extracted(
            record,
            env.graph_root / "overlay" / record["id"] / "diff",
            env.graph_root / "overlay-layers" / f"{record['id']}.tar-split.gz",
            staged,
            env,
        )


def lines_joined(path: Path) -> list[dict[str, Any]]:
    """The lines of a tar-split, neighbouring segments as one: their cuts say nothing."""
    joined: list[dict[str, Any]] = []
    for text in gzip.decompress(path.read_bytes()).splitlines():
        line = json.loads(text)
        del line["position"]
        if line["type"] == 2:
            line["payload"] = base64.b64decode(line["payload"])
            if joined and joined[-1]["type"] == 2:
                joined[-1]["payload"] += line["payload"]
                continue
        joined.append(line)
    return joined


def check(each: Extracted) -> None:
    implicit = IMPLICIT_DIRECTORIES | {
        *(b"absolute", b"implicit", b"implicit/deep", b"never", b"never/was", b"real/made"),
        *(b"setgid/implicit",),
    }
    diff = each.staged.directory / "diff"
    if not each.staged.root_entry:
        # the root's mode and owner are the committer's business
        shutil.copystat(each.theirs, diff)
        root = each.theirs.stat()
        os.chown(diff, root.st_uid, root.st_gid)
    theirs_tree = trees.snapshot(each.theirs)
    # a whiteout has no time of its own
    implicit |= {
        path for path, node in theirs_tree.items() if stat.S_ISCHR(node.mode) and not node.rdev
    }
    differences = trees.compare(
        theirs_tree,
        trees.snapshot(diff),
        ignore=(),
        ignore_xattrs=(),
        any_mtime=implicit - ({b"."} if each.staged.root_entry else set()),
    )
    assert differences == []
    staged = each.staged
    assert each.record["diff-size"] == staged.diff_size
    assert each.record["diff-digest"] == staged.diff_id
    assert each.record["compressed-size"] == staged.blob_size
    assert tuple(each.record["uidset"]) == staged.uids
    assert tuple(each.record["gidset"]) == staged.gids
    assert lines_joined(staged.directory / "tar-split.gz") == lines_joined(each.tar_split)


def rebuilt(diff: Path, tar_split: Path) -> Digest:
    return Digest.of(b"".join(export_diff(diff, (), tar_split)))


@pytest.mark.parametrize("flavour", FLAVOURS, indirect=True)
def test_torture_image(flavour, make_podman_env, workspace, registry, push) -> None:
    place = workspace / f"extract-torture-{flavour}"
    place.mkdir()
    push(torture_image(), "extract/torture:1")
    name = f"{registry.host}/extract/torture:1"
    for each in extract_both(name, torture_image(), make_podman_env(flavour), place):
        check(each)
        # our tar-split with our files, theirs with theirs: the same archive
        assert rebuilt(each.staged.directory / "diff", each.staged.directory / "tar-split.gz") == (
            each.staged.diff_id
        )
        assert rebuilt(each.theirs, each.tar_split) == each.staged.diff_id


@pytest.mark.parametrize("flavour", FLAVOURS, indirect=True)
def test_odd_layers(flavour, make_podman_env, workspace, registry, push) -> None:
    place = workspace / f"extract-odd-{flavour}"
    place.mkdir()
    sources = [LayerSource(images.tar_bytes(layer)) for layer in odd_layers()]
    image = oci.write_image(place / "layout", "odd", sources, RunConfig())
    push(image, "extract/odd:1")
    name = f"{registry.host}/extract/odd:1"
    for each in extract_both(name, image, make_podman_env(flavour), place):
        check(each)


@pytest.mark.parametrize("flavour", FLAVOURS, indirect=True)
def test_podman_saves_with_our_tar_split(
    flavour, make_podman_env, workspace, registry, push
) -> None:
    """Our tar-split in the place of theirs: `podman save` gives the same layers back."""
    place = workspace / f"extract-save-{flavour}"
    place.mkdir()
    env = make_podman_env(flavour)
    image = torture_image()
    push(image, "extract/torture:1")
    name = f"{registry.host}/extract/torture:1"
    for each in extract_both(name, image, env, place):
        shutil.copy(each.staged.directory / "tar-split.gz", each.tar_split)
    archive = place / "saved.tar"
    env.podman("save", "-o", archive, name)
    saved = place / "saved"
    saved.mkdir()
    shutil.unpack_archive(archive, saved)
    (entry,) = json.loads((saved / "manifest.json").read_text())
    digests = [Digest.of((saved / name).read_bytes()) for name in entry["Layers"]]
    assert digests == [layer.diff_id for layer in image.layers]
