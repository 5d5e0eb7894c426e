"""Snapshots of mounted file trees, and what two of them differ in.

Two trees are equal when they agree in names, types, modes, owners, modification times, devices,
extended attributes, link targets, hard links, sizes and contents.  What a file system chooses by
itself is left out: inode and device numbers, change and access times, the size and link count of
directories, allocated blocks.

    python -m lab.trees A B
"""

import argparse
import contextlib
import errno
import hashlib
import os
import stat
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

FORMAT_FILES: Final = frozenset(
    {b"stargz.index.json", b".no.prefetch.landmark", b".prefetch.landmark"}
)
"""Root entries of eStargz layers that an ordinary extraction leaves behind and a lazy view hides."""

OVERLAY_XATTRS: Final = (b"trusted.overlay.", b"user.overlay.")
"""Prefixes of what overlayfs keeps for itself; seen only when a layer is looked at directly."""

ROOT: Final = frozenset({b"."})
"""The root itself: containers/storage skips its archive entry, so its time is that of the pull."""

_READ: Final = 1 << 20
_READERS: Final = 4

_KINDS: Final = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


@dataclass(frozen=True, slots=True)
class Node:
    """One name.  `digest` is the SHA-256 of a regular file; `peers` are all names of its inode."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    rdev: int
    nlink: int
    target: bytes
    xattrs: Mapping[bytes, bytes]
    digest: str
    peers: tuple[bytes, ...]

    @property
    def kind(self) -> str:
        """The file type in words."""
        return _KINDS.get(stat.S_IFMT(self.mode), "unknown")


Tree = dict[bytes, Node]
"""Nodes by path below the root; the root itself is `b"."`."""


def snapshot(root: Path | bytes, *, contents: bool = True) -> Tree:
    """Read the whole tree under `root` without following links; OSError on the first failure.

    With `contents=False` no file is opened and digests are empty.
    """
    with ThreadPoolExecutor(_READERS) as readers:
        walker = _Walker(readers if contents else None)
        top = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            walker.add_root(top)
            walker.descend(top, b"")
        finally:
            os.close(top)
    return walker.tree()


def forget_contents(root: Path) -> None:
    """Have the kernel forget what it has in memory of the regular files below ``root``."""
    for top, _, names in os.walk(os.fsencode(root)):
        for path in (os.path.join(top, name) for name in names):
            with contextlib.suppress(FileNotFoundError):  # a living service removes some
                if stat.S_ISREG(os.lstat(path).st_mode):
                    with open(path, "rb", buffering=0) as file:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(
    expected: Tree,
    actual: Tree,
    *,
    ignore: Collection[bytes] = FORMAT_FILES,
    ignore_xattrs: tuple[bytes, ...] = OVERLAY_XATTRS,
    any_mtime: Collection[bytes] = ROOT,
    seconds: bool = False,
) -> list[str]:
    """The differences as sentences, ordered by path; empty when the trees are equal.

    `ignore`: paths left out on both sides.  `ignore_xattrs`: prefixes of attribute names.
    `any_mtime`: paths whose modification time does not count: the root, and directories that no
    archive entry describes; each extraction gives those the time of the day.
    `seconds`: compare modification times by whole seconds only.
    """
    differences: list[str] = []
    for path in sorted((expected.keys() | actual.keys()) - set(ignore)):
        before, after = expected.get(path), actual.get(path)
        if before is None:
            differences.append(f"{_show(path)}: only in the second tree")
        elif after is None:
            differences.append(f"{_show(path)}: only in the first tree")
        else:
            said = list(_differences(before, after, ignore_xattrs))
            unit = 10**9 if seconds else 1
            if before.mtime_ns // unit != after.mtime_ns // unit and path not in any_mtime:
                said.append(f"mtime {before.mtime_ns} ns became {after.mtime_ns} ns")
            differences += [f"{_show(path)}: {each}" for each in said]
    return differences


def main(arguments: list[str] | None = None) -> int:
    """Compare two directories; exit code 1 when they differ."""
    parser = argparse.ArgumentParser(prog="lab.trees", description="compare two file trees")
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--seconds", action="store_true", help="ignore fractions of a second")
    parser.add_argument("--ignore", action="append", default=[], metavar="PATH")
    options = parser.parse_args(arguments)
    ignore = FORMAT_FILES | {os.fsencode(path) for path in options.ignore}
    first, second = snapshot(options.first), snapshot(options.second)
    differences = compare(first, second, ignore=ignore, seconds=options.seconds)
    for each in differences:
        print(each)
    print(f"{len(first)} and {len(second)} names, {len(differences)} differences")
    return 1 if differences else 0


class _Walker:
    """Collects nodes by descriptor, so no path ever gets longer than one name."""

    def __init__(self, readers: ThreadPoolExecutor | None) -> None:
        self._readers = readers
        self._found: dict[bytes, tuple[os.stat_result, bytes, dict[bytes, bytes]]] = {}
        self._names: defaultdict[tuple[int, int], list[bytes]] = defaultdict(list)
        self._digests: dict[tuple[int, int], str] = {}

    def add_root(self, descriptor: int) -> None:
        self._found[b"."] = (
            os.fstat(descriptor),
            b"",
            _xattrs(b"/proc/self/fd/%d" % descriptor, follow=True),
        )

    def descend(self, descriptor: int, prefix: bytes) -> None:
        directories: list[bytes] = []
        files: list[tuple[bytes, tuple[int, int]]] = []
        with os.scandir(descriptor) as entries:
            names = sorted(os.fsencode(entry.name) for entry in entries)
        for name in names:
            status = os.lstat(name, dir_fd=descriptor)
            path = prefix + name
            here = b"/proc/self/fd/%d/%s" % (descriptor, name)
            target = b""
            if stat.S_ISDIR(status.st_mode):
                directories.append(name)
            else:
                inode = (status.st_dev, status.st_ino)
                self._names[inode].append(path)
                if stat.S_ISLNK(status.st_mode):
                    target = os.readlink(name, dir_fd=descriptor)
                elif stat.S_ISREG(status.st_mode) and inode not in self._digests:
                    self._digests[inode] = ""
                    files.append((here, inode))
            self._found[path] = (status, target, _xattrs(here))
        if self._readers:
            digests = self._readers.map(_digest, [here for here, _ in files])
            self._digests.update(
                {inode: digest for (_, inode), digest in zip(files, digests, strict=True)}
            )
        for name in directories:
            child = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            try:
                self.descend(child, prefix + name + b"/")
            finally:
                os.close(child)

    def tree(self) -> Tree:
        nodes: Tree = {}
        for path, (status, target, xattrs) in self._found.items():
            inode = (status.st_dev, status.st_ino)
            nodes[path] = Node(
                mode=status.st_mode,
                uid=status.st_uid,
                gid=status.st_gid,
                mtime_ns=status.st_mtime_ns,
                size=status.st_size,
                rdev=status.st_rdev,
                nlink=status.st_nlink,
                target=target,
                xattrs=xattrs,
                digest=self._digests.get(inode, ""),
                peers=tuple(sorted(self._names.get(inode, ()))),
            )
        return nodes


def _xattrs(path: bytes, *, follow: bool = False) -> dict[bytes, bytes]:
    """All attributes; a file system without them has none.

    A magic link of /proc must be followed to reach what it stands for.
    """
    try:
        names = os.listxattr(path, follow_symlinks=follow)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return {}
        raise
    return {os.fsencode(name): os.getxattr(path, name, follow_symlinks=follow) for name in names}


def _digest(path: bytes) -> str:
    hasher = hashlib.sha256()
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb", buffering=0) as file:
        buffer = memoryview(bytearray(_READ))
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
    return hasher.hexdigest()


def _differences(before: Node, after: Node, ignore_xattrs: tuple[bytes, ...]) -> Iterator[str]:
    if before.kind != after.kind:
        yield f"type {before.kind} became {after.kind}"
        return
    if before.mode != after.mode:
        yield f"mode {stat.S_IMODE(before.mode):04o} became {stat.S_IMODE(after.mode):04o}"
    if (before.uid, before.gid) != (after.uid, after.gid):
        yield f"owner {before.uid}:{before.gid} became {after.uid}:{after.gid}"
    yield from _xattr_differences(before.xattrs, after.xattrs, ignore_xattrs)
    if stat.S_ISDIR(before.mode):
        return
    if before.target != after.target:
        yield f"target {_show(before.target)} became {_show(after.target)}"
    if before.rdev != after.rdev:
        yield f"device {before.rdev:#x} became {after.rdev:#x}"
    if before.nlink != after.nlink:
        yield f"link count {before.nlink} became {after.nlink}"
    if before.peers != after.peers:
        yield (f"hard links {b', '.join(before.peers)!r} became {b', '.join(after.peers)!r}")
    if before.size != after.size:
        yield f"size {before.size} became {after.size}"
    if before.digest != after.digest:
        yield f"content {before.digest[:12]} became {after.digest[:12]}"


def _xattr_differences(
    before: Mapping[bytes, bytes], after: Mapping[bytes, bytes], ignore: tuple[bytes, ...]
) -> Iterator[str]:
    for name in sorted(before.keys() | after.keys()):
        if name.startswith(ignore):
            continue
        old, new = before.get(name), after.get(name)
        if old is None:
            yield f"xattr {_show(name)} was added"
        elif new is None:
            yield f"xattr {_show(name)} is missing"
        elif old != new:
            yield f"xattr {_show(name)} {old.hex()} became {new.hex()}"


def _show(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
