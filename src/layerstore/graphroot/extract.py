"""Making the files of a layer from its tar stream, as containers/storage does.

What stands in an overlay layer's ``diff`` after a pull by Podman is the measure
(containers/storage ``pkg/archive``: ``Unpack``, ``extractTarFileEntry``,
``overlayWhiteoutConverter``):

* An entry replaces what has its path, except that directories merge.  Parents that have no
  entry of their own are made, 0755 and root's.
* Symbolic links on the way to an entry are followed, inside the layer.
* The root's owner, mode and time count only when it is called ``/``; ``./`` says nothing.
* ``.wh.NAME`` becomes a character device 0:0 with the entry's owner, ``.wh..wh..opq`` the
  overlay's opaque attribute.  A whiteout below a whiteout is nothing.
* Of sparse files the holes stay holes, which Podman fills with zeros.
* Times before 1970 and after 2262 become 1970, except those of symbolic links.
* Device nodes are left out inside a user namespace, where nobody may make them.

Unlike there, nothing that leads out of the layer is taken: a ``..`` that climbs out of it
is refused, not stopped at the root.

How it is made safe: no path is walked but by ``beneath``, files are only ever created anew, and
nothing is opened that the archive could have made a device or a pipe.  How it is made fast:
descriptors of directories are kept, and no system call is made whose effect is there already.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, NoReturn, Self

from layerstore import limits
from layerstore.errors import InvalidLayer, LayerstoreError, LimitExceeded, StorageError
from layerstore.formats import tarstream
from layerstore.formats.compression import Readable
from layerstore.formats.tarstream import TarEntry, TarReader, shown
from layerstore.graphroot.beneath import Beneath, clean, open_directory, through
from layerstore.graphroot.removal import remove_tree
from layerstore.graphroot.whiteouts import OPAQUE_MARKER, WHITEOUT_PREFIX, WhiteoutStyle

_PIECE: Final = limits.MIB
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LAST_NS: Final = (1 << 63) - 1
_SPECIAL: Final = 0o7000
_PARENT_MODE: Final = 0o755
_IGNORED_XATTRS: Final = frozenset((b"security.selinux",))
# How the mounts read a layer is not the archive's to say: redirects, opacity, owners.
OVERLAYS_OWN: Final = (b"trusted.overlay.", b"user.overlay.", b"user.fuseoverlayfs.")
_DEFAULT_ACL: Final = b"system.posix_acl_default"
_NODES: Final = {
    tarstream.CHARACTER: stat.S_IFCHR,
    tarstream.BLOCK_DEVICE: stat.S_IFBLK,
    tarstream.FIFO: stat.S_IFIFO,
}

# What an archive can bring about; everything else is this machine's fault.
_ARCHIVES_FAULT: Final = frozenset(
    (
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.EINVAL),
        *(errno.ENAMETOOLONG, errno.EMLINK, errno.ENOTEMPTY, errno.ERANGE, errno.E2BIG),
    )
)


@dataclass(frozen=True, slots=True)
class ExtractOptions:
    """How to extract; ``ignore_chown_errors`` is Podman's option of the same name."""

    whiteouts: WhiteoutStyle = WhiteoutStyle.OVERLAY
    ignore_chown_errors: bool = False
    in_user_namespace: bool = False


def apply_tar(stream: Readable, root: Path, options: ExtractOptions | None = None) -> Extractor:
    """Extract a whole uncompressed tar stream into the directory ``root``, which is there.

    A path that comes twice is taken, the later entry wins.  Raises InvalidLayer naming the entry,
    LimitExceeded, UnsupportedFormat, StorageError; what was made until then stays.  Gives the
    extractor, closed, for what it has counted.
    """
    with Extractor(root, options or ExtractOptions()) as extractor:
        reader = TarReader(stream, sparse=True)
        for entry in reader:
            extractor.apply(entry, reader.read)
        extractor.finish()
    return extractor


class Extractor:
    """Makes the entries of one layer below ``root``; a context manager that holds descriptors.

    ``uids`` and ``gids`` are those of all entries but whiteouts; ``root_entry`` says that the
    archive had an entry for the root that counts.
    """

    def __init__(self, root: Path, options: ExtractOptions) -> None:
        """Open ``root``.  Raises StorageError."""
        self.uids: set[int] = set()
        self.gids: set[int] = set()
        self.root_entry = False
        self._options = options
        self._aufs = options.whiteouts is WhiteoutStyle.AUFS
        self._opaque = (
            b"user.overlay.opaque"
            if options.whiteouts is WhiteoutStyle.USERXATTR
            else b"trusted.overlay.opaque"
        )
        self._uid, self._gid = os.geteuid(), os.getegid()
        self._entries = 0
        try:
            self._tree = Beneath(root, self._make_parent)
        except OSError as error:
            raise StorageError(f"cannot extract there: {error}", subject=str(root)) from error
        self._open = self._tree.open
        self._root = self._tree.root
        # A directory that is setgid or has a default ACL changes what is made in it.
        self._plain = not os.fstat(self._root).st_mode & stat.S_ISGID
        with contextlib.suppress(OSError):
            self._plain &= _DEFAULT_ACL.decode() not in os.listxattr(self._root)
        self._doubtful = _SPECIAL | _umask()
        self._times: dict[bytes, int] = {}
        self._names_bytes = 0  # of the paths in _times

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tree.close()

    def apply(self, entry: TarEntry, read: Callable[[int], bytes]) -> None:
        """Make what ``entry`` says; ``read`` gives its payload, of which some may be left unread.

        Raises InvalidLayer, LimitExceeded, StorageError.
        """
        self._entries += 1
        if self._entries > limits.LAYER_ENTRIES:
            raise LimitExceeded(f"the layer has more than {limits.LAYER_ENTRIES} entries")
        if len(self._open) > limits.OPEN_DIRECTORIES:
            self._tree.trim()
        path = clean(entry.name)
        parent, _, last = path.rpartition(b"/")
        if not 0 <= entry.uid < 0xFFFFFFFF or not 0 <= entry.gid < 0xFFFFFFFF:
            _refuse(entry, f"the entry has an owner that cannot be: {entry.uid}:{entry.gid}")
        whiteout = last.startswith(WHITEOUT_PREFIX)
        if not whiteout:
            self.uids.add(entry.uid)
            self.gids.add(entry.gid)
            if max(len(self.uids), len(self.gids)) > limits.LAYER_OWNERS:
                raise LimitExceeded(f"the layer has more than {limits.LAYER_OWNERS} owners")
        try:
            if not path:
                self._apply_root(entry)
            elif whiteout and not self._aufs:
                self._apply_whiteout(entry, parent, last)
            else:
                directory = self._open.get(parent)
                if directory is None:
                    directory = self._tree.directory(parent, create=True)
                self._make(entry, path, directory, last, read)
        except OSError as error:
            raise _explained(error, entry) from error

    def finish(self) -> None:
        """Set the times of directories, which making their entries has changed."""
        for path, mtime_ns in self._times.items():
            self._tree.trim()
            try:
                self._set_directory_time(path, mtime_ns)
            except OSError as error:
                raise StorageError(f"cannot set the time: {error}", subject=shown(path)) from error

    def _set_directory_time(self, path: bytes, mtime_ns: int) -> None:
        if not path:
            os.utime(self._root, ns=(mtime_ns, mtime_ns))
            return
        parent, _, last = path.rpartition(b"/")
        # A later entry may have taken the place of this directory or of one above it.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            directory = self._tree.directory(parent)
            if stat.S_ISDIR(os.stat(last, dir_fd=directory, follow_symlinks=False).st_mode):
                os.utime(last, ns=(mtime_ns, mtime_ns), dir_fd=directory, follow_symlinks=False)

    # -- one entry -----------------------------------------------------------------

    def _apply_root(self, entry: TarEntry) -> None:
        if entry.type != tarstream.DIRECTORY:
            _refuse(entry, "the root of the layer would not be a directory")
        if not entry.name.startswith(b"/"):
            return
        self.root_entry = True
        self._times[b""] = _time(entry.mtime_ns)
        self._own(entry, self._root, found=os.fstat(self._root))
        os.fchmod(self._root, entry.mode & 0o7777)
        self._attributes(entry, self._root)
        self._mind(entry)

    def _apply_whiteout(self, entry: TarEntry, parent: bytes, last: bytes) -> None:
        hidden = last[len(WHITEOUT_PREFIX) :]
        try:
            directory = self._tree.directory(parent, create=True)
        except NotADirectoryError:
            # rm -rf of a directory: some tools write a whiteout for it and for what was in it.
            return
        if last == OPAQUE_MARKER:
            os.setxattr(directory, self._opaque, b"y")
            return
        if hidden in (b"", b".", b".."):
            _refuse(entry, "the entry is a whiteout without a name")
        try:
            os.mknod(hidden, stat.S_IFCHR, 0, dir_fd=directory)
        except FileExistsError:
            # Whiteouts are about the layers below: this layer's own entry stays.
            found = os.stat(hidden, dir_fd=directory, follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode):
                self._make_opaque(directory, hidden)
            return
        self._own(entry, hidden, directory)

    def _make_opaque(self, parent: int, name: bytes) -> None:
        fd = open_directory(parent, name)
        try:
            os.setxattr(fd, self._opaque, b"y")
        finally:
            os.close(fd)

    def _make(
        self,
        entry: TarEntry,
        path: bytes,
        directory: int,
        last: bytes,
        read: Callable[[int], bytes],
    ) -> None:
        kind = entry.type
        if kind == tarstream.REGULAR:
            self._make_file(entry, directory, last, read)
        elif kind == tarstream.DIRECTORY:
            self._make_directory(entry, path, directory, last)
        elif kind == tarstream.SYMLINK:
            self._make_symlink(entry, directory, last)
        elif kind == tarstream.HARD_LINK:
            self._make_link(entry, path, directory, last)
        else:
            self._make_node(entry, directory, last)

    def _make_file(
        self, entry: TarEntry, directory: int, last: bytes, read: Callable[[int], bytes]
    ) -> None:
        mode = entry.mode & 0o7777
        try:
            fd = os.open(last, _CREATE, mode & 0o777, dir_fd=directory)
        except FileExistsError:
            self._clear(directory, last)
            fd = os.open(last, _CREATE, mode & 0o777, dir_fd=directory)
        try:
            if entry.sparse is None:
                _write(fd, entry.size, read)
            else:
                for offset, length in entry.sparse.pieces:
                    os.lseek(fd, offset, os.SEEK_SET)
                    _write(fd, length, read)
                os.ftruncate(fd, entry.sparse.size)
            self._own(entry, fd)
            if mode & self._doubtful or not self._plain:
                os.fchmod(fd, mode)
            mtime_ns = _time(entry.mtime_ns)
            os.utime(fd, ns=(mtime_ns, mtime_ns))
            if entry.xattrs:
                self._attributes(entry, fd)
        finally:
            os.close(fd)

    def _make_directory(self, entry: TarEntry, path: bytes, directory: int, last: bytes) -> None:
        mode = entry.mode & 0o7777
        merged: os.stat_result | None = None
        try:
            os.mkdir(last, mode & 0o777, dir_fd=directory)
        except FileExistsError:
            merged = os.stat(last, dir_fd=directory, follow_symlinks=False)
            if not stat.S_ISDIR(merged.st_mode):
                merged = None
                self._clear(directory, last)
                os.mkdir(last, mode & 0o777, dir_fd=directory)
        fd = self._open.get(path)
        if fd is None:
            fd = self._open[path] = open_directory(directory, last)
        self._own(entry, fd, found=merged)
        if merged is not None or mode & self._doubtful or not self._plain:
            os.fchmod(fd, mode)
        if entry.xattrs:
            self._attributes(entry, fd)
        self._mind(entry)
        if path not in self._times:
            self._names_bytes += len(path)
            if self._names_bytes > limits.DIRECTORY_NAMES_BYTES:
                raise LimitExceeded("the paths of the layer's directories are too long in all")
        self._times[path] = _time(entry.mtime_ns)

    def _make_symlink(self, entry: TarEntry, directory: int, last: bytes) -> None:
        if not entry.link_name or b"\0" in entry.link_name:
            _refuse(entry, "the target of the symbolic link is empty or contains NUL")
        try:
            os.symlink(entry.link_name, last, dir_fd=directory)
        except FileExistsError:
            self._clear(directory, last)
            os.symlink(entry.link_name, last, dir_fd=directory)
        self._own(entry, last, directory)
        times = (entry.mtime_ns, entry.mtime_ns)
        os.utime(last, ns=times, dir_fd=directory, follow_symlinks=False)
        if entry.xattrs:
            self._attributes(entry, through(directory, last))

    def _make_link(self, entry: TarEntry, path: bytes, directory: int, last: bytes) -> None:
        target = clean(entry.link_name)
        if not target or target == path:
            _refuse(entry, "the entry is a hard link to itself or to the root")
        with contextlib.suppress(FileNotFoundError):
            self._clear(directory, last)
        parent, _, name = target.rpartition(b"/")
        try:
            source = self._tree.directory(parent)
            found = os.stat(name, dir_fd=source, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            _refuse(
                entry,
                f"the entry is a hard link to {shown(target)}, which the layer does not have",
            )
        if stat.S_ISDIR(found.st_mode):
            _refuse(entry, "the entry is a hard link to a directory")
        os.link(name, last, src_dir_fd=source, dst_dir_fd=directory, follow_symlinks=False)
        self._own(entry, last, directory, found=found)
        if not stat.S_ISLNK(found.st_mode):
            self._dress(entry, directory, last)
        if entry.xattrs:
            self._attributes(entry, through(directory, last))

    def _make_node(self, entry: TarEntry, directory: int, last: bytes) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._clear(directory, last)
        device = 0
        if entry.type != tarstream.FIFO:
            if self._options.in_user_namespace:
                return
            if not (0 <= entry.dev_major < 1 << 12 and 0 <= entry.dev_minor < 1 << 20):
                _refuse(entry, f"no device has the number {entry.dev_major}:{entry.dev_minor}")
            device = os.makedev(entry.dev_major, entry.dev_minor)
        mode = entry.mode & 0o777
        os.mknod(last, _NODES[entry.type] | mode, device, dir_fd=directory)
        self._own(entry, last, directory)
        self._dress(entry, directory, last)
        if entry.xattrs:
            self._attributes(entry, through(directory, last))

    # -- what all kinds have ---------------------------------------------------------

    def _own(
        self,
        entry: TarEntry,
        file: int | bytes,
        directory: int | None = None,
        *,
        found: os.stat_result | None = None,
    ) -> None:
        """Give the file its owner, unless it has that already.

        ``found`` says what it has if it was not made for this entry.  A change that is none
        would take a file's capabilities away.
        """
        if found is not None:
            if found.st_uid == entry.uid and found.st_gid == entry.gid:
                return
        elif self._plain and entry.uid == self._uid and entry.gid == self._gid:
            return
        try:
            if directory is None:
                os.chown(file, entry.uid, entry.gid)
            else:
                os.chown(file, entry.uid, entry.gid, dir_fd=directory, follow_symlinks=False)
        except OSError as error:
            if self._options.ignore_chown_errors:
                return
            if error.errno in (errno.EPERM, errno.EINVAL):
                raise StorageError(
                    f"cannot give the file to {entry.uid}:{entry.gid}: {error.strerror}",
                    subject=shown(entry.name),
                    advice="there may be too few ids in the user namespace: see /etc/subuid and "
                    "/etc/subgid, or use the storage option ignore_chown_errors",
                ) from error
            raise

    def _dress(self, entry: TarEntry, directory: int, last: bytes) -> None:
        """Mode and time by name, for what must not be opened and is no symbolic link."""
        os.chmod(last, entry.mode & 0o7777, dir_fd=directory)
        mtime_ns = _time(entry.mtime_ns)
        os.utime(last, ns=(mtime_ns, mtime_ns), dir_fd=directory, follow_symlinks=False)

    def _attributes(self, entry: TarEntry, file: int | bytes) -> None:
        follow = not isinstance(file, bytes)
        for name, value in entry.xattrs.items():
            if name in _IGNORED_XATTRS or name.startswith(OVERLAYS_OWN):
                continue
            if not name or b"\0" in name:
                _refuse(entry, "the entry has an extended attribute without a proper name")
            try:
                os.setxattr(file, name, value, follow_symlinks=follow)
            except OSError as error:
                if error.errno == errno.ENOTSUP:
                    continue
                if error.errno == errno.EPERM and self._options.in_user_namespace:
                    continue
                if error.errno == errno.EPERM and name.startswith(b"user.") and not follow:
                    _refuse(entry, f"no file of this kind can have the attribute {shown(name)}")
                raise

    def _mind(self, entry: TarEntry) -> None:
        """Note a directory that hands on more than its path to what is made in it."""
        if entry.mode & stat.S_ISGID or _DEFAULT_ACL in entry.xattrs:
            self._plain = False

    # -- directories -------------------------------------------------------------------

    def _make_parent(self, directory: int, name: bytes) -> int:
        os.mkdir(name, _PARENT_MODE, dir_fd=directory)
        fd = open_directory(directory, name)
        if not self._plain:
            os.fchown(fd, self._uid, self._gid)
        if _PARENT_MODE & self._doubtful:
            os.fchmod(fd, _PARENT_MODE)
        return fd

    def _clear(self, directory: int, name: bytes) -> None:
        """Remove what stands in an entry's way.  Raises OSError."""
        os.stat(name, dir_fd=directory, follow_symlinks=False)
        remove_tree(Path(os.fsdecode(through(directory, name))))
        # Paths through it may lead elsewhere now.
        self._tree.forget(keep=directory)


def _write(fd: int, left: int, read: Callable[[int], bytes]) -> None:
    while left:
        data = read(min(left, _PIECE))
        left -= len(data)
        written = os.write(fd, data)
        while written < len(data):
            data = data[written:]
            written = os.write(fd, data)


def _time(mtime_ns: int) -> int:
    return mtime_ns if 0 <= mtime_ns <= _LAST_NS else 0


def _umask() -> int:
    """The process's umask, read without changing it: other threads make files too."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o777


def _refuse(entry: TarEntry, why: str) -> NoReturn:
    raise InvalidLayer(why, subject=shown(entry.name))


def _explained(error: OSError, entry: TarEntry) -> LayerstoreError:
    if error.errno in _ARCHIVES_FAULT:
        return InvalidLayer(
            f"the entry of the archive cannot be made: {error.strerror}", subject=shown(entry.name)
        )
    return StorageError(f"cannot extract the file: {error.strerror}", subject=shown(entry.name))
