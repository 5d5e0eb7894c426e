"""The contents of one layer: read what is here, fetch what is not.

Reads name an *entry* (a regular file) and a byte range.  What is stored is read
at once; otherwise the gzip members that hold the range are fetched, decompressed,
verified chunk by chunk and stored, and then the reader is called back.
"""

from __future__ import annotations

import hashlib
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from layerstore import limits
from layerstore.content.blob import BlobFile, Member
from layerstore.content.files import OpenFile
from layerstore.content.flight import Flight, FlightPlan, Waiter
from layerstore.content.objects import ObjectStore, PartialObject
from layerstore.content.scheduler import Priority, Scheduler
from layerstore.content.stats import ContentStats, LayerStats
from layerstore.content.stream import ByteSource, MemberStream
from layerstore.errors import (
    ContentError,
    InvalidLayer,
    LayerstoreError,
    NetworkError,
    ServiceError,
    VerificationError,
)
from layerstore.formats.gzipmember import decompress_member

_log = logging.getLogger(__name__)

Done = Callable[[Exception | None], None]


class Chunk(Protocol):
    """One verified piece of a file, see layertree."""

    @property
    def file_offset(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def digest(self) -> bytes: ...
    @property
    def member(self) -> int: ...
    @property
    def inner_offset(self) -> int: ...


class FileContent(Protocol):
    """What makes up a regular file, see layertree."""

    @property
    def size(self) -> int: ...
    @property
    def digest(self) -> bytes | None: ...
    @property
    def key(self) -> bytes: ...
    @property
    def first_chunk(self) -> int: ...
    @property
    def chunk_count(self) -> int: ...


class LayerMap(Protocol):
    """A layer index, as far as contents are concerned (implemented by layertree)."""

    @property
    def members(self) -> int: ...
    def member(self, number: int) -> Member: ...
    def member_chunks(self, number: int) -> Sequence[int]: ...
    def chunk(self, number: int) -> Chunk: ...
    def chunk_owner(self, number: int) -> int: ...
    def chunks_between(self, entry: int, offset: int, end: int) -> Sequence[int]: ...
    def content(self, entry: int) -> FileContent | None: ...


class LayerContent:
    """File contents of one layer.  Thread-safe.

    ``path`` is the sparse blob file; ``source`` opens a byte range of the blob at
    the registry; ``digest`` is the announced SHA-256 (hex) of the blob.
    """

    def __init__(
        self,
        name: str,
        layer_map: LayerMap,
        path: Path,
        *,
        digest: str,
        size: int,
        toc_offset: int,
        objects: ObjectStore,
        scheduler: Scheduler,
        source: ByteSource,
        stats: ContentStats,
        verified: bool = False,
    ) -> None:
        self.name = name
        self.stats = LayerStats(total_bytes=size)
        self._map = layer_map
        self._blob = BlobFile(path, layer_map, size, toc_offset)
        self._digest = digest
        self._objects = objects
        self._scheduler = scheduler
        self._source = source
        self._totals = stats
        self._lock = threading.Lock()
        self._plan = FlightPlan(_Units(self._blob))
        self._waiters: dict[int, list[Waiter]] = {}
        self._failed: dict[int, tuple[float, Exception]] = {}
        self._contradictory: dict[bytes, VerificationError] = {}
        self._needed = bytearray(self._blob.units)
        self._verified = verified
        self._verifying = threading.Lock()
        self._blob_error: ContentError | None = None

    # -- reading what is here --------------------------------------------------

    def read_cached(self, entry: int, offset: int, size: int) -> bytearray | bytes | None:
        """The bytes if they are stored and in memory; None if reading must wait."""
        content = self._map.content(entry)
        if content is None or offset >= content.size or size <= 0:
            return b""
        size = min(size, content.size - offset)
        file = self._stored(entry, content, offset, size)
        return None if file is None else file.read_cached(offset, size)

    def read_stored(self, entry: int, offset: int, size: int) -> bytes | None:
        """The bytes if they are stored, waiting for the disk; else None."""
        content = self._map.content(entry)
        if content is None or offset >= content.size or size <= 0:
            return b""
        size = min(size, content.size - offset)
        file = self._stored(entry, content, offset, size)
        if file is None:
            return None
        data = file.read(offset, size)
        if len(data) != size:
            # a truncated object: drop it, the next read fetches it again
            self._objects.discard(content.digest or content.key)
            return None
        return data

    def open_complete(self, entry: int) -> OpenFile | None:
        """The object that holds the whole file, if it is complete."""
        content = self._map.content(entry)
        if content is None:
            return None
        return self._objects.open(content.digest or content.key)

    def read_blob(self, offset: int, size: int) -> bytes | None:
        """Bytes of the compressed blob, once all of it is here and verified; else None."""
        if not self._verified:
            return None
        return self._blob.file.read(offset, max(0, min(size, self._blob.size - offset)))

    def _stored(self, entry: int, content: FileContent, offset: int, size: int) -> OpenFile | None:
        if content.chunk_count == 1:
            self._touch(content.first_chunk)
            return self._objects.open(content.key)
        if content.key in self._contradictory:
            raise self._contradictory[content.key]
        partial = self._objects.known_partial(content.key)
        if partial is None and content.digest:
            complete = self._objects.open(content.digest)
            if complete is not None:
                return complete
        partial = partial or self._objects.partial(
            content.key, content.size, content.chunk_count, create=False
        )
        if partial is not None and not self._missing_chunks(entry, content, partial, offset, size):
            return partial.file
        return None

    def _touch(self, chunk: int) -> None:
        """Count the member that holds the chunk as needed by a reader, once."""
        unit = self._map.chunk(chunk).member + 1
        if not self._needed[unit]:
            self._needed[unit] = 1
            offset, end = self._blob.extent(unit)
            self.stats.needed_bytes += end - offset
            self._totals.needed(end - offset)

    def _missing_chunks(
        self,
        entry: int,
        content: FileContent,
        partial: PartialObject | None,
        offset: int,
        size: int,
    ) -> list[int]:
        """Chunk numbers of the range that are not in the partial object."""
        missing = []
        for number in self._map.chunks_between(entry, offset, offset + size):
            self._touch(number)
            if partial is None or not partial.present[number - content.first_chunk]:
                missing.append(number)
        return missing

    # -- fetching --------------------------------------------------------------

    def fetch(self, entry: int, offset: int, size: int, done: Done) -> None:
        """Bring the range here; ``done(error or None)`` is called once, from any thread."""
        content = self._map.content(entry)
        if content is None or offset >= content.size:
            done(None)
            return
        size = min(size, content.size - offset)
        if self._stored(entry, content, offset, size) is not None:
            done(None)
            return
        partial = (
            self._objects.partial(content.key, content.size, content.chunk_count, create=False)
            if content.chunk_count > 1
            else None
        )
        chunks = self._missing_chunks(entry, content, partial, offset, size)
        units = sorted({self._map.chunk(number).member + 1 for number in chunks})
        self._demand(units, done)

    def fetch_blob(self, done: Done) -> None:
        """Bring the whole blob here and verify it; ``done`` as for fetch()."""
        missing = [unit for unit in range(self._blob.units) if not self._blob.present[unit]]
        self._demand(missing, lambda error: done(error or self._verify_blob()))

    def _demand(self, units: Sequence[int], done: Done) -> None:
        if not units:
            done(None)
            return
        now = time.monotonic()
        with self._lock:
            for unit in units:
                when, error = self._failed.get(unit, (0.0, None))
                if error is not None and now - when < limits.FAILURE_SECONDS:
                    break
            else:
                error = None
            if error is None:
                self._enlist(units, Waiter(len(units), done))
        if error is not None:
            done(error)

    def _enlist(self, units: Sequence[int], waiter: Waiter) -> None:
        for unit in units:
            self._waiters.setdefault(unit, []).append(waiter)
            for flight in self._plan.demand(unit):
                self._start(flight)

    def prefetch(self, end: int) -> None:
        """Fetch the units that lie before byte ``end`` of the blob ahead of need."""
        last = -1
        while last + 1 < self._blob.units and self._blob.extent(last + 1)[1] <= end:
            last += 1
        with self._lock:
            size = limits.PREFETCH_RANGE_BYTES
            while (flight := self._plan.sweep(0, last, size, Priority.PREFETCH)) is not None:
                self._start(flight)

    def complete_step(self) -> bool:
        """Fetch a next large range in the background, in this thread; True while more is missing.

        Raises what the registry or the disk raised.
        """
        with self._lock:
            flight = self._plan.sweep(
                0, self._blob.units - 1, limits.BACKGROUND_RANGE_BYTES, Priority.BACKGROUND
            )
        if flight is not None:
            error = self._fly(flight)
            if error is not None:
                raise error
        if not self._blob.present.full:
            return True
        error = self._verify_blob()
        if error is not None:
            raise error
        return False

    @property
    def complete(self) -> bool:
        """Whether every byte of the blob is stored and the blob digest was checked."""
        return self._verified

    @property
    def stored_bytes(self) -> int:
        """How many bytes of the compressed blob are stored."""
        return self._blob.stored_bytes

    @property
    def blob_size(self) -> int:
        """Size of the compressed blob in bytes."""
        return self._blob.size

    def seed(self, end: bytes) -> None:
        """Take over the last bytes of the blob, which were read to resolve the layer."""
        start = self._blob.size - len(end)
        view = memoryview(end)
        for unit in range(self._blob.units - 1, -1, -1):
            offset, stop = self._blob.extent(unit)
            if offset < start:
                return
            if self._blob.present[unit]:
                continue
            data = view[offset - start : stop - start]
            try:
                if self._blob.is_member(unit):
                    self._ingest(unit - 1, data)
                self._blob.store(unit, data)
            except ContentError as error:
                # whoever reads it will fetch it anew and be told
                _log.warning("layer %s: bytes read with the TOC are wrong: %s", self.name, error)

    # -- flights ---------------------------------------------------------------

    def _start(self, flight: Flight) -> None:
        self._scheduler.submit(flight.priority, lambda: self._fly_quietly(flight))

    def _fly_quietly(self, flight: Flight) -> None:
        error = self._fly(flight)
        if error is not None:
            _log.warning("layer %s: fetch failed: %s", self.name, error)

    def _fly(self, flight: Flight) -> Exception | None:
        """Bring all units of a flight; the error that ended it early, if one did."""
        error: Exception | None = None
        attempt = 0
        flight.started = True
        while True:
            before = flight.position
            try:
                self._fly_on(flight)
            except NetworkError as caught:
                error = caught
                attempt = 1 if flight.position > before else attempt + 1
                if attempt < limits.FETCH_ATTEMPTS and not self._scheduler.closed:
                    pause = limits.BACKOFF_FIRST_SECONDS * 2**attempt
                    time.sleep(random.uniform(pause / 2, pause))
                    continue
            except Exception as caught:
                error = caught
            else:
                error = None
            break
        with self._lock:
            self._plan.landed(flight)
            left = range(flight.position, flight.last + 1)
            calls = [
                call
                for unit in left
                if self._plan.covering(unit) is None
                for call in self._arrived(unit, error or ServiceError("the fetch was stopped"))
            ]
        for call in calls:
            call()
        return error

    def _fly_on(self, flight: Flight) -> None:
        while flight.position <= flight.last:
            if not self._scheduler.give_way(flight.priority):
                raise ServiceError("the store is being stopped", subject=self.name)
            unit = flight.position
            if self._blob.present[unit]:
                self._take(flight, unit, self._blob.read_unit(unit), fetched=False)
                continue
            last = unit
            while last < flight.last and not self._blob.present[last + 1]:
                last += 1
            self._stream(flight, self._blob.extent(unit)[0], self._blob.extent(last)[1])

    def _stream(self, flight: Flight, offset: int, end: int) -> None:
        """Take units out of one response, from flight.position on."""
        piece = (
            limits.STREAM_DEMAND_BYTES
            if flight.priority is Priority.DEMAND
            else limits.STREAM_BULK_BYTES
        )
        self._totals.request(flight.priority)
        with MemberStream(self._source, offset, end - offset, piece) as stream:
            if stream.start != offset:
                with self._lock:
                    other = self._plan.whole
                    if other is None:
                        self._plan.spread(flight)
                if other is not None:
                    self._join(flight, other)
                    return
                end = self._blob.size
            while flight.position <= flight.last:
                unit = flight.position
                first, unit_end = self._blob.extent(unit)
                if unit_end > end or (self._blob.present[unit] and not flight.whole):
                    return
                data = stream.take(unit_end - first)
                self.stats.fetched_bytes += unit_end - first
                self._totals.fetched(flight.priority, unit_end - first)
                self._take(flight, unit, data, fetched=True)
                if not self._scheduler.give_way(flight.priority):
                    raise ServiceError("the store is being stopped", subject=self.name)

    def _join(self, flight: Flight, other: Flight) -> None:
        """Another flight already streams the whole blob: leave the units to it."""
        while flight.position <= flight.last:
            if not self._scheduler.give_way(Priority.DEMAND):
                raise ServiceError("the store is being stopped", subject=self.name)
            with self._lock:
                gone = self._plan.whole is not other
            if self._blob.present[flight.position]:
                self._take(flight, flight.position, b"", fetched=False, stored=True)
            elif gone:
                raise NetworkError("the stream of the whole blob broke", subject=self.name)
            else:
                time.sleep(0.02)

    def _take(
        self,
        flight: Flight,
        unit: int,
        data: bytes | memoryview,
        *,
        fetched: bool,
        stored: bool = False,
    ) -> None:
        """Verify and store one unit, tell those who wait for it, and step on."""
        error: Exception | None = None
        try:
            if self._blob.is_member(unit) and not stored:
                self._ingest(unit - 1, data)
            if fetched and not self._blob.present[unit]:
                self._blob.store(unit, data)
        except LayerstoreError as caught:
            error = caught
            self._totals.failed_units += 1
            self.stats.failed_units += 1
            _log.error("layer %s: refused bytes of unit %d: %s", self.name, unit, caught)
        with self._lock:
            if error is not None:
                self._failed[unit] = (time.monotonic(), error)
            else:
                self._failed.pop(unit, None)
            flight.position = unit + 1
            calls = self._arrived(unit, error)
        for call in calls:
            call()

    def _arrived(self, unit: int, error: Exception | None) -> list[Callable[[], None]]:
        waiters = self._waiters.pop(unit, ())
        return [call for waiter in waiters if (call := waiter.arrived(error)) is not None]

    # -- verification ----------------------------------------------------------

    def _ingest(self, member: int, data: bytes | memoryview) -> None:
        chunks = [(number, self._map.chunk(number)) for number in self._map.member_chunks(member)]
        if not chunks:
            return
        needed = max(chunk.inner_offset + chunk.size for _, chunk in chunks)
        plain = memoryview(decompress_member(data, limit=needed + limits.MEMBER_SLACK_BYTES))
        for number, chunk in chunks:
            payload = plain[chunk.inner_offset : chunk.inner_offset + chunk.size]
            if len(payload) != chunk.size:
                raise InvalidLayer(f"chunk {number} is shorter than {chunk.size} bytes")
            if hashlib.sha256(payload).digest() != chunk.digest:
                raise VerificationError(f"chunk {number} does not have its announced digest")
            self._keep(number, chunk, payload)

    def _keep(self, number: int, chunk: Chunk, payload: memoryview) -> None:
        content = self._map.content(self._map.chunk_owner(number))
        if content is None:
            return
        if content.chunk_count == 1:
            self._objects.put(content.key, payload)
            return
        if content.digest and self._objects.has(content.digest):
            return
        partial = self._objects.partial(content.key, content.size, content.chunk_count, create=True)
        if partial is None:
            return
        last = partial.write(number - content.first_chunk, chunk.file_offset, payload)
        digest = content.digest
        if last and digest:
            key = content.key
            self._scheduler.submit(
                Priority.PREFETCH, lambda: self._complete_object(key, partial, digest)
            )

    def _complete_object(self, key: bytes, partial: PartialObject, digest: bytes) -> None:
        """Check a large file as a whole, once all its chunks are there."""
        try:
            self._objects.complete(key, partial, digest)
        except VerificationError as error:
            self._contradictory[key] = error
            self._totals.failed_units += 1
            self.stats.failed_units += 1
            _log.error("layer %s: %s", self.name, error)

    def _verify_blob(self) -> ContentError | None:
        """Check the digest over the whole stored blob, once."""
        with self._verifying:
            if self._verified:
                return None
            if self._blob_error is not None:
                return self._blob_error
            actual = self._blob.sha256()
            if actual == self._digest:
                self._verified = True
                return None
            self._blob_error = VerificationError(
                f"blob has SHA-256 {actual} instead of {self._digest}",
                subject=self.name,
                advice="files whose chunks were verified stay readable; the blob is not exported",
            )
            _log.error("%s", self._blob_error)
            self._totals.failed_units += 1
            return self._blob_error


class _Units:
    """The view that FlightPlan has of a blob."""

    def __init__(self, blob: BlobFile) -> None:
        self._blob = blob
        self.units = blob.units
        self.extent = blob.extent
        self.is_member = blob.is_member

    def stored(self, unit: int) -> bool:
        return self._blob.present[unit]
