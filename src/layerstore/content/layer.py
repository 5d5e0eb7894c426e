"""The contents of one layer: read what is here, fetch what is not.

Reads name an *entry* (a regular file) and a byte range.  What is stored is read
at once; otherwise the gzip members that hold the range are fetched, decompressed,
verified chunk by chunk and stored, and then the reader is called back.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from layerstore.content.blob import BlobFile
from layerstore.content.fetcher import Done, Fetcher
from layerstore.content.files import OpenFile
from layerstore.content.ingest import Ingester
from layerstore.content.layermap import FileContent, LayerMap
from layerstore.content.objects import ObjectStore, PartialObject
from layerstore.content.scheduler import Scheduler
from layerstore.content.stats import ContentStats, LayerStats
from layerstore.content.stream import ByteSource
from layerstore.errors import ContentError, VerificationError

_log = logging.getLogger(__name__)


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
        self._totals = stats
        self._ingester = Ingester(name, layer_map, objects, scheduler, self.stats, stats)
        self._fetcher = Fetcher(
            name, self._blob, self._ingester, scheduler, source, self.stats, stats
        )
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
        self._ingester.check(content.key)
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
        self._fetcher.demand(units, done)

    def fetch_blob(self, done: Done) -> None:
        """Bring the whole blob here and verify it; ``done`` as for fetch()."""
        missing = [unit for unit in range(self._blob.units) if not self._blob.present[unit]]
        self._fetcher.demand(missing, lambda error: done(error or self._verify_blob()))

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
            data = view[offset - start : stop - start]
            try:
                if self._blob.is_member(unit):
                    self._ingester.take(unit - 1, data)
                self._blob.store(unit, data)
            except ContentError as error:
                # whoever reads it will fetch it anew and be told
                _log.warning("layer %s: bytes read with the TOC are wrong: %s", self.name, error)

    # -- verification ----------------------------------------------------------

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
