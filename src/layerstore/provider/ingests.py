"""Ordinary layers on their way here: each is fetched once, whoever asks for it.

A layer without a TOC can only be shown when all of it is here and verified.  Those that
nobody waits for come one after the other, and rest while somebody reads; those that
somebody waits for have workers of their own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from layerstore import limits
from layerstore.content import ObjectStore, Priority, Scheduler
from layerstore.errors import (
    DiskFull,
    LayerstoreError,
    NetworkError,
    ServiceError,
    StorageError,
)
from layerstore.formats import Compression
from layerstore.formats.announced import Form
from layerstore.image import Descriptor, Digest, Reference, media_types
from layerstore.provider import memory
from layerstore.provider.loader import Loader
from layerstore.provider.misplaced import remove
from layerstore.provider.ordinary import Source, ingest_layer
from layerstore.provider.state import LayerRecord, State
from layerstore.registry import BlobReader, RegistryClient

_log = logging.getLogger(__name__)

_FORMS = {
    Compression.NONE: Form.TAR,
    Compression.GZIP: Form.TAR_GZIP,
    Compression.ZSTD: Form.TAR_ZSTD,
}


class Ingest:
    """One layer on its way; ``finished`` is set when ``record`` or ``error`` is.

    ``urgent`` says that somebody waits; ``fetched`` counts bytes of the blob.
    """

    def __init__(self, descriptor: Descriptor, diff_id: Digest) -> None:
        self.references: list[Reference] = []
        self.descriptor = descriptor
        self.diff_id = diff_id
        self.urgent = False
        self.begun = False
        self.fetched = 0
        self.record: LayerRecord | None = None
        self.error: LayerstoreError | None = None
        self.ended = 0.0
        self.finished = threading.Event()


class Ingests:
    """Brings ordinary layers here.  Thread-safe."""

    def __init__(
        self,
        state: State,
        client: RegistryClient,
        objects: ObjectStore,
        scheduler: Scheduler,
        loader: Loader,
    ) -> None:
        self._state = state
        self._client = client
        self._objects = objects
        self._scheduler = scheduler
        self._loader = loader
        self._condition = threading.Condition()
        self._known: OrderedDict[tuple[Digest, Digest], Ingest] = OrderedDict()
        self._urgent: deque[Ingest] = deque()
        self._background: deque[Ingest] = deque()
        self._closed = False
        objects.disk.when_back(self._go_on)
        self._threads = [
            threading.Thread(
                target=self._work, args=(urgent,), name=f"ingest-{number}", daemon=True
            )
            for number, urgent in enumerate((False, *(True,) * limits.INGEST_WORKERS))
        ]
        for thread in self._threads:
            thread.start()

    def here(self, digest: Digest, diff_id: Digest) -> LayerRecord | None:
        """A verified layer in this blob with this diff ID, whatever brought it here."""
        for record in self._state.layers_of_blob(digest):
            if (
                record.verified
                and not record.quarantine
                and record.diff_id == diff_id
                and (self._loader.directory(record.slot) / "index").exists()
            ):
                return record
        return None

    def start(
        self, reference: Reference, descriptor: Descriptor, diff_id: Digest, *, urgent: bool
    ) -> Ingest:
        """The layer's way here, begun now or before; a failed one is begun anew after a while."""
        key = (descriptor.digest, diff_id)
        with self._condition:
            known = self._known.get(key)
            if known is not None and not self._over(known, urgent=urgent):
                if reference not in known.references:
                    known.references.append(reference)
                if urgent and not known.urgent:
                    known.urgent = True
                    if not known.begun:
                        self._background.remove(known)
                        self._urgent.append(known)
                        self._condition.notify_all()
                return known
            fresh = Ingest(descriptor, diff_id)
            fresh.references.append(reference)
            fresh.urgent = urgent
            if not urgent and len(self._background) >= limits.INGEST_QUEUE:
                fresh.error = ServiceError("too many layers wait to be fetched")
                fresh.finished.set()
                return fresh
            self._known[key] = fresh
            self._known.move_to_end(key)
            (self._urgent if urgent else self._background).append(fresh)
            self._trim()
            self._condition.notify_all()
            return fresh

    @staticmethod
    def _over(known: Ingest, *, urgent: bool) -> bool:
        if not known.finished.is_set():
            return False
        if isinstance(known.error, DiskFull):
            return True  # it ends at once if there is no room yet
        age = time.monotonic() - known.ended
        return known.error is None or urgent or age > limits.INGEST_FAILED_SECONDS

    def _go_on(self) -> None:
        """The disk takes writes again: begin anew what had no room."""
        with self._condition:
            stopped = [one for one in self._known.values() if isinstance(one.error, DiskFull)]
        for one in stopped:
            for reference in one.references:
                self.start(reference, one.descriptor, one.diff_id, urgent=False)

    def _trim(self) -> None:
        while len(self._known) > 2 * limits.INGEST_QUEUE:
            key = next((key for key, one in self._known.items() if one.finished.is_set()), None)
            if key is None:
                return
            del self._known[key]

    def rebuild(self, record: LayerRecord, references: tuple[Reference, ...]) -> None:
        """Make the damaged index of a known layer anew, from its stored blob.

        Raises StorageError if that does not work; then the layer is fetched anew meanwhile.
        """
        assert record.diff_id is not None
        descriptor = Descriptor(
            media_type=media_types.OCI_LAYER, digest=record.blob_digest, size=record.size
        )
        local = self._loader.directory(record.slot) / "blob"
        ingest = Ingest(descriptor, record.diff_id)
        ingest.urgent = True
        try:
            self._ingest(ingest, lambda offset: _File(local, offset))
        except LayerstoreError as error:
            with contextlib.suppress(OSError):
                remove(self._loader.directory(record.slot) / "index")
            for reference in references:
                self.start(reference, descriptor, record.diff_id, urgent=True)
            raise StorageError(
                "the layer's index is damaged and cannot be built anew now",
                subject=record.blob_digest,
                advice="the layer is being fetched anew",
            ) from error

    def status(self) -> dict[str, int]:
        """How many layers are under way."""
        with self._condition:
            under_way = [one for one in self._known.values() if not one.finished.is_set()]
        return {
            "fetching": sum(one.begun for one in under_way),
            "waiting": sum(not one.begun for one in under_way),
        }

    def close(self, seconds: float = 2.0) -> None:
        """Begin nothing more; what is under way ends with an error soon."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    # -- in the workers ------------------------------------------------------------

    def _work(self, urgent: bool) -> None:
        queue = self._urgent if urgent else self._background
        while True:
            with self._condition:
                while not queue and not self._closed:
                    self._condition.wait()
                if self._closed:
                    return
                ingest = queue.popleft()
                ingest.begun = True
            self._run(ingest)

    def _run(self, ingest: Ingest) -> None:
        digest = ingest.descriptor.digest
        started = time.monotonic()
        try:
            ingest.record = self.here(digest, ingest.diff_id) or self._ingest(
                ingest, lambda offset: self._open(ingest, offset)
            )
        except LayerstoreError as error:
            ingest.error = error
            _log.warning(
                "event=ingest-failed layer=%s reason=%s error=%s", digest, error.code, error
            )
        except Exception as error:
            ingest.error = ServiceError(f"unexpected failure, see the log: {error}")
            _log.exception("ingest of %s failed", digest)
        else:
            _log.info(
                "event=layer-ingested layer=%s bytes=%d seconds=%.1f",
                digest, ingest.descriptor.size, time.monotonic() - started,
            )  # fmt: skip
        ingest.ended = time.monotonic()
        ingest.finished.set()
        memory.give_back()

    def _ingest(self, ingest: Ingest, open_at: Callable[[int], Source]) -> LayerRecord:
        descriptor = ingest.descriptor
        self._objects.disk.check()
        with ExitStack() as stack:
            try:
                fresh = self._loader.new_directory()
            except OSError as error:
                raise self._objects.disk.failed(error, "cannot create", "layer") from error
            stack.callback(shutil.rmtree, fresh, ignore_errors=True)
            spent = stack.enter_context(ExitStack())
            spent.callback(lambda: self._objects.room.freed(ingest.fetched))

            def count(size: int) -> None:
                ingest.fetched += size

            layer = ingest_layer(
                open_at,
                fresh,
                self._objects,
                digest=descriptor.digest,
                size=descriptor.size,
                diff_id=ingest.diff_id,
                progress=count,
                check=lambda: self._check(ingest),
                ahead=lambda: not ingest.urgent,
            )
            record = self._state.add_layer(
                descriptor.digest,
                None,
                ingest.diff_id,
                size=descriptor.size,
                toc_offset=descriptor.size,
                form=_FORMS[layer.compression],
            )
            target = self._loader.directory(record.slot)
            try:
                remove(target)  # it was damaged, or a crash came before it was remembered
                os.rename(fresh, target)
            except OSError as error:
                raise self._objects.disk.failed(error, "cannot publish", target) from error
            spent.pop_all()  # it stays
            self._state.set_complete(record.slot)
            self._state.set_verified(record.slot, layer.diff_size)
        verified = self._state.layer(record.slot)
        assert verified is not None
        return verified

    def _check(self, ingest: Ingest) -> None:
        self._objects.disk.check()
        if self._closed or not self._scheduler.give_way(
            Priority.BACKGROUND, lambda: ingest.urgent or self._closed
        ):
            raise ServiceError("the store is being stopped")

    def _open(self, ingest: Ingest, offset: int) -> BlobReader:
        """The blob from ``offset`` on, from the first place that gives it."""
        size = ingest.descriptor.size
        failure: LayerstoreError = NetworkError("no place gives the layer")
        for reference in list(ingest.references):
            try:
                return self._client.open_blob(
                    reference,
                    ingest.descriptor.digest,
                    offset=offset,
                    length=size - offset if offset else None,
                    size=size,
                )
            except LayerstoreError as error:
                failure = error
        raise failure


class _File:
    """A stored blob, from byte ``start`` on."""

    def __init__(self, path: Path, start: int) -> None:
        self.start = start
        try:
            self._stream = path.open("rb")
            self._stream.seek(start)
        except OSError as error:
            raise StorageError(f"cannot read: {error.strerror}", subject=str(path)) from error
        self.read = self._stream.read
        self.close = self._stream.close
