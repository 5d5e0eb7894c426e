"""What becomes of a TOC's entries: parents, replacement, links, whiteouts, hidden names."""

import base64
import stat
from collections.abc import Callable
from typing import Any

import pytest

from layerstore import limits
from layerstore.errors import InvalidLayer, LimitExceeded, UnsupportedFormat
from layerstore.formats.toc import TocEntry
from layerstore.layertree import Inode, LayerIndex

Shown = Callable[[list[TocEntry]], list[bytes]]

OPAQUE = [(b"trusted.overlay.opaque", b"y"), (b"user.overlay.opaque", b"y")]


def at(index: LayerIndex, path: str) -> int:
    entry = index.entry_of_path(path.encode())
    assert entry is not None, path
    return entry


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


# -- attributes ------------------------------------------------------------------------


def test_an_empty_toc_is_an_empty_root(toc: Any) -> None:
    index = toc.build([])
    assert index.inode(0) == Inode(stat.S_IFDIR | 0o755, 0, 0, 2, 0, 0, 0, 0, False)
    assert index.children(0) == []
    assert index.parent(0) == 0
    assert (index.entries, index.names, index.directories, index.files) == (1, 0, 1, 0)
    assert index.landmark is None


@pytest.mark.parametrize("name", ["", "./", "/", "."])
def test_the_root_takes_its_entry(toc: Any, name: str) -> None:
    index = toc.build([toc.reg("a"), toc.dir(name, 0o1777, uid=3, modtime="1970-01-01T00:00:09Z")])
    inode = index.inode(0)
    assert (inode.mode, inode.uid, inode.mtime_ns) == (stat.S_IFDIR | 0o1777, 3, 9 * 10**9)
    assert index.lookup(0, b"a") == 1


@pytest.mark.parametrize("modtime", ["1969-12-31T00:00:00Z", "2400-01-01T00:00:00Z"])
def test_times_that_an_extraction_does_not_set_are_the_epoch(toc: Any, modtime: str) -> None:
    index = toc.build([toc.dir("a", 0o755, modtime=modtime)])
    assert index.inode(at(index, "a")).mtime_ns == 0


@pytest.mark.parametrize("kind", ["reg", "symlink", "hardlink", "fifo"])
def test_the_root_is_a_directory(toc: Any, kind: str) -> None:
    with pytest.raises(InvalidLayer, match="root"):
        toc.build([toc.entry("./", kind, link_name="a")])


def test_all_kinds(toc: Any) -> None:
    index = toc.build(
        [
            toc.reg("reg", b"12345", mode=0o106755, uid=1000, gid=limits.INDEX_ENTRY_BITS),
            toc.dir("dir", 0o3770),
            toc.symlink("link", "../some/where"),
            toc.entry("char", "char", dev_major=5, dev_minor=1, mode=0o620),
            toc.entry("null", "char"),
            toc.entry("block", "block", dev_major=4095, dev_minor=1048575, mode=0o660),
            toc.entry("fifo", "fifo", mode=0o644),
        ]
    )
    modes = {path: index.inode(entry).mode for path, entry in index.walk() if path}
    assert modes == {
        b"reg": stat.S_IFREG | 0o6755,
        b"dir": stat.S_IFDIR | 0o3770,
        b"link": stat.S_IFLNK | 0o777,
        b"char": stat.S_IFCHR | 0o620,
        b"null": stat.S_IFCHR,
        b"block": stat.S_IFBLK | 0o660,
        b"fifo": stat.S_IFIFO | 0o644,
    }
    inode = index.inode(at(index, "reg"))
    assert (inode.uid, inode.gid, inode.size, inode.nlink) == (1000, 24, 5, 1)
    assert index.symlink(at(index, "link")) == b"../some/where"
    assert index.inode(at(index, "link")).size == 13
    assert index.inode(at(index, "block"))[5:7] == (4095, 1048575)
    assert index.inode(at(index, "char"))[5:7] == (5, 1)
    with pytest.raises(IndexError):
        index.symlink(at(index, "reg"))
    with pytest.raises(IndexError):
        index.parent(at(index, "reg"))
    assert index.children(at(index, "reg")) == []
    assert index.lookup(at(index, "link"), b"x") is None


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        (TocEntry(name="a", type="socket"), UnsupportedFormat),
        (TocEntry(name="a", type=""), UnsupportedFormat),
        (TocEntry(name="a", type="dir", uid=-1), InvalidLayer),
        (TocEntry(name="a", type="dir", gid=0xFFFFFFFF), InvalidLayer),
        (TocEntry(name="a", type="char", dev_major=4096), InvalidLayer),
        (TocEntry(name="a", type="block", dev_minor=1 << 20), InvalidLayer),
        (TocEntry(name="a", type="char", dev_minor=-1), InvalidLayer),
        (TocEntry(name="a", type="dir", modtime="today"), InvalidLayer),
        (TocEntry(name="a", type="symlink"), InvalidLayer),
        (TocEntry(name="a", type="symlink", link_name="x" * 4096), LimitExceeded),
        (TocEntry(name="a", type="symlink", link_name="\ufffd"), UnsupportedFormat),
        (TocEntry(name="\ufffd", type="dir"), UnsupportedFormat),
        (TocEntry(name="\ufffd", type="dir", name_raw="YQA="), InvalidLayer),
        (TocEntry(name="x", type="dir", name_raw=b64(b"../x")), InvalidLayer),
        (TocEntry(name="a/../b", type="dir"), InvalidLayer),
        (TocEntry(name="a" * 256, type="dir"), LimitExceeded),
        (TocEntry(name="a" * 256 + "/b", type="dir"), LimitExceeded),
        (TocEntry(name="a/" * 2048 + "b", type="dir"), LimitExceeded),
        (TocEntry(name="a", type="dir", xattrs={"user.x": "?"}), InvalidLayer),
        (TocEntry(name="a", type="dir", xattrs={"": ""}), InvalidLayer),
        (TocEntry(name="a", type="dir", xattrs={"user.\0": ""}), InvalidLayer),
        (TocEntry(name="a", type="dir", xattrs={"u" * 256: ""}), LimitExceeded),
        (TocEntry(name="a", type="dir", xattrs={"u": b64(bytes(65537))}), LimitExceeded),
        (TocEntry(name="a", type="dir", xattrs={f"u{n}": "" for n in range(1025)}), LimitExceeded),
        (
            TocEntry(name="a", type="dir", xattrs={f"u{n}": b64(bytes(65536)) for n in range(17)}),
            LimitExceeded,
        ),
        (TocEntry(name="a", type="dir", xattrs={"user.\ufffd": ""}), UnsupportedFormat),
    ],
)
def test_refused(toc: Any, entry: TocEntry, error: type[Exception]) -> None:
    with pytest.raises(error):
        toc.build([entry])


def test_names_that_are_not_unicode(toc: Any) -> None:
    index = toc.build(
        [
            toc.reg("caf\ufffd", name_raw=b64(b"./caf\xe9")),
            toc.entry(
                "l\ufffd", "symlink", name_raw=b64(b"l\xff"), link_name="\ufffd",
                link_name_raw=b64(b"caf\xe9"),
            ),
            toc.entry("h", "hardlink", link_name="caf\ufffd", link_name_raw=b64(b"caf\xe9")),
        ]
    )  # fmt: skip
    assert index.symlink(index.lookup(0, b"l\xff")) == b"caf\xe9"
    assert index.lookup(0, b"h") == index.lookup(0, b"caf\xe9")


def test_xattrs(toc: Any) -> None:
    capability = bytes(range(20))
    index = toc.build(
        [
            toc.reg("a", xattrs={"user.b": "YmFy", "security.capability": b64(capability)}),
            toc.reg("b", xattrs={"user.b": "YmFy", "security.capability": b64(capability)}),
            toc.reg("c", xattrs={"user.empty": "", "user.big": b64(bytes(65536))}),
            toc.reg("d", xattrs={}),
        ]
    )
    a, c, d = at(index, "a"), at(index, "c"), at(index, "d")
    expected = [(b"security.capability", capability), (b"user.b", b"bar")]
    assert index.xattrs(a) == index.xattrs(at(index, "b")) == expected
    assert index.xattr(a, b"user.b") == b"bar"
    assert index.xattr(a, b"user.c") is None
    assert index.xattr(c, b"user.empty") == b""
    assert index.xattr(c, b"user.big") == bytes(65536)
    assert index.xattrs(d) == []
    assert index.xattr(d, b"user.b") is None
    assert [index.inode(entry).has_xattrs for entry in (a, c, d)] == [True, True, False]
    assert index.entries_with_xattrs == 3


# -- parents and replacement -------------------------------------------------------------


def test_missing_parents_are_made(toc: Any) -> None:
    index = toc.build([toc.reg("a/b/c", uid=5)])
    for path in ("a", "a/b"):
        inode = index.inode(at(index, path))
        assert (inode.mode, inode.uid, inode.nlink) == (
            stat.S_IFDIR | 0o755,
            0,
            3 if path == "a" else 2,
        )
    assert index.parent(at(index, "a/b")) == at(index, "a")
    assert index.parent(at(index, "a")) == 0


@pytest.mark.parametrize("kind", ["reg", "symlink", "hardlink", "char", "fifo"])
def test_a_parent_must_be_a_directory(toc: Any, kind: str) -> None:
    with pytest.raises(InvalidLayer, match="no directory"):
        toc.build([toc.reg("t"), toc.entry("a", kind, link_name="t"), toc.reg("a/b")])


def test_the_later_file_wins(toc: Any) -> None:
    index = toc.build([toc.reg("a", uid=1), toc.reg("./a", uid=2)])
    assert index.inode(at(index, "a")).uid == 2
    assert index.entries == 2


def test_a_file_over_a_directory_takes_its_subtree_away(toc: Any, shown: Shown) -> None:
    entries = [toc.reg("d/e/f"), toc.reg("d"), toc.dir("d"), toc.reg("d/g")]
    assert shown(entries[:2]) == [b"d"]
    assert shown(entries[:3]) == [b"d"]
    assert shown(entries) == [b"d", b"d/g"]
    assert toc.build(entries).entries == 3


def test_a_directory_over_a_directory_keeps_children_and_other_attributes(toc: Any) -> None:
    index = toc.build(
        [
            toc.dir("d", 0o700, uid=1, xattrs={"user.a": b64(b"1"), "user.b": b64(b"1")}),
            toc.reg("d/f"),
            toc.dir("d/", 0o711, gid=2, xattrs={"user.b": b64(b"2")}),
        ]
    )
    inode = index.inode(at(index, "d"))
    assert (inode.mode & 0o7777, inode.uid, inode.gid) == (0o711, 0, 2)
    assert index.xattrs(at(index, "d")) == [(b"user.a", b"1"), (b"user.b", b"2")]
    assert at(index, "d/f")


# -- hard links ------------------------------------------------------------------------


def test_hard_links_share_an_entry(toc: Any) -> None:
    index = toc.build([toc.reg("a", b"1", uid=7), toc.link("d/b", "./a"), toc.link("c", "d/b")])
    assert at(index, "a") == at(index, "d/b") == at(index, "c")
    inode = index.inode(at(index, "a"))
    assert (inode.nlink, inode.uid) == (3, 7)
    assert (index.entries, index.names, index.files, index.content_bytes) == (3, 4, 1, 1)


def test_a_link_keeps_what_its_target_was(toc: Any) -> None:
    index = toc.build([toc.reg("a", uid=1), toc.link("b", "a"), toc.reg("a", uid=2)])
    assert [index.inode(at(index, path)).uid for path in ("a", "b")] == [2, 1]
    assert [index.inode(at(index, path)).nlink for path in ("a", "b")] == [1, 1]


def test_a_link_survives_the_tree_of_its_target(toc: Any) -> None:
    index = toc.build([toc.reg("d/a", b"1"), toc.link("b", "d/a"), toc.symlink("d", "x")])
    assert index.content(at(index, "b")).size == 1
    assert index.chunk_owner(0) == at(index, "b")


def test_targets_that_come_later(toc: Any) -> None:
    index = toc.build(
        [toc.link("a", "b"), toc.link("b", "d/c"), toc.link("x", "a"), toc.reg("d/c", uid=4)]
    )
    assert len({at(index, path) for path in ("a", "b", "d/c", "x")}) == 1
    assert index.inode(at(index, "a")).nlink == 4


def test_links_to_other_kinds(toc: Any) -> None:
    index = toc.build([toc.symlink("s", "t"), toc.link("a", "s"), toc.entry("p", "fifo"),
                       toc.link("b", "p")])  # fmt: skip
    assert index.symlink(at(index, "a")) == b"t"
    assert stat.S_ISFIFO(index.mode(at(index, "b")))


@pytest.mark.parametrize(
    "links",
    [
        [("a", "missing")],
        [("a", "a")],
        [("a", "b"), ("b", "a")],
        [("a", "b"), ("b", "c"), ("c", "a")],
        [("a", "d")],
        [("a", "d/")],
        [("a", "")],
        [("a", "later")],
        [("a", "f/x")],
        [("a", "gone")],
        [("a", "s/f")],
        [("a", "d/../f")],
        [("f", "f")],
        [("d", "d/inside")],
    ],
)
def test_links_that_lead_nowhere(toc: Any, links: list[tuple[str, str]]) -> None:
    entries = [
        toc.reg("f"),
        toc.reg("d/inside"),
        toc.symlink("s", "d"),
        toc.reg(".wh.gone"),
        *(toc.link(name, target) for name, target in links),
        toc.dir("later"),
    ]
    with pytest.raises(InvalidLayer):
        toc.build(entries)


def test_a_very_long_chain_of_links(toc: Any) -> None:
    count = 5000
    links = [toc.link(f"l{number}", f"l{number + 1}") for number in range(count)]
    index = toc.build([*links, toc.reg(f"l{count}")])
    assert index.inode(at(index, "l0")).nlink == count + 1


def test_a_link_that_is_replaced_needs_no_target(toc: Any, shown: Shown) -> None:
    assert shown([toc.link("a", "missing"), toc.reg("a")]) == [b"a"]


# -- whiteouts -------------------------------------------------------------------------


def test_a_whiteout_is_a_device(toc: Any) -> None:
    index = toc.build([toc.reg("d/.wh.x", mode=0o644, uid=1, gid=2,
                               modtime="1970-01-01T00:00:01Z")])  # fmt: skip
    assert index.inode(at(index, "d/x")) == Inode(
        stat.S_IFCHR, 1, 2, 1, 0, 0, 0, 1_000_000_000, False
    )
    assert index.lookup(at(index, "d"), b".wh.x") is None


@pytest.mark.parametrize("whiteout_first", [True, False])
def test_a_real_name_wins_over_its_whiteout(toc: Any, whiteout_first: bool) -> None:
    for real in ([toc.reg("x", uid=3)], [toc.dir("x")], [toc.reg("x/y")], [toc.symlink("x", "y")]):
        entries = [toc.reg(".wh.x"), *real] if whiteout_first else [*real, toc.reg(".wh.x")]
        index = toc.build(entries)
        assert not stat.S_ISCHR(index.mode(at(index, "x")))


@pytest.mark.parametrize("outer_first", [True, False])
def test_a_removed_tree_is_one_whiteout(toc: Any, shown: Shown, outer_first: bool) -> None:
    entries = [toc.reg(".wh.d"), toc.reg("d/.wh.e"), toc.reg("d/.wh..wh..opq")]
    if not outer_first:
        entries.reverse()
    assert shown(entries) == [b"d"]
    assert stat.S_ISCHR(toc.build(entries).mode(1))


def test_whiteouts_below_other_things(toc: Any, shown: Shown) -> None:
    assert shown([toc.reg("f"), toc.reg("f/.wh.x"), toc.reg("f/.wh..wh..opq")]) == [b"f"]
    with pytest.raises(InvalidLayer, match="symbolic link"):
        toc.build([toc.symlink("s", "d"), toc.reg("s/.wh.x")])


def test_opaque_directories(toc: Any) -> None:
    index = toc.build(
        [
            toc.dir("d", 0o700, xattrs={"user.x": b64(b"1")}),
            toc.reg("d/.wh..wh..opq"),
            toc.reg("e/.wh..wh..opq"),
            toc.dir("e", 0o711),
        ]
    )
    d, e = at(index, "d"), at(index, "e")
    assert index.xattrs(d) == [*OPAQUE, (b"user.x", b"1")]
    assert index.xattrs(e) == OPAQUE
    assert index.xattr(e, b"user.overlay.opaque") == b"y"
    assert index.inode(e).has_xattrs
    assert index.inode(e).mode == stat.S_IFDIR | 0o711
    assert index.children(e) == []


def test_an_opaque_root(toc: Any) -> None:
    index = toc.build([toc.reg(".wh..wh..opq")])
    assert index.xattrs(0) == OPAQUE


def test_a_replaced_opaque_directory_is_forgotten(toc: Any) -> None:
    index = toc.build([toc.reg("d/.wh..wh..opq"), toc.reg("d"), toc.dir("d")])
    assert index.xattrs(at(index, "d")) == []


def test_aufs_bookkeeping_is_never_shown(toc: Any, shown: Shown) -> None:
    entries = [
        toc.dir(".wh..wh.plnk"),
        toc.reg(".wh..wh.plnk/12.34", b"x"),
        toc.reg(".wh..wh.aufs"),
        toc.reg("new/.wh.dir/below"),
        toc.reg("new/.wh.dir/.wh.below"),
    ]
    assert shown(entries) == []
    assert toc.build(entries).chunks == 0


@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh...", "d/.wh.."])
def test_whiteouts_of_no_name(toc: Any, name: str) -> None:
    with pytest.raises(InvalidLayer):
        toc.build([toc.reg(name)])


def test_a_whiteout_of_the_longest_name(toc: Any, shown: Shown) -> None:
    assert shown([toc.reg(".wh." + "x" * 255)]) == [b"x" * 255]
    with pytest.raises(LimitExceeded):
        toc.build([toc.reg(".wh." + "x" * 256)])


def test_a_whiteout_with_content_has_no_chunk(toc: Any) -> None:
    index = toc.build([toc.reg(".wh.x", b"1", 100), toc.reg("y", b"2", 200)])
    assert (index.chunks, index.members) == (1, 2)


# -- hidden names ----------------------------------------------------------------------


def test_landmarks_are_hidden_and_remembered(toc: Any, shown: Shown) -> None:
    entries = [
        toc.reg("a", b"a", 100),
        toc.reg(".prefetch.landmark", b"\x0f", 200),
        toc.reg("b", b"b", 300),
        toc.reg("stargz.index.json", b"{}", 400),
        toc.reg("d/.prefetch.landmark"),
        toc.reg(".wh..prefetch.landmark"),
    ]
    index = toc.build(entries)
    assert index.landmark == 200
    assert shown(entries) == [b"a", b"b", b"d", b"d/.prefetch.landmark"]
    assert index.member(0).end == 200
    assert index.content_bytes == 2


def test_no_prefetch(toc: Any, shown: Shown) -> None:
    entries = [toc.reg("./.no.prefetch.landmark", b"\x0f", 100), toc.reg("a", b"a", 200)]
    assert toc.build(entries).landmark == 0
    assert shown(entries) == [b"a"]
    both = [*entries, toc.reg(".prefetch.landmark", b"\x0f", 300)]
    assert toc.build(both).landmark == 0


def test_a_landmark_outside_the_blob(toc: Any) -> None:
    with pytest.raises(InvalidLayer):
        toc.build([TocEntry(name=".prefetch.landmark", type="reg", offset=1 << 41)])


# -- bounds ----------------------------------------------------------------------------


def test_the_number_of_entries_is_bounded(toc: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerstore.layertree.tree._NODES_MAX", 10)
    toc.build([toc.reg("a/b/c/d/e/f/g/h/i")])
    with pytest.raises(LimitExceeded):
        toc.build([toc.reg("a/b/c/d/e/f/g/h/i/j")])


def test_the_number_of_toc_entries_is_bounded(toc: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerstore.limits.TOC_ENTRIES", 3)
    toc.build([toc.reg("a")] * 3)
    with pytest.raises(LimitExceeded):
        toc.build([toc.reg("a")] * 4)


def test_the_deepest_path(toc: Any) -> None:
    path = "d/" * 2047 + "f"
    index = toc.build([toc.reg(path)])
    assert index.entry_of_path(path.encode()) == index.entries - 1 == 2048
    assert sum(1 for _ in index.walk()) == 2049
