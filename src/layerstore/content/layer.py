"""The contents of one layer: read what is here, fetch what is not.

Reads name an *entry* (a regular file) and a byte range.  Contents have three
states: an object (verified, decompressed: read at once), bytes of the blob as
the registry sent them (decompressed and verified at the first read, which makes
the object), and not here (fetched first).  Prefetch and background work thus
cost no more than storing bytes, and only verified bytes are ever shown.
"""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from layerstore import limits
from layerstore.content.blob import BlobFile
from layerstore.content.fetcher import Done, Fetcher
from layerstore.content.files import OpenFile
from layerstore.content.ingest import Ingester
from layerstore.content.layermap import FileContent, LayerMap
from layerstore.content.objects import ObjectStore
from layerstore.content.outages import Outages
from layerstore.content.partial import PartialObject
from layerstore.content.refused import RefusedUnits
from layerstore.content.scheduler import Scheduler
from layerstore.content.stats import ContentStats, LayerStats
from layerstore.content.stream import ByteSource
from layerstore.content.unstored import UnstoredFetcher
from layerstore.content.wholeblob import WholeBlob
from layerstore.errors import ContentError, LayerstoreError, StorageError, VerificationError
from layerstore.formats.compression import Readable
from layerstore.formats.members import MemberCodec

_log = logging.getLogger(__name__)


class LayerContent:
    """File contents of one layer.  Thread-safe.

    ``path`` is the sparse blob file; ``source`` opens a byte range of the blob at
    the registry; ``codec`` takes its members apart; ``digest`` is the announced
    SHA-256 (hex) of the blob; ``distrust`` is called when bytes that came were
    wrong, before they are fetched again; ``outages``, ``places`` and ``patience`` are those
    of Fetcher; ``counts`` are those of the layer so far.
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
        counts: LayerStats | None = None,
        distrust: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.stats = counts or LayerStats(total_bytes=size)
        self.used = False  # somebody read from it since this was last set back
        self._map = layer_map
        self._disk, self._shelf = objects.disk, objects.shelf
        self._blob = BlobFile(path, layer_map, size, toc_offset, objects)
        self._objects = objects
        self._totals = stats
        self._ingester = Ingester(name, layer_map, codec, objects, scheduler, self.stats, stats)
        self._fetcher = Fetcher(
            name, self._blob, scheduler, source, self.stats, stats, outages, places, patience
        )
        self._refused = RefusedUnits(name, self.stats, stats, distrust)
        self._unstored = UnstoredFetcher(
            layer_map, source, self._blob, self._fetcher, self._ingester, scheduler,
            self._refused, self._missing,
        )  # fmt: skip
        self._needed = bytearray(self._blob.units)
        self._whole = WholeBlob(
            name, digest, self._blob, self._ingester, self._unit, self._refuse,
            ledger=objects.ledger, totals=stats, verified=verified,
        )  # fmt: skip
        self._refusing = threading.Lock()
        self._blob_lock = threading.Lock()
        self._blob_waiting: list[Done] = []

    # -- reading what is here --------------------------------------------------

    def read_cached(self, entry: int, offset: int, size: int) -> bytearray | bytes | None:
        """The bytes if they are stored and in memory; None if reading must wait."""
        content = self._map.content(entry)
        if content is None or offset >= content.size or size <= 0:
            return b""
        size = min(size, content.size - offset)
        file = self._stored(entry, content, offset, size, wait=False)
        return None if file is None else file.read_cached(offset, size)

    def read_stored(self, entry: int, offset: int, size: int) -> bytes | bytearray | None:
        """The bytes if they are stored, waiting for the disk; else None."""
        content = self._map.content(entry)
        if content is None or offset >= content.size or size <= 0:
            return b""
        size = min(size, content.size - offset)
        file = self._stored(entry, content, offset, size)
        if file is not None:
            data = self._read_file(file, content, offset, size)
            if data is not None:
                return data
        return self._materialize(entry, content, offset, size)

    def _read_file(
        self, file: OpenFile, content: FileContent, offset: int, size: int
    ) -> bytes | None:
        """Bytes of an object; one that is too short or cannot be read is dropped."""
        try:
            data = file.read(offset, size)
        except OSError as error:
            _log.warning("event=file-unreadable layer=%s error=%s", self.name, error.strerror)
            data = b""
        if len(data) == size:
            return data
        self._objects.discard(content.digest or content.key)
        self._objects.discard_partial(content.key)
        return None

    def _materialize(
        self, entry: int, content: FileContent, offset: int, size: int
    ) -> bytes | bytearray | None:
        """Take the chunks out of stored members; None if members are missing.

        They become objects where the disk takes them.
        """
        partial = None if content.plain else self._partial(content)
        found: dict[int, bytes | memoryview] = {}
        units: dict[int, list[int]] = {}
        for number in self._missing_chunks(entry, content, partial, offset, size):
            chunk = self._map.chunk(number)
            if chunk.hole:
                continue
            shelved = self._shelf.get(chunk.digest)
            if shelved is None:
                units.setdefault(chunk.member + 1, []).append(number)
            else:
                found[number] = shelved
        if not all(self._blob.here(unit) for unit in units):
            return None
        for unit, numbers in units.items():
            taken = self._take(unit, numbers)
            if taken is None:
                return None
            found |= taken
        return self._assembled(entry, content, partial, found, offset, size)

    def _assembled(
        self,
        entry: int,
        content: FileContent,
        partial: PartialObject | None,
        found: dict[int, bytes | memoryview],
        offset: int,
        size: int,
    ) -> bytearray | None:
        """A range of a file out of chunks, holes, and what the partial object has."""
        whole = bytearray(size)
        for number in self._map.chunks_between(entry, offset, offset + size):
            chunk = self._map.chunk(number)
            start = max(offset, chunk.file_offset)
            stop = min(offset + size, chunk.file_offset + chunk.size)
            if chunk.hole:
                continue
            piece: bytes | memoryview | None = found.get(number)
            if piece is not None:
                piece = piece[start - chunk.file_offset : stop - chunk.file_offset]
            elif partial is not None:
                piece = self._read_file(partial.file, content, start, stop - start)
            if piece is None:
                return None
            whole[start - offset : stop - offset] = piece
        return whole

    def _take(self, unit: int, numbers: Collection[int]) -> dict[int, memoryview] | None:
        """The contents of these chunks of a unit; None if it cannot be read any more."""
        try:
            data = self._unit(unit)
            return self._ingester.take(unit - 1, data, numbers)
        except ContentError as error:
            self._refuse(unit, data, error)
            raise
        except OSError as error:
            self._blob.discard(unit)
            _log.warning("event=file-unreadable layer=%s error=%s", self.name, error.strerror)
            return None

    def _unit(self, unit: int) -> bytes | Readable:
        held = self._blob.held(unit)
        if self._ingester.is_long(unit - 1):
            return self._blob.stream_unit(unit) if held is None else io.BytesIO(held)
        return self._blob.read_unit(unit) if held is None else held

    def _refuse(self, unit: int, data: bytes | Readable, error: ContentError) -> None:
        """Stored bytes are wrong: forget them, and remember for a moment that they were.

        Of several readers only the first counts: others may come when better ones are here.
        """
        with self._refusing:
            if not self._blob.here(unit):
                return
            if isinstance(data, bytes) and self._unit(unit) != data:
                return
            self._blob.discard(unit)
            self._whole.verified = False
        self._refused.add(unit, error)

    def read_blob(self, offset: int, size: int) -> bytes | None:
        """Bytes of the compressed blob, once all of it is here and verified; else None."""
        if not self._whole.verified:
            return None
        return self._blob.file.read(offset, max(0, min(size, self._blob.size - offset)))

    def _stored(
        self, entry: int, content: FileContent, offset: int, size: int, *, wait: bool = True
    ) -> OpenFile | None:
        self.used = True
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
        if partial is None and not wait:
            return None
        partial = partial or self._partial(content)
        missing = self._missing_chunks(entry, content, partial, offset, size, wait=wait)
        if partial is not None and not missing:
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
        *,
        wait: bool = True,
    ) -> list[int]:
        """Chunk numbers of the range that are not in the partial object.

        Not to ``wait``: or have to be verified first.  A hole is among them where it is no hole
        in the partial object, and cannot be made one.
        """
        missing = []
        for number in self._map.chunks_between(entry, offset, offset + size):
            chunk, place = self._map.chunk(number), number - content.first_chunk
            if not chunk.hole:
                self._touch(number)
            if partial is None:
                here = chunk.hole
            elif wait:
                here = partial.has(place, chunk)
            else:
                here = partial.trusts(place)
            if not here:
                missing.append(number)
        return missing

    # -- fetching --------------------------------------------------------------

    def fetch(
        self, entry: int, offset: int, size: int, done: Done, *, tries: int = limits.HELD_TRIES
    ) -> None:
        """Bring the range here; ``done(error or None)`` is called once, from any thread.

        What the disk does not take is in memory then, until ``done`` returns.
        """
        try:
            absent = self._absent(entry, offset, size)
            missing = self._missing(absent)
            self._refused.check(missing)
        except (LayerstoreError, OSError) as error:
            done(error)
            return
        in_memory = self._disk.full

        def arrived(error: Exception | None) -> None:
            left = tries - 1
            if error is None and self._disk.full:
                still = self._missing(self._absent(entry, offset, size))
                again = not in_memory or bool(still)
                left += len(still) < len(missing)  # members that are too long come one at a time
            else:
                again = isinstance(error, StorageError)
            if again and left >= 0:
                self.fetch(entry, offset, size, done, tries=left)
            else:
                done(error)

        if not absent:
            done(None)
        elif in_memory:
            self._unstored.bring(absent, arrived)
        else:
            self._fetcher.demand(missing, arrived)

    def _absent(self, entry: int, offset: int, size: int) -> dict[int, list[int]]:
        """Chunks of the range that are not on the disk, by unit.

        Raises what refuses the file or fails at the disk.
        """
        content = self._map.content(entry)
        if content is None or offset >= content.size:
            return {}
        size = min(size, content.size - offset)
        if self._stored(entry, content, offset, size) is not None:
            return {}
        absent: dict[int, list[int]] = {}
        partial = None if content.plain else self._partial(content)
        for number in self._missing_chunks(entry, content, partial, offset, size):
            chunk = self._map.chunk(number)
            unit = chunk.member + 1
            if not chunk.hole and not self._blob.present[unit]:
                absent.setdefault(unit, []).append(number)
        return absent

    def _missing(self, absent: Mapping[int, Collection[int]]) -> list[int]:
        """The units of which some of these chunks are not in memory either."""
        return sorted(
            unit
            for unit, chunks in absent.items()
            if not self._blob.here(unit)
            and not all(self._map.chunk(number).digest in self._shelf for number in chunks)
        )

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
                    again = not (self._blob.present.full and self._whole.verify())
            except Exception as caught:
                error = caught
            if again:
                self._bring_blob()
                return
            with self._blob_lock:
                waiting, self._blob_waiting = self._blob_waiting, []
            for done in waiting:
                done(error)

        try:
            self._disk.check()
            self._blob.store_held()
        except StorageError as error:
            arrived(error)
            return
        self._fetcher.demand(
            [unit for unit in range(self._blob.units) if not self._blob.present[unit]],
            arrived,
            stored=True,
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
        self._disk.check()
        self._blob.store_held()
        error = self._fetcher.sweep()
        if error is not None:
            raise error
        if not self._blob.present.full:
            return True
        return not self._whole.verify()

    @property
    def complete(self) -> bool:
        """Whether every byte of the blob is stored and the blob digest was checked."""
        return self._whole.verified

    @property
    def filled(self) -> bool:
        """Whether every byte of the blob is said to be stored."""
        return self._blob.present.full

    @property
    def blob_error(self) -> VerificationError | None:
        """Set when the same wrong blob came twice, of which every member fits its TOC.

        Members that do not fit came damaged, and may come right another time.
        """
        return self._whole.error

    @property
    def provisional(self) -> bool:
        """See BlobFile."""
        return self._blob.provisional

    @property
    def stored_bytes(self) -> int:
        """How many bytes of the compressed blob are stored."""
        return self._blob.stored_bytes

    def seed(self, end: bytes) -> None:
        """Take over the last bytes of the blob, which were read to resolve it: see BlobFile."""
        self.stats.fetched_bytes += len(end)
        self._totals.resolved(len(end))
        self._blob.seed(end)

    def check(self, progress: Callable[[int], None]) -> str:
        """Read what is stored of the blob through, see ``WholeBlob.check``."""
        return self._whole.check(progress)
