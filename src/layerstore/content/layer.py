"""The contents of one layer: read what is here, fetch what is not.

Reads name an *entry* (a regular file) and a byte range.  Contents have three
states: an object (verified, decompressed: read at once), bytes of the blob as
the registry sent them (decompressed and verified at the first read, which makes
the object), and not here (fetched first).  Prefetch and background work thus
cost no more than storing bytes, and only verified bytes are ever shown.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from layerstore import limits
from layerstore.content.blob import BlobFile
from layerstore.content.fetcher import Done, Fetcher
from layerstore.content.files import OpenFile
from layerstore.content.ingest import Ingester
from layerstore.content.layermap import FileContent, LayerMap
from layerstore.content.objects import ObjectStore, PartialObject
from layerstore.content.outages import Outages
from layerstore.content.scheduler import Scheduler
from layerstore.content.stats import ContentStats, LayerStats
from layerstore.content.stream import ByteSource
from layerstore.errors import ContentError, LayerstoreError, VerificationError
from layerstore.formats.compression import Readable
from layerstore.formats.members import MemberCodec

_log = logging.getLogger(__name__)

_TRIES: Final = 2  # bytes that are wrong are fetched once more, at once


class LayerContent:
    """File contents of one layer.  Thread-safe.

    ``path`` is the sparse blob file; ``source`` opens a byte range of the blob at
    the registry; ``codec`` takes its members apart; ``digest`` is the announced
    SHA-256 (hex) of the blob; ``distrust`` is called when bytes that came were
    wrong, before they are fetched again; ``outages``, ``places`` and ``patience`` are those
    of Fetcher.
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
        codec: MemberCodec,
        objects: ObjectStore,
        scheduler: Scheduler,
        source: ByteSource,
        stats: ContentStats,
        outages: Outages,
        places: Callable[[], str] = lambda: "",
        patience: Callable[[], float] = lambda: limits.OUTAGE_FAIL_SECONDS,
        verified: bool = False,
        distrust: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.stats = LayerStats(total_bytes=size)
        self._map = layer_map
        self._blob = BlobFile(path, layer_map, size, toc_offset)
        self._digest = digest
        self._objects = objects
        self._totals = stats
        self._ingester = Ingester(name, layer_map, codec, objects, scheduler, self.stats, stats)
        self._fetcher = Fetcher(
            name,
            self._blob,
            scheduler,
            source,
            self.stats,
            stats,
            outages,
            places,
            patience,
        )
        self._needed = bytearray(self._blob.units)
        self._distrust = distrust
        self._verified = verified and self._blob.present.full
        self._verifying = threading.Lock()
        self._refusing = threading.Lock()
        self._blob_lock = threading.Lock()
        self._blob_waiting: list[Done] = []
        self._wrong_blob = ""  # the digest last seen of wrong bytes that fit the TOC
        self._again = False  # wrong bytes are being fetched once more, at once
        self._blob_error: VerificationError | None = None
        self._refused: dict[int, tuple[int, float, ContentError]] = {}

    # -- reading what is here --------------------------------------------------

    def read_cached(self, entry: int, offset: int, size: int) -> bytearray | bytes | None:
        """The bytes if they are stored and in memory; None if reading must wait."""
        content = self._map.content(entry)
        if content is None or offset >= content.size or size <= 0:
            return b""
        size = min(size, content.size - offset)
        file = self._stored(entry, content, offset, size, wait=False)
        return None if file is None else file.read_cached(offset, size)

    def read_stored(self, entry: int, offset: int, size: int) -> bytes | None:
        """The bytes if they are stored, waiting for the disk; else None."""
        content = self._map.content(entry)
        if content is None or offset >= content.size or size <= 0:
            return b""
        size = min(size, content.size - offset)
        file = self._stored(entry, content, offset, size)
        if file is None:
            return self._materialize(entry, content, offset, size)
        data = file.read(offset, size)
        if len(data) != size:
            # a truncated object: drop it, the next read makes it anew
            self._objects.discard(content.digest or content.key)
            return None
        return data

    def _materialize(
        self, entry: int, content: FileContent, offset: int, size: int
    ) -> bytes | None:
        """Make objects of stored members and read from them; None if members are missing."""
        chunks = self._absent_chunks(entry, content, offset, size)
        units = {self._map.chunk(number).member + 1: number for number in chunks}
        if not all(self._blob.present[unit] for unit in units):
            return None
        payload: memoryview | None = None
        for unit, number in units.items():
            payload = self._take(unit, number)
        if content.plain and payload is not None:
            return bytes(payload[offset : offset + size])
        file = self._stored(entry, content, offset, size)
        return None if file is None else file.read(offset, size)

    def _take(self, unit: int, number: int) -> memoryview | None:
        data = self._unit(unit)
        try:
            return self._ingester.take(unit - 1, data, number)
        except ContentError as error:
            self._refuse(unit, data, error)
            raise

    def _unit(self, unit: int) -> bytes | Readable:
        if self._ingester.is_long(unit - 1):
            return self._blob.stream_unit(unit)
        return self._blob.read_unit(unit)

    def _refuse(self, unit: int, data: bytes | Readable, error: ContentError) -> None:
        """Stored bytes are wrong: forget them, and remember for a moment that they were.

        Of several readers only the first counts: others may come when better ones are here.
        """
        with self._refusing:
            if not self._blob.present[unit]:
                return
            if isinstance(data, bytes) and self._blob.read_unit(unit) != data:
                return
            self._blob.discard(unit)
            self._verified = False
            count = self._refused.get(unit, (0, 0.0, error))[0] + 1
            self._refused[unit] = (count, time.monotonic(), error)
            self.stats.failed_units += 1
            self._totals.failed_units += 1
        self._distrust()
        _log.error("event=bytes-refused layer=%s unit=%d error=%s", self.name, unit, error)

    def _recent_refusal(self, units: Iterable[int]) -> ContentError | None:
        """The error of a unit that was wrong twice a moment ago: a third try must wait."""
        for unit in units:
            count, when, error = self._refused.get(unit, (0, 0.0, None))
            if error is None:
                continue
            if time.monotonic() - when > limits.FAILURE_SECONDS:
                self._refused.pop(unit, None)
            elif count >= _TRIES:
                return error
        return None

    def read_blob(self, offset: int, size: int) -> bytes | None:
        """Bytes of the compressed blob, once all of it is here and verified; else None."""
        if not self._verified:
            return None
        return self._blob.file.read(offset, max(0, min(size, self._blob.size - offset)))

    def _stored(
        self, entry: int, content: FileContent, offset: int, size: int, *, wait: bool = True
    ) -> OpenFile | None:
        if content.plain:
            self._touch(content.first_chunk)
            return self._objects.open(content.key, wait=wait)
        self._ingester.check(content.key)
        partial = self._objects.known_partial(content.key)
        if partial is None and content.digest:
            complete = self._objects.open(content.digest, wait=wait)
            if complete is not None:
                for number in self._map.chunks_between(entry, offset, offset + size):
                    self._touch(number)
                return complete
        partial = partial or self._partial(content)
        if not self._missing_chunks(entry, content, partial, offset, size):
            partial = partial or self._ingester.partial(content)  # all of it is holes
            if partial is not None:
                return partial.file
        # it may have become whole meanwhile
        return self._objects.open(content.digest, wait=wait) if content.digest else None

    def _partial(self, content: FileContent) -> PartialObject | None:
        return self._objects.partial(
            content.key, content.size, content.chunk_count, content.digest, create=False
        )

    def _touch(self, chunk: int) -> None:
        """Count the member that holds the chunk as needed by a reader, once."""
        found = self._map.chunk(chunk)
        unit = found.member + 1
        if not found.hole and not self._needed[unit]:
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
            if self._map.chunk(number).hole:
                continue
            self._touch(number)
            if partial is None or not partial.present[number - content.first_chunk]:
                missing.append(number)
        return missing

    # -- fetching --------------------------------------------------------------

    def fetch(self, entry: int, offset: int, size: int, done: Done) -> None:
        """Bring the range here; ``done(error or None)`` is called once, from any thread."""
        try:
            missing = self._missing_units(entry, offset, size)
        except (LayerstoreError, OSError) as error:
            done(error)
            return
        self._fetcher.demand(missing, done)

    def _missing_units(self, entry: int, offset: int, size: int) -> list[int]:
        """The units to fetch for the range; raises what refuses the file or fails at the disk."""
        content = self._map.content(entry)
        if content is None or offset >= content.size:
            return []
        size = min(size, content.size - offset)
        if self._stored(entry, content, offset, size) is not None:
            return []
        chunks = self._absent_chunks(entry, content, offset, size)
        units = {self._map.chunk(number).member + 1 for number in chunks}
        missing = sorted(unit for unit in units if not self._blob.present[unit])
        refusal = self._recent_refusal(missing)
        if refusal is not None:
            raise refusal
        return missing

    def _absent_chunks(self, entry: int, content: FileContent, offset: int, size: int) -> list[int]:
        partial = None if content.plain else self._partial(content)
        return self._missing_chunks(entry, content, partial, offset, size)

    def fetch_blob(self, done: Done) -> None:
        """Bring the whole blob here and verify it; ``done`` as for fetch()."""
        with self._blob_lock:
            self._blob_waiting.append(done)
            if len(self._blob_waiting) > 1:
                return  # a reader ahead asks for many pieces: one of them brings the blob
        self._bring_blob()

    def _bring_blob(self) -> None:
        def arrived(error: Exception | None) -> None:
            again = False
            try:
                if error is None:
                    again = not (self._blob.present.full and self._verify_blob())
            except Exception as caught:
                error = caught
            if again:
                self._bring_blob()
                return
            with self._blob_lock:
                waiting, self._blob_waiting = self._blob_waiting, []
            for done in waiting:
                done(error)

        self._fetcher.demand(
            [unit for unit in range(self._blob.units) if not self._blob.present[unit]], arrived
        )

    def prefetch(self, end: int) -> None:
        """Fetch the units that lie before byte ``end`` of the blob ahead of need."""
        last = -1
        while last + 1 < self._blob.units and self._blob.extent(last + 1)[1] <= end:
            last += 1
        self._fetcher.prefetch(last)

    def complete_step(self) -> bool:
        """Fetch a next large range in the background, in this thread; True while more is missing.

        Raises what the registry or the disk raised.
        """
        error = self._fetcher.sweep()
        if error is not None:
            raise error
        if not self._blob.present.full:
            return True
        return not self._verify_blob()

    @property
    def complete(self) -> bool:
        """Whether every byte of the blob is stored and the blob digest was checked."""
        return self._verified

    @property
    def filled(self) -> bool:
        """Whether every byte of the blob is said to be stored."""
        return self._blob.present.full

    @property
    def blob_error(self) -> VerificationError | None:
        """Set when the same wrong blob came twice, of which every member fits its TOC.

        Members that do not fit came damaged, and may come right another time.
        """
        return self._blob_error

    @property
    def stored_bytes(self) -> int:
        """How many bytes of the compressed blob are stored."""
        return self._blob.stored_bytes

    def seed(self, end: bytes) -> None:
        """Take over the last bytes of the blob, which were read to resolve the layer."""
        self.stats.fetched_bytes += len(end)
        self._totals.resolved(len(end))
        start = self._blob.size - len(end)
        view = memoryview(end)
        for unit in range(self._blob.units - 1, -1, -1):
            offset, stop = self._blob.extent(unit)
            if offset < start:
                return
            if self._blob.present[unit]:
                continue
            self._blob.write(offset, view[offset - start : stop - start])
            self._blob.mark(unit)

    # -- verification ----------------------------------------------------------

    def _verify_blob(self) -> bool:
        """Check the digest over the whole stored blob; False if parts must be fetched again.

        Raises VerificationError if the registry has another blob than announced.
        """
        with self._verifying:
            if self._verified:
                return True
            if self._blob_error is not None:
                raise self._blob_error
            actual = self._blob.sha256()
            if actual == self._digest:
                self._blob.sync()  # this is remembered, even after a power failure
                self._objects.ledger.stamp(self._blob.file.fd)
                self._verified = True
                return True
            damaged = self._scrub()
            before, self._wrong_blob = self._wrong_blob, "" if damaged else actual
            twice = not damaged and actual == before
            again, self._again = self._again, not self._again
            if not (twice or again):
                return False
            error = VerificationError(
                f"blob has SHA-256 {actual} instead of {self._digest}",
                subject=self.name,
                advice="the registry sends another blob than the manifest names",
            )
            if not twice:
                raise error  # for this time
            self._blob_error = error
            _log.error("event=blob-refused layer=%s error=%s", self.name, self._blob_error)
            self._totals.failed_units += 1
            raise error

    def _scrub(self) -> bool:
        """Forget the members that do not fit the TOC, else all of the blob; whether there were any."""
        found = False
        for unit in filter(self._blob.is_member, range(self._blob.units)):
            data = self._unit(unit)
            try:
                self._ingester.check_member(unit - 1, data)
            except ContentError as error:
                self._refuse(unit, data, error)
                found = True
        if not found:  # headers, padding and members without contents: only the digest covers them
            for unit in range(self._blob.units):
                self._blob.discard(unit)
        return found
