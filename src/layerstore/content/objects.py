"""Verified file contents by digest, shared by all layers and images.

``objects/<2 hex>/<62 hex>`` holds exactly the bytes whose SHA-256 is the name.
``partial/<64 hex>`` holds a file that arrives chunk by chunk, with a bitmap of
the verified chunks beside it; the name is the identity of the chunk list, not
the announced digest of the file, because until all of it is there only the
chunks are verified.  Nothing is written to ``objects`` before it is verified; what is not written
completely yet is `Underway`.

Nothing is synced before it counts: what a power failure may have spoilt is told by the
`Ledger`.  Such an object is verified when it is opened; partial objects, whose bitmaps may be there
without the bytes, are dropped: the layer's blob, whose bytes are verified when they are taken
out, gives them again.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Self

from layerstore import limits
from layerstore.content.disk import Disk
from layerstore.content.files import OpenFile, OpenFiles, open_cached, write_all
from layerstore.content.layermap import Chunk
from layerstore.content.ledger import Ledger
from layerstore.content.measure import StoredObject
from layerstore.content.partial import PartialObject
from layerstore.content.room import Room
from layerstore.content.shelf import Shelf
from layerstore.content.underway import Underway
from layerstore.errors import StorageError, VerificationError

_log = logging.getLogger(__name__)

_HASH_PIECE = 1 * limits.MIB
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_VERIFYING = 16  # locks that keep several readers from verifying one object


class ObjectWriter:
    """An object under way; forgotten unless it is published.  Raises StorageError."""

    def __init__(
        self,
        temporary: str,
        path: Callable[[bytes], str],
        disk: Disk,
        ledger: Ledger,
        charge: Callable[[int], None],
    ) -> None:
        self._temporary = temporary
        self._path = path
        self._disk = disk
        self._ledger = ledger
        self._charge = charge

    def __enter__(self) -> Self:
        self._disk.check()
        try:
            self._fd = os.open(self._temporary, _CREATE, 0o600)
        except OSError as error:
            raise self._disk.failed(error, "cannot store", self._temporary) from error
        self._size = 0
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        _unlink_quietly(self._temporary)

    def write(self, data: bytes) -> None:
        """The next bytes."""
        self._charge(len(data))
        try:
            write_all(self._fd, data, self._size)
        except OSError as error:
            raise self._disk.failed(error, "cannot store", self._temporary) from error
        self._size += len(data)

    def publish(self, digest: bytes) -> bool:
        """What was written is the object whose SHA-256 the caller has checked.

        False if it was there already.
        """
        target = self._path(digest)
        if self._ledger.trusts(target):
            return False
        try:
            self._ledger.stamp(self._fd)
            os.rename(self._temporary, target)
        except OSError as error:
            raise self._disk.failed(error, "cannot store", target) from error
        return True


class ObjectStore:
    """The directory of objects and partial objects below ``root``.

    ``disk`` tells whether it takes what is written, ``shelf`` holds what it did not take.
    Methods raise StorageError when the local disk fails, DiskFull when it takes nothing.
    Thread-safe.
    """

    def __init__(self, root: Path, room: Room | None = None) -> None:
        self.room = room or Room()
        self.disk = Disk(root / "tmp")
        self.shelf = Shelf()
        self._objects = os.fspath(root / "objects")
        self._partial = root / "partial"
        self._temporary = os.fspath(root / "tmp")
        self._counter = itertools.count()
        self._open: OpenFiles[bytes] = OpenFiles(limits.OPEN_OBJECTS)
        self._partials: OrderedDict[bytes, PartialObject] = OrderedDict()
        self._lock = threading.Lock()
        self._verifying = tuple(threading.Lock() for _ in range(_VERIFYING))
        self._unusable: set[bytes] = set()  # damaged files that the disk did not let go of
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.path.exists(self._objects):
                self._make_objects(root / "new")
            self._partial.mkdir(mode=0o700, exist_ok=True)
            os.makedirs(self._temporary, mode=0o700, exist_ok=True)
            self.ledger = Ledger(root)
            self.ledger.when_failed = self._sync_failed
            self.ledger.resting = lambda: self.disk.full
            self._underway = Underway(root / "underway")
            self._drop_stale()
        except OSError as error:
            raise StorageError(f"cannot prepare: {error.strerror}", subject=str(root)) from error

    def _make_objects(self, fresh: Path) -> None:
        """All directories or none, so that a start need not look at them."""
        for first in range(256):
            os.makedirs(f"{fresh}/{first:02x}", mode=0o700, exist_ok=True)
        fresh.rename(self._objects)

    def _drop_stale(self) -> None:
        stale = list(os.scandir(self._temporary))
        if self.ledger.unclean:
            stale += os.scandir(self._partial)
        for entry in stale:
            os.unlink(entry.path)
        for digest in self._underway.left:
            if not self.ledger.trusts(half := self.path(digest)):
                _unlink_quietly(half)

    def _sync_failed(self, error: OSError) -> None:
        """What was written of late may be in memory only: nobody goes on with it unverified."""
        self.disk.failed(error, "cannot sync", self._objects)
        self._open.clear()
        with self._lock:
            unfinished = list(self._partials)
        for key in unfinished:
            self.discard_partial(key)

    def path(self, digest: bytes) -> str:
        """Where the object with this SHA-256 lives, if it is there."""
        name = digest.hex()
        return f"{self._objects}/{name[:2]}/{name[2:]}"

    def open(self, digest: bytes, *, wait: bool = True) -> OpenFile | None:
        """The complete object with this SHA-256, or None.

        One that is suspect is verified before, which takes its time, and the disk may take its
        own: None if not to ``wait``.
        """
        if digest in self._unusable:
            return None
        return self._open.get(digest, lambda: self._opened(digest, wait=wait))

    def _opened(self, digest: bytes, *, wait: bool) -> int:
        """A descriptor; raises FileNotFoundError where there is no object, or a damaged one."""
        path = self.path(digest)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if wait else open_cached(path)
        except BlockingIOError:
            raise FileNotFoundError from None
        try:
            if self.ledger.trusts(fd):
                return fd
            if wait and digest not in self._underway:  # in this order: it may be finished by now
                with self._verifying[digest[0] % _VERIFYING]:
                    if self.ledger.trusts(fd) or self._verify(digest, fd):
                        return fd
        except OSError:
            os.close(fd)
            raise
        os.close(fd)
        raise FileNotFoundError

    def _verify(self, digest: bytes, fd: int) -> bool:
        """Whether a suspect object is right; it goes if not."""
        if not self.ledger.failed and _is_intact(fd, digest):
            with contextlib.suppress(OSError):  # it stays suspect on a disk that is read only
                self.ledger.stamp(fd)
            return True
        _log.warning("event=object-damaged object=%s", digest.hex())
        if os.path.exists(path := self.path(digest)) and os.path.samestat(
            os.stat(path), os.fstat(fd)
        ):
            self.discard(digest)
        return False

    def intact(self, digest: bytes) -> bool:
        """Read an object through; False if it is damaged, which makes it suspect.

        True also for one that is not there.  Raises OSError where the disk gives no bytes.
        """
        try:
            fd = os.open(self.path(digest), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            right = _sha256(fd) == digest
            if not right:
                if digest in self._underway:
                    return True
                right = _sha256(fd) == digest  # it may have been finished since
            if not right:
                self.ledger.distrust(fd)
                self._open.drop(digest)
            elif not self.ledger.trusts(fd):
                self.ledger.stamp(fd)
        finally:
            os.close(fd)
        return right

    def has(self, digest: bytes) -> bool:
        """Whether the complete object is there."""
        there = os.path.exists(self.path(digest)) and digest not in self._unusable
        return there and digest not in self._underway

    def put(self, digest: bytes, data: bytes | memoryview, *, ahead: bool = False) -> bool:
        """Store a complete object whose SHA-256 the caller has checked; False if it was there.

        ``ahead`` says that nobody waits for it.
        """
        target = self.path(digest)
        if self.disk.full and self._is_good(target, digest):
            return False
        self.disk.check()
        if not self._underway.begin(digest):
            return False
        try:
            try:
                fd = os.open(target, _CREATE, 0o600)
            except FileExistsError:
                if self._is_good(target, digest):
                    return False
                self._replace(target, data, ahead=ahead)
            else:
                self._fill(fd, target, data, ahead=ahead)
        except OSError as error:
            raise self.disk.failed(error, "cannot store", target) from error
        finally:
            self._underway.end(digest)
        self._unusable.discard(digest)
        return True

    def _is_good(self, path: str, digest: bytes) -> bool:
        """Whether the object is there and needs no verification."""
        return self.ledger.trusts(path) and digest not in self._unusable

    def _fill(self, fd: int, path: str, data: bytes | memoryview, *, ahead: bool) -> None:
        """Write the file that was just made, or remove it; closes it in any case."""
        try:
            self.room.charge(len(data), ahead=ahead)
            write_all(fd, data, 0)
            self.ledger.stamp(fd)
        except BaseException:
            _unlink_quietly(path)
            raise
        finally:
            os.close(fd)

    def _replace(self, target: str, data: bytes | memoryview, *, ahead: bool) -> None:
        """Put a new file in the place of a suspect one."""
        temporary = f"{self._temporary}/{next(self._counter):x}"
        self._fill(os.open(temporary, _CREATE, 0o600), temporary, data, ahead=ahead)
        try:
            os.rename(temporary, target)
        except OSError:
            _unlink_quietly(temporary)
            raise

    def writer(self, *, ahead: bool = False) -> ObjectWriter:
        """A large object that comes piece by piece; a context manager.  ``ahead`` as for put()."""
        return ObjectWriter(
            f"{self._temporary}/{next(self._counter):x}",
            self.path,
            self.disk,
            self.ledger,
            lambda size: self.room.charge(size, ahead=ahead),
        )

    def known_partial(self, key: bytes) -> PartialObject | None:
        """The partial object if it is open already; never touches the disk, nor waits for it."""
        return self._partials.get(key)  # without the lock, which is held while the disk works

    def partial(
        self, key: bytes, size: int, chunks: int, digest: bytes | None, *, create: bool
    ) -> PartialObject | None:
        """The partial object with chunk-list identity ``key``.

        None if it is absent or unusable and not to be created, or is the object ``digest``
        already.
        """
        with self._lock:
            found = self._partials.get(key)
            if found is not None:
                self._partials.move_to_end(key)
                return found
            if digest is not None and self.has(digest):
                return None
            path = self._partial / key.hex()
            try:
                if key in self._unusable or not path.exists():
                    if not create:
                        return None
                    self.disk.check()
                    self._remove_partial(key)
                found = PartialObject(path, size, chunks, self.disk, self.room)
            except OSError as error:
                if create:
                    raise self.disk.failed(error, "cannot open", path) from error
                return None
            self._partials[key] = found
            while len(self._partials) > limits.OPEN_OBJECTS:
                self._partials.popitem(last=False)
            return found

    def complete(
        self, key: bytes, partial: PartialObject, digest: bytes, chunks: Iterable[Chunk]
    ) -> bool:
        """Turn a partial object with all its chunks into the object ``digest``.

        If the whole does not hash to that, all its ``chunks`` are verified again: False if some
        changed on the disk, and have to be brought anew.  Raises VerificationError if none did:
        chunk list and file digest of the TOC contradict each other.  The partial object is
        forgotten then.
        """
        try:
            found = _sha256(partial.file.fd)
            if found != digest:
                partial.forget_wrong(chunks)
                if not partial.present.full:
                    return False
                found = _sha256(partial.file.fd)  # they are right now
            matches = found == digest
            if matches:
                self.ledger.stamp(partial.file.fd)
        except OSError as error:
            self.discard_partial(key)
            raise self.disk.failed(error, "cannot read", partial.path) from error
        with self._lock:
            self._partials.pop(key, None)
            try:
                if os.stat(partial.path).st_ino == os.fstat(partial.file.fd).st_ino:
                    partial.map_path.unlink(missing_ok=True)
                    if matches:
                        os.rename(partial.path, self.path(digest))
                    else:
                        partial.path.unlink(missing_ok=True)
                # else it was evicted, and is on its way anew
            except FileNotFoundError:
                return True  # it was evicted, or another layer with the same file was faster
            except OSError as error:
                raise self.disk.failed(error, "cannot publish", partial.path) from error
        if not matches:
            raise VerificationError(
                f"file has SHA-256 {found.hex()} instead of {digest.hex()}",
                subject="file",
                advice="the table of contents of the layer contradicts itself",
            )
        return True

    def discard(self, digest: bytes) -> None:
        """Remove an object that turned out to be damaged."""
        self._open.drop(digest)
        path = self.path(digest)
        try:
            if os.path.isdir(path):  # whoever made it; nothing could be stored in its place
                shutil.rmtree(path)
            else:
                os.unlink(path)
        except FileNotFoundError:
            return
        except OSError:
            self._unusable.add(digest)

    def discard_partial(self, key: bytes) -> None:
        """Remove a partial object that turned out to be damaged."""
        with self._lock:
            partial = self._partials.pop(key, None)
            if partial is not None:
                partial.present.forget()
            try:
                self._remove_partial(key)
            except OSError:
                self._unusable.add(key)

    def _remove_partial(self, key: bytes) -> None:
        for name in (f"{key.hex()}.map", key.hex()):  # no bit may outlive its bytes
            (self._partial / name).unlink(missing_ok=True)
        self._unusable.discard(key)

    def evict(self, found: StoredObject) -> None:
        """Remove an object or partial object to make room; who reads it reads on."""
        path = Path(found.path)
        if path.parent != self._partial:
            _unlink_quietly(found.path)
            self._open.drop(bytes.fromhex(path.parent.name + path.name))  # in this order
        elif path.suffix != ".map":
            with self._lock:
                self._partials.pop(bytes.fromhex(path.name), None)
                _unlink_quietly(f"{found.path}.map")
                _unlink_quietly(found.path)

    def close(self) -> None:
        """Let go of all open files."""
        self.disk.close()
        self.ledger.close()
        self._open.clear()
        with self._lock:
            self._partials.clear()


def _sha256(fd: int) -> bytes:
    hasher = hashlib.sha256()
    offset = 0
    while piece := os.pread(fd, _HASH_PIECE, offset):
        hasher.update(piece)
        offset += len(piece)
    return hasher.digest()


def _is_intact(fd: int, digest: bytes) -> bool:
    try:
        return _sha256(fd) == digest
    except OSError:
        return False


def _unlink_quietly(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        return
