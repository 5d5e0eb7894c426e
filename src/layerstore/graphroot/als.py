"""Layers of an additional layer store, as a client of its directory protocol sees them.

A store is a directory of layers that are extracted already:
``<store>/[<base64 of the reference>/]<digest>/{diff,info,blob}``.  The digest is that of
the blob (dialect L) or of its TOC (dialect T).  A client looks for ``diff``, ``info`` and
``blob``; says that it uses the layer by creating the file ``use``, which a counting store
answers with ENOENT; and gives it back by removing the layer's directory, again with
ENOENT as the answer.  One count is taken by each lookup and given back when the pull is
over, one more is held by each layer record.  Source: containers/storage,
drivers/overlay/overlay.go (``LookupAdditionalLayer``, ``notifyUseAdditionalLayer``,
``notifyReleaseAdditionalLayer``) and layers.go (``PutAdditionalLayer``).

Because a layer that was found by its TOC was never compared with any blob or tar stream,
nothing that ``info`` says of those is passed on.

A store may be dead, slow or wrong at any time: then the layer is not there, no more.
"""

from __future__ import annotations

import base64
import errno
import logging
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, Generic, Literal, TypeVar

import msgspec

from layerstore import limits
from layerstore.errors import StorageError
from layerstore.graphroot.alsinfo import LayerFacts, parse_info
from layerstore.graphroot.storageconf import LayerStoreSpec
from layerstore.image import Digest, Reference

__all__ = [
    "AlsLayer",
    "LayerFacts",
    "LayerStores",
    "Miss",
    "StoreFiles",
    "open_blob",
    "parse_info",
    "read_info",
    "release_path",
    "use_path",
]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

Dialect = Literal["T", "L"]
# What a release is answered with where nobody counts, besides ENOENT, which means success:
# by plain directories, file systems that are read-only, and stores that are gone.
_NOT_COUNTED: Final = {
    errno.ENOTEMPTY,
    errno.EEXIST,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EBUSY,
    errno.ENOTCONN,
}


class StoreFiles:
    """The file system calls of the protocol, one method each."""

    def check(self, layer: Path) -> None:
        """``OSError`` unless ``layer`` has what a layer has."""
        if not stat.S_ISDIR((layer / "diff").stat().st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "diff is no directory", str(layer / "diff"))
        (layer / "info").stat()
        (layer / "blob").stat()

    def use(self, layer: Path) -> None:
        """Tell the store that the layer is used once more; a store need not count."""
        path = layer / "use"
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            descriptor = os.open(path, flags, 0o666)
        except FileNotFoundError:
            return  # counted
        except OSError as error:
            _log.debug("%s does not count uses: %s", layer, error.strerror)
            return
        os.close(descriptor)
        with _ignored():
            path.unlink()

    def info(self, layer: Path) -> bytes:
        """The contents of ``info``, at most ``limits.LAYER_INFO_BYTES`` and one more."""
        with (layer / "info").open("rb") as file:
            return file.read(limits.LAYER_INFO_BYTES + 1)

    def blob(self, layer: Path) -> BinaryIO:
        """The blob as a stream."""
        return (layer / "blob").open("rb")

    def release(self, layer: Path) -> None:
        """Tell the store that the layer is used once less."""
        try:
            layer.rmdir()
        except FileNotFoundError:
            return  # counted
        except OSError as error:
            if error.errno not in _NOT_COUNTED:
                _log.warning("%s could not be released: %s", layer, error.strerror)


@contextmanager
def _ignored() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _log.debug("%s", error)


def _facts(files: StoreFiles, layer: Path) -> LayerFacts:
    raw = files.info(layer)
    if len(raw) > limits.LAYER_INFO_BYTES:
        raise StorageError(
            f"info has more than {limits.LAYER_INFO_BYTES} bytes", subject=str(layer)
        )
    return parse_info(raw, subject=str(layer))


class _Task(Generic[_T]):
    """A call in a thread of its own that is waited for so long and no longer.

    A thread that hangs in a dead file system cannot be ended, only left behind; ``undo``
    takes back what it did when it returns after all.
    """

    def __init__(self, work: Callable[[], _T], undo: Callable[[_T], None] | None = None) -> None:
        self._work = work
        self._undo = undo
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._given_up = False
        self._value: list[_T] = []
        self._error: Exception | None = None
        threading.Thread(target=self._run, name="layer-store", daemon=True).start()

    def _run(self) -> None:
        try:
            value = self._work()
        except Exception as error:  # whatever it is, the one who waits is told
            self._error = error
        else:
            with self._lock:
                self._value.append(value)
                late = self._given_up
            if late and self._undo is not None:
                self._undo(value)
        self._ready.set()

    def result(self, seconds: float) -> _T:
        """What the call gave or raised; ``TimeoutError`` if it is not back by then."""
        if not self._ready.wait(seconds):
            with self._lock:
                if not self._value:
                    self._given_up = True
            if self._given_up:
                raise TimeoutError(f"no answer within {seconds:g} seconds")
        if self._error is not None:
            raise self._error
        return self._value[0]


@dataclass(slots=True)
class _Store:
    path: Path
    with_reference: bool
    files: StoreFiles
    seconds: float
    hung: bool = False

    def layer_path(self, reference: Reference | None, digest: Digest) -> Path | None:
        if not self.with_reference:
            return self.path / digest
        if reference is None:
            return None
        return self.path / base64.b64encode(str(reference).encode()).decode() / digest

    def call(self, work: Callable[[], _T], undo: Callable[[_T], None] | None = None) -> _T:
        """Run ``work`` within the time; a store that was once too slow is not waited for."""
        try:
            return _Task(work, undo).result(0.0 if self.hung else self.seconds)
        except TimeoutError:
            self.hung = True
            raise

    def signal(self, work: Callable[[], None]) -> None:
        """``use`` or ``release``: counts are hints, and must hold nobody up."""
        try:
            self.call(work)
        except TimeoutError as error:
            _log.warning("layer store %s: %s", self.path, error)


class AlsLayer:
    """A layer found in a store, held until it is released: one count."""

    __slots__ = ("_lock", "_released", "_store", "dialect", "facts", "path")

    def __init__(self, path: Path, facts: LayerFacts, dialect: Dialect, store: _Store) -> None:
        self.path = path
        """The layer's directory, in which ``diff`` lies."""
        self.facts = facts
        """Without what was found in this dialect and cannot be known in it."""
        self.dialect: Dialect = dialect
        self._store = store
        self._released = False
        self._lock = threading.Lock()

    def use(self) -> None:
        """Count once more, for a layer record; ``release_path`` gives that one back."""
        self._store.signal(lambda: self._store.files.use(self.path))

    def release(self) -> None:
        """Give back the count of the lookup; again does nothing."""
        with self._lock:
            if self._released:
                return
            self._released = True
        self._store.signal(lambda: self._store.files.release(self.path))

    def __repr__(self) -> str:
        return f"<AlsLayer {self.dialect} {self.path}{' released' if self._released else ''}>"


class Miss(msgspec.Struct, frozen=True):
    """Why one store did not give one layer."""

    path: Path
    reason: str


class _Refused(Exception):
    """What a store gave is not the layer that was asked for."""


@dataclass(slots=True)
class _Held:
    lock: threading.Lock = field(default_factory=threading.Lock)
    layers: list[AlsLayer] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)


class LayerStores:
    """The configured stores in their order; methods may be called from several threads.

    Every layer that was found is held until ``close``, or until it is released by itself.
    """

    def __init__(
        self,
        specs: Sequence[LayerStoreSpec],
        *,
        lookup_seconds: float = limits.LAYER_STORE_SECONDS,
        files: StoreFiles | None = None,
    ) -> None:
        """``lookup_seconds`` is what one lookup in one store may take.

        A store that takes longer once is not asked again.
        """
        files = files or StoreFiles()
        self._stores = tuple(
            _Store(spec.path, spec.with_reference, files, lookup_seconds) for spec in specs
        )
        self._held = _Held()

    def __bool__(self) -> bool:
        """Whether there is any store."""
        return bool(self._stores)

    @property
    def misses(self) -> tuple[Miss, ...]:
        """Every lookup that failed so far, in no particular order between threads."""
        with self._held.lock:
            return tuple(self._held.misses)

    def find_by_toc(self, reference: Reference | None, toc: Digest) -> AlsLayer | None:
        """The layer whose TOC has this digest (dialect T); never raises.

        A store with a reference level is passed over without a ``reference``.
        """
        return self._find(reference, toc, "T")

    def find_by_blob(self, reference: Reference | None, blob: Digest) -> AlsLayer | None:
        """The layer whose blob has this digest (dialect L), with DiffID and size; never raises.

        Nobody has verified that its tree is that of the blob: only for stores as
        trustworthy as the graph root itself, and its DiffID must be the image config's.
        """
        return self._find(reference, blob, "L")

    def close(self) -> None:
        """Release every layer that is still held."""
        with self._held.lock:
            layers = self._held.layers
            self._held.layers = []
        for layer in layers:
            layer.release()

    def _find(
        self, reference: Reference | None, digest: Digest, dialect: Dialect
    ) -> AlsLayer | None:
        for store in self._stores:
            path = store.layer_path(reference, digest)
            if path is None:
                continue
            if store.hung:
                self._miss(path, "the store did not answer in time before")
                continue
            look = partial(_look, store.files, path, digest, dialect)
            try:
                facts = store.call(look, partial(_give_back, store.files, path))
            except FileNotFoundError:
                self._miss(path, "not there")
            except Exception as error:  # a store's fault is never the pull's
                reason = error.strerror if isinstance(error, OSError) else None
                self._miss(path, reason or str(error) or type(error).__name__)
                _log.warning("layer store %s is no help: %s", path, reason or error)
            else:
                layer = AlsLayer(path, facts, dialect, store)
                with self._held.lock:
                    self._held.layers.append(layer)
                return layer
        return None

    def _miss(self, path: Path, reason: str) -> None:
        with self._held.lock:
            self._held.misses.append(Miss(path, reason))


def _look(files: StoreFiles, path: Path, digest: Digest, dialect: Dialect) -> LayerFacts:
    """Look for a layer; with the facts comes one count."""
    files.check(path)
    files.use(path)
    try:
        return _believed(_facts(files, path), digest, dialect)
    except BaseException:
        files.release(path)
        raise


def _give_back(files: StoreFiles, path: Path, facts: LayerFacts) -> None:
    """Undo ``_look``."""
    del facts
    files.release(path)


def _believed(facts: LayerFacts, digest: Digest, dialect: Dialect) -> LayerFacts:
    """What may be taken from ``info`` for a layer found as ``digest``."""
    if dialect == "T":
        if facts.toc_digest != digest:
            raise _Refused(f"info states the TOC digest {facts.toc_digest}")
        return LayerFacts(
            compressed_size=facts.compressed_size,
            diff_size=facts.diff_size,
            compression=facts.compression,
            toc_digest=digest,
            expected_diff_id=facts.expected_diff_id,
        )
    if facts.compressed_diff_digest not in (None, digest):
        raise _Refused(f"info states the blob digest {facts.compressed_diff_digest}")
    if facts.diff_digest is None or facts.diff_size < 0:
        raise _Refused("info states no DiffID or no size")
    return LayerFacts(
        compressed_diff_digest=facts.compressed_diff_digest,
        compressed_size=facts.compressed_size,
        diff_digest=facts.diff_digest,
        diff_size=facts.diff_size,
        compression=facts.compression,
    )


def release_path(
    path: Path,
    *,
    seconds: float = limits.LAYER_STORE_SECONDS,
    files: StoreFiles | None = None,
) -> None:
    """Give back the count of a deleted layer record; whatever the store's state, no error."""
    _one(path, seconds, files).signal(lambda: (files or StoreFiles()).release(path))


def read_info(
    path: Path,
    *,
    seconds: float = limits.LAYER_STORE_SECONDS,
    files: StoreFiles | None = None,
) -> LayerFacts:
    """What the store says of the layer at ``path``; raises ``OSError`` or ``StorageError``."""
    files = files or StoreFiles()
    return _one(path, seconds, files).call(lambda: _facts(files, path))


def use_path(
    path: Path,
    *,
    seconds: float = limits.LAYER_STORE_SECONDS,
    files: StoreFiles | None = None,
) -> None:
    """Count once more, for a layer record that is made without a lookup; no error."""
    _one(path, seconds, files).signal(lambda: (files or StoreFiles()).use(path))


def _one(path: Path, seconds: float, files: StoreFiles | None) -> _Store:
    return _Store(path, with_reference=False, files=files or StoreFiles(), seconds=seconds)


@contextmanager
def open_blob(
    path: Path,
    *,
    seconds: float = limits.LAYER_STORE_SECONDS,
    files: StoreFiles | None = None,
) -> Iterator[tuple[BinaryIO, LayerFacts]]:
    """The blob of the layer at ``path``, for an export, and what ``info`` says now.

    Neither is verified.  The layer is in use until the block is left.  Raises
    ``StorageError`` if the store does not give it within ``seconds``; reads may then take
    as long as the store needs to fetch the blob.
    """
    files = files or StoreFiles()
    store = _one(path, seconds, files)

    def begin() -> tuple[BinaryIO, LayerFacts]:
        files.use(path)
        try:
            facts = _facts(files, path)
            return files.blob(path), facts
        except BaseException:
            files.release(path)
            raise

    def end(late: tuple[BinaryIO, LayerFacts]) -> None:
        late[0].close()
        files.release(path)

    try:
        stream, facts = store.call(begin, end)
    except OSError as error:
        raise StorageError(
            f"the layer store does not give the layer: {error.strerror or error}",
            subject=str(path),
            advice="is the service of the additional layer store running?",
        ) from error
    try:
        with stream:
            yield stream, facts
    finally:
        store.signal(lambda: files.release(path))
