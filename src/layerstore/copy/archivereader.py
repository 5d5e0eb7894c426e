"""The files inside a tar archive, read in place.

Image archives are tar files that hold an image's files; nothing of them is ever extracted.
One pass over the headers gives the place of each file, after which it is read from there.
A compressed archive is unpacked into a nameless temporary file first.  Symbolic links
(older versions of Docker write a layer that occurs twice so) lead to other entries of the
same archive or nowhere.
"""

from __future__ import annotations

import bz2
import contextlib
import lzma
import os
import posixpath
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from layerstore import limits
from layerstore.copy.localfiles import LocalFile, read_all, said, scratch_directory
from layerstore.copy.transport import PIECE_BYTES
from layerstore.errors import (
    InvalidLayer,
    LayerstoreError,
    LimitExceeded,
    NotFound,
    StorageError,
)
from layerstore.formats import Compression, LayerStream, TarReader
from layerstore.formats.compression import Readable, detect
from layerstore.formats.tarstream import DIRECTORY, HARD_LINK, REGULAR, SYMLINK

_BZIP2: Final = b"BZh"
_XZ: Final = b"\xfd7zXZ\0"
_LINKS: Final = 16  # that one name may lead through


@dataclass(frozen=True, slots=True)
class _Member:
    offset: int
    size: int
    type: bytes
    target: str  # normalised name that a link leads to


class TarFiles:
    """A ``FileSet`` over an archive; close it."""

    def __init__(self, path: Path, subject: str, *, scratch: Path | None = None) -> None:
        """Open ``path`` (also a pipe, read to its end) and find out what is in it.

        Raises ``NotFound``, ``StorageError``, ``InvalidLayer`` for a broken archive or one
        that reaches outside of itself, and ``LimitExceeded``.
        """
        self._subject = subject
        self._members: dict[str, _Member] = {}
        self._twice: set[str] = set()
        try:
            self._file = _open(path, scratch_directory(scratch))
        except FileNotFoundError:
            raise NotFound("there is no such file", subject=subject) from None
        except OSError as error:
            raise StorageError(said(error), subject=subject) from error
        except LayerstoreError as error:
            error.subject = error.subject or subject
            raise
        try:
            self._index()
        except OSError as error:
            self.close()
            raise StorageError(said(error), subject=subject) from error
        except LayerstoreError as error:
            self.close()
            error.subject = error.subject or subject
            raise

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def open(self, name: str) -> LocalFile:
        """See ``FileSet``."""
        member = self._resolve(name)
        return LocalFile(
            self._file.fileno(),
            member.offset,
            member.size,
            f"{self._subject}: {name}",
            owned=False,
        )

    def read(self, name: str, limit: int) -> bytes:
        """See ``FileSet``."""
        with self.open(name) as file:
            return read_all(file, limit, f"{self._subject}: {name}")

    def close(self) -> None:
        """No more will be read."""
        self._file.close()

    def _index(self) -> None:
        end = os.fstat(self._file.fileno()).st_size
        position = 0
        while True:
            self._file.seek(position)
            entry = TarReader(self._file, offset=position).next()
            if entry is None:
                return
            position = entry.payload_offset + entry.size + entry.padding
            if entry.payload_offset + entry.size > end:
                raise InvalidLayer("the archive is truncated")
            name = _inside(entry.name)
            if entry.type == DIRECTORY:
                continue
            if len(self._members) >= limits.ARCHIVE_MEMBERS:
                raise LimitExceeded(f"an archive has at most {limits.ARCHIVE_MEMBERS} files")
            target = ""
            if entry.type == SYMLINK:
                link = entry.link_name
                if not link.startswith(b"/"):
                    link = posixpath.join(posixpath.dirname(entry.name), link)
                target = _inside(link, link=entry.name)
            elif entry.type == HARD_LINK:
                target = _inside(entry.link_name, link=entry.name)
            if name in self._members:
                self._twice.add(name)
            self._members[name] = _Member(entry.payload_offset, entry.size, entry.type, target)

    def _resolve(self, name: str) -> _Member:
        wanted = f"{self._subject}: {name}"
        for _ in range(_LINKS):
            member = self._members.get(name)
            if member is None:
                raise NotFound("the archive has no such file", subject=wanted)
            if name in self._twice:
                raise InvalidLayer("the archive has this file twice", subject=wanted)
            if member.type == REGULAR:
                return member
            if member.type not in (SYMLINK, HARD_LINK):
                raise InvalidLayer("not a regular file", subject=wanted)
            name = member.target
        raise InvalidLayer("links in the archive go round in circles", subject=wanted)


def _inside(raw: bytes, link: bytes | None = None) -> str:
    """The normalised name of an entry; raises ``InvalidLayer`` for one outside."""
    name = os.fsdecode(posixpath.normpath(raw)) if raw else ""
    if not name or name.startswith("/") or name == ".." or name.startswith("../"):
        shown = os.fsdecode(raw if link is None else link)[:200]
        what = "an entry" if link is None else "a link"
        raise InvalidLayer(f"{what} of the archive leads outside of it: {shown!r}")
    return name


def _open(path: Path, scratch: Path) -> BinaryIO:
    """The archive as a plain seekable file."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        unpack = _unpacker(file.peek(8)[:8])
        if unpack is None and regular:
            stack.pop_all()
            return file
        source = file if unpack is None else unpack(file)
        with contextlib.ExitStack() as inner:
            plain = inner.enter_context(tempfile.TemporaryFile(prefix="layerstore-", dir=scratch))
            written = 0
            while data := source.read(PIECE_BYTES):
                written += len(data)
                if written > limits.ARCHIVE_BYTES:
                    raise LimitExceeded(f"more than {limits.ARCHIVE_BYTES} bytes when unpacked")
                plain.write(data)
            plain.flush()
            inner.pop_all()
            return plain


class _Standard:
    """A decompressor of the standard library, its errors made ours."""

    def __init__(self, file: Readable) -> None:
        self._file = file

    def read(self, n: int, /) -> bytes:
        try:
            return self._file.read(n)
        except (EOFError, lzma.LZMAError, ValueError) as error:
            raise InvalidLayer(f"the compressed archive is damaged: {error}") from None
        except OSError as error:
            if error.errno is not None:
                raise
            raise InvalidLayer(f"the compressed archive is damaged: {error}") from None


def _unpacker(head: bytes) -> Callable[[BinaryIO], Readable] | None:
    if head.startswith(_BZIP2):
        return lambda file: _Standard(bz2.BZ2File(file))
    if head.startswith(_XZ):
        return lambda file: _Standard(lzma.LZMAFile(file))
    return LayerStream if detect(head) is not Compression.NONE else None
