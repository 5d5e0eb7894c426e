"""An additional layer store of plain directories, for file systems that are read only.

    DIR/sha256:<digest>                                       asked for without a reference
    DIR/<base64 of the reference>/sha256:<digest>             with one
    DIR/.layerstore/layers/<blob digest>/{diff,info,blob,layer.json}
    DIR/.layerstore/{lock,repeated/,tmp/}

A layer lies once in ``.layerstore/layers`` and has one or more names: the digest of its blob
(dialect L), and that of its TOC (dialect T) if it has one.  A name is a relative link to the
layer, so that the whole can be moved, copied with its attributes and mounted anywhere; ``info``
says what both dialects want to know.  ``diff`` itself is no link: Podman, which follows the one
in its own graph root, walks no further than to the next (``podman diff``, sizes).  Only where a
blob is known by a second TOC, that name is a directory with an ``info`` of its own, and links to
``diff`` and ``blob``.  Names with and without the reference level never collide, because base64
has no colon: one DIR may have both.

Nothing is seen half made: everything is built in ``.layerstore/tmp``, synced and renamed to its
place, layers before their names.  What a crash leaves in ``tmp`` the next writer removes; the lock
lets one writer in at a time.

How a client reads such a directory: ``layerstore.graphroot.als``.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import fcntl
import os
import posixpath
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from layerstore import limits
from layerstore.copy.statictoc import check_toc, toc_notes
from layerstore.copy.transport import BlobStream
from layerstore.errors import StorageError, UsageError, VerificationError
from layerstore.formats import Compression, LayerStream, TarReader
from layerstore.formats.tarstream import DIRECTORY, TarEntry
from layerstore.graphroot.atomic import sync_directory, write_file
from layerstore.graphroot.removal import remove_tree
from layerstore.graphroot.stage import stage_layer
from layerstore.graphroot.staged import DIFF, TAR_SPLIT
from layerstore.graphroot.treecheck import OPAQUE, OpenTree
from layerstore.graphroot.whiteouts import WhiteoutStyle, in_user_namespace
from layerstore.image import Descriptor, Digest, Reference

OWN: Final = ".layerstore"
LAYERS: Final = "layers"
BLOB: Final = "blob"
INFO: Final = "info"
RECORD: Final = "layer.json"
_TEMPORARY: Final = "tmp"
_LOCK: Final = "lock"
_NAME: Final = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_REFERENCE: Final = re.compile(r"[A-Za-z0-9+=]+")
_NUMBERS: Final = {Compression.NONE: 0, Compression.GZIP: 2, Compression.ZSTD: 4}
PUBLIC: Final = 0o755  # whatever the umask: others read the store
_LAST_NS: Final = (1 << 63) - 1


class LayerFile(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What is known of a layer, all of it verified when it was unpacked (``layer.json``).

    ``size`` is the blob's, ``diff_size`` the tar stream's, in bytes; ``tocs`` are the TOC
    digests by which it may be known, with the annotations that lead to them.
    """

    version: int = 1
    digest: str
    size: int
    diff_id: str
    diff_size: int
    compression: str
    tocs: dict[str, dict[str, str]] = {}

    def info(self, name: str) -> bytes:
        """``info`` of the layer under one of its names; the same for those that are links.

        Everything is known here, so nothing is left open: a client may believe the DiffID and
        the blob's digest of a layer that it found by its TOC.
        """
        known: dict[str, object] = {
            "compressed-diff-digest": self.digest,
            "compressed-size": self.size,
            "diff-digest": self.diff_id,
            "diff-size": self.diff_size,
            "compression": _NUMBERS[Compression(self.compression)],
        }
        toc = next(iter(self.tocs), None) if self.is_link(name) else str(name)
        if toc is not None:
            known |= {"toc-digest": toc, "flags": {"expected-layer-diffid": self.diff_id}}
        return msgspec.json.encode(known)

    def is_link(self, name: str) -> bool:
        """Whether this name is a link to the layer: it is, but for a second TOC."""
        return name in (self.digest, *list(self.tocs)[:1])


@dataclass(frozen=True, slots=True)
class Name:
    """One name of a layer; ``reference`` is base64, ``""`` without that level."""

    reference: str
    digest: str

    @property
    def path(self) -> Path:
        """Below the store."""
        return Path(self.reference) / self.digest


def layer_name(reference: Reference | None, digest: str) -> Name:
    """The name for clients that ask with this reference, or with none."""
    text = "" if reference is None else str(reference)
    return Name(base64.b64encode(text.encode()).decode(), digest)


class StaticStore:
    """The directory; what changes it must be called inside ``writing``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._own = directory / OWN
        self._layers = self._own / LAYERS
        self._temporary = self._own / _TEMPORARY

    # -- locks --------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self, waiting: Callable[[], None] | None = None) -> Iterator[None]:
        """Be the only writer; ``waiting`` is called if there is another one now.

        Makes what is missing of the store and removes what a crash left behind.  Raises
        ``StorageError``, ``UsageError`` for a directory that holds other things.
        """
        try:
            self._refuse_strange_directory()
            for directory in (self.directory, self._own, self._layers):
                if not directory.is_dir():
                    directory.mkdir(parents=True)
                    os.chmod(directory, PUBLIC)
            self._temporary.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(self._own / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise self._failed("cannot be written", error) from error
        try:
            _take(descriptor, fcntl.LOCK_EX, waiting)
            self._clear()
            try:
                yield
            finally:
                with contextlib.suppress(OSError, StorageError):  # the next run has another try
                    self._clear()
        except OSError as error:
            raise self._failed("cannot be written", error) from error
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def reading(self, waiting: Callable[[], None] | None = None) -> Iterator[None]:
        """Keep writers out, where the file system has locks."""
        if not self._layers.is_dir():
            raise UsageError("not a static layer store", subject=str(self.directory))
        try:
            descriptor = os.open(self._own / _LOCK, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            yield  # a copy without the lock file: nobody writes there
            return
        try:
            with contextlib.suppress(OSError):
                _take(descriptor, fcntl.LOCK_SH, waiting)
            yield
        finally:
            os.close(descriptor)

    def _refuse_strange_directory(self) -> None:
        if not self._own.exists() and self.directory.exists() and any(self.directory.iterdir()):
            raise UsageError(
                "the directory is not empty and no static layer store",
                subject=str(self.directory),
                advice="name an empty or a new directory",
            )

    def _clear(self) -> None:
        for left in self._temporary.iterdir():
            remove_tree(left)

    def _failed(self, what: str, error: OSError) -> StorageError:
        return StorageError(f"{what}: {error.strerror or error}", subject=str(self.directory))

    # -- reading ------------------------------------------------------------------

    def layer_directory(self, digest: str) -> Path:
        """Where the layer with this blob digest lies, or would."""
        return self._layers / digest

    def layer(self, digest: str) -> LayerFile | None:
        """The record of a layer that is there as a whole, None otherwise."""
        directory = self._layers / digest
        try:
            record = read_record(directory)
            complete = (
                record.digest == digest
                and (directory / BLOB).stat().st_size == record.size
                and stat.S_ISDIR((directory / DIFF).stat().st_mode)
            )
        except (OSError, StorageError):
            return None
        return record if complete else None

    def layers(self) -> list[str]:
        """Blob digests of all layers."""
        return sorted(name for name in os.listdir(self._layers) if _NAME.fullmatch(name))

    def names(self) -> list[Name]:
        """All names, those without a reference first."""
        top = sorted(os.listdir(self.directory))
        found = [Name("", name) for name in top if _NAME.fullmatch(name)]
        for reference in top:
            if _REFERENCE.fullmatch(reference) and (self.directory / reference).is_dir():
                below = sorted(os.listdir(self.directory / reference))
                found += [Name(reference, name) for name in below if _NAME.fullmatch(name)]
        return found

    def layer_of(self, name: Name) -> str | None:
        """The blob digest of the layer that a name leads to, None if it leads elsewhere."""
        path = self.directory / name.path
        try:
            if path.is_symlink():
                digest = os.readlink(path).rpartition("/")[2]
                right = os.readlink(path) == _link(name, digest)
            else:
                target = os.readlink(path / DIFF)
                digest = target.split("/")[-2] if target.count("/") > 1 else ""
                right = target == f"../{_link(name, digest)}/{DIFF}"
                right &= os.readlink(path / BLOB) == f"../{_link(name, digest)}/{BLOB}"
        except OSError:
            return None
        return digest if right and _NAME.fullmatch(digest) else None

    def is_right(self, name: Name) -> bool:
        """Whether a name leads to a layer that is there and has it, with the right ``info``."""
        digest = self.layer_of(name)
        record = None if digest is None else self.layer(digest)
        if record is None or name.digest not in (record.digest, *record.tocs):
            return False
        path = self.directory / name.path
        linked = path.is_symlink() == record.is_link(name.digest)
        return linked and _read(path / INFO) == record.info(name.digest)

    # -- writing ------------------------------------------------------------------

    def add_layer(
        self,
        layer: Descriptor,
        diff_id: Digest,
        source: BlobStream,
        progress: Callable[[int], None] | None = None,
    ) -> LayerFile:
        """Extract a blob, verify it and publish it; one that is damaged is replaced.

        Raises what ``stage_layer`` does.  May run in several threads for different layers.
        """
        work = self._work()
        tee = _Tee(source, work / BLOB)
        try:
            staged = stage_layer(
                work,
                tee,
                blob_digest=layer.digest,
                blob_size=layer.size,
                diff_id=diff_id,
                whiteouts=whiteout_style(),
                progress=progress,
            )
        finally:
            tee.finish()
        finish_tree(work, root_entry=staged.root_entry)
        record = LayerFile(
            digest=str(layer.digest),
            size=staged.blob_size,
            diff_id=str(staged.diff_id),
            diff_size=staged.diff_size,
            compression=staged.compression.value,
        )
        try:
            _describe(work, record)
            os.chmod(work, PUBLIC)
            _sync_file_system(work)
            self._publish(work, self._layers / layer.digest)
        except OSError as error:
            raise self._failed("cannot be written", error) from error
        return record

    def add_toc(self, record: LayerFile, notes: Mapping[str, str]) -> tuple[LayerFile, str | None]:
        """The layer with the TOC that ``notes`` announce, once it is verified, and its digest.

        Raises what ``check_toc`` does if it is not the layer's.
        """
        directory = self._layers / record.digest
        toc = check_toc(directory / BLOB, directory / DIFF, notes, Compression(record.compression))
        if toc is None or toc in record.tocs:
            return record, toc
        record = msgspec.structs.replace(record, tocs=record.tocs | {str(toc): toc_notes(notes)})
        _describe(directory, record)
        return record, str(toc)

    def add_name(self, record: LayerFile, reference: Reference | None, digest: str) -> bool:
        """Let a layer be found; True if it was not, or not rightly.  Raises ``StorageError``."""
        name = layer_name(reference, digest)
        final = self.directory / name.path
        try:
            if self.is_right(name):
                return False
            work = self._work()
            link = _link(name, record.digest)
            if record.is_link(digest):
                if _read(self._layers / record.digest / INFO) != record.info(digest):
                    _describe(self._layers / record.digest, record)
                work /= "link"
                os.symlink(link, work)
            else:
                os.symlink(f"../{link}/{DIFF}", work / DIFF)
                os.symlink(f"../{link}/{BLOB}", work / BLOB)
                write_file(work / INFO, record.info(digest), mode=0o644)
                os.chmod(work, PUBLIC)
            if not final.parent.is_dir():
                final.parent.mkdir()
                os.chmod(final.parent, PUBLIC)
                sync_directory(self.directory)
            self._publish(work, final)
        except OSError as error:
            raise self._failed("cannot be written", error) from error
        return True

    def _work(self) -> Path:
        path = self._temporary / secrets.token_hex(8)
        path.mkdir(mode=0o700)
        return path

    def _publish(self, work: Path, final: Path) -> None:
        if os.path.lexists(final):
            # Incomplete, or it would not be made again: whoever reads it just now has a miss.
            final.rename(self._temporary / secrets.token_hex(8))
        work.rename(final)
        sync_directory(final.parent)


def read_record(directory: Path) -> LayerFile:
    """Read ``layer.json``; raises ``OSError``, ``StorageError``."""
    with (directory / RECORD).open("rb") as file:
        raw = file.read(limits.LAYER_INFO_BYTES)
    try:
        record = msgspec.json.decode(raw, type=LayerFile)
        Compression(record.compression)
    except (msgspec.MsgspecError, ValueError) as error:
        raise StorageError(f"cannot be read: {error}", subject=str(directory / RECORD)) from error
    return record


def whiteout_style() -> WhiteoutStyle:
    """How deletions are written: ``trusted.*`` attributes are the machine's root's only."""
    rootless = os.geteuid() != 0 or in_user_namespace()
    return WhiteoutStyle.USERXATTR if rootless else WhiteoutStyle.OVERLAY


def finish_tree(directory: Path, *, root_entry: bool) -> None:
    """Complete the ``diff`` of a staged layer, with its ``blob`` beside it.

    Opaque directories get the attribute of rootless overlay mounts too, where the file system
    takes it.  The root gets what its entry in the archive says: an extraction by Podman takes it
    from the layer below, but a client of a layer store takes it from here.
    """
    diff = directory / DIFF
    (directory / TAR_SPLIT).unlink(missing_ok=True)
    with OpenTree(diff) as tree:
        for node in tree.walk():
            if node.opaque:
                for name in OPAQUE:
                    with contextlib.suppress(OSError):
                        tree.set_xattr(node.path, name, b"y")
    if root_entry:
        return
    entry = _root_entry(directory / BLOB)
    uid, gid = (0, 0) if entry is None else (entry.uid, entry.gid)
    with contextlib.suppress(PermissionError):
        os.chown(diff, uid, gid)
    os.chmod(diff, PUBLIC if entry is None else entry.mode & 0o7777)
    mtime = 0 if entry is None else entry.mtime_ns
    os.utime(diff, ns=(mtime, mtime) if 0 <= mtime <= _LAST_NS else (0, 0))


def _root_entry(blob: Path) -> TarEntry | None:
    with blob.open("rb") as file:
        for entry in TarReader(LayerStream(file), sparse=True):
            if entry.type == DIRECTORY and posixpath.normpath(entry.name) in (b".", b"/"):
                return entry
    return None


def _describe(directory: Path, record: LayerFile) -> None:
    """Write what is known of a layer, for us and for clients; raises ``OSError``."""
    write_file(directory / RECORD, msgspec.json.encode(record), mode=0o644)
    write_file(directory / INFO, record.info(record.digest), mode=0o644)


def _read(path: Path) -> bytes:
    """A small file, ``b""`` where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(limits.LAYER_INFO_BYTES)
    except OSError:
        return b""


def _link(name: Name, digest: str) -> str:
    """From where a name lies to its layer."""
    up = "../" if name.reference else ""
    return f"{up}{OWN}/{LAYERS}/{digest}"


def _take(descriptor: int, kind: int, waiting: Callable[[], None] | None) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        if waiting is not None:
            waiting()
        fcntl.flock(descriptor, kind)


def _sync_file_system(directory: Path) -> None:
    """One sync for all files of a layer; raises ``OSError``."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if libc.syncfs(descriptor):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(directory))
    finally:
        os.close(descriptor)


class _Tee:
    """A blob on its way, and a copy of it in a file."""

    def __init__(self, source: BlobStream, path: Path) -> None:
        self._source = source
        self._path = path
        self._file = path.open("xb")
        os.fchmod(self._file.fileno(), 0o644)

    def read(self, n: int, /) -> bytes:
        data = self._source.read(n)
        try:
            self._file.write(data)
        except OSError as error:
            raise StorageError(
                f"cannot be written: {error.strerror}", subject=str(self._path)
            ) from error
        return data

    def finish(self) -> None:
        """Everything was read, or nothing more will be."""
        try:
            self._file.close()
        except OSError as error:
            raise StorageError(
                f"cannot be written: {error.strerror}", subject=str(self._path)
            ) from error


def require_diff_id(record: LayerFile, diff_id: Digest) -> None:
    """Raise ``VerificationError`` if an image says another DiffID of a layer that is there."""
    if record.diff_id != diff_id:
        raise VerificationError(
            f"the layer's tar stream is {record.diff_id}, the image's config says {diff_id}",
            subject=record.digest,
        )
