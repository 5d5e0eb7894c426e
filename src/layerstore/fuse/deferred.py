"""Answers that may have to wait: for the disk, for a layer to be opened, for the registry.

The loop thread tries memory first; the rest is deferred to a few workers, and a
worker that finds bytes missing leaves the request to the fetch scheduler.  Every
failure becomes EIO, one log line that names file, layer and cause, and a count.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable

from layerstore import limits
from layerstore.errors import ContentError, LayerstoreError
from layerstore.fuse.operations import Answer
from layerstore.fuse.session import Request
from layerstore.provider import Layer, Layers, View, WorkerPool

_log = logging.getLogger(__name__)


class DeferredReader:
    """Reads file contents and blobs for requests; opens layers that are not open."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._workers = WorkerPool("io", limits.IO_WORKERS, limits.IO_QUEUE)
        self._logged: OrderedDict[tuple[int, int], float] = OrderedDict()
        self.errors = 0

    def close(self) -> None:
        """End idle workers."""
        self._workers.close()

    def read_file(self, request: Request, slot: int, entry: int, offset: int, size: int) -> Answer:
        """Bytes of a regular file of a layer."""
        layer = self._layers.get(slot)
        if layer is not None:
            try:
                data = layer.content.read_cached(entry, offset, size)
            except (LayerstoreError, OSError):
                data = None  # a worker meets it again and has the time to report it
            if data is not None:
                return data
        return self._later(
            request,
            limits.READ_ANSWER_SECONDS + self._layers.patience(slot),
            lambda: self._read_or_fetch(request, slot, entry, offset, size),
        )

    def _read_or_fetch(
        self, request: Request, slot: int, entry: int, offset: int, size: int, tries: int = 2
    ) -> None:
        """In a worker: read what is stored, or have it fetched and read it then.

        Stored bytes that turn out to be wrong are fetched once more.
        """
        try:
            content = self._layers.open(slot).content
            try:
                data = content.read_stored(entry, offset, size)
            except ContentError:
                if not tries:
                    raise
                data = None
        except (LayerstoreError, OSError) as error:
            request.reply(self._read_failed(slot, entry, error))
            return
        if data is not None:
            request.reply(data)
            return

        def done(error: Exception | None) -> None:
            if error is None and tries:
                self._read_or_fetch(request, slot, entry, offset, size, tries - 1)
            else:
                request.reply(self._read_failed(slot, entry, error))

        content.fetch(entry, offset, size, lambda error: _answered(request, lambda: done(error)))

    def read_blob(self, request: Request, view: View, offset: int, size: int) -> Answer:
        """Bytes of a layer's compressed blob."""
        return self._later(
            request,
            limits.BLOB_ANSWER_SECONDS,
            lambda: self._read_blob(request, view, offset, size),
        )

    def _read_blob(self, request: Request, view: View, offset: int, size: int) -> None:
        """In a worker: bytes of the compressed layer, once all of it is here and verified."""
        try:
            content = self._layers.open(view.slot).content
            data = content.read_blob(offset, size)
        except (LayerstoreError, OSError) as error:
            request.reply(self._read_failed(view.slot, -1, error))
            return
        if data is not None:
            request.reply(data)
            return

        def done(error: Exception | None) -> None:
            data = None if error is not None else content.read_blob(offset, size)
            if data is None:
                request.reply(self._read_failed(view.slot, -1, error))
            else:
                request.reply(data)
                self._layers.mark_complete(view.slot)

        content.fetch_blob(lambda error: _answered(request, lambda: done(error)))

    def _read_failed(self, slot: int, entry: int, error: Exception | None) -> int:
        """Count and log a read that gets EIO; one line a file and period."""
        self.errors += 1
        reason = getattr(error, "code", "storage")
        self._layers.stats.read_failed(reason)
        now = time.monotonic()
        last = self._logged.get((slot, entry))
        if last is None or now - last > limits.READ_ERROR_LOG_SECONDS:
            self._logged[slot, entry] = now
            if len(self._logged) > limits.OPEN_OBJECTS:
                self._logged.popitem(last=False)
            layer = self._layers.get(slot)
            path = b"blob" if entry < 0 or layer is None else _path_of(layer, entry)
            _log.error(
                "event=read-failed reason=%s layer=%s file=%s error=%s",
                reason,
                layer.record.blob_digest if layer else slot,
                os.fsdecode(path).encode("unicode_escape").decode(),
                error,
            )
        return errno.EIO

    def with_layer(self, request: Request, slot: int, answer: Callable[[Layer], Answer]) -> Answer:
        """Answer from the layer: now if it is open, else once a worker has opened it."""
        layer = self._layers.get(slot)
        if layer is not None:
            return answer(layer)
        return self._later(
            request,
            limits.READ_ANSWER_SECONDS,
            functools.partial(self._open_and_answer, request, slot, answer),
        )

    def _open_and_answer(
        self, request: Request, slot: int, answer: Callable[[Layer], Answer]
    ) -> None:
        try:
            request.reply(answer(self._layers.open(slot)))
        except (LayerstoreError, OSError) as error:
            request.reply(self._read_failed(slot, -1, error))

    def _later(self, request: Request, timeout: float, call: Callable[[], None]) -> Answer:
        deferred = request.defer(timeout)

        if not self._workers.submit(lambda: _answered(request, call)):
            return errno.EAGAIN
        return deferred


def _answered(request: Request, call: Callable[[], None]) -> None:
    """Call what answers the request; an unforeseen failure becomes its answer."""
    try:
        call()
    except Exception:
        _log.exception("request %r failed", request)
        request.fail(errno.EIO)


def _path_of(layer: Layer, entry: int) -> bytes:
    """A path of an entry, for the log."""
    return next((path for path, number in layer.index.walk() if number == entry), b"?")
