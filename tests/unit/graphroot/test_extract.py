"""Extraction: what honest archives become, what hostile ones are refused for, what is never touched."""

import contextlib
import errno
import io
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import sparse, tars, trees, xattrs
from lab.images import tar_bytes
from lab.tars import Member
from layerstore import limits
from layerstore.errors import (
    InvalidLayer,
    LayerstoreError,
    LimitExceeded,
    StorageError,
    UnsupportedFormat,
)
from layerstore.graphroot.extract import (
    ExtractOptions,
    Extractor,
    apply_tar,
)
from layerstore.graphroot.removal import remove_tree
from layerstore.graphroot.whiteouts import WhiteoutStyle

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="owners and devices take root")


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    # pytest's own directory may stand on a file system without trusted attributes
    path = tmp_path / "sandbox" / "layer"
    path.mkdir(parents=True)
    return path


def extract(
    layer: Path, members: Sequence[Member], options: ExtractOptions | None = None
) -> Extractor:
    return apply_tar(io.BytesIO(tar_bytes(list(members))), layer, options)


def names(layer: Path) -> list[str]:
    return sorted(str(path.relative_to(layer)) for path in layer.rglob("*"))


def mine(name: bytes, **more: Any) -> Member:
    return tars.directory(name, uid=os.geteuid(), gid=os.getegid(), **more)


# -- honest archives ------------------------------------------------------------------


@root_only
def test_files_have_what_the_archive_says(layer: Path) -> None:
    capability = xattrs.file_capability(xattrs.CAP_NET_RAW)
    extract(
        layer,
        [
            tars.directory(b"d/", mode=0o2750, uid=1, gid=2, mtime_ns=1_000_000_000_000_000_001),
            tars.regular(b"d/f", b"content", mode=0o4711, uid=3, gid=4, mtime_ns=5_000_000_006),
            tars.regular(
                b"d/cap", b"", uid=9, xattrs={xattrs.CAPABILITY: capability, b"user.a": b"\0b"}
            ),
            tars.symlink(b"d/s", b"../f", uid=5, gid=6, mtime_ns=-7),
            Member(b"d/p", tars.FIFO, mode=0o622, uid=7),
            Member(b"d/c", tars.CHARACTER, mode=0o660, device=(4095, 1048575)),
            Member(b"d/b", tars.BLOCK, mode=0o600, device=(7, 1)),
        ],
    )
    found = trees.snapshot(layer)
    directory, file = found[b"d"], found[b"d/f"]
    assert (directory.mode, directory.uid, directory.gid) == (stat.S_IFDIR | 0o2750, 1, 2)
    assert directory.mtime_ns == 1_000_000_000_000_000_001
    assert (file.mode, file.uid, file.gid, file.mtime_ns) == (
        *(stat.S_IFREG | 0o4711, 3, 4),
        5_000_000_006,
    )
    assert (layer / "d/f").read_bytes() == b"content"
    assert found[b"d/cap"].xattrs == {xattrs.CAPABILITY: capability, b"user.a": b"\0b"}
    assert (found[b"d/s"].target, found[b"d/s"].uid, found[b"d/s"].mtime_ns) == (b"../f", 5, -7)
    assert (found[b"d/p"].mode, found[b"d/p"].uid) == (stat.S_IFIFO | 0o622, 7)
    assert (found[b"d/c"].mode, found[b"d/c"].rdev) == (
        stat.S_IFCHR | 0o660,
        os.makedev(4095, 1048575),
    )
    assert found[b"d/b"].rdev == os.makedev(7, 1)


@root_only
def test_the_umask_of_the_process_is_no_part_of_a_layer(layer: Path) -> None:
    before = os.umask(0o077)
    try:
        extract(
            layer,
            [
                tars.regular(b"implicit/f", b"x", mode=0o666),
                tars.directory(b"d", mode=0o777),
                Member(b"p", tars.FIFO, mode=0o666),
            ],
        )
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((layer / name).lstat().st_mode) for name in names(layer)}
    assert modes == {"implicit": 0o755, "implicit/f": 0o666, "d": 0o777, "p": 0o666}


@root_only
def test_a_setgid_directory_hands_nothing_down(layer: Path) -> None:
    extract(
        layer,
        [
            tars.directory(b"d", mode=0o2775, gid=50),
            tars.directory(b"d/sub", mode=0o755),
            tars.regular(b"d/sub/f"),
        ],
    )
    sub, file = (layer / "d/sub").stat(), (layer / "d/sub/f").stat()
    assert (stat.S_IMODE(sub.st_mode), sub.st_gid, file.st_gid) == (0o755, 0, 0)


def test_times_outside_what_engines_keep_become_1970(layer: Path) -> None:
    extract(
        layer,
        [
            mine(b"early", mtime_ns=-1),
            tars.regular(b"late", uid=os.geteuid(), gid=os.getegid(), mtime_ns=(1 << 63)),
        ],
    )
    assert [(layer / name).stat().st_mtime_ns for name in ("early", "late")] == [0, 0]


@root_only
def test_entries_replace_each_other(layer: Path) -> None:
    extract(
        layer,
        [
            tars.directory(b"was-directory"),
            tars.regular(b"was-directory/deep/inside", b"x"),
            tars.regular(b"was-file", b"x"),
            tars.symlink(b"was-link", b"was-file"),
            Member(b"was-fifo", tars.FIFO),
            tars.directory(b"merged", mode=0o700, uid=9),
            tars.regular(b"merged/stays", b"x"),
            tars.regular(b"was-directory", b"file"),
            tars.directory(b"was-file"),
            tars.regular(b"was-link", b"y"),
            tars.regular(b"was-fifo", b"z"),
            tars.directory(b"merged", mode=0o755),
        ],
    )
    assert (layer / "was-directory").read_bytes() == b"file"
    assert (layer / "was-file").is_dir()
    assert (layer / "was-link").read_bytes() == b"y"
    assert not (layer / "was-link").is_symlink()
    assert (layer / "was-fifo").read_bytes() == b"z"
    assert (layer / "merged/stays").exists()
    assert stat.S_IMODE((layer / "merged").stat().st_mode) == 0o755
    assert (layer / "merged").stat().st_uid == 0


@root_only
def test_whiteouts(layer: Path) -> None:
    extractor = extract(
        layer,
        [
            tars.regular(b"made-here", b"x"),
            tars.directory(b"directory"),
            tars.whiteout(b"gone", uid=5, gid=6),
            tars.whiteout(b"gone/below"),
            tars.whiteout(b"made-here"),
            tars.whiteout(b"directory"),
            tars.whiteout(b"later"),
            tars.regular(b"later", b"y"),
            tars.opaque(b"opaque"),
        ],
    )
    gone = (layer / "gone").lstat()
    assert (stat.S_IFMT(gone.st_mode), gone.st_rdev) == (stat.S_IFCHR, 0)
    assert (gone.st_uid, gone.st_gid) == (5, 6)
    assert (layer / "made-here").read_bytes() == b"x"
    assert (layer / "later").read_bytes() == b"y"
    for name in ("directory", "opaque"):
        assert os.getxattr(layer / name, "trusted.overlay.opaque") == b"y"
    assert os.listxattr(layer) == []
    assert extractor.uids == {0}


@root_only
def test_the_other_styles_of_whiteouts(layer: Path) -> None:
    members = [tars.whiteout(b"gone"), tars.opaque(b"opaque")]
    extract(layer, members, ExtractOptions(WhiteoutStyle.USERXATTR))
    assert os.getxattr(layer / "opaque", "user.overlay.opaque") == b"y"
    other = layer.parent / "aufs"
    other.mkdir()
    extract(other, members, ExtractOptions(WhiteoutStyle.AUFS))
    assert names(other) == [".wh.gone", "opaque", "opaque/.wh..wh..opq"]


@root_only
def test_links_on_the_way_are_followed_inside_the_layer(layer: Path) -> None:
    extract(
        layer,
        [
            tars.directory(b"real"),
            tars.symlink(b"absolute", b"/real"),
            tars.symlink(b"up", b"../../../../../real"),
            tars.symlink(b"real/around", b"../up"),
            tars.regular(b"absolute/one"),
            tars.regular(b"up/two"),
            tars.regular(b"real/around/three/deep"),
            tars.hard_link(b"linked", b"absolute/one"),
            tars.directory(b"up/dir", mtime_ns=7),
        ],
    )
    assert {"real/one", "real/two", "real/three/deep", "real/dir"} <= set(names(layer))
    assert (layer / "linked").stat().st_ino == (layer / "real/one").stat().st_ino
    assert (layer / "real/dir").stat().st_mtime_ns == 7


@root_only
def test_a_path_means_what_it_means_now(layer: Path) -> None:
    """A directory that was entered is replaced by a link, and the link by another one."""
    extract(
        layer,
        [
            tars.regular(b"a/f", b"1"),
            tars.directory(b"b"),
            tars.directory(b"c"),
            tars.symlink(b"a", b"b"),
            tars.regular(b"a/f", b"2"),
            tars.symlink(b"a", b"c"),
            tars.regular(b"a/f", b"3"),
        ],
    )
    assert (layer / "b/f").read_bytes() == b"2"
    assert (layer / "c/f").read_bytes() == b"3"


@root_only
def test_only_a_root_called_slash_counts(layer: Path) -> None:
    assert not extract(layer, [tars.directory(b"./", mode=0o711, uid=7)]).root_entry
    assert (layer.stat().st_uid, stat.S_IMODE(layer.stat().st_mode) == 0o711) == (0, False)
    assert extract(layer, [Member(b"/", tars.DIRECTORY, mode=0o711, uid=7, mtime_ns=9)]).root_entry
    found = layer.stat()
    assert (found.st_uid, stat.S_IMODE(found.st_mode), found.st_mtime_ns) == (7, 0o711, 9)


@root_only
def test_deep_trees_take_few_descriptors(layer: Path) -> None:
    path = b"d/" * 900 + b"f"
    before = len(os.listdir("/proc/self/fd"))
    extract(layer, [tars.regular(path, b"x"), *(mine(b"%d/sub/" % n) for n in range(300))])
    assert len(os.listdir("/proc/self/fd")) == before
    # and what stands in the way is removed, however deep
    extract(layer, [tars.regular(b"d", b"file")])
    assert (layer / "d").read_bytes() == b"file"


@root_only
def test_hard_links_keep_capabilities(layer: Path) -> None:
    capability = xattrs.file_capability(xattrs.CAP_NET_RAW)
    first = tars.regular(b"a", b"x", uid=4, mode=0o755, xattrs={xattrs.CAPABILITY: capability})
    extract(layer, [first, tars.hard_link(b"b", first)])
    assert os.getxattr(layer / "b", "security.capability") == capability


@root_only
def test_in_a_user_namespace_devices_are_left_out(layer: Path) -> None:
    options = ExtractOptions(WhiteoutStyle.USERXATTR, in_user_namespace=True)
    extract(layer, [Member(b"null", tars.CHARACTER, device=(1, 3)), tars.regular(b"f")], options)
    assert names(layer) == ["f"]


@root_only
def test_chown_errors(layer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "chown", refuse)
    with pytest.raises(StorageError, match="subuid") as caught:
        extract(layer, [tars.regular(b"f", uid=70000)])
    assert caught.value.subject == "f"
    extract(layer, [tars.regular(b"g", uid=70000)], ExtractOptions(ignore_chown_errors=True))
    assert (layer / "g").exists()


def test_a_full_disk_is_the_machines_fault(layer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match="No space"):
        extract(layer, [tars.regular(b"f", b"x")])


# -- hostile archives -----------------------------------------------------------------


@root_only
@pytest.mark.parametrize(
    ("members", "named"),
    [
        ([tars.regular(b"../escaped")], "../escaped"),
        ([tars.regular(b"a/../../escaped")], "a/../../escaped"),
        ([tars.regular(b"/../escaped")], "/../escaped"),
        ([tars.directory(b"..", mode=0o700)], "../"),
        ([tars.whiteout(b"../escaped")], "../.wh.escaped"),
        ([tars.opaque(b"..")], "../.wh..wh..opq"),
        ([tars.hard_link(b"h", b"../canary")], "../canary"),
        ([tars.hard_link(b"h", b"/../canary")], "/../canary"),
        ([tars.hard_link(b"h", b"nothing")], "h"),
        ([tars.hard_link(b"h", b"h")], "h"),
        ([tars.directory(b"d"), tars.hard_link(b"h", b"d")], "h"),
        ([tars.hard_link(b"h", b"/")], "h"),
        ([tars.symlink(b"l", b"../canary"), tars.regular(b"l/x")], "l/x"),
        ([tars.symlink(b"l", b"nowhere"), tars.regular(b"l/x")], "l/x"),
        ([tars.symlink(b"l", b"l"), tars.regular(b"l/x")], "l/x"),
        ([tars.symlink(b"l", b"")], "l"),
        ([tars.regular(b"f"), tars.regular(b"f/x")], "f/x"),
        ([tars.whiteout(b"f"), tars.regular(b"f/x")], "f/x"),
        ([Member(b".wh..", mode=0)], ".wh.."),
        ([Member(b"d/.wh...", mode=0)], "d/.wh..."),
        ([Member(b".wh.", mode=0)], ".wh."),
        ([Member(b"/", tars.REGULAR)], "/"),
        ([Member(b"./", tars.SYMLINK, link=b"x")], "./"),
        ([Member(b"c", tars.CHARACTER, device=(4096, 0))], "c"),
        ([tars.regular(b"n" * 256)], "n" * 256),
        ([tars.symlink(b"l", b"x", xattrs={b"user.a": b"b"})], "l"),
        ([tars.regular(b"f", xattrs={b"user.": b"b"})], "f"),
    ],
)
def test_what_cannot_be_is_refused_by_name(layer: Path, members: list[Member], named: str) -> None:
    (layer.parent / "canary").write_text("sings")
    before = trees.snapshot(layer.parent)
    with pytest.raises(InvalidLayer) as caught:
        extract(layer, members)
    assert caught.value.subject == named
    after = trees.snapshot(layer.parent)
    assert {path for path in after if not path.startswith(b"layer")} == {b".", b"canary"}
    assert after[b"canary"] == before[b"canary"]


@pytest.mark.parametrize("version", sparse.VERSIONS)
def test_sparse_files_have_their_holes(tmp_path: Path, layer: Path, version: str) -> None:
    apply_tar(io.BytesIO(sparse.sparse_tar(tmp_path, version)), layer)
    assert {name: (layer / name).read_bytes() for name in sparse.FILES} == sparse.FILES
    assert (layer / "d/hole").stat().st_blocks == 0
    assert (layer / "d/sparse").stat().st_blocks * 512 < 1 << 20
    found = (layer / "d/tail").stat()
    assert found.st_mtime_ns == (tmp_path / "source/d/tail").stat().st_mtime_ns


def test_sparse_files_of_gnus_own_type_are_refused(tmp_path: Path, layer: Path) -> None:
    with pytest.raises(UnsupportedFormat, match="sparse"):
        apply_tar(io.BytesIO(sparse.sparse_tar(tmp_path, "gnu")), layer)


def test_negative_sizes_and_owners_are_refused(layer: Path) -> None:
    for field, width in ((124, 12), (108, 8)):
        raw = bytearray(tar_bytes([tars.regular(b"f")]))
        raw[field : field + width] = b"\xff" * width
        raw[148:156] = b"        "
        raw[148:156] = b"%06o\0 " % sum(raw[:512])
        with pytest.raises(InvalidLayer):
            apply_tar(io.BytesIO(bytes(raw)), layer)


def test_giant_headers_and_paths_are_refused(layer: Path) -> None:
    with pytest.raises(LimitExceeded):
        extract(layer, [tars.regular(b"f", xattrs={b"user.a": bytes(17 << 20)})])
    with pytest.raises(LimitExceeded):
        extract(layer, [mine(b"d/" * 2100)])


def test_too_many_entries_are_refused(layer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LAYER_ENTRIES", 3)
    with pytest.raises(LimitExceeded):
        extract(layer, [mine(b"%d" % number) for number in range(4)])


NAMES = st.sampled_from(
    [
        *(b"a", b"b", b"a/b", b"a/b/c", b"l", b"l/x", b"l/l", b"l/canary", b"l/d/canary", b"m/l/x"),
        *(
            b"../canary",
            b"a/../../canary",
            b"/etc/x",
            b"/",
            b"./",
            b"..",
            b".",
            b"",
            b"l/..",
            b"//a",
        ),
        *(
            b".wh.a",
            b"a/.wh.b",
            b".wh..wh..opq",
            b"l/.wh..wh..opq",
            b"l/.wh.canary",
            b".wh..",
            b".wh.",
        ),
        *(b"../.wh.canary", b"m", b"m/a", b"\xff", b"x" * 300),
    ]
)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        yield Path(place)


def members_of(sandbox: Path) -> st.SearchStrategy[list[Member]]:
    outside = [os.fsencode(sandbox), os.fsencode(sandbox / "d"), os.fsencode(sandbox / "canary")]
    targets = st.one_of(
        NAMES,
        st.sampled_from(
            [*outside, b"../d", b"../../" + outside[0], b"..", b"/", b"a", b"../layer"]
        ),
    )
    anything = st.builds(
        Member,
        name=NAMES,
        kind=st.sampled_from([bytes([kind]) for kind in b"0123456"]),
        mode=st.sampled_from([0o644, 0o755, 0, 0o7777]),
        uid=st.sampled_from([0, 1000]),
        link=targets,
        device=st.sampled_from([(0, 0), (1, 3)]),
        xattrs=st.sampled_from([{}, {b"user.a": b"b"}, {b"trusted.a": b"b"}]),
    )
    # what most escapes are made of
    link = st.builds(tars.symlink, st.sampled_from([b"l", b"m", b"a"]), targets)
    file = st.builds(tars.regular, NAMES, st.just(b"evil"))
    return st.lists(st.one_of(anything, link, file), max_size=12)


@root_only
@settings(max_examples=150)
@given(data=st.data())
def test_nothing_outside_is_ever_touched(sandbox: Path, data: st.DataObject) -> None:
    layer = sandbox / "layer"
    if not layer.exists():
        (sandbox / "d").mkdir()
        for canary in (sandbox / "canary", sandbox / "d/canary"):
            canary.write_text("sings")
            os.utime(canary, ns=(1, 1))
    else:
        remove_tree(layer)
    layer.mkdir()
    members = data.draw(members_of(sandbox))
    for each in (b".", b"d"):
        os.utime(sandbox / os.fsdecode(each), ns=(2, 2))

    def outside() -> dict[bytes, object]:
        found = trees.snapshot(sandbox)
        return {path: node for path, node in found.items() if not path.startswith(b"layer")}

    before = outside()
    with contextlib.suppress(LayerstoreError):
        extract(layer, members)
    # the time of the sandbox is what tells of an entry made and removed again
    assert outside() == before


@root_only
@pytest.mark.parametrize(
    "name",
    [
        *(b"trusted.overlay.redirect", b"trusted.overlay.opaque", b"trusted.overlay.metacopy"),
        *(b"user.overlay.opaque", b"user.fuseoverlayfs.opaque"),
    ],
)
def test_an_archive_says_nothing_about_how_mounts_read_the_layer(layer: Path, name: bytes) -> None:
    planted = {name: b"/elsewhere", b"user.kept": b"1"}
    extract(
        layer,
        [
            tars.regular(b"file", b"x", xattrs=planted),
            tars.directory(b"directory", xattrs=planted),
            tars.directory(b"/", xattrs=planted),
        ],
    )
    for path in (layer, layer / "file", layer / "directory"):
        assert os.listxattr(path) == ["user.kept"]


def test_what_is_remembered_of_directories_has_a_bound(
    layer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "DIRECTORY_NAMES_BYTES", 30)
    extract(layer, [mine(b"directory%d" % number) for number in (1, 2, 3, 3, 3)])
    with pytest.raises(LimitExceeded, match="too long in all"):
        extract(layer, [mine(b"directory%d" % number) for number in range(4)])


@root_only
def test_the_owners_that_a_record_lists_have_a_bound(
    layer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "LAYER_OWNERS", 3)
    members = [tars.regular(b"%d" % number, b"", uid=number) for number in range(4)]
    extract(layer, members[:3])
    with pytest.raises(LimitExceeded, match="owners"):
        extract(layer, members)
