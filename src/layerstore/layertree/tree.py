"""The tree that a TOC describes, built by applying its entries in order.

The result is what ordinary extraction (containers/storage ``archive.Unpack`` with
overlay whiteouts) leaves in a layer's ``diff``, with the readers' normalisation of
``spec layer-formats 2.3`` where extraction has no say:

* A missing parent is made, 0755 root:root.  A parent that is no directory is
  refused: extraction would fail, or follow a symbolic link where other readers of
  the TOC do not, so that two readers would see two trees.
* A name that comes again replaces what it named before, with all that lay below;
  only a directory over a directory keeps its children (and attributes that the
  later entry does not set) and takes the new metadata.
* A hard link names what its target is at this point of the stream, even if that
  name is replaced later.  A target that comes only later is resolved at the end.
* ``.wh.X`` becomes a character device 0:0 named X unless the layer holds a real X;
  ``.wh..wh..opq`` makes its directory opaque; no other ``.wh.`` name is shown.  A
  directory that exists only because whiteouts lie in it is no real one: tools that
  remove a tree list ``.wh.foo`` and ``foo/.wh.bar``, and extraction ignores the
  second.

Nodes are records in one ``bytearray`` (``layout.RECORD``, the last fields still
provisional); see ``compiler`` for what becomes of them.
"""

from __future__ import annotations

import stat
from array import array
from typing import Final

from layerstore import limits
from layerstore.errors import InvalidLayer, LimitExceeded, UnsupportedFormat
from layerstore.formats.toc import TocEntry

from .chunks import NO_OWNER, ChunkTable
from .fields import (
    ID_MAX,
    MAJOR_MAX,
    MINOR_MAX,
    XattrPool,
    check_number,
    parse_xattrs,
    read_xattrs,
)
from .layout import RECORD, RECORD_BYTES
from .names import (
    HIDDEN_IN_ROOT,
    LANDMARK,
    META_PREFIX,
    NO_LANDMARK,
    OPAQUE_MARKER,
    WHITEOUT_PREFIX,
    check_component,
    check_symlink,
    clean_path,
    exact_bytes,
    subject_of,
)
from .nametable import NONE, NameTable
from .times import MAX_NS, parse_time_ns

ROOT: Final = 0

# What a node is; directories come first.  A WEAK directory holds nothing but whiteouts.
DIRECTORY, WEAK, OTHER, SYMLINK, WHITEOUT, LINK = range(6)

_DROPPED: Final = -1  # below a name that is never shown
_PATHS_REMEMBERED: Final = 4096
_NODES_MAX: Final = min(1 << limits.INDEX_ENTRY_BITS, limits.TOC_ENTRIES)
_SYMLINKS_BYTES: Final = (1 << 32) - 1
_PERMISSIONS: Final = 0o7777
_SPECIAL: Final = {"char": stat.S_IFCHR, "block": stat.S_IFBLK, "fifo": stat.S_IFIFO}


class Tree:
    """Nodes, names and chunks of a layer; ``add`` each entry, then ``finish``."""

    def __init__(self, toc_offset: int, member_bytes: int = limits.MEMBER_BYTES) -> None:
        self.table = NameTable()
        self.chunks = ChunkTable(toc_offset, member_bytes)
        self.xattrs = XattrPool()
        self.symlinks = bytearray()
        self.records = bytearray()
        self.kinds = array("B")
        self.opaque: set[int] = set()
        self.links: dict[int, tuple[bytes, str]] = {}  # LINK node to cleaned target, subject
        self.landmark: int | None = None
        self._no_landmark = False
        self._file = NO_OWNER
        self._file_open = False
        self._known: dict[bytes, int] = {}
        self._entries = 0
        self._implicit_directory()

    # -- entries ------------------------------------------------------------------

    def add(self, entry: TocEntry) -> None:
        """Apply one entry.

        Raises InvalidLayer, UnsupportedFormat or LimitExceeded; the tree is of no use then.
        """
        self._entries += 1
        if self._entries > limits.TOC_ENTRIES:
            raise LimitExceeded(f"a TOC of more than {limits.TOC_ENTRIES} entries")
        kind = entry.type
        if kind == "chunk":
            if not self._file_open:
                raise InvalidLayer(
                    "a chunk follows no regular file", subject=subject_of(entry.name)
                )
            self.chunks.more(entry, self._file)
            return
        self._end_file()
        subject = subject_of(entry.name)
        path = clean_path(exact_bytes(entry.name, entry.name_raw, subject), subject)
        parent_path, _, name = path.rpartition(b"/")
        if not path:
            self._root(entry, subject)
        elif name.startswith(WHITEOUT_PREFIX):
            self._whiteout(parent_path, name, entry, subject)
            if kind == "reg":
                self._begin_file(entry, NO_OWNER)
        elif name in HIDDEN_IN_ROOT and not parent_path:
            if kind == "reg":
                self._landmark(name, entry)
                self._begin_file(entry, NO_OWNER)
        else:
            check_component(name, subject)
            parent = self._parent(parent_path, subject)
            if parent != _DROPPED:
                self._place(parent, name, entry, subject)
            elif kind == "reg":
                self._begin_file(entry, NO_OWNER)

    def finish(self) -> None:
        """All entries have been added."""
        self._end_file()
        if self._no_landmark:
            self.landmark = 0

    def _place(self, parent: int, name: bytes, entry: TocEntry, subject: str) -> None:
        table, kinds = self.table, self.kinds
        number = table.number(parent, name)
        old = table.targets[number]
        was_directory = old != NONE and kinds[old] <= WEAK
        kind = entry.type
        if kind == "dir":
            if was_directory:
                self._update_directory(old, entry, subject)
            else:
                table.targets[number] = self._node(
                    DIRECTORY, entry, stat.S_IFDIR | entry.mode & _PERMISSIONS, subject
                )
            return
        table.targets[number] = NONE  # before a link is resolved: it cannot name what it replaces
        if was_directory:
            self._known.clear()
        if kind == "reg":
            node = self._node(
                OTHER, entry, stat.S_IFREG | entry.mode & _PERMISSIONS, subject, size=entry.size
            )
            self._begin_file(entry, node)
        elif kind == "symlink":
            node = self._symlink(entry, subject)
        elif kind == "hardlink":
            node = self._hardlink(entry, subject)
        elif kind in _SPECIAL:
            node = self._node(OTHER, entry, _SPECIAL[kind] | entry.mode & _PERMISSIONS, subject)
        else:
            raise UnsupportedFormat(f"an entry of type {kind[:32]!r}", subject=subject)
        table.targets[number] = node

    def _root(self, entry: TocEntry, subject: str) -> None:
        if entry.type != "dir":
            raise InvalidLayer("the root is not a directory", subject=subject)
        self._update_directory(ROOT, entry, subject)

    def _symlink(self, entry: TocEntry, subject: str) -> int:
        target = exact_bytes(entry.link_name, entry.link_name_raw, subject)
        check_symlink(target, subject)
        offset = len(self.symlinks)
        if offset + len(target) > _SYMLINKS_BYTES:
            raise LimitExceeded("the symbolic links of the layer are too large together")
        self.symlinks += target
        return self._node(
            SYMLINK,
            entry,
            stat.S_IFLNK | 0o777,
            subject,
            size=len(target),
            first=offset,
            count=len(target),
        )

    def _hardlink(self, entry: TocEntry, subject: str) -> int:
        target = clean_path(exact_bytes(entry.link_name, entry.link_name_raw, subject), subject)
        found = self.find(target)
        if found == NONE:
            node = self._record(LINK, 0)
            self.links[node] = (target, subject)
            return node
        if self.kinds[found] <= WEAK:
            raise InvalidLayer("a hard link to a directory", subject=subject)
        return found

    def _landmark(self, name: bytes, entry: TocEntry) -> None:
        if name == NO_LANDMARK:
            self._no_landmark = True
        elif name == LANDMARK:
            self.landmark = check_number(
                entry.offset, self.chunks.toc_offset, "landmark's offset", entry.name
            )

    # -- whiteouts ------------------------------------------------------------------

    def _whiteout(self, parent_path: bytes, name: bytes, entry: TocEntry, subject: str) -> None:
        if name == OPAQUE_MARKER:
            directory = self._weak_parent(parent_path, subject)
            if directory != _DROPPED:
                self.opaque.add(directory)
            return
        if name.startswith(META_PREFIX):
            return
        hidden = name[len(WHITEOUT_PREFIX) :]
        if hidden in (b"", b".", b".."):
            raise InvalidLayer("a whiteout of no proper name", subject=subject)
        check_component(hidden, subject)
        if not parent_path and hidden in HIDDEN_IN_ROOT:
            return
        directory = self._weak_parent(parent_path, subject)
        if directory == _DROPPED:
            return
        number = self.table.number(directory, hidden)
        old = self.table.targets[number]
        if old == NONE or self.kinds[old] in (WEAK, WHITEOUT):
            self.table.targets[number] = self._record(
                WHITEOUT,
                stat.S_IFCHR,
                uid=check_number(entry.uid, ID_MAX, "uid", subject),
                gid=check_number(entry.gid, ID_MAX, "gid", subject),
                mtime=self._time(entry, subject),
            )

    def _weak_parent(self, path: bytes, subject: str) -> int:
        """The directory that a whiteout lies in, or _DROPPED where it has no effect."""
        found = self._known.get(path)
        if found is not None:
            return found
        if _never_shown(path):
            return _DROPPED
        node = ROOT
        for part in path.split(b"/") if path else ():
            check_component(part, subject)
            number = self.table.number(node, part)
            child = self.table.targets[number]
            if child == NONE:
                child = self.table.targets[number] = self._implicit_directory(WEAK)
            elif self.kinds[child] == SYMLINK:
                raise InvalidLayer("a whiteout below a symbolic link", subject=subject)
            elif self.kinds[child] > WEAK:
                return _DROPPED  # extraction: mknod fails with ENOTDIR, which it ignores
            node = child
        return node

    # -- directories ------------------------------------------------------------------

    def _parent(self, path: bytes, subject: str) -> int:
        """The directory that a real entry lies in, made if missing; or _DROPPED."""
        if not path:
            return ROOT
        found = self._known.get(path)
        if found is not None:
            return found
        node = _DROPPED if _never_shown(path) else ROOT
        for part in path.split(b"/") if node == ROOT else ():
            check_component(part, subject)
            number = self.table.number(node, part)
            child = self.table.targets[number]
            if child == NONE or self.kinds[child] == WHITEOUT:
                child = self.table.targets[number] = self._implicit_directory()
            elif self.kinds[child] == WEAK:
                self.kinds[child] = DIRECTORY
            elif self.kinds[child] != DIRECTORY:
                raise InvalidLayer("an entry below one that is no directory", subject=subject)
            node = child
        if len(self._known) >= _PATHS_REMEMBERED:
            self._known.clear()
        self._known[path] = node
        return node

    def find(self, path: bytes) -> int:
        """The node at a cleaned path, NONE where there is nothing or only a whiteout."""
        table, kinds = self.table, self.kinds
        node = ROOT
        for part in path.split(b"/") if path else ():
            if kinds[node] > WEAK:
                return NONE
            number = table.find(node, part)
            node = table.targets[number]  # number 0 names NONE
            if node == NONE:
                return NONE
        return NONE if kinds[node] == WHITEOUT else node

    def _implicit_directory(self, kind: int = DIRECTORY) -> int:
        return self._record(kind, stat.S_IFDIR | 0o755)

    def _update_directory(self, node: int, entry: TocEntry, subject: str) -> None:
        at = node * RECORD_BYTES
        old = RECORD.unpack_from(self.records, at)[8]
        new = self._node_fields(
            entry, stat.S_IFDIR | entry.mode & _PERMISSIONS, subject, keep_xattrs=old
        )
        RECORD.pack_into(self.records, at, *new)
        self.kinds[node] = DIRECTORY

    # -- nodes ------------------------------------------------------------------------

    def _node(
        self,
        kind: int,
        entry: TocEntry,
        mode: int,
        subject: str,
        *,
        size: int = 0,
        first: int = 0,
        count: int = 0,
    ) -> int:
        fields = self._node_fields(entry, mode, subject, size=size, first=first, count=count)
        return self._append(kind, RECORD.pack(*fields))

    def _node_fields(
        self,
        entry: TocEntry,
        mode: int,
        subject: str,
        *,
        size: int = 0,
        first: int = 0,
        count: int = 0,
        keep_xattrs: int = 0,
    ) -> tuple[int, ...]:
        uid, gid = entry.uid, entry.gid
        if uid or gid:
            check_number(uid, ID_MAX, "uid", subject)
            check_number(gid, ID_MAX, "gid", subject)
        major = minor = 0
        if (entry.dev_major or entry.dev_minor) and (stat.S_ISCHR(mode) or stat.S_ISBLK(mode)):
            major = check_number(entry.dev_major, MAJOR_MAX, "device major", subject)
            minor = check_number(entry.dev_minor, MINOR_MAX, "device minor", subject)
        if not 0 <= size <= limits.FILE_BYTES:
            raise InvalidLayer(f"the size {size} is out of range", subject=subject)
        xattrs = keep_xattrs
        if entry.xattrs:
            parsed = parse_xattrs(entry.xattrs, subject)
            if keep_xattrs:
                parsed = read_xattrs(self.xattrs.data, keep_xattrs) | parsed
            xattrs = self.xattrs.add(parsed, subject)
        time = self._time(entry, subject)
        return mode, uid, gid, 0, size, major, minor, time, xattrs, first, count, 0, 0, 0

    @staticmethod
    def _time(entry: TocEntry, subject: str) -> int:
        try:
            time = parse_time_ns(entry.modtime)
        except InvalidLayer as error:
            raise InvalidLayer(error.what, subject=subject) from error
        # containers/storage extracts what it cannot count in nanoseconds since 1970 as 1970.
        return time if 0 <= time < MAX_NS else 0

    def _record(self, kind: int, mode: int, *, uid: int = 0, gid: int = 0, mtime: int = 0) -> int:
        return self._append(kind, RECORD.pack(mode, uid, gid, 0, 0, 0, 0, mtime, 0, 0, 0, 0, 0, 0))

    def _append(self, kind: int, record: bytes) -> int:
        node = len(self.kinds)
        if node >= _NODES_MAX:
            raise LimitExceeded(f"a layer of more than {_NODES_MAX} entries")
        self.records += record
        self.kinds.append(kind)
        return node

    # -- regular files ------------------------------------------------------------------

    def _begin_file(self, entry: TocEntry, node: int) -> None:
        self.chunks.begin(entry, node)
        self._file = node
        self._file_open = True

    def _end_file(self) -> None:
        if not self._file_open:
            return
        self._file_open = False
        first, count, extra, flags = self.chunks.finish()
        if self._file != NO_OWNER:
            at = self._file * RECORD_BYTES
            fields = RECORD.unpack_from(self.records, at)
            RECORD.pack_into(self.records, at, *fields[:9], first, count, extra, flags, 0)


def _never_shown(path: bytes) -> bool:
    """Whether a directory path has a component that is not part of the tree."""
    return (
        path.startswith(WHITEOUT_PREFIX)
        or b"/" + WHITEOUT_PREFIX in path
        or path.partition(b"/")[0] in HIDDEN_IN_ROOT
    )
