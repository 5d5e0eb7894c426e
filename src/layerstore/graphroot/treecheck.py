"""Whether two pictures of one layer agree: two directory trees, or a tree and its TOC.

A layer can be read as a tar stream or through its table of contents, and a hostile one may
say different things there.  Whoever publishes an extracted tree under the digest of the TOC
must have compared the two: names, types, permissions, owners, sizes, link targets, devices,
extended attributes, hard links, whiteouts and every byte.

Times are compared between trees only, because a TOC rounds them.  Two trees may lie on file
systems that keep different things: times as whole seconds, some kinds of attributes or none.
What the one cannot keep says nothing about the other.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Final

from layerstore.errors import StorageError
from layerstore.formats import NO_PREFETCH_LANDMARK, PREFETCH_LANDMARK, TOC_NAME
from layerstore.layertree import LayerIndex

OPAQUE: Final = (b"trusted.overlay.opaque", b"user.overlay.opaque")
# What stands in the tar stream of a lazy layer for the format's sake; a TOC does not show it.
_FORMAT_FILES: Final = frozenset(
    name.encode() for name in (TOC_NAME, PREFETCH_LANDMARK, NO_PREFETCH_LANDMARK)
)
# The label is this machine's; XFS shows ACLs under names of its own once more.
_NOT_CONTENT: Final = frozenset(
    (b"security.selinux", b"trusted.SGI_ACL_FILE", b"trusted.SGI_ACL_DEFAULT")
)
_SECOND: Final = 10**9
_GRANULARITIES: Final = (_SECOND, 10**6, 10**3, 100, 1)  # of times, in nanoseconds
_PIECE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Node:
    """One name of a tree; ``inode`` is the same for all names of a file."""

    path: bytes
    mode: int
    uid: int
    gid: int
    size: int
    device: tuple[int, int]
    target: bytes
    xattrs: dict[bytes, bytes]
    opaque: bool
    inode: int = field(compare=False)
    mtime_ns: int = field(compare=False)


class OpenTree:
    """A directory tree that nobody changes; a context manager.

    ``granularity_ns`` is how finely its file system keeps times, as far as was seen.
    """

    def __init__(self, root: Path) -> None:
        """Raises ``StorageError`` if it cannot be opened."""
        self._root = root
        self.granularity_ns = _SECOND
        try:
            self._fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"cannot be opened: {error.strerror}", subject=str(root)) from error

    def __enter__(self) -> OpenTree:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def walk(self) -> Iterator[Node]:
        """Every name, parents first and sorted; the root is ``b""``.  Raises ``StorageError``."""
        pending = [b""]
        while pending:
            path = pending.pop()
            try:
                node = self.node(path)
                if stat.S_ISDIR(node.mode):
                    below = path + b"/" if path else b""
                    pending += [below + name for name in sorted(self._names(path), reverse=True)]
            except OSError as error:
                raise self._failed(path, error) from error
            yield node

    def node(self, path: bytes) -> Node:
        """One name of the tree; raises ``OSError``."""
        facts = os.lstat(path or b".", dir_fd=self._fd)
        mode = facts.st_mode
        for time_ns in (facts.st_ctime_ns, facts.st_mtime_ns):
            if time_ns % self.granularity_ns:
                self.granularity_ns = next(each for each in _GRANULARITIES if not time_ns % each)
        xattrs = self._xattrs(path)
        opaque = b"y" in [xattrs.pop(name, b"") for name in OPAQUE]
        device = stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
        return Node(
            path=path,
            mode=mode,
            uid=facts.st_uid,
            gid=facts.st_gid,
            size=facts.st_size if stat.S_ISREG(mode) else 0,
            device=(os.major(facts.st_rdev), os.minor(facts.st_rdev)) if device else (0, 0),
            target=os.readlink(path, dir_fd=self._fd) if stat.S_ISLNK(mode) else b"",
            xattrs=xattrs,
            opaque=opaque,
            inode=facts.st_ino,
            mtime_ns=facts.st_mtime_ns,
        )

    def open(self, path: bytes) -> BinaryIO:
        """A regular file of the tree, for reading; raises ``OSError``."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        return os.fdopen(os.open(path, flags, dir_fd=self._fd), "rb")

    def digest(self, path: bytes) -> bytes:
        """sha256 of a regular file; raises ``StorageError``."""
        try:
            with self.open(path) as file:
                running = hashlib.sha256()
                while data := file.read(_PIECE):
                    running.update(data)
                return running.digest()
        except OSError as error:
            raise self._failed(path, error) from error

    def keeps(self, path: bytes, name: bytes) -> bool:
        """Whether the file system has attributes of this kind."""
        try:
            os.getxattr(self._proc(path), name, follow_symlinks=not path)
        except OSError as error:
            return error.errno != errno.ENOTSUP
        return True

    def set_xattr(self, path: bytes, name: bytes, value: bytes) -> None:
        """Set one attribute of a directory; raises ``OSError``."""
        os.setxattr(self._proc(path), name, value)

    def _names(self, path: bytes) -> list[bytes]:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path or b".", flags, dir_fd=self._fd)
        try:
            return [os.fsencode(name) for name in os.listdir(descriptor)]
        finally:
            os.close(descriptor)

    def _xattrs(self, path: bytes) -> dict[bytes, bytes]:
        full = self._proc(path)
        found: dict[bytes, bytes] = {}
        with contextlib.suppress(OSError):  # a file system that has none
            for name in map(os.fsencode, os.listxattr(full, follow_symlinks=not path)):
                if name not in _NOT_CONTENT:
                    found[name] = os.getxattr(full, name, follow_symlinks=not path)
        return found

    def _proc(self, path: bytes) -> bytes:
        base = b"/proc/self/fd/%d" % self._fd
        return base + b"/" + path if path else base

    def _failed(self, path: bytes, error: OSError) -> StorageError:
        return StorageError(
            f"{shown(path)} cannot be read: {error.strerror}", subject=str(self._root)
        )


def shown(path: bytes) -> str:
    """A path of a layer for a message."""
    return "/" + path.decode(errors="backslashreplace")


def tree_differences(
    expected: Path,
    actual: Path,
    *,
    made_after_ns: int,
    contents: bool = True,
    whole: Container[int] = (),
    roots: bool = True,
    optional: Mapping[int, Mapping[bytes, bytes]] | None = None,
    fewer_attributes: bool = False,
) -> Iterator[str]:
    """What is different in ``actual``, one sentence each; nothing if the trees are the same.

    What is newer than ``made_after_ns`` in ``expected`` has no time of its own: whiteouts,
    and directories that were made because something lies in them.  Without ``contents`` the
    sizes of files do not count, but for those whose inodes in ``expected`` are ``whole``; without
    ``roots`` the two directories themselves may differ.
    ``optional`` are attributes, by inode of ``expected``, that may be there with this value or not.
    With ``fewer_attributes`` those may be missing that the file system of ``actual`` has not.
    Raises ``StorageError``.
    """
    optional = optional or {}
    with OpenTree(expected) as left, OpenTree(actual) as right:
        links = _Links()
        for wanted, found in _side_by_side(left.walk(), right.walk()):
            if wanted is not None and not wanted.path and not roots:
                continue
            if found is None and wanted is not None:
                yield f"{shown(wanted.path)} is missing"
            elif wanted is None and found is not None:
                yield f"{shown(found.path)} does not belong there"
            elif wanted is not None and found is not None:
                is_whole = contents or wanted.inode in whole
                compared = wanted if is_whole else replace(wanted, size=found.size)
                if wanted.inode in optional:
                    compared = _with_optional(compared, found, optional[wanted.inode])
                if compared.xattrs != found.xattrs:
                    compared = _as_kept(compared, found, left, right if fewer_attributes else None)
                difference = _node_difference(compared, found) or links.difference(
                    wanted.inode, found.inode
                )
                coarse = max(left.granularity_ns, right.granularity_ns)
                timeless = wanted.mtime_ns >= made_after_ns
                same_time = wanted.mtime_ns // coarse == found.mtime_ns // coarse
                if difference is None and not timeless and not same_time:
                    difference = "has another time of modification"
                if (
                    is_whole
                    and difference is None
                    and stat.S_ISREG(wanted.mode)
                    and left.digest(wanted.path) != right.digest(found.path)
                ):
                    difference = "has other contents"
                if difference is not None:
                    yield f"{shown(wanted.path)} {difference}"


def _side_by_side(
    left: Iterator[Node], right: Iterator[Node]
) -> Iterator[tuple[Node | None, Node | None]]:
    """Pairs of the same path out of two sorted walks; None where one has no such path."""
    one, other = next(left, None), next(right, None)
    while one is not None or other is not None:
        order = 0
        if one is None or other is None:
            order = 1 if one is None else -1
        elif one.path != other.path:
            order = -1 if _key(one.path) < _key(other.path) else 1
        yield (one if order <= 0 else None), (other if order >= 0 else None)
        if order <= 0:
            one = next(left, None)
        if order >= 0:
            other = next(right, None)


def _key(path: bytes) -> bytes:
    return path.replace(b"/", b"\0")  # a directory's names come before "directory-2"


class _Links:
    """Inodes of one side and what they are on the other."""

    def __init__(self) -> None:
        self._there: dict[int, int] = {}
        self._back: dict[int, int] = {}

    def difference(self, left: int, right: int) -> str | None:
        if (self._there.setdefault(left, right), self._back.setdefault(right, left)) == (
            right,
            left,
        ):
            return None
        return "is a link to another file"


def _with_optional(wanted: Node, found: Node, optional: Mapping[bytes, bytes]) -> Node:
    """``wanted`` with the optional attributes as ``found`` has them."""
    xattrs = dict(wanted.xattrs)
    for name, value in optional.items():
        if name not in found.xattrs:
            xattrs.pop(name, None)
        elif found.xattrs[name] == value:
            xattrs[name] = value
    opaque = found.opaque if not optional.keys().isdisjoint(OPAQUE) else wanted.opaque
    return replace(wanted, xattrs=xattrs, opaque=opaque)


def _as_kept(wanted: Node, found: Node, here: OpenTree, there: OpenTree | None) -> Node:
    """``wanted`` as ``found`` in attributes that ``here``, or ``there``, cannot keep."""
    xattrs = dict(wanted.xattrs)
    for name, value in found.xattrs.items():
        if name not in xattrs and not here.keeps(wanted.path, name):
            xattrs[name] = value
    if there is not None:
        for name in wanted.xattrs.keys() - found.xattrs.keys():
            if not there.keeps(found.path, name):
                del xattrs[name]
    return replace(wanted, xattrs=xattrs)


def _node_difference(wanted: Node, found: Node) -> str | None:
    if wanted == found:
        return None
    if stat.S_IFMT(wanted.mode) != stat.S_IFMT(found.mode):
        return "is of another type"
    if wanted.mode != found.mode:
        return f"has the mode {found.mode & 0o7777:04o}, not {wanted.mode & 0o7777:04o}"
    if (wanted.uid, wanted.gid) != (found.uid, found.gid):
        return f"belongs to {found.uid}:{found.gid}, not {wanted.uid}:{wanted.gid}"
    if wanted.size != found.size:
        return f"has {found.size} bytes, not {wanted.size}"
    if wanted.target != found.target:
        return "is a link to another name"
    if wanted.device != found.device:
        return "is another device"
    if wanted.opaque != found.opaque:
        return "hides the layers below" if found.opaque else "does not hide the layers below"
    return "has other extended attributes"


def toc_difference(index: LayerIndex, root: Path) -> str | None:
    """The first difference between a TOC, compiled, and the tree extracted from the tar stream.

    The roots are left out: containers/storage takes no attributes from an archive's root.
    Raises ``StorageError``.
    """
    names = -1  # the root
    links = _Links()
    with OpenTree(root) as tree:
        for found in tree.walk():
            if found.path in _FORMAT_FILES:
                continue
            names += 1
            if not found.path:
                continue
            entry = index.entry_of_path(found.path)
            if entry is None:
                return f"{shown(found.path)} is not in the table of contents"
            difference = (
                _node_difference(_index_node(index, entry, found.path), found)
                or links.difference(entry, found.inode)
                or _content_difference(index, entry, tree, found.path)
            )
            if difference is not None:
                return f"{shown(found.path)} {difference}, says the table of contents"
    if names != index.names:
        return f"the table of contents has {index.names} names, the archive {names}"
    return None


def _index_node(index: LayerIndex, entry: int, path: bytes) -> Node:
    inode = index.inode(entry)
    xattrs = dict(index.xattrs(entry)) if inode.has_xattrs else {}
    for name in _NOT_CONTENT:
        xattrs.pop(name, None)
    opaque = b"y" in [xattrs.pop(name, b"") for name in OPAQUE]
    return Node(
        path=path,
        mode=inode.mode,
        uid=inode.uid,
        gid=inode.gid,
        size=inode.size if stat.S_ISREG(inode.mode) else 0,
        device=(inode.major, inode.minor),
        target=index.symlink(entry) if stat.S_ISLNK(inode.mode) else b"",
        xattrs=xattrs,
        opaque=opaque,
        inode=entry,
        mtime_ns=inode.mtime_ns,
    )


def _content_difference(index: LayerIndex, entry: int, tree: OpenTree, path: bytes) -> str | None:
    content = index.content(entry)
    if content is None:
        return None
    try:
        with tree.open(path) as file:
            for number in range(content.first_chunk, content.first_chunk + content.chunk_count):
                chunk = index.chunk(number)
                left = chunk.size
                running = hashlib.sha256()
                while left and (data := file.read(min(left, _PIECE))):
                    running.update(data)
                    left -= len(data)
                if running.digest() != chunk.digest:
                    return "has other contents"
    except OSError as error:
        raise StorageError(f"{shown(path)} cannot be read: {error.strerror}") from error
    return None
