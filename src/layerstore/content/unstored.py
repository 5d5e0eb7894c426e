"""Fetching for readers what the disk does not take.

Units that fit into the memory come as others do, and are held on the shelf until their reader
was told.  Members that are too long for that are verified as they stream by: what readers
asked for is kept, and a little of what follows, so that a file which is read from its
beginning to its end takes few passages.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from layerstore import limits
from layerstore.content.blob import BlobFile
from layerstore.content.fetcher import Done, Fetcher
from layerstore.content.ingest import Ingester
from layerstore.content.layermap import LayerMap
from layerstore.content.refused import RefusedUnits
from layerstore.content.scheduler import Priority, Scheduler
from layerstore.content.shelf import Key
from layerstore.content.stream import ByteSource, Response
from layerstore.errors import ContentError, NetworkError

_log = logging.getLogger(__name__)


class UnstoredFetcher:
    """Brings units of one blob into memory; members too long for it one stream at a time.

    ``missing`` tells of chunks, by unit, which units have to be fetched.  Thread-safe.
    """

    def __init__(
        self,
        layer_map: LayerMap,
        source: ByteSource,
        blob: BlobFile,
        fetcher: Fetcher,
        ingester: Ingester,
        scheduler: Scheduler,
        refused: RefusedUnits,
        missing: Callable[[Mapping[int, Collection[int]]], Sequence[int]],
    ) -> None:
        self._map = layer_map
        self._source = source
        self._blob = blob
        self._fetcher = fetcher
        self._ingester = ingester
        self._scheduler = scheduler
        self._refused = refused
        self._missing = missing
        self._lock = threading.Lock()
        self._waiting: dict[int, list[tuple[Collection[int], Done]]] = {}

    def bring(self, absent: Mapping[int, Collection[int]], done: Done) -> None:
        """Bring these chunks of these units; they stay until ``done(error or None)`` returned.

        Of members that are too long only one comes: ask again.
        """
        shelf = self._blob.shelf
        chunks = [self._map.chunk(number) for numbers in absent.values() for number in numbers]
        keys: list[Key] = [chunk.digest for chunk in chunks]
        keys += [(self._blob.path, unit) for unit in absent]
        held = [self._blob.extent(unit) for unit in absent if not self._passes(unit)]
        size = sum(chunk.size for chunk in chunks) + sum(end - offset for offset, end in held)

        def ended(error: Exception | None) -> None:
            try:
                done(error)
            finally:
                shelf.release(keys, size)

        def begin() -> None:
            missing = self._missing(absent)
            for unit in filter(self._passes, missing):
                self._await(unit, absent[unit], ended)
                return
            self._fetcher.demand(missing, ended)

        shelf.admit(keys, size, begin)

    def _passes(self, unit: int) -> bool:
        return self._blob.too_long(unit) or self._ingester.is_long(unit - 1)

    # -- members that stream by ------------------------------------------------

    def _await(self, unit: int, chunks: Collection[int], done: Done) -> None:
        with self._lock:
            waiting = self._waiting.get(unit)
            if waiting is not None:
                waiting.append((chunks, done))
                return
            self._waiting[unit] = [(chunks, done)]
        self._scheduler.submit(Priority.DEMAND, lambda: self._serve(unit))

    def _serve(self, unit: int) -> None:
        while True:
            with self._lock:
                batch = self._waiting[unit]
                if not batch:
                    del self._waiting[unit]
                    return
                self._waiting[unit] = []
            error: Exception | None = None
            try:
                self._pass(unit, {number for chunks, _ in batch for number in chunks})
            except Exception as caught:
                error = caught
            for _, done in batch:
                try:
                    done(error)
                except Exception:
                    _log.exception("a read failed")

    def _pass(self, unit: int, wanted: Collection[int]) -> None:
        """Stream a unit; what broke is tried several times, what was wrong once more."""
        wrong = False
        for attempt in range(1, limits.FETCH_ATTEMPTS + 1):
            stream = _Passing(self._source, *self._blob.extent(unit), self._fetcher.count)
            try:
                self._ingester.take(unit - 1, stream, wanted)
            except ContentError as error:
                self._refused.add(unit, error)
                if wrong:
                    raise
                wrong = True
            except NetworkError:
                if attempt == limits.FETCH_ATTEMPTS or self._scheduler.closed:
                    raise
                time.sleep(limits.BACKOFF_FIRST_SECONDS * 2**attempt)
            else:
                return
            finally:
                stream.close()


class _Passing:
    """The bytes [offset, end) of the blob as the registry sends them; opened by the first read."""

    def __init__(
        self,
        source: ByteSource,
        offset: int,
        end: int,
        count: Callable[[Priority, int], None],
    ) -> None:
        self._source = source
        self._offset = offset
        self._end = end
        self._count = count
        self._response: Response | None = None
        self._skip = 0
        self._left = b""

    def read(self, n: int, /) -> bytes:
        while not self._left and self._offset < self._end:
            self._left = self._next()
        data, self._left = self._left[:n], self._left[n:]
        return data

    def _next(self) -> bytes:
        if self._response is None:
            self._response = self._source(
                self._offset, self._end - self._offset, limits.ANSWER_MAX_SECONDS
            )
            self._skip = self._offset - self._response.start
        wanted = self._skip + self._end - self._offset
        data = self._response.read_some(min(limits.STREAM_BYTES, wanted))
        if not data:
            raise NetworkError(f"the body ended {self._end - self._offset} bytes early")
        self._count(Priority.DEMAND, len(data))
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        self._offset += len(data) - skipped
        return data[skipped:]

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
