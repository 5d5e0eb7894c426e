"""What a file system cannot keep is no damage: coarse times, no attributes."""

import io
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import graphroot, tars
from lab.smalldisk import Kind, SmallDisk
from lab.xattrs import ACL_ACCESS, posix_acl
from layerstore.graphroot import check
from layerstore.graphroot.extract import apply_tar
from layerstore.graphroot.store import Store
from layerstore.graphroot.treecheck import tree_differences

pytestmark = [
    pytest.mark.compat,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root"),
]

SIZE = 32 << 20
ACL = posix_acl(owner=6, group=4, other=4, users={7: 4}, mask=4)
LAYER = graphroot.layer_tar(
    tars.directory(b"d", mtime_ns=tars.MTIME_NS + 123_456_789),
    tars.regular(b"d/fine", b"fine\n", mtime_ns=tars.MTIME_NS + 987_654_321),
    tars.symlink(b"d/link", b"fine", mtime_ns=tars.MTIME_NS + 1),
    tars.regular(b"d/more", b"more\n", xattrs={b"user.a": b"b", ACL_ACCESS: ACL}),
)


@pytest.fixture(params=["coarse", "ramfs"])
def other(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A place on another kind of file system."""
    kind: Kind = request.param
    with SmallDisk(tmp_path / "other", kind, SIZE) as disk:
        yield disk.directory


def damage(store: Store) -> list[str]:
    report = check.check(store, full=True)
    return [found.detail for found in report.remaining]


def test_a_graph_root_there_is_sound(other: Path) -> None:
    store = graphroot.open_store(other)
    image = graphroot.put_image(store, [LAYER], "localhost/kept:1")
    assert damage(store) == []
    os.utime(image.layers()[0].diff_path / "d/fine", (5, 5))
    assert damage(store) == ["/d/fine has another time of modification"]


def test_temporary_files_there_find_a_graph_root_sound(
    other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = graphroot.open_store(tmp_path / "store")
    image = graphroot.put_image(store, [LAYER], "localhost/kept:1")
    monkeypatch.setattr("tempfile.tempdir", str(other))
    assert damage(store) == []
    os.utime(image.layers()[0].diff_path / "d/link", (5, 5), follow_symlinks=False)
    assert damage(store) == ["/d/link has another time of modification"]


def test_directories_that_hide_others_need_no_attributes_of_temporary_files(
    other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = graphroot.open_store(tmp_path / "store")
    hiding = graphroot.layer_tar(
        tars.directory(b"a"), tars.opaque(b"a"), tars.directory(b"b"), tars.whiteout(b"b")
    )
    image = graphroot.put_image(store, [hiding], "localhost/kept:1")
    monkeypatch.setattr("tempfile.tempdir", str(other))
    assert damage(store) == []
    (image.layers()[0].diff_path / "a").chmod(0o700)
    assert damage(store) == ["/a has the mode 0700, not 0755"]


def test_a_copy_there_is_the_same_but_for_attributes(other: Path, tmp_path: Path) -> None:
    began = time.time_ns() - 2 * 10**9
    for place in (tmp_path / "expected", other / "actual"):
        place.mkdir()
        apply_tar(io.BytesIO(LAYER), place)
    has_attributes = b"user.a" in map(os.fsencode, os.listxattr(other / "actual/d/more"))
    found = list(tree_differences(tmp_path / "expected", other / "actual", made_after_ns=began))
    assert found == ([] if has_attributes else ["/d/more has other extended attributes"])


def test_times_are_compared_as_finely_as_both_keep_them(tmp_path: Path) -> None:
    store = graphroot.open_store(tmp_path)
    image = graphroot.put_image(store, [LAYER], "localhost/kept:1")
    assert damage(store) == []
    seconds = tars.MTIME_NS
    os.utime(image.layers()[0].diff_path / "d/fine", ns=(seconds, seconds))
    assert damage(store) == ["/d/fine has another time of modification"]
