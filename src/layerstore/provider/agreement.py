"""Whether a layer's tar stream holds just what its index shows.

A blob can be read as a tar stream or through its TOC, and a hostile one says different
things there (als-protocol, section 9).  The tree that the tar stream gives is built by the
same rules as that of the TOC, and the two are compared: names, types, permissions, owners,
sizes, link targets, devices, extended attributes, hard links, whiteouts and every byte.

What the formats cannot tell is no lie: a TOC may round times to seconds.  ``security.selinux`` belongs to the machine, not to the layer.
"""

from __future__ import annotations

import hashlib
import io
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Final

from layerstore import limits
from layerstore.errors import InvalidLayer, LimitExceeded, VerificationError
from layerstore.formats import LayerStream, TarEntry, TarReader, TocEntry
from layerstore.formats.compression import Readable
from layerstore.formats.tartoc import FileRead, Piece, tar_entries
from layerstore.image import Digest
from layerstore.layertree import LayerIndex, build_index, clean_path

_PIECE_BYTES: Final = 4 * limits.MIB
_END: Final = 1 << 62
_SECOND: Final = 1_000_000_000
_NOT_CONTENT: Final = frozenset((b"security.selinux",))


@dataclass(frozen=True, slots=True)
class TarFacts:
    """What was found in a whole blob: the digest of its tar stream, and its length in bytes."""

    diff_id: Digest
    diff_size: int


def check_agreement(
    index: LayerIndex, blob: Readable, *, check: Callable[[], None] = lambda: None
) -> TarFacts:
    """Read a complete blob through and compare its tree with what ``index`` shows.

    ``check`` is called often, and stops the work by raising.  Raises VerificationError that
    names the first difference; InvalidLayer, LimitExceeded or UnsupportedFormat for a blob that
    is no tar archive which can be read.  Memory grows with the number of entries only.
    """
    stream = _Hashed(LayerStream(blob), check)
    out = io.BytesIO()
    reading = _Reading(index, TarReader(stream))
    build_index(reading.entries(), out, blob_size=_END, toc_offset=_END)
    while stream.read(limits.MIB):
        pass
    with LayerIndex.from_bytes(out.getvalue()) as found:
        difference = _difference(index, found, check)
    if difference is not None:
        raise VerificationError(difference, subject="the layer's table of contents")
    return TarFacts(Digest(f"sha256:{stream.hash.hexdigest()}"), stream.size)


class _Hashed:
    """A stream that is hashed and counted."""

    def __init__(self, stream: Readable, check: Callable[[], None]) -> None:
        self._stream = stream
        self._check = check
        self.hash = hashlib.sha256()
        self.size = 0

    def read(self, n: int, /) -> bytes:
        self._check()
        data = self._stream.read(n)
        self.hash.update(data)
        self.size += len(data)
        if self.size > limits.LAYER_BYTES:
            raise LimitExceeded("the layer's tar stream is too long")
        return data


class _Reading:
    """The tar stream as TOC entries, its files cut as the index has them cut."""

    def __init__(self, index: LayerIndex, reader: TarReader) -> None:
        self._index = index
        self._reader = reader
        self._place = 512  # of a made-up blob: no two pieces share one

    def entries(self) -> Iterator[TocEntry]:
        return tar_entries(self._reader, self._read)

    def _read(self, entry: TarEntry) -> FileRead:
        pieces: list[Piece] = []
        whole = hashlib.sha256() if self._wants_digest(entry) else None
        for size, hole in self._cuts(entry):
            pieces.append(self._piece(size, hole, whole))
        if whole is None:
            return FileRead(pieces[0].digest if len(pieces) == 1 else None, tuple(pieces))
        return FileRead(whole.digest(), tuple(pieces))

    def _piece(self, size: int, hole: bool, whole: hashlib._Hash | None) -> Piece:
        running = hashlib.sha256()
        zeros = hole
        left = size
        while left:
            data = self._reader.read(min(_PIECE_BYTES, left))
            left -= len(data)
            zeros = zeros and not data.strip(b"\0")
            if not hole or not zeros:
                running.update(data)
            if whole is not None:
                whole.update(data)
        if zeros:
            return Piece(size, b"", hole=True)
        self._place += 1
        return Piece(size, running.digest(), self._place)

    def _found(self, entry: TarEntry) -> int | None:
        try:
            found = self._index.entry_of_path(clean_path(entry.name, "an entry"))
        except (InvalidLayer, LimitExceeded):
            return None  # the tree says so, with the name
        if found is None or self._index.inode(found).size != entry.size:
            return None
        return found if stat.S_ISREG(self._index.mode(found)) else None

    def _wants_digest(self, entry: TarEntry) -> bool:
        found = self._found(entry)
        content = None if found is None else self._index.content(found)
        return content is not None and not content.plain and content.digest is not None

    def _cuts(self, entry: TarEntry) -> Iterator[tuple[int, bool]]:
        """Sizes of the pieces of a file, and whether each should be a hole."""
        found = self._found(entry)
        content = None if found is None else self._index.content(found)
        if content is not None and content.chunk_count:
            for number in range(content.first_chunk, content.first_chunk + content.chunk_count):
                chunk = self._index.chunk(number)
                yield chunk.size, chunk.hole
            return
        for offset in range(0, entry.size, _PIECE_BYTES):
            yield min(_PIECE_BYTES, entry.size - offset), False


def _difference(shown: LayerIndex, found: LayerIndex, check: Callable[[], None]) -> str | None:
    """The first difference between two trees."""
    same: dict[int, int] = {}
    back: dict[int, int] = {}
    for number, (one, other) in enumerate(zip_longest(shown.walk(), found.walk())):
        if number % 1024 == 0:
            check()
        if one is None or other is None or one[0] != other[0]:
            if other is None or (one is not None and one[0] < other[0]):
                return f"{_shown(one[0] if one else b'')} is not in the tar stream"
            return f"{_shown(other[0])} is in the tar stream only"
        path, entry = one
        if (
            same.setdefault(entry, other[1]) != other[1]
            or back.setdefault(other[1], entry) != entry
        ):
            return f"{_shown(path)}: other hard links than in the tar stream"
        what = _node_difference(shown, entry, found, other[1])
        if what is not None:
            return f"{_shown(path)}: another {what} than in the tar stream"
    return None


def _shown(path: bytes) -> str:
    return repr("/" + path.decode(errors="backslashreplace"))


def _node_difference(shown: LayerIndex, one: int, found: LayerIndex, other: int) -> str | None:
    a, b = shown.inode(one), found.inode(other)
    if stat.S_IFMT(a.mode) != stat.S_IFMT(b.mode):
        return "type"
    if a.mode != b.mode:
        return "mode"
    if (a.uid, a.gid) != (b.uid, b.gid):
        return "owner"
    if (a.major, a.minor) != (b.major, b.minor):
        return "device"
    if abs(a.mtime_ns // _SECOND - b.mtime_ns // _SECOND) > 1:
        return "time"
    if (a.has_xattrs or b.has_xattrs) and _xattrs(shown, one) != _xattrs(found, other):
        return "set of extended attributes"
    if stat.S_ISLNK(a.mode):
        return None if shown.symlink(one) == found.symlink(other) else "target"
    if not stat.S_ISREG(a.mode):
        return None
    if a.size != b.size:
        return "size"
    mine, its = shown.content(one), found.content(other)
    assert mine is not None
    assert its is not None
    same = mine.key == its.key and (None in (mine.digest, its.digest) or mine.digest == its.digest)
    return None if same else "content"


def _xattrs(index: LayerIndex, entry: int) -> dict[bytes, bytes]:
    return {name: value for name, value in index.xattrs(entry) if name not in _NOT_CONTENT}
