"""Reading a layer index in place.

The file is mapped and every answer is unpacked from the map when it is asked for;
nothing is kept per entry.  The checksum over the whole file is verified when it is
opened, so afterwards the tables are trusted to fit together.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final, NamedTuple, Self

from layerstore import limits
from layerstore.errors import StorageError
from layerstore.formats.members import Packing

from .fields import read_xattrs
from .layout import (
    ATTRIBUTES,
    BYTE_ORDER,
    CHECKSUM_BYTES,
    CHUNK,
    CHUNK_BYTES,
    CHUNK_MARK,
    CHUNK_WORDS,
    COUNT_WORD,
    DIGEST_PAIR,
    EXTRA_WORD,
    FIRST_WORD,
    FLAG_DIGEST,
    FLAGS_WORD,
    HEADER,
    MAGIC,
    NO_LANDMARK_SEEN,
    NO_MEMBER,
    OWNER_WORD,
    PAIR_MARKS,
    RECORD_BYTES,
    RECORD_WORDS,
    VERSION,
    XATTR_WORD,
    Section,
    checksum,
    prefix,
)

ROOT: Final = 0
_EMPTY: Final = hashlib.sha256(b"").digest()


class Inode(NamedTuple):
    """Attributes of an entry; ``mode`` includes the file type, times are nanoseconds since 1970."""

    mode: int
    uid: int
    gid: int
    nlink: int
    size: int
    major: int
    minor: int
    mtime_ns: int
    has_xattrs: bool


class FileContent(NamedTuple):
    """What a regular file consists of.

    ``digest`` is the sha256 of the whole content where the TOC gives it; ``key`` names the
    content as its chunks are verified, and is that same sha256 exactly if ``plain``.  The
    chunks are numbers ``first_chunk`` to ``first_chunk + chunk_count``, in file order.
    """

    size: int
    digest: bytes | None
    key: bytes
    plain: bool
    first_chunk: int
    chunk_count: int


class Chunk(NamedTuple):
    """A verifiable piece of a file: ``size`` bytes at ``file_offset``, found ``inner_offset``
    bytes into the decompressed member ``member``; or a hole, if that is ``NO_MEMBER``."""

    file_offset: int
    size: int
    digest: bytes
    member: int
    inner_offset: int

    @property
    def hole(self) -> bool:
        """Whether it is nothing but zeros, and in no member."""
        return self.member == NO_MEMBER


class Member(NamedTuple):
    """The compressed range of the blob in which a member lies."""

    offset: int
    end: int


class Child(NamedTuple):
    """A name in a directory; ``mode`` includes the file type."""

    name: bytes
    entry: int
    mode: int


class LayerIndex:
    """A layer's file tree, read-only; may be used by several threads at once.

    Entry 0 is the root directory.  A number that no entry, chunk or member has raises
    IndexError, as does every use after ``close``.
    """

    _TABLES: ClassVar = (
        "_data",
        "_view",
        "_words",
        "_prefixes",
        "_targets",
        "_name_ends",
        "_chunk_words",
        "_members",
        "_member_ends",
        "_member_chunks",
    )

    def __init__(self, data: bytes | mmap.mmap, subject: str = "layer index") -> None:
        """Take over ``data``, a whole index file; StorageError if it is not intact."""
        view = memoryview(data)
        fields = _verify(view, subject)
        (
            self.blob_size,
            self.toc_offset,
            self.content_bytes,
            landmark,
            self.entries,
            self.names,
            self.directories,
            self.files,
            self.chunks,
            self.members,
            self.entries_with_xattrs,
            packing,
        ) = fields[4:16]
        self.packing = Packing(packing)
        self.landmark: int | None = None if landmark == NO_LANDMARK_SEEN else landmark
        offsets = fields[16:]
        self._data = data
        self._records_at = offsets[Section.INODES]
        self._names_at = offsets[Section.NAMES]
        self._chunks_at = offsets[Section.CHUNKS]
        self._digests_at = offsets[Section.DIGESTS]
        self._xattrs_at = offsets[Section.XATTRS]
        self._symlinks_at = offsets[Section.SYMLINKS]

        def u32(section: Section, count: int) -> memoryview:
            return view[offsets[section] : offsets[section] + 4 * count].cast("I")

        def u64(section: Section, count: int) -> memoryview:
            return view[offsets[section] : offsets[section] + 8 * count].cast("Q")

        self._view = view
        self._words = u32(Section.INODES, self.entries * RECORD_WORDS)
        self._prefixes = u64(Section.PREFIXES, self.names)
        self._targets = u32(Section.TARGETS, self.names)
        self._name_ends = u32(Section.NAME_ENDS, self.names + 1)
        self._chunk_words = u32(Section.CHUNKS, self.chunks * CHUNK_WORDS)
        self._members = u64(Section.MEMBERS, self.members + 1)
        self._member_ends = u32(Section.MEMBER_ENDS, self.members + 1)
        self._member_chunks = u32(Section.MEMBER_CHUNKS, self._member_ends[self.members])

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Map an index file and verify it; StorageError if it is missing or not intact."""
        try:
            with Path(path).open("rb", buffering=0) as stream:
                # what the disk does not give fails here; in the map it would end the process
                buffer = bytearray(limits.MIB)
                while stream.readinto(buffer):
                    pass
                data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise StorageError(f"cannot map the layer index: {error}", subject=str(path)) from error
        return cls(data, str(path))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read an index from memory; StorageError if it is not intact."""
        return cls(data)

    def close(self) -> None:
        """Let go of the map; may be called again.

        A method that another thread is in at that moment finishes, or raises
        AttributeError; it never answers wrongly.
        """
        # The map itself goes with its last user: it cannot be unmapped under a memoryview.
        self.entries = self.names = self.chunks = self.members = 0
        for table in self._TABLES:
            self.__dict__.pop(table, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<LayerIndex of {self.entries} entries, {self.chunks} chunks>"

    def __reduce__(self) -> str:
        raise TypeError("a LayerIndex cannot be pickled: open its file instead")

    # -- tree -------------------------------------------------------------------------

    def inode(self, entry: int) -> Inode:
        """The attributes of ``entry``."""
        if not 0 <= entry < self.entries:
            raise IndexError(f"no entry {entry}")
        mode, uid, gid, nlink, size, major, minor, mtime, xattrs = ATTRIBUTES.unpack_from(
            self._data, self._records_at + entry * RECORD_BYTES
        )
        return Inode(mode, uid, gid, nlink, size, major, minor, mtime, xattrs != 0)

    def mode(self, entry: int) -> int:
        """The mode of ``entry``, file type included."""
        return self._word(entry, 0)

    def lookup(self, directory: int, name: bytes) -> int | None:
        """The entry that ``name`` names in ``directory``, None if there is none."""
        first, end = self._span(directory)
        key = prefix(name)
        prefixes = self._prefixes
        low = bisect_left(prefixes, key, first, end)
        if low == end or prefixes[low] != key:
            return None
        high = bisect_right(prefixes, key, low, end)
        while low < high:
            middle = (low + high) // 2
            found = self._name(middle)
            if found == name:
                return int(self._targets[middle])
            if found < name:
                low = middle + 1
            else:
                high = middle
        return None

    def children(self, directory: int, start: int = 0, stop: int | None = None) -> list[Child]:
        """Names number ``start`` to ``stop`` (all from there on if None) of a directory, sorted."""
        first, end = self._span(directory)
        stop = end if stop is None else min(first + max(stop, 0), end)
        words, targets = self._words, self._targets
        found = []
        for number in range(first + max(start, 0), stop):
            entry = targets[number]
            found.append(Child(self._name(number), entry, words[entry * RECORD_WORDS]))
        return found

    def parent(self, directory: int) -> int:
        """The directory in which ``directory`` lies; the root is its own parent."""
        if not stat.S_ISDIR(self.mode(directory)):
            raise IndexError(f"entry {directory} is no directory")
        return self._word(directory, EXTRA_WORD)

    def entry_of_path(self, path: bytes) -> int | None:
        """The entry at a path from the root, symbolic links not followed; None if there is none."""
        entry = ROOT
        for name in path.split(b"/"):
            if name not in (b"", b"."):
                found = self.lookup(entry, name)
                if found is None:
                    return None
                entry = found
        return entry

    def walk(self) -> Iterator[tuple[bytes, int]]:
        """(path, entry) of every name, parents first, each directory sorted; the root is ``b""``."""
        yield b"", ROOT
        pending = [(b"", iter(self.children(ROOT)))]
        while pending:
            base, children = pending[-1]
            child = next(children, None)
            if child is None:
                pending.pop()
                continue
            path = base + child.name
            yield path, child.entry
            if stat.S_ISDIR(child.mode):
                pending.append((path + b"/", iter(self.children(child.entry))))

    def symlink(self, entry: int) -> bytes:
        """The target of a symbolic link; IndexError for anything else."""
        if not stat.S_ISLNK(self.mode(entry)):
            raise IndexError(f"entry {entry} is no symbolic link")
        start = self._symlinks_at + self._word(entry, FIRST_WORD)
        return self._data[start : start + self._word(entry, COUNT_WORD)]

    def xattrs(self, entry: int) -> list[tuple[bytes, bytes]]:
        """All extended attributes of ``entry``, sorted by name."""
        offset = self._word(entry, XATTR_WORD)
        return list(read_xattrs(self._view[self._xattrs_at :], offset).items()) if offset else []

    def xattr(self, entry: int, name: bytes) -> bytes | None:
        """The value of one extended attribute, None if ``entry`` does not have it."""
        offset = self._word(entry, XATTR_WORD)
        return read_xattrs(self._view[self._xattrs_at :], offset).get(name) if offset else None

    # -- contents ---------------------------------------------------------------------

    def content(self, entry: int) -> FileContent | None:
        """What a regular file consists of; None for anything else."""
        if not stat.S_ISREG(self.mode(entry)):
            return None
        base = entry * RECORD_WORDS
        words = self._words
        size = ATTRIBUTES.unpack_from(self._data, self._records_at + entry * RECORD_BYTES)[4]
        first, count = words[base + FIRST_WORD], words[base + COUNT_WORD]
        if not count:
            return FileContent(size, _EMPTY, _EMPTY, True, 0, 0)
        extra = words[base + EXTRA_WORD]
        if count == 1 and not extra:
            digest = self.chunk(first).digest
            return FileContent(size, digest, digest, True, first, 1)
        digest, key = DIGEST_PAIR.unpack_from(
            self._data, self._digests_at + (extra - 1) * DIGEST_PAIR.size
        )
        known = words[base + FLAGS_WORD] & FLAG_DIGEST
        return FileContent(size, digest if known else None, key, False, first, count)

    def object_marks(self) -> Iterator[int]:
        """The first eight bytes, as a native number, of the name of each object that files need.

        Some may come several times, and some that name no object.
        """
        view = self._view
        chunks = view[self._chunks_at : self._chunks_at + self.chunks * CHUNK_BYTES]
        for (mark,) in CHUNK_MARK.iter_unpack(chunks):
            yield mark
        for pair in PAIR_MARKS.iter_unpack(view[self._digests_at : self._xattrs_at]):
            yield from pair

    def chunk(self, number: int) -> Chunk:
        """Chunk ``number`` of the layer."""
        if not 0 <= number < self.chunks:
            raise IndexError(f"no chunk {number}")
        start, size, member, inner, digest, _ = CHUNK.unpack_from(
            self._data, self._chunks_at + number * CHUNK_BYTES
        )
        return Chunk(start, size, digest, member, inner)

    def chunk_owner(self, number: int) -> int:
        """The regular file of which chunk ``number`` is a part."""
        if not 0 <= number < self.chunks:
            raise IndexError(f"no chunk {number}")
        return int(self._chunk_words[number * CHUNK_WORDS + OWNER_WORD])

    def chunks_between(self, entry: int, offset: int, end: int) -> range:
        """The chunks that hold bytes ``offset`` to ``end`` of a regular file, in file order."""
        content = self.content(entry)
        end = min(end, content.size) if content else 0
        if content is None or offset >= end:
            return range(0)
        numbers = range(content.first_chunk, content.first_chunk + content.chunk_count)
        first = bisect_right(numbers, max(offset, 0), key=self._chunk_start) - 1
        last = bisect_left(numbers, end, key=self._chunk_start)
        return numbers[first:last]

    def member(self, number: int) -> Member:
        """Member ``number``; members are in the order of the blob."""
        if not 0 <= number < self.members:
            raise IndexError(f"no member {number}")
        return Member(self._members[number], self._members[number + 1])

    def member_chunks(self, number: int) -> list[int]:
        """The chunks in a member by inner offset; none if no file that is shown needs it."""
        if not 0 <= number < self.members:
            raise IndexError(f"no member {number}")
        return self._member_chunks[
            self._member_ends[number] : self._member_ends[number + 1]
        ].tolist()

    # -- inside -----------------------------------------------------------------------

    def _word(self, entry: int, word: int) -> int:
        if not 0 <= entry < self.entries:
            raise IndexError(f"no entry {entry}")
        return int(self._words[entry * RECORD_WORDS + word])

    def _span(self, directory: int) -> tuple[int, int]:
        """The names of a directory, as numbers; empty for anything else."""
        if not 0 <= directory < self.entries:
            raise IndexError(f"no entry {directory}")
        base = directory * RECORD_WORDS
        words = self._words
        if not stat.S_ISDIR(words[base]):
            return 0, 0
        first = words[base + FIRST_WORD]
        return first, first + words[base + COUNT_WORD]

    def _name(self, number: int) -> bytes:
        ends, at = self._name_ends, self._names_at
        return self._data[at + ends[number] : at + ends[number + 1]]

    def _chunk_start(self, number: int) -> int:
        return self.chunk(number).file_offset


def _verify(view: memoryview, subject: str) -> tuple[Any, ...]:
    """The header's fields, once the whole file has been found intact."""
    advice = "it is built again from the layer's TOC"
    if len(view) < HEADER.size + CHECKSUM_BYTES:
        raise StorageError("a layer index is cut off", subject=subject, advice=advice)
    fields = HEADER.unpack_from(view)
    if fields[0] != MAGIC:
        raise StorageError("this is no layer index", subject=subject, advice=advice)
    if fields[1:3] != (VERSION, BYTE_ORDER):
        raise StorageError(
            "a layer index of another version or machine", subject=subject, advice=advice
        )
    if fields[3] != len(view):
        raise StorageError("a layer index has the wrong length", subject=subject, advice=advice)
    running = checksum()
    running.update(view[:-CHECKSUM_BYTES])
    if running.digest() != view[-CHECKSUM_BYTES:]:
        raise StorageError("a layer index is damaged", subject=subject, advice=advice)
    return fields
