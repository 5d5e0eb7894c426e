"""A full check tells layers that changed from those whose archives never came back."""

import contextlib
import dataclasses
import errno
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from lab import graphroot, tars
from lab.tars import Member
from layerstore.graphroot import check, contents, fsck
from layerstore.graphroot.check import Kind
from layerstore.graphroot.export import opened_files
from layerstore.graphroot.records import LayerRecord
from layerstore.graphroot.store import Store
from layerstore.graphroot.tarsplit import TarSplitWriter, crc64
from layerstore.image import Digest

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="whiteouts and owners take root")

NAME = "localhost/odd:1"
PLAIN = [tars.directory(b"etc"), tars.regular(b"etc/plain", b"plain\n")]


def found(store: Store) -> list[tuple[Kind, str]]:
    return [(each.kind, each.detail) for each in check.check(store, full=True).findings]


def kinds(store: Store) -> list[Kind]:
    return [kind for kind, _ in found(store)]


def foreign_layer(store: Store, made: Sequence[Member], archive: Sequence[Member]) -> LayerRecord:
    """A layer that another tool made of ``archive``, which we refuse: it left ``made``."""
    record = graphroot.put_layer(store, graphroot.layer_tar(*made))
    split = store.layer_area.tar_split(record.id)
    assert split is not None
    with split.open("wb") as out:
        writer = TarSplitWriter(out)
        for member in archive:
            assert isinstance(member.content, bytes)
            raw = b"".join(tars.encode(member))
            end = len(raw) - len(member.content) - (-len(member.content) % 512)
            writer.segment(raw[:end])
            writer.file(member.name, len(member.content), crc64(member.content))
            writer.segment(raw[end + len(member.content) :])
        writer.segment(bytes(1024))
        writer.close()
    table = store.layer_area.table
    changed = dataclasses.replace(
        record, diff_digest=Digest.of(graphroot.layer_tar(*archive)), compressed_diff_digest=None
    )
    with table.lock.writing():
        table.save([changed if each.id == record.id else each for each in table.load()])
    return changed


ODD = {
    "a whiteout with content": [tars.regular(b"etc/.wh.gone", b"bytes\n")],
    "a file in the place of a directory": [
        tars.regular(b"opt/x/y", b"first\n"),
        tars.regular(b"opt/x", b"second\n"),
    ],
    "another name of one path": [
        tars.directory(b"real"),
        tars.symlink(b"link", b"real"),
        tars.regular(b"link/file", b"first\n"),
        tars.regular(b"real/file", b"other\n"),
    ],
    "a link in the place of a file": [
        tars.directory(b"real"),
        tars.symlink(b"link", b"real"),
        tars.regular(b"link/file", b"first\n"),
        tars.symlink(b"real/file", b"elsewhere"),
    ],
}


@pytest.mark.parametrize("members", ODD.values(), ids=ODD)
def test_an_archive_that_never_comes_back_is_no_damage(store: Store, members: list[Member]) -> None:
    image = graphroot.put_image(store, [graphroot.layer_tar(*PLAIN, *members)], NAME)
    ((kind, detail),) = found(store)
    assert kind is Kind.LAYER_ARCHIVE
    assert detail.startswith("its archive cannot be put together again: ")
    assert "leaves no file of this content" in detail
    report = fsck.repair_storage(store, full=True)
    assert report.remaining == ()
    assert [each.id for each in store.images()] == [image.id]


@pytest.mark.parametrize("members", ODD.values(), ids=ODD)
@pytest.mark.parametrize("change", ["content", "mode", "gone"])
def test_what_changed_in_such_a_layer_is_damage(
    store: Store, members: list[Member], change: str
) -> None:
    image = graphroot.put_image(store, [graphroot.layer_tar(*PLAIN, *members)], NAME)
    path = image.layers()[0].diff_path / "etc/plain"
    match change:
        case "content":
            path.write_bytes(b"PLAIN\n")
        case "mode":
            path.chmod(0o600)
        case "gone":
            path.unlink()
    ((kind, detail),) = found(store)
    assert kind is Kind.LAYER_CHANGED
    assert "etc/plain" in detail
    assert "leaves no file" not in detail


def test_the_content_that_stands_at_the_end_must_be_there(store: Store) -> None:
    members = [*PLAIN, *ODD["another name of one path"]]
    image = graphroot.put_image(store, [graphroot.layer_tar(*members)], NAME)
    (image.layers()[0].diff_path / "real/file").write_bytes(b"OTHER\n")
    ((kind, detail),) = found(store)
    assert kind is Kind.LAYER_CHANGED
    assert detail.startswith("real/file: file integrity")


def test_a_layer_that_we_would_refuse_stops_nothing(store: Store) -> None:
    odd = foreign_layer(
        store,
        [*PLAIN, tars.regular(b"e", b"hello\n")],
        [*PLAIN, tars.regular(b"../e", b"hello\n")],
    )
    other = graphroot.put_image(store, [graphroot.layer_tar(*PLAIN)], NAME)
    (other.layers()[0].diff_path / "etc/plain").chmod(0o600)
    assert {(each.kind, each.subject) for each in check.check(store, full=True).findings} == {
        (Kind.LAYER_UNUSED, odd.id),
        (Kind.LAYER_ARCHIVE, odd.id),
        (Kind.LAYER_CHANGED, other.top_layer),
    }


def test_contents_of_a_layer_that_we_would_refuse_are_compared(store: Store) -> None:
    odd = foreign_layer(
        store,
        [*PLAIN, tars.regular(b"e", b"hello\n")],
        [*PLAIN, tars.regular(b"../e", b"hello\n")],
    )
    (_, (kind, detail)) = found(store)
    assert (kind, "leaves the layer by '..'" in detail) == (Kind.LAYER_ARCHIVE, True)
    (store.layer(odd.id).diff_path / "etc/plain").write_bytes(b"PLAIN\n")
    (_, (kind, detail)) = found(store)
    assert kind is Kind.LAYER_CHANGED
    assert detail.startswith("etc/plain: ")
    assert "'..'" not in detail


def test_a_layer_that_cannot_be_read_stops_nothing_and_stays(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = graphroot.put_image(store, [graphroot.layer_tar(*PLAIN)], NAME)
    other = graphroot.put_image(
        store, [graphroot.layer_tar(*PLAIN, tars.regular(b"more"))], "localhost/other:1"
    )
    (other.layers()[0].diff_path / "more").chmod(0o600)
    diff = failing.layers()[0].diff_path

    @contextlib.contextmanager
    def opened(where: Path, *more: Any) -> Iterator[Callable[[bytes], BinaryIO]]:
        if where == diff:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        with opened_files(where, *more) as open_file:
            yield open_file

    monkeypatch.setattr(contents, "opened_files", opened)
    report = fsck.repair_storage(store, full=True)
    assert [(each.kind, each.subject, bool(each.repaired)) for each in report.findings] == [
        (Kind.LAYER_UNREADABLE, failing.top_layer, False),
        (Kind.LAYER_CHANGED, other.top_layer, True),
    ]
    assert [each.names for each in store.images()] == [(NAME,)]


def test_an_attribute_that_the_place_for_temporary_files_cannot_take_stops_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = tars.regular(b"large", b"content\n", xattrs={b"user.large": b"x" * 3000})
    image = graphroot.put_image(store, [graphroot.layer_tar(*PLAIN, large)], NAME)

    def setxattr(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "setxattr", setxattr)
    assert found(store) == []
    (image.layers()[0].diff_path / "large").write_bytes(b"CONTENT\n")
    assert kinds(store) == [Kind.LAYER_CHANGED]


OPAQUE = "trusted.overlay.opaque"
REDIRECT = "user.overlay.redirect"
WITH_ATTRIBUTES = [
    *PLAIN,
    tars.directory(b"d", xattrs={OPAQUE.encode(): b"y", b"user.kept": b"kept"}),
    tars.regular(b"d/f", b"f\n", xattrs={b"user.empty": b"", REDIRECT.encode(): b"/x"}),
    tars.symlink(b"link", b"d"),
    tars.directory(b"link/sub", xattrs={OPAQUE.encode(): b"y"}),
]


@pytest.fixture
def attributes(store: Store) -> Path:
    """The ``diff`` of a layer whose archive has attributes that tools treat differently."""
    image = graphroot.put_image(store, [graphroot.layer_tar(*WITH_ATTRIBUTES)], NAME)
    assert found(store) == []
    diff = image.layers()[0].diff_path
    assert OPAQUE not in os.listxattr(diff / "d")
    return diff


def test_attributes_as_other_tools_extract_them_are_no_damage(
    store: Store, attributes: Path
) -> None:
    os.setxattr(attributes / "d", OPAQUE, b"y")
    os.setxattr(attributes / "d/sub", OPAQUE, b"y")
    os.setxattr(attributes / "d/f", REDIRECT, b"/x")
    os.removexattr(attributes / "d/f", "user.empty")
    assert found(store) == []


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        ("etc", OPAQUE, b"y"),
        ("d/f", REDIRECT, b"/elsewhere"),
        ("d/f", "user.overlay.metacopy", b""),
        ("d/f", "user.empty", b"no more"),
        ("d", "user.kept", b""),
    ],
)
def test_attributes_that_the_archive_does_not_have_are_damage(
    store: Store, attributes: Path, path: str, name: str, value: bytes
) -> None:
    os.setxattr(attributes / path, name, value)
    ((kind, detail),) = found(store)
    assert kind is Kind.LAYER_CHANGED
    assert detail.startswith(f"/{path} ")


@pytest.mark.parametrize("version", ["0.0", "0.1", "1.0"])
@pytest.mark.parametrize("data", [5, 3 << 20])  # the second is kept on disk meanwhile
def test_sparse_files_of_ours_are_read_as_well(
    store: Store, tmp_path: Path, version: str, data: int
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("first", "second"):
        with (source / name).open("wb") as file:
            file.seek(1 << 20)
            file.write(name.encode() * data)
            file.truncate(30 << 20)
    (source / "third").write_bytes(b"plain\n")
    command = ["tar", "--format=pax", "-S", f"--sparse-version={version}", "-C", str(source)]
    tar = subprocess.run(
        [*command, "-cf", "-", "first", "second", "third"], check=True, capture_output=True
    ).stdout
    diff = graphroot.put_image(store, [tar], NAME).layers()[0].diff_path
    assert found(store) == []
    (diff / "third").chmod(0o600)
    ((kind, detail),) = found(store)
    assert (kind, detail) == (Kind.LAYER_CHANGED, "/third has the mode 0600, not 0644")
    times = (diff / "second").stat()
    with (diff / "second").open("r+b") as file:
        file.write(b"x")
    os.utime(diff / "second", ns=(times.st_atime_ns, times.st_mtime_ns))
    ((kind, detail),) = found(store)
    assert detail.startswith("/second has other contents; /third ")
