"""Whether the files of an ordinary layer are still what its archive made of them.

The tar-split knows the archive but for the contents of files: put together with those, the tar
stream must have the layer's diff ID.  That says nothing of owners, modes, times, links, devices,
attributes, and of files that came later.  So the headers are extracted once more, into a place
for temporary files and without contents, and the two trees compared.

Not every archive comes back: one entry may take another's place, a whiteout have content, a file
be sparse.  Such a layer was never whole in that sense, and is as good as on its first day.  The
second extraction tells it from one that changed: a content that is lost is missed only where the
archive, extracted to its end, has it.
"""

from __future__ import annotations

import errno
import hashlib
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import IO, BinaryIO, Final

from layerstore import limits
from layerstore.errors import (
    ContentError,
    CorruptStorage,
    InvalidLayer,
    LayerstoreError,
    LimitExceeded,
    StorageError,
)
from layerstore.formats import tarstream
from layerstore.formats.tarstream import TarEntry, TarReader
from layerstore.graphroot import tarsplit
from layerstore.graphroot.beneath import Beneath, clean
from layerstore.graphroot.export import opened_files
from layerstore.graphroot.extract import OVERLAYS_OWN, ExtractOptions, Extractor
from layerstore.graphroot.layers import Layer
from layerstore.graphroot.removal import remove_tree
from layerstore.graphroot.tarsplit import SplitFile
from layerstore.graphroot.treecheck import OPAQUE, tree_differences
from layerstore.graphroot.whiteouts import OPAQUE_MARKER, WHITEOUT_PREFIX

_TOLD: Final = 3  # differences of one layer
_MISSED: Final = 10_000  # contents of one layer that are looked into
_CLOCK_NS: Final = 2 * 10**9  # by which the times of a file system may lag behind ours
_SPARSE: Final = b"GNU.sparse."
_NOT_AS_SPARSE: Final = "it has a sparse file, which is not kept as in the archive"


@dataclass(frozen=True, slots=True)
class Contents:
    """What was found, "" for nothing: what has ``changed``, and why the archive is ``lost``.

    Of an archive that is lost no file need have changed.
    """

    changed: str = ""
    lost: str = ""


def layer_contents(layer: Layer, options: ExtractOptions) -> Contents:
    """Look at the files of ``layer``, which has a diff ID and a tar-split.

    ``options`` are those that the layer was extracted with.  Raises StorageError if the layer
    cannot be read, with its ``diff`` as the subject, or if the system's place for temporary files
    cannot take it.
    """
    with tempfile.TemporaryDirectory(prefix="layerstore-check-") as scratch:
        return _Check(layer, options, Path(scratch)).contents()


class _Check:
    def __init__(self, layer: Layer, options: ExtractOptions, scratch: Path) -> None:
        self._layer = layer
        self._options = options
        self._expected = scratch / "diff"
        assert layer.diff_id is not None
        self._diff_id = layer.diff_id

    def contents(self) -> Contents:
        began = time.time_ns() - _CLOCK_NS
        self._expected.mkdir(mode=0o755)
        try:
            with (
                Extractor(self._expected, self._options) as extractor,
                tempfile.SpooledTemporaryFile(
                    max_size=limits.MIB, dir=str(self._expected.parent)
                ) as raw,
            ):
                stream = _Stream(extractor, self._expected, raw, self._diff_id.algorithm)
                self._read(stream)
                extractor.finish()
            changed = stream.missed()
            lost = ""
            if stream.misses:
                lost = stream.odd or stream.misses[0].why_lost
            elif stream.digest != self._diff_id:
                # A tar-split is exact, but for what made Go's reader leave bytes out.
                changed = "" if stream.odd else f"its files are no longer {self._diff_id}"
                lost = stream.odd
            if not changed and not stream.refused and not self._is_mapped:
                changed = self._differences(stream, began, roots=extractor.root_entry)
            return Contents(changed, "" if changed else lost)
        except CorruptStorage as error:
            return Contents(str(error))
        finally:
            remove_tree(self._expected)

    @property
    def _is_mapped(self) -> bool:
        return bool(self._layer.record.uid_map or self._layer.record.gid_map)

    def _read(self, stream: _Stream) -> None:
        split = self._layer.area.tar_split(self._layer.id)
        diff = self._layer.diff_path
        try:
            if split is None:
                raise FileNotFoundError(f"{self._layer.id} has no tar-split any more")
            with split.open("rb") as file, opened_files(diff, self._layer.lower_dirs) as open_file:
                for line in tarsplit.lines(file):
                    if isinstance(line, bytes):
                        stream.segment(line)
                    else:
                        stream.file(line, open_file)
                stream.end()
        except OSError as error:
            raise StorageError(f"cannot be read: {error}", subject=str(diff)) from error

    def _differences(self, stream: _Stream, began: int, *, roots: bool) -> str:
        return _in_short(
            tree_differences(
                self._expected,
                self._layer.diff_path,
                made_after_ns=began,
                contents=False,
                whole=stream.whole,
                roots=roots,
                optional=stream.optional,
                fewer_attributes=True,
            )
        )


@dataclass(frozen=True, slots=True)
class _Miss:
    """A content that is not there; ``number`` is that of its entry."""

    name: bytes
    number: int
    error: LayerstoreError

    @property
    def mark(self) -> bytes:
        """What stands in the place of the content in the second extraction."""
        return b"%d" % self.number

    @property
    def why_lost(self) -> str:
        """For an archive that itself leaves nothing with this content."""
        if isinstance(self.error, ContentError):
            return str(self.error)
        shown = self.name[:256].decode(errors="replace")
        return f"{shown}: the archive itself leaves no file of this content"


class _Stream:
    """An archive as it comes out of a tar-split: hashed, its headers extracted one by one.

    Each entry is read by itself, so that one that is not for us costs no other.
    """

    def __init__(
        self, extractor: Extractor, expected: Path, raw: IO[bytes], algorithm: str
    ) -> None:
        self.odd = ""  # why the archive may not come back
        self.refused = False  # whether the extraction is not all that others have made
        self.misses: list[_Miss] = []
        self.whole: set[int] = set()  # see tree_differences
        self.optional: dict[int, dict[bytes, bytes]] = {}  # see tree_differences
        self._optional_bytes = 0
        self._extractor = extractor
        self._expected = expected
        self._algorithm = algorithm
        self._hash = hashlib.new(algorithm)
        # since the last entry: headers, and what we keep of sparse files
        self._raw = raw
        self._padding: int | None = 0  # of the last entry, if it could be read
        self._unread: ContentError | None = None
        self._number = 0

    @property
    def digest(self) -> str:
        """Of the whole, if there are no ``misses``."""
        return f"{self._algorithm}:{self._hash.hexdigest()}"

    def segment(self, data: bytes) -> None:
        """Raw bytes of the stream."""
        self._hash.update(data)
        try:
            self._raw.write(data)
        except OSError as error:
            raise StorageError(
                f"cannot be written: {error}", subject=tempfile.gettempdir()
            ) from error

    def file(self, line: SplitFile, open_file: Callable[[bytes], BinaryIO]) -> None:
        """An entry.  Raises OSError if its content cannot be read, StorageError."""
        self._number += 1
        miss: _Miss | None = None
        try:
            for data in tarsplit.content(line, open_file):
                self._hash.update(data)
        except (CorruptStorage, ContentError) as error:
            miss = _Miss(line.name, self._number, error)
            if len(self.misses) < _MISSED:
                self.misses.append(miss)
        entry, read = self._entry(line)
        if entry is None and not line.size:
            # Go makes an entry of a PAX global header, which belongs to what follows.
            return
        if entry is not None and entry.sparse is not None and line.size:
            # Podman notes a sparse file as it is read, not as it is in the archive.
            self.odd = self.odd or _NOT_AS_SPARSE
            entry = replace(entry, sparse=None)
        if entry is None:
            assert self._unread is not None
            self._refuse(self._unread)
            entry = self._stand_in(line.name)
        if entry is not None and entry.sparse is not None:
            self._make_whole(entry, read)
        elif entry is not None:
            self._apply(entry, miss)
        self._raw.seek(0)
        self._raw.truncate()

    def _entry(self, line: SplitFile) -> tuple[TarEntry | None, Callable[[int], bytes]]:
        """The entry that the raw bytes begin, and what gives its payload if they hold it."""
        size = self._raw.tell()
        # Headers are blocks, so what is over belongs to the content before them.
        self._raw.seek(size % tarstream.BLOCK if self._padding is None else self._padding)
        reader = TarReader(self._raw, sparse=True)
        try:
            entry = reader.next()
            if entry is None:
                raise InvalidLayer("an entry has no header")
            self._unread, self._padding = None, entry.padding
        except ContentError as error:
            entry, self._unread = None, error
            if line.size:
                self._padding = None
                self._raw.seek(0)
                if _SPARSE in self._raw.read(limits.TAR_EXTENDED_HEADER_BYTES):
                    self.odd = self.odd or _NOT_AS_SPARSE
            self._raw.seek(size)
        return entry, reader.read

    def _stand_in(self, name: bytes) -> TarEntry | None:
        """An entry in the place of one that only others can read; its last block is its own."""
        self._raw.seek(max(0, self._raw.tell() - tarstream.BLOCK))
        try:
            entry = TarReader(self._raw).next()
        except ContentError:
            return None
        return None if entry is None else replace(entry, name=name)

    def _make_whole(self, entry: TarEntry, read: Callable[[int], bytes]) -> None:
        """Make a sparse file of ours, whose content is in the tar-split itself."""
        try:
            self._extractor.apply(entry, read)
        except ContentError as error:
            self._refuse(error)
            return
        with Beneath(self._expected) as tree:
            made = tree.stat(clean(entry.name))
        if made is not None:
            self.whole.add(made.st_ino)

    def end(self) -> None:
        """The archive is at its end."""
        if self._unread is not None:
            self._refuse(self._unread)

    def missed(self) -> str:
        """The contents that the extraction has and the layer has not."""
        with Beneath(self._expected) as tree:
            return _in_short(str(miss.error) for miss in self.misses if _has(tree, miss))

    def _apply(self, entry: TarEntry, miss: _Miss | None) -> None:
        mark = miss.mark if miss is not None and entry.type == tarstream.REGULAR else b""
        entry = replace(entry, size=len(mark))
        try:
            self._make(entry, mark)
        except StorageError as error:
            # File systems differ in what attributes they take, and how large.
            if entry.xattrs:
                self._make(replace(entry, xattrs={}), mark)
                self._refuse(error)
            elif not self._is_only_opaque(entry, error):
                raise

    def _make(self, entry: TarEntry, mark: bytes) -> None:
        try:
            self._extractor.apply(entry, BytesIO(mark).read)
            # Podman sets overlay's own attributes, we do not; Podman 4 leaves out those without a
            # value.
            unsure = {
                name: value
                for name, value in entry.xattrs.items()
                if not value or name.startswith(OVERLAYS_OWN)
            }
            if unsure:
                self._note_optional(clean(entry.name), unsure)
        except ContentError as error:
            self._refuse(error)

    def _is_only_opaque(self, entry: TarEntry, error: StorageError) -> bool:
        """Whether all that failed is that the place for temporary files has no such attribute."""
        parent, _, last = clean(entry.name).rpartition(b"/")
        cause = error.__cause__
        lacking = isinstance(cause, OSError) and cause.errno == errno.ENOTSUP
        if not lacking or not last.startswith(WHITEOUT_PREFIX):
            return False
        hidden = b"" if last == OPAQUE_MARKER else last.removeprefix(WHITEOUT_PREFIX)
        self._note_optional(b"/".join(filter(None, (parent, hidden))), {OPAQUE[0]: b"y"})
        return True

    def _note_optional(self, path: bytes, xattrs: dict[bytes, bytes]) -> None:
        self._optional_bytes += sum(map(len, (*xattrs.keys(), *xattrs.values())))
        if self._optional_bytes > limits.OPTIONAL_ATTRIBUTES_BYTES:
            self._refuse(LimitExceeded("the layer has too many attributes of overlay's own"))
            return
        with Beneath(self._expected) as tree:
            made = tree.stat(path)
        if made is not None:
            self.optional.setdefault(made.st_ino, {}).update(xattrs)

    def _refuse(self, error: LayerstoreError) -> None:
        self.refused = True
        self.odd = self.odd or str(error)


def _has(tree: Beneath, miss: _Miss) -> bool:
    try:
        with open(tree.open_file(clean(miss.name)), "rb") as file:
            return file.read(len(miss.mark) + 1) == miss.mark
    except (OSError, ContentError):
        return False


def _in_short(found: Iterable[str]) -> str:
    told = list(islice(found, _TOLD + 1))
    return "; ".join([*told[:_TOLD], *(["and more"] if told[_TOLD:] else [])])
