"""An image with everything a layer may hold, to compare lazy views with plain pulls.

`torture_image` is accepted by an ordinary pull of Podman 4.3 and 5.4.  Its layers, lowest first:
a busybox root; file types, modes, owners and times; odd names; names that are no UTF-8; links;
extended attributes; what later layers delete or replace; that deleting and replacing; the
replaced back; odd archives (no parents, all header forms); nothing but the root.  A name twice in
one layer is not among them: both Podmans refuse it ("duplicates of file paths not supported").
`huge_image` holds a file of more than 4 GiB and is apart, because extraction writes it whole.

Everything lies below `/torture`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lab import tars, xattrs
from lab.images import base_members, cached, noise, tar_bytes
from lab.oci import LayerSource, RunConfig, StoredImage
from lab.tars import Member, Zeros

INEXACT_TIMES: Final = frozenset({b"torture/times/early-fraction", b"torture/times/late-fraction"})
"""Paths whose time a TOC cannot say exactly: it has whole seconds."""

IMPLICIT_DIRECTORIES: Final = frozenset({b".", b"torture/implicit", b"torture/implicit/deep"})
"""Directories without an entry of their own that counts; each extraction gives them the time of the day."""

RAW_NAMES: Final = frozenset(
    {
        b"torture/raw",
        b"torture/raw/latin-\xe9",
        b"torture/raw/\xff\xfe",
        b"torture/raw/" + b"\xff" * 255,
        b"torture/raw/link",
        b"torture/raw/linked-\xe9",
        b"torture/raw/replaced-\xef\xbf\xbd",
    }
)
"""The layer of names that are no UTF-8, which the JSON of common converters cannot carry.

One name holds U+FFFD itself, which such converters put in the place of what they cannot write.
"""

HUGE_SIZE: Final = (4 << 30) + (5 << 20) + 12345
HUGE_TAIL: Final = b"the end of a huge file\n"

_RECIPE: Final = 2
_HUGE_RECIPE: Final = 1
_NS: Final = 10**9
_TOP: Final = b"torture/"
_DEEP_NAME: Final = b"n" * 245
_DEEP_LEVELS: Final = 12
_MANY_LEVELS: Final = 200


def torture_image(directory: Path | None = None) -> StoredImage:
    """The image; `podman run` prints `hello from torture`.  A layout below `.cache/images`."""
    config = RunConfig(cmd=("/bin/sh", "-c", "echo hello from torture"))

    def build(_: Path) -> tuple[Sequence[LayerSource], RunConfig]:
        return [LayerSource(tar_bytes(layer)) for layer in torture_layers()], config

    return cached(directory, "torture", {"torture": _RECIPE}, build)


def huge_image(directory: Path | None = None) -> StoredImage:
    """An image whose `/huge` has HUGE_SIZE bytes: zeros, and HUGE_TAIL at the end.

    The blob has some 20 MB; an extraction writes more than 4 GiB.
    """
    config = RunConfig(cmd=("/bin/tail", "-c", str(len(HUGE_TAIL)), "/huge"))

    def build(scratch: Path) -> tuple[Sequence[LayerSource], RunConfig]:
        content = scratch / "huge"
        with content.open("wb") as file:
            file.seek(HUGE_SIZE - len(HUGE_TAIL))
            file.write(HUGE_TAIL)
        tar = scratch / "huge.tar"
        with tar.open("wb") as out:
            tars.write_tar(out, [tars.directory(b"./"), tars.regular(b"huge", content)])
        content.unlink()
        return [LayerSource(tar_bytes(base_members())), LayerSource(tar, level=1)], config

    return cached(directory, "huge", {"huge": _HUGE_RECIPE}, build)


def torture_layers() -> list[list[Member]]:
    """The members of each layer, lowest first."""
    return [
        base_members(),
        [*_opening(), *_types(), *_times()],
        [*_opening(), *_names()],
        [*_opening(), *_raw_names()],
        [*_opening(), *_links()],
        [*_opening(), *_attributes()],
        [*_opening(), *_before()],
        [*_opening(), *_between()],
        [*_opening(), *_after()],
        [*_opening(), *_odd_archive()],
        [tars.directory(b"./")],
    ]


def _opening() -> list[Member]:
    return [tars.directory(b"./"), tars.directory(_TOP)]


def _types() -> list[Member]:
    at = _TOP + b"types/"
    members = [
        tars.directory(at),
        tars.regular(at + b"empty"),
        tars.regular(at + b"one-byte", b"\0"),
        tars.regular(at + b"block-less-one", noise(4095, 2)),
        tars.regular(at + b"block", noise(4096, 3)),
        tars.regular(at + b"block-and-one", noise(4097, 4)),
        tars.regular(at + b"two-chunks", noise((4 << 20) + 1, 5)),
        tars.regular(at + b"holes", Zeros(9 << 20)),
        tars.directory(at + b"empty-directory"),
        tars.symlink(at + b"symlink", b"empty", uid=12, gid=34),
        tars.Member(at + b"null", tars.CHARACTER, mode=0o666, device=(1, 3)),
        tars.Member(at + b"great-numbers", tars.CHARACTER, mode=0o600, device=(4095, 1048575)),
        tars.Member(at + b"loop", tars.BLOCK, mode=0o660, gid=6, device=(7, 0)),
        tars.Member(at + b"fifo", tars.FIFO, mode=0o622, uid=5),
        tars.directory(at + b"no-rights", mode=0),
        tars.regular(at + b"no-rights/inside", b"inside\n", mode=0),
        tars.directory(at + b"sticky", mode=0o1777),
        tars.directory(at + b"setgid", mode=0o2775, gid=50),
    ]
    members += [
        tars.regular(at + b"mode-%04o" % mode, b"mode\n", mode=mode)
        for mode in (0o000, 0o111, 0o400, 0o777, 0o1644, 0o2755, 0o4755, 0o6711, 0o7777)
    ]
    members += [
        tars.regular(at + b"owner-%d" % owner, b"owner\n", uid=owner, gid=owner + 1)
        for owner in (1, 65534, 2097151, 2097152, 3000000000)
    ]
    return members


def _times() -> list[Member]:
    at = _TOP + b"times/"
    times = {
        b"epoch": 0,
        b"one": _NS,
        b"before-1970": -86400 * _NS,
        b"after-2106": 5_000_000_000 * _NS,
        b"after-2262": 13_569_465_600 * _NS,
        b"early-fraction": 1_600_000_000 * _NS + 123_456_789,
        b"late-fraction": 1_600_000_000 * _NS + 987_654_321,
    }
    return [
        tars.directory(at, mtime_ns=1_500_000_000 * _NS),
        *(tars.regular(at + name, b"time\n", mtime_ns=when) for name, when in times.items()),
        tars.symlink(at + b"symlink", b"one", mtime_ns=1_400_000_000 * _NS),
        tars.directory(at + b"directory", mtime_ns=1_300_000_000 * _NS),
    ]


def _names() -> list[Member]:
    at = _TOP + b"names/"
    odd = [
        *(b" ", b"  leading", b"trailing ", b"trailing.", b"...", b"..data", b"-rf", b"--", b"~"),
        *(b"*", b"?", b"[a]", b"{b}", b"$HOME", b"`id`", b"a;b", b"a&b", b"a|b", b"a<b>c", b"#"),
        *(b"back\\slash", b"'single'", b'"double"', b"%41", b"a=b", b"a,b", b"a:b", b"c:", b"!"),
        *(b"new\nline", b"tab\t", b"bell\a", b"escape\x1b[31m", b"delete\x7f", b"\x01"),
        *(b".wh", b"a.wh.b", b"wh.", b".hidden", b".prefetch.landmark", b"stargz.index.json"),
    ]
    texts = ["é", "e\u0301", "日本語", "🦭", "\u202eright-to-left", "ﬀ", "K", "\u2028"]
    odd += [text.encode() for text in texts]
    odd += [b"x" * 255, "é".encode() * 127 + b"x", b"y" * 100, b"z" * 101]
    members = [tars.directory(at)]
    members += [tars.regular(at + name, b"odd: " + name) for name in odd]
    members += [tars.directory(at + b"in " + name[:250]) for name in odd]
    path = at + b"deep/"
    members.append(tars.directory(path))
    for _ in range(_DEEP_LEVELS):
        path += _DEEP_NAME + b"/"
        members.append(tars.directory(path))
    members.append(tars.regular(path + b"bottom", b"the bottom\n"))
    path = at + b"many/"
    members.append(tars.directory(path))
    for _ in range(_MANY_LEVELS):
        path += b"d/"
        members.append(tars.directory(path))
    members.append(tars.regular(path + b"bottom", b"the bottom of many\n"))
    return members


def _raw_names() -> list[Member]:
    at = _TOP + b"raw/"
    return [
        tars.directory(at),
        tars.regular(at + b"latin-\xe9", b"one raw byte, in a USTAR header\n"),
        tars.regular(at + b"\xff\xfe", b"two raw bytes\n"),
        tars.regular(at + b"\xff" * 255, b"255 raw bytes, in a PAX record\n"),
        tars.symlink(at + b"link", b"latin-\xe9"),
        tars.hard_link(at + b"linked-\xe9", at + b"latin-\xe9"),
        tars.regular(at + b"replaced-\xef\xbf\xbd", b"a replacement character\n"),
    ]


def _links() -> list[Member]:
    at = _TOP + b"links/"
    long = b"/".join([b"t" * 200] * 21)[:4095]
    first = tars.regular(at + b"a/first", noise(70000, 6), uid=7, gid=8, mode=0o640)
    symlink = tars.symlink(at + b"to-first", b"a/first")
    fifo = tars.Member(at + b"fifo", tars.FIFO, mode=0o600)
    return [
        tars.directory(at),
        tars.directory(at + b"a/"),
        first,
        tars.hard_link(at + b"a/second", first),
        tars.directory(at + b"b/"),
        tars.directory(at + b"b/c/"),
        tars.hard_link(at + b"b/c/third", first),
        tars.hard_link(at + b"b/of-a-link", first, link=at + b"b/c/third"),
        tars.regular(at + b"empty"),
        tars.hard_link(at + b"also-empty", at + b"empty"),
        symlink,
        tars.hard_link(at + b"same-symlink", symlink),
        fifo,
        tars.hard_link(at + b"same-fifo", fifo),
        tars.symlink(at + b"absolute", b"/torture/links/a/first"),
        tars.symlink(at + b"dangling", b"nowhere/at/all"),
        tars.symlink(at + b"self", b"self"),
        tars.symlink(at + b"up", b"../../torture/../torture/links"),
        tars.symlink(at + b"directory", b"a/"),
        tars.symlink(at + b"dots", b"."),
        tars.symlink(at + b"spaces and\nlines", b" a\nb "),
        tars.symlink(at + b"hundred", b"h" * 100),
        tars.symlink(at + b"hundred-and-one", b"h" * 101),
        tars.symlink(at + b"long", long),
    ]


def _attributes() -> list[Member]:
    at = _TOP + b"xattrs/"
    access = xattrs.posix_acl(owner=6, users={1000: 4, 3000: 6}, group=4, mask=6, other=0)
    default = xattrs.posix_acl(owner=7, groups={50: 5}, group=5, mask=5, other=5)
    capability = xattrs.file_capability(xattrs.CAP_NET_RAW, xattrs.CAP_NET_BIND_SERVICE)
    inherited = xattrs.file_capability(xattrs.CAP_SYS_PTRACE, effective=False)
    capable = tars.regular(
        at + b"capable", b"c\n", mode=0o755, xattrs={xattrs.CAPABILITY: capability}
    )
    # Extraction creates it below a directory whose default ACL it would inherit.
    inside = xattrs.posix_acl(owner=6, groups={50: 4}, group=4, mask=4, other=4)
    several = {b"user.%02d" % number: noise(40, number) for number in range(20)}
    return [
        tars.directory(at, xattrs={b"user.directory": b"yes", b"trusted.directory": b"yes"}),
        tars.regular(at + b"user", b"u\n", xattrs={b"user.note": b"text", b"user.b": b"\0\xff="}),
        tars.regular(at + b"great", b"g\n", xattrs={b"user.great": noise(3000, 7)}),
        tars.regular(at + b"several", b"s\n", xattrs=several),
        tars.regular(at + b"long-name", b"l\n", xattrs={b"user." + b"n" * 250: b"v"}),
        capable,
        tars.hard_link(at + b"capable-too", capable),
        tars.regular(at + b"permitted", b"p\n", mode=0o755, xattrs={xattrs.CAPABILITY: inherited}),
        tars.regular(at + b"acl", b"a\n", mode=0o660, xattrs={xattrs.ACL_ACCESS: access}),
        tars.directory(at + b"acl-default", xattrs={xattrs.ACL_DEFAULT: default}),
        tars.regular(at + b"acl-default/inside", b"i\n", xattrs={xattrs.ACL_ACCESS: inside}),
        tars.symlink(at + b"symlink", b"user", xattrs={b"trusted.link": b"on the link"}),
        tars.Member(at + b"fifo", tars.FIFO, xattrs={b"trusted.fifo": b"on the fifo"}),
    ]


def _before() -> list[Member]:
    """What the next two layers delete and replace."""
    at = _TOP + b"changes/"
    return [
        tars.directory(at),
        tars.regular(at + b"file-gone", b"gone\n"),
        tars.symlink(at + b"symlink-gone", b"file-gone"),
        tars.Member(at + b"fifo-gone", tars.FIFO),
        tars.directory(at + b"directory-gone"),
        tars.directory(at + b"directory-gone/below"),
        tars.regular(at + b"directory-gone/below/leaf", b"leaf\n"),
        tars.directory(at + b"links"),
        tars.regular(at + b"links/one", b"linked\n"),
        tars.hard_link(at + b"links/two", at + b"links/one"),
        tars.hard_link(at + b"links/three", at + b"links/one"),
        tars.directory(at + b"opaque", mode=0o711),
        tars.regular(at + b"opaque/hidden", b"hidden\n"),
        tars.directory(at + b"opaque/below"),
        tars.regular(at + b"opaque/below/hidden", b"hidden\n"),
        tars.directory(at + b"outer"),
        tars.directory(at + b"outer/inner"),
        tars.regular(at + b"outer/seen", b"seen\n"),
        tars.regular(at + b"outer/inner/hidden", b"hidden\n"),
        tars.regular(at + b"file-directory-file", b"first\n"),
        tars.directory(at + b"directory-file-directory"),
        tars.regular(at + b"directory-file-directory/old", b"old\n"),
        tars.regular(at + b"file-symlink-file", b"first\n"),
        tars.regular(at + b"gone-and-back", b"first\n"),
        tars.regular(at + b"new-mode", b"same\n", mode=0o600),
        tars.directory(at + b"new-directory-mode", mode=0o700, uid=9),
        tars.regular(at + b"new-directory-mode/stays", b"stays\n"),
        tars.regular(at + b"replaced-under-whiteout", b"old\n"),
    ]


def _between() -> list[Member]:
    at = _TOP + b"changes/"
    return [
        tars.directory(at),
        tars.whiteout(at + b"file-gone"),
        tars.whiteout(at + b"symlink-gone"),
        tars.whiteout(at + b"fifo-gone"),
        tars.whiteout(at + b"directory-gone"),
        tars.whiteout(at + b"never-was"),
        tars.directory(at + b"links"),
        tars.whiteout(at + b"links/two"),
        tars.directory(at + b"opaque", mode=0o711),
        tars.opaque(at + b"opaque"),
        tars.regular(at + b"opaque/new", b"new\n"),
        tars.directory(at + b"opaque/below"),
        tars.regular(at + b"opaque/below/new", b"new\n"),
        tars.directory(at + b"outer"),
        tars.directory(at + b"outer/inner"),
        tars.regular(at + b"outer/inner/new", b"new\n"),
        tars.opaque(at + b"outer/inner"),
        tars.directory(at + b"file-directory-file"),
        tars.regular(at + b"file-directory-file/inside", b"second\n"),
        tars.regular(at + b"directory-file-directory", b"second\n"),
        tars.symlink(at + b"file-symlink-file", b"new-mode"),
        tars.whiteout(at + b"gone-and-back"),
        tars.regular(at + b"new-mode", b"same\n", mode=0o4755),
        tars.directory(at + b"new-directory-mode", mode=0o2755, uid=10),
        tars.whiteout(at + b"replaced-under-whiteout"),
        tars.regular(at + b"replaced-under-whiteout", b"new\n"),
    ]


def _after() -> list[Member]:
    at = _TOP + b"changes/"
    return [
        tars.directory(at),
        tars.regular(at + b"file-directory-file", b"third\n"),
        tars.directory(at + b"directory-file-directory"),
        tars.regular(at + b"directory-file-directory/new", b"third\n"),
        tars.regular(at + b"file-symlink-file", b"third\n"),
        tars.regular(at + b"gone-and-back", b"third\n"),
        tars.directory(at + b"opaque", mode=0o711),
        tars.directory(at + b"opaque/below"),
        tars.whiteout(at + b"opaque/below/new"),
        tars.directory(at + b"links"),
        tars.whiteout(at + b"links/three"),
    ]


def _odd_archive() -> list[Member]:
    at = _TOP + b"odd/"
    long = b"g" * 90 + b"/" + b"h" * 120
    return [
        tars.regular(_TOP + b"implicit/deep/file", b"no entry names my parents\n"),
        tars.directory(at),
        tars.regular(b"./" + at + b"dot-slash", b"./\n"),
        tars.regular(b"/" + at + b"absolute", b"/\n"),
        tars.regular(at + b"./inner-dot", b"a/./b\n"),
        tars.regular(at + b"/double-slash", b"a//b\n"),
        tars.directory(at + b"g" * 90),
        tars.regular(at + long, b"a GNU long name\n", form="gnu"),
        tars.symlink(at + b"gnu-symlink", b"k" * 300, form="gnu"),
        tars.regular(at + b"gnu-owner", b"base-256\n", uid=2097152 + 5, gid=4000000, form="gnu"),
        tars.directory(at + b"p" * 60),
        tars.regular(at + b"p" * 60 + b"/" + b"q" * 60, b"a USTAR prefix\n"),
        tars.directory(at + b"late-parent-entry/below"),
        tars.directory(at + b"late-parent-entry", mode=0o711, uid=3),
    ]
