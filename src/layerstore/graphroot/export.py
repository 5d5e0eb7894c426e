"""A layer's tar stream from what is in the graph root.

A layer that was extracted from a blob has a tar-split beside it and comes back byte by byte: the
contents of its files are put between the kept headers, and their checksums compared.  The layer
of a container has none; its archive is made afresh (containers/storage ``pkg/archive``:
``TarWithOptions``, ``overlayWhiteoutConverter.ConvertWrite``): names sorted, hard links to the
first of their names, a character device 0:0 back to ``.wh.NAME``, the overlay's opaque
attribute to an entry ``.wh..wh..opq`` if a layer below has that directory.  As there, only
``security.capability``, ``security.ima`` and ``user.*`` attributes are written, times have whole
seconds, and sockets are left out.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from layerstore import limits
from layerstore.errors import StorageError, UnsupportedFormat
from layerstore.formats import tarstream
from layerstore.formats.tarheader import tar_header
from layerstore.graphroot.beneath import Beneath, clean, through
from layerstore.graphroot.lowertree import LowerTrees, is_opaque, is_whiteout
from layerstore.graphroot.tarsplit import assemble
from layerstore.graphroot.whiteouts import OPAQUE_MARKER, WHITEOUT_PREFIX

_PIECE: Final = limits.MIB
_SECOND: Final = 10**9
_SECURITY: Final = frozenset((b"security.capability", b"security.ima"))
_REDIRECTS: Final = (b"overlay.metacopy", b"overlay.redirect")
_KINDS: Final = {
    stat.S_IFCHR: tarstream.CHARACTER,
    stat.S_IFBLK: tarstream.BLOCK_DEVICE,
    stat.S_IFIFO: tarstream.FIFO,
}


def export_diff(diff: Path, lowers: Sequence[Path], tar_split: Path | None) -> Iterator[bytes]:
    """The uncompressed tar stream of the layer whose files are in ``diff``, in pieces.

    ``lowers`` are the ``diff`` directories of the layers below, nearest first.  With ``tar_split``
    the stream is the one that the layer was made of; a file that is not in ``diff`` is looked for
    in ``lowers``.  Without, a fresh archive is made.

    Raises CorruptStorage naming the file that is missing or has changed, UnsupportedFormat for a
    layer that only the kernel's overlay can read, StorageError.
    """
    if tar_split is None:
        return _fresh(diff, lowers)
    return _exact(diff, lowers, tar_split)


def _exact(diff: Path, lowers: Sequence[Path], tar_split: Path) -> Iterator[bytes]:
    try:
        with tar_split.open("rb") as file, opened_files(diff, lowers) as open_file:
            yield from assemble(file, open_file)
    except OSError as error:
        raise StorageError(f"cannot export: {error}", subject=str(diff)) from error


@contextlib.contextmanager
def opened_files(diff: Path, lowers: Sequence[Path]) -> Iterator[Callable[[bytes], BinaryIO]]:
    """What opens a regular file by its name in the archive, in ``diff`` or else in ``lowers``.

    Both it and opening the trees raise OSError; it raises InvalidLayer for a name that leads out.
    """
    with Beneath(diff) as tree, LowerTrees(lowers) as below:

        def open_file(name: bytes) -> BinaryIO:
            path = clean(name)
            tree.trim()
            try:
                fd = tree.open_file(path)
            except (FileNotFoundError, NotADirectoryError):
                fd = below.open_file(path)
            return open(fd, "rb")

        yield open_file


def _fresh(diff: Path, lowers: Sequence[Path]) -> Iterator[bytes]:
    try:
        with Beneath(diff) as tree, LowerTrees(lowers) as below:
            yield from _Archive(tree, below).entries()
    except OSError as error:
        raise StorageError(f"cannot export: {error}", subject=str(diff)) from error


class _Archive:
    """A fresh archive of one tree, as overlay wrote it."""

    def __init__(self, tree: Beneath, below: LowerTrees) -> None:
        self._tree = tree
        self._below = below
        self._first_names: dict[tuple[int, int], bytes] = {}  # of files with several

    def entries(self) -> Iterator[bytes]:
        # Paths still to write, the next one last: no recursion, trees may be deep.
        ahead = self._names(b"")
        while ahead:
            path = ahead.pop()
            self._tree.trim()
            parent, _, name = path.rpartition(b"/")
            directory = self._tree.directory(parent)
            found = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if is_whiteout(found):
                target = (
                    parent + b"/" + WHITEOUT_PREFIX + name if parent else WHITEOUT_PREFIX + name
                )
                yield _header(target, tarstream.REGULAR, found, mode=0)
            elif stat.S_ISDIR(found.st_mode):
                yield from self._directory(path, found)
                ahead += self._names(path)
            elif not stat.S_ISSOCK(found.st_mode):
                yield from self._file(path, directory, name, found)
        yield bytes(2 * tarstream.BLOCK)

    def _names(self, path: bytes) -> list[bytes]:
        start = path + b"/" if path else b""
        names = sorted(map(os.fsencode, os.listdir(self._tree.directory(path))), reverse=True)
        return [start + name for name in names]

    def _directory(self, path: bytes, found: os.stat_result) -> Iterator[bytes]:
        directory = self._tree.directory(path)
        attributes = _attributes(directory, path)
        yield _header(path + b"/", tarstream.DIRECTORY, found, xattrs=attributes)
        if is_opaque(directory) and self._below.find(path) is not None:
            yield _header(
                path + b"/" + OPAQUE_MARKER, tarstream.REGULAR, found, mode=found.st_mode & 0o777
            )

    def _file(
        self, path: bytes, directory: int, name: bytes, found: os.stat_result
    ) -> Iterator[bytes]:
        attributes = _attributes(through(directory, name), path)
        inode = (found.st_dev, found.st_ino)
        first = self._first_names.setdefault(inode, path) if found.st_nlink > 1 else path
        if first != path:
            yield _header(path, tarstream.HARD_LINK, found, link_name=first, xattrs=attributes)
        elif stat.S_ISREG(found.st_mode):
            yield from self._content(path, found, attributes)
        elif stat.S_ISLNK(found.st_mode):
            target = os.readlink(name, dir_fd=directory)
            yield _header(path, tarstream.SYMLINK, found, link_name=target, xattrs=attributes)
        else:
            yield _header(path, _KINDS[stat.S_IFMT(found.st_mode)], found, xattrs=attributes)

    def _content(
        self, path: bytes, found: os.stat_result, attributes: dict[bytes, bytes]
    ) -> Iterator[bytes]:
        with open(self._tree.open_file(path), "rb") as file:
            # The size is fixed by the header: a file that a container writes to meanwhile is cut
            # or filled up.
            size = left = os.fstat(file.fileno()).st_size
            yield _header(path, tarstream.REGULAR, found, size=size, xattrs=attributes)
            while left:
                data = file.read(min(left, _PIECE))
                if not data:
                    data = bytes(min(left, _PIECE))
                left -= len(data)
                yield data
        if size % tarstream.BLOCK:
            yield bytes(-size % tarstream.BLOCK)


def _header(
    name: bytes,
    kind: bytes,
    found: os.stat_result,
    *,
    mode: int | None = None,
    size: int = 0,
    link_name: bytes = b"",
    xattrs: dict[bytes, bytes] | None = None,
) -> bytes:
    device = (0, 0)
    if kind in (tarstream.CHARACTER, tarstream.BLOCK_DEVICE):
        device = (os.major(found.st_rdev), os.minor(found.st_rdev))
    return tar_header(
        name,
        kind,
        mode=found.st_mode & 0o7777 if mode is None else mode,
        uid=found.st_uid,
        gid=found.st_gid,
        size=size,
        mtime=(found.st_mtime_ns + _SECOND // 2) // _SECOND,
        link_name=link_name,
        device=device,
        xattrs=xattrs,
    )


def _attributes(file: int | bytes, path: bytes) -> dict[bytes, bytes]:
    """The attributes that go into an archive."""
    follow = not isinstance(file, bytes)
    found: dict[bytes, bytes] = {}
    try:
        names = [os.fsencode(name) for name in os.listxattr(file, follow_symlinks=follow)]
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return found
        raise
    for name in names:
        if name.partition(b".")[2] in _REDIRECTS:
            raise UnsupportedFormat(
                "the file's content or children lie elsewhere (overlay metacopy or redirect_dir), "
                "which only the kernel puts together",
                subject=path[:256].decode(errors="replace"),
                advice="commit the container with podman",
            )
        if name in _SECURITY or (
            name.startswith(b"user.") and not name.startswith(b"user.overlay.")
        ):
            found[name] = os.getxattr(file, name, follow_symlinks=follow)
    return found
