"""From the tree of a TOC to the index file: numbering, sorting, writing.

Entries are numbered breadth first, the names of each directory in order of their
bytes.  The numbers depend on nothing but the TOC, so an index that is built again
gives every file the node id that the kernel already knows.
"""

from __future__ import annotations

import os
import stat
import threading
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from layerstore import limits
from layerstore.errors import InvalidLayer, LayerstoreError, LimitExceeded, StorageError
from layerstore.formats.members import Packing
from layerstore.formats.toc import TocEntry

from .chunks import NO_OWNER
from .fields import read_xattrs
from .layout import (
    BYTE_ORDER,
    CHECKSUM_BYTES,
    CHUNK,
    CHUNK_BYTES,
    HEADER,
    MAGIC,
    NO_LANDMARK_SEEN,
    NO_MEMBER,
    RECORD,
    RECORD_BYTES,
    VERSION,
    checksum,
    padding,
    prefix,
)
from .nametable import NONE
from .tree import DIRECTORY, LINK, ROOT, WEAK, Tree

OPAQUE_XATTRS: Final = {b"trusted.overlay.opaque": b"y", b"user.overlay.opaque": b"y"}
BLOB_BYTES: Final = (1 << 63) - 1
_PIECE_ENTRIES: Final = 8192  # records packed before they are written


@dataclass(frozen=True, slots=True)
class IndexSummary:
    """What an index file holds.

    ``entries`` counts inodes, ``names`` directory entries (hard links count each),
    ``files`` regular files, ``content_bytes`` their sizes together; ``landmark`` is the
    end of the range to prefetch, 0 for "no prefetch", None if the layer does not say;
    ``file_bytes`` is the size of the index itself.
    """

    entries: int
    names: int
    directories: int
    files: int
    chunks: int
    members: int
    content_bytes: int
    landmark: int | None
    file_bytes: int


def build_index(
    entries: Iterable[TocEntry],
    out: BinaryIO | str | os.PathLike[str],
    *,
    blob_size: int,
    toc_offset: int,
    packing: Packing = Packing.GZIP,
    member_bytes: int = limits.MEMBER_BYTES,
) -> IndexSummary:
    """Compile TOC entries into a layer index.

    ``toc_offset`` is where the contents of the blob end, ``blob_size`` its whole size;
    ``packing`` how its members are packed, and ``member_bytes`` how far inside one a chunk may
    reach (uncompressed).  A stream is written from its position on and neither flushed nor closed.  At a path the
    file appears only complete and synced, under a temporary name until then.

    Raises InvalidLayer, UnsupportedFormat or LimitExceeded for entries that make no tree,
    before anything is written; StorageError if writing fails.
    """
    if not 0 <= toc_offset <= blob_size <= BLOB_BYTES:
        raise InvalidLayer(f"a TOC at {toc_offset} in a blob of {blob_size} bytes")
    tree = Tree(toc_offset, member_bytes)
    for entry in entries:
        tree.add(entry)
    tree.finish()
    compiled = _Compiled(tree, blob_size, packing)
    if not isinstance(out, str | os.PathLike):
        compiled.write(out)
        return compiled.summary
    path = Path(out)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as stream:
            compiled.write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except (OSError, LayerstoreError) as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, LayerstoreError):
            raise
        raise StorageError(f"cannot write a layer index: {error}", subject=str(path)) from error
    return compiled.summary


class _Compiled:
    """A finished tree, numbered and sorted, ready to be written."""

    def __init__(self, tree: Tree, blob_size: int, packing: Packing) -> None:
        self._tree = tree
        self._packing = packing
        self._number = array("I", (NONE,)) * len(tree.kinds)  # node to entry
        self._nodes = array("I")  # entry to node
        self._links = array("I", bytes(4 * len(tree.kinds)))  # by node
        self._resolved: dict[int, int] = {}
        self._add_opaque()
        self._name_directories()
        self._number_chunks()
        self._lay_out(blob_size)

    def _add_opaque(self) -> None:
        tree = self._tree
        for node in sorted(tree.opaque):
            fields = list(RECORD.unpack_from(tree.records, node * RECORD_BYTES))
            own = read_xattrs(tree.xattrs.data, fields[8])
            fields[8] = tree.xattrs.add(own | OPAQUE_XATTRS, "")
            RECORD.pack_into(tree.records, node * RECORD_BYTES, *fields)

    # -- names ----------------------------------------------------------------------

    def _resolve(self, node: int) -> int:
        """The node that a LINK stands for, through any number of links."""
        tree = self._tree
        seen: dict[int, None] = {}
        while tree.kinds[node] == LINK:
            if node in self._resolved:
                node = self._resolved[node]
                break
            target, subject = tree.links[node]
            if node in seen:
                raise InvalidLayer("hard links name each other in a circle", subject=subject)
            seen[node] = None
            node = tree.find(target)
            if node == NONE:
                raise InvalidLayer("a hard link to a name that is not there", subject=subject)
            if tree.kinds[node] <= WEAK:
                raise InvalidLayer("a hard link to a directory", subject=subject)
        for link in seen:
            self._resolved[link] = node
        return node

    def _children(self) -> tuple[array[int], array[int]]:
        """(starts, numbers): the living names of directory node n are numbers[starts[n]:starts[n+1]]."""
        table = self._tree.table
        if not self._tree.links:
            table.forget_hashes()
        starts = array("I", bytes(4 * (len(self._tree.kinds) + 2)))
        for directory, target in zip(table.directories, table.targets, strict=True):
            if target != NONE:
                starts[directory + 2] += 1
        total = 0
        for node in range(2, len(starts)):
            total += starts[node]
            starts[node] = total
        numbers = array("I", bytes(4 * total))
        for number, directory in enumerate(table.directories):
            if table.targets[number] != NONE:
                at = starts[directory + 1]
                numbers[at] = number
                starts[directory + 1] = at + 1
        return starts, numbers

    def _name_directories(self) -> None:
        """Number the entries and fill the directory tables, starting at the root."""
        tree, number_of, nodes, links = self._tree, self._number, self._nodes, self._links
        kinds, targets, name_of = tree.kinds, tree.table.targets, tree.table.name
        starts, numbers = self._children()
        self.prefixes = array("Q")
        self.targets = array("I")
        self.name_ends = array("I", (0,))
        self.names = bytearray()
        self._first = array("I", bytes(4 * len(kinds)))  # by node, as are the next two
        self._count = array("I", bytes(4 * len(kinds)))
        self._parent = array("I", bytes(4 * len(kinds)))
        number_of[ROOT] = 0
        nodes.append(ROOT)
        links[ROOT] = 2
        queue = array("I", (ROOT,))
        for directory in queue:
            self._first[directory] = len(self.targets)
            children = sorted(numbers[starts[directory] : starts[directory + 1]], key=name_of)
            self._count[directory] = len(children)
            for number in children:
                node = targets[number]
                kind = kinds[node]
                if kind == LINK:
                    node = self._resolve(node)
                if number_of[node] == NONE:
                    number_of[node] = len(nodes)
                    nodes.append(node)
                if kind <= WEAK:
                    queue.append(node)
                    links[node] = 2
                    links[directory] += 1
                    self._parent[node] = number_of[directory]
                else:
                    links[node] += 1
                self.targets.append(number_of[node])
                name = name_of(number)
                self.prefixes.append(prefix(name))
                self.names += name
                self.name_ends.append(len(self.names))

    # -- chunks ---------------------------------------------------------------------

    def _number_chunks(self) -> None:
        """Drop the chunks of files that are not shown; find members and their chunks."""
        chunks, number_of = self._tree.chunks, self._number
        order = chunks.by_position()
        self.members = chunks.members(order)
        new = array("I", (NONE,)) * len(chunks)
        living = 0
        for number, owner in enumerate(chunks.owners):
            if owner != NO_OWNER and number_of[owner] != NONE:
                new[number] = living
                living += 1
        self._new_chunk = new
        self._living_chunks = living
        self.member_ends = array("I", (0,))
        self.member_chunks = array("I")
        self._member = array("I", (NO_MEMBER,)) * len(chunks)
        member = -1
        last = -1
        for number in order:
            offset = chunks.offsets[number]
            if offset != last:
                if member >= 0:
                    self.member_ends.append(len(self.member_chunks))
                member += 1
                last = offset
            self._member[number] = member
            if new[number] != NONE:
                self.member_chunks.append(new[number])
        if member >= 0:
            self.member_ends.append(len(self.member_chunks))

    def _chunk_pieces(self) -> Iterator[bytes]:
        chunks, piece = self._tree.chunks, bytearray()
        for number, new in enumerate(self._new_chunk):
            if new == NONE:
                continue
            piece += CHUNK.pack(
                chunks.starts[number],
                chunks.sizes[number],
                self._member[number],
                chunks.inner[number],
                chunks.digests[32 * number : 32 * number + 32],
                self._number[chunks.owners[number]],
            )
            if len(piece) >= _PIECE_ENTRIES * CHUNK_BYTES:
                yield bytes(piece)
                piece.clear()
        yield bytes(piece)

    # -- records --------------------------------------------------------------------

    def _record_pieces(self) -> Iterator[bytes]:
        records, kinds, piece = self._tree.records, self._tree.kinds, bytearray()
        for node in self._nodes:
            head = RECORD.unpack_from(records, node * RECORD_BYTES)
            mode, uid, gid, _, size, major, minor, mtime, xattrs, first, count, extra, flags, _ = (
                head
            )
            if kinds[node] <= WEAK:
                first, count, extra = self._first[node], self._count[node], self._parent[node]
            elif stat.S_ISREG(mode):
                first = self._new_chunk[first] if count else 0
            piece += RECORD.pack(
                mode,
                uid,
                gid,
                self._links[node],
                size,
                major,
                minor,
                mtime,
                xattrs,
                first,
                count,
                extra,
                flags,
                0,
            )
            if len(piece) >= _PIECE_ENTRIES * RECORD_BYTES:
                yield bytes(piece)
                piece.clear()
        yield bytes(piece)

    # -- the file -------------------------------------------------------------------

    def _lay_out(self, blob_size: int) -> None:
        tree = self._tree
        lengths = (
            len(self._nodes) * RECORD_BYTES,
            len(self.prefixes) * 8,
            len(self.targets) * 4,
            len(self.name_ends) * 4,
            len(self.names),
            self._living_chunks * CHUNK_BYTES,
            len(self.members) * 8,
            len(self.member_ends) * 4,
            len(self.member_chunks) * 4,
            len(tree.chunks.pairs),
            len(tree.xattrs.data),
            len(tree.symlinks),
        )
        offsets = []
        at = HEADER.size + padding(HEADER.size)
        for length in lengths:
            offsets.append(at)
            at += length + padding(length)
        offsets.append(at)
        self._lengths = lengths
        files = content = directories = attributed = 0
        for node in self._nodes:
            mode, _, _, _, size, _, _, _, xattrs, *_ = RECORD.unpack_from(
                tree.records, node * RECORD_BYTES
            )
            attributed += xattrs != 0
            if tree.kinds[node] in (DIRECTORY, WEAK):
                directories += 1
            elif stat.S_ISREG(mode):
                files += 1
                content += size
        if content > BLOB_BYTES:
            raise LimitExceeded("the files of the layer are too large together")
        self.summary = IndexSummary(
            entries=len(self._nodes),
            names=len(self.targets),
            directories=directories,
            files=files,
            chunks=self._living_chunks,
            members=len(self.members) - 1,
            content_bytes=content,
            landmark=tree.landmark,
            file_bytes=at + CHECKSUM_BYTES,
        )
        self._header = HEADER.pack(
            MAGIC,
            VERSION,
            BYTE_ORDER,
            self.summary.file_bytes,
            blob_size,
            tree.chunks.toc_offset,
            content,
            NO_LANDMARK_SEEN if tree.landmark is None else tree.landmark,
            self.summary.entries,
            self.summary.names,
            directories,
            files,
            self.summary.chunks,
            self.summary.members,
            attributed,
            self._packing,
            *offsets,
        )

    def write(self, stream: BinaryIO) -> None:
        """Write the whole file; call once."""
        tree, running = self._tree, checksum()

        def put(data: bytes | bytearray | array[int]) -> int:
            running.update(data)
            stream.write(data)
            return len(data) * data.itemsize if isinstance(data, array) else len(data)

        put(self._header)
        put(bytes(padding(HEADER.size)))
        sections: tuple[Iterable[bytes | bytearray | array[int]], ...] = (
            self._record_pieces(),
            (self.prefixes,),
            (self.targets,),
            (self.name_ends,),
            (self.names,),
            self._chunk_pieces(),
            (self.members,),
            (self.member_ends,),
            (self.member_chunks,),
            (tree.chunks.pairs,),
            (tree.xattrs.data,),
            (tree.symlinks,),
        )
        for length, section in zip(self._lengths, sections, strict=True):
            written = sum(map(put, section))
            if written != length:
                raise StorageError("a section of the layer index has an unforeseen length")
            put(bytes(padding(length)))
        stream.write(running.digest())
