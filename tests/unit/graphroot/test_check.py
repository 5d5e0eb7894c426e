"""Every kind of damage: found, told apart from what is sound, repaired or said to stay."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import graphroot, tars
from layerstore.errors import StorageError
from layerstore.graphroot import check, fsck
from layerstore.graphroot.check import Kind
from layerstore.graphroot.records import INCOMPLETE, LayerRecord
from layerstore.graphroot.store import Store

KEPT, OTHER = "localhost/kept:1", "localhost/other:1"
TOOL = tars.regular(b"bin/tool", b"#!/bin/sh\n", mode=0o4755)
BASE = graphroot.layer_tar(
    tars.directory(b"bin/"),
    TOOL,
    tars.hard_link(b"bin/again", TOOL),
    tars.symlink(b"bin/sh", b"tool"),
    tars.directory(b"etc/", mode=0o711),
    tars.regular(b"etc/empty"),
    tars.Member(b"pipe", tars.FIFO),
    tars.Member(b"null", tars.CHARACTER, device=(1, 3)),
)
TOP = graphroot.layer_tar(
    tars.directory(b"etc/"),
    tars.whiteout(b"etc/gone"),
    tars.directory(b"opt/"),
    tars.opaque(b"opt/"),
    tars.regular(b"made/file", b"in a directory without an entry\n"),
)


@pytest.fixture
def base(store: Store) -> Path:
    """The ``diff`` of the lower layer of an image that is sound."""
    image = graphroot.put_image(store, [BASE, TOP], KEPT)
    assert check.check(store, full=True).findings == ()
    return image.layers()[0].diff_path


@pytest.fixture
def top(store: Store, base: Path) -> Path:
    return store.image(KEPT).layers()[1].diff_path


def kinds(store: Store, *, full: bool = False) -> list[Kind]:
    return [found.kind for found in check.check(store, full=full).findings]


def mode(path: Path) -> None:
    (path / "bin/tool").chmod(0o755)


def owner(path: Path) -> None:
    os.lchown(path / "bin/sh", 7, 7)


def time(path: Path) -> None:
    os.utime(path / "etc/empty", ns=(0, 0))


def attribute(path: Path) -> None:
    os.setxattr(path / "etc/empty", b"trusted.other", b"y")


def link(path: Path) -> None:
    (path / "bin/sh").unlink()
    (path / "bin/sh").symlink_to("else")


def hard_link(path: Path) -> None:
    times = (tars.MTIME_NS, tars.MTIME_NS)
    (path / "bin/again").unlink()
    (path / "bin/again").write_bytes((path / "bin/tool").read_bytes())
    (path / "bin/again").chmod(0o4755)
    os.utime(path / "bin/again", ns=times)
    os.utime(path / "bin", ns=times)


def more(path: Path) -> None:
    (path / "extra").touch()


def fewer(path: Path) -> None:
    (path / "pipe").unlink()


def other_device(path: Path) -> None:
    (path / "null").unlink()
    os.mknod(path / "null", 0o20644, os.makedev(1, 5))
    (path / "null").chmod(0o644)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (mode, "/bin/tool has the mode 0755, not 4755"),
        (owner, "/bin/sh belongs to 7:7, not 0:0"),
        (time, "/etc/empty has another time of modification"),
        (attribute, "/etc/empty has other extended attributes"),
        (link, "/bin/sh is a link to another name"),
        (hard_link, "is a link to another file"),
        (more, "/extra does not belong there"),
        (fewer, "/pipe is missing"),
        (other_device, "/null is another device"),
    ],
)
def test_what_the_digest_of_the_archive_does_not_tell(
    store: Store, base: Path, damage: Callable[[Path], None], says: str
) -> None:
    damage(base)
    assert kinds(store) == []  # a quick look reads no layer
    (found,) = check.check(store, full=True).findings
    assert (found.kind, found.subject) == (Kind.LAYER_CHANGED, base.parent.name)
    assert says in found.detail
    report = fsck.repair_storage(store, full=True)
    assert report.remaining == ()
    assert store.images() == []
    graphroot.put_image(store, [BASE, TOP], KEPT)
    assert check.check(store, full=True).findings == ()


def test_deletions_belong_to_the_layer(store: Store, top: Path) -> None:
    assert os.stat(top / "etc/gone").st_rdev == 0
    (top / "etc/gone").unlink()
    assert kinds(store, full=True) == [Kind.LAYER_CHANGED]


def test_hiding_what_is_below_belongs_to_the_layer(store: Store, top: Path) -> None:
    os.removexattr(top / "opt", b"trusted.overlay.opaque")
    (found,) = check.check(store, full=True).findings
    assert found.detail == "/opt does not hide the layers below"


def test_much_that_changed_is_told_in_short(store: Store, base: Path) -> None:
    for number in range(5):
        (base / f"extra{number}").touch()
    (found,) = check.check(store, full=True).findings
    assert found.detail.count("does not belong there") == 3
    assert found.detail.endswith("; and more")


def test_a_layer_that_cannot_be_given_out_any_more(store: Store, base: Path) -> None:
    split = store.layer_area.tar_split(base.parent.name)
    assert split is not None
    split.unlink()
    assert kinds(store) == [Kind.LAYER_CHANGED]
    assert fsck.repair_storage(store).remaining == ()
    assert store.images() == []


def test_partial_pulls_of_others_may_have_no_tar_split(store: Store, base: Path) -> None:
    split = store.layer_area.tar_split(base.parent.name)
    assert split is not None
    split.unlink()
    table = store.layer_area.table
    with table.lock.writing():
        first, *others = table.load()
        first = dataclasses.replace(first, big_data_names=("zstd-chunked-manifest",))
        table.save([first, *others])
    assert kinds(store, full=True) == []


def test_a_place_for_temporary_files_that_is_none_damages_nothing(
    store: Store, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(base / "nowhere"))
    with pytest.raises(StorageError):
        fsck.repair_storage(store, full=True)
    assert [image.names for image in store.images()] == [(KEPT,)]


def test_a_container_without_its_layer_stays_for_podman(store: Store, base: Path) -> None:
    graphroot.put_container(store, store.image(KEPT), "box")
    table = store.layer_area.table
    with table.lock.writing():
        table.save(table.load()[:-1])
    report = fsck.repair_storage(store)
    (found,) = report.remaining
    assert found.kind is Kind.CONTAINER_LAYER
    assert [box.names for box in store.containers()] == [("box",)]
    assert [image.names for image in store.images()] == [(KEPT,)]


def test_interrupted_work_is_cleared_away(store: Store, base: Path) -> None:
    table = store.layer_area.table
    with table.lock.writing():
        half = LayerRecord(id="f" * 64, flags={INCOMPLETE: True})
        table.save([*table.load(), half])
    (store.layer_area.overlay.home / half.id / "diff").mkdir(parents=True)
    assert kinds(store) == [Kind.LAYER_INCOMPLETE]
    report = fsck.repair_storage(store)
    assert [found.repaired for found in report.findings] == ["removed"]
    assert not (store.layer_area.overlay.home / half.id).exists()
    assert check.check(store, full=True).findings == ()


def test_a_mount_of_a_layer_that_is_gone_is_forgotten(store: Store, base: Path) -> None:
    run = store.layer_area.run_directory
    run.mkdir(parents=True, exist_ok=True)
    points = run / "mountpoints.json"
    points.write_text(json.dumps([{"id": "e" * 64, "path": "/nowhere/merged", "count": 2}]))
    assert kinds(store) == [Kind.MOUNT]
    assert fsck.repair_storage(store).remaining == ()
    assert kinds(store) == []
    assert json.loads(points.read_text() or "[]") in ([], None)


def test_a_layer_of_no_image_is_a_notice(store: Store, base: Path) -> None:
    spare = graphroot.put_layer(store, TOP)
    report = fsck.repair_storage(store, full=True)
    assert [(found.kind, found.subject) for found in report.findings] == [
        (Kind.LAYER_UNUSED, spare.id)
    ]
    assert report.remaining == ()
    assert store.layer(spare.id).diff_path.exists()


def test_a_layer_of_no_image_is_read_as_well(store: Store, base: Path) -> None:
    spare = graphroot.put_layer(store, graphroot.layer_tar(tars.regular(b"file", b"content\n")))
    (store.layer(spare.id).diff_path / "file").write_bytes(b"changed\n")
    assert kinds(store) == [Kind.LAYER_UNUSED]
    assert kinds(store, full=True) == [Kind.LAYER_UNUSED, Kind.LAYER_CHANGED]
    assert fsck.repair_storage(store, full=True).remaining == ()
    assert [image.names for image in store.images()] == [(KEPT,)]
    assert check.check(store, full=True).findings == ()


def test_a_layer_with_the_name_of_another_is_read_as_well(store: Store, base: Path) -> None:
    path = store.layer_area.directory / "layers.json"
    records = json.loads(path.read_bytes())
    path.write_text(json.dumps([{**record, "names": ["twin"]} for record in records]))
    (base.parent.parent / records[1]["id"] / "diff/extra").touch()
    assert set(kinds(store, full=True)) == {Kind.DUPLICATE_NAME, Kind.LAYER_CHANGED}


def test_a_layer_store_that_does_not_answer_is_a_notice(store: Store, base: Path) -> None:
    directory = base.parent
    target = store.config.graph_root / "als" / f"sha256:{'a' * 64}"
    (directory / "additionallayer").write_text(str(target))
    base.rename(directory / "elsewhere")
    base.symlink_to(target / "diff")
    report = check.check(store, full=True)
    assert [found.kind for found in report.findings] == [Kind.LAYER_STORE]
    assert report.remaining == ()
    base.unlink()
    base.symlink_to(directory / "elsewhere")
    assert kinds(store) == [Kind.LAYER_CONTENT]


def test_a_pointer_that_leads_to_no_layer_store_is_damage(store: Store, base: Path) -> None:
    (base.parent / "additionallayer").write_text("/tmp")
    (found,) = check.check(store).findings
    assert (found.kind, found.detail) == (
        Kind.LAYER_CONTENT,
        "additionallayer leads to no layer of a layer store",
    )
    assert fsck.repair_storage(store).remaining == ()
    assert store.images() == []
    graphroot.put_image(store, [BASE, TOP], KEPT)
    assert check.check(store, full=True).findings == ()
