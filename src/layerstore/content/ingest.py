"""Verifying what arrives: gzip members to chunks, chunks to objects.

Nothing reaches an object before its digest was checked.  A file of several
chunks is checked a second time as a whole: when the digest that the TOC
announces for it contradicts the verified chunks, the file is refused for good.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator

from layerstore import limits
from layerstore.content.layermap import Chunk, LayerMap
from layerstore.content.objects import ObjectStore, PartialObject
from layerstore.content.scheduler import Priority, Scheduler
from layerstore.content.stats import ContentStats, LayerStats
from layerstore.errors import InvalidLayer, StorageError, VerificationError
from layerstore.formats import decompress_member

_log = logging.getLogger(__name__)


class Ingester:
    """Takes the members of one layer into the object store.  Thread-safe."""

    def __init__(
        self,
        name: str,
        layer_map: LayerMap,
        objects: ObjectStore,
        scheduler: Scheduler,
        stats: LayerStats,
        totals: ContentStats,
    ) -> None:
        self._name = name
        self._map = layer_map
        self._objects = objects
        self._scheduler = scheduler
        self._stats = stats
        self._totals = totals
        self._contradictory: dict[bytes, VerificationError] = {}

    def check(self, key: bytes) -> None:
        """Raise VerificationError if the file with this chunk list contradicts itself."""
        error = self._contradictory.get(key)
        if error is not None:
            raise error

    def take(self, member: int, data: bytes, wanted: int = -1) -> memoryview | None:
        """Verify and store the chunks of a member, given its compressed bytes.

        Gives the contents of chunk ``wanted`` if it is one of them.  Raises
        InvalidLayer, LimitExceeded, VerificationError, StorageError.
        """
        found = None
        for number, chunk, payload in self._verified(member, data):
            self._keep(number, chunk, payload)
            if number == wanted:
                found = payload
        return found

    def check_member(self, member: int, data: bytes) -> None:
        """Verify the chunks of a member without storing them; raises as take()."""
        for _ in self._verified(member, data):
            pass

    def _verified(self, member: int, data: bytes) -> Iterator[tuple[int, Chunk, memoryview]]:
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
            yield number, chunk, payload

    def _keep(self, number: int, chunk: Chunk, payload: memoryview) -> None:
        content = self._map.content(self._map.chunk_owner(number))
        if content is None:
            return
        if content.chunk_count == 1:
            self._objects.put(content.key, payload)
            return
        partial = self._objects.partial(
            content.key, content.size, content.chunk_count, content.digest, create=True
        )
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
            self._stats.failed_units += 1
            _log.error("event=file-refused layer=%s error=%s", self._name, error)
        except (StorageError, OSError) as error:
            # its chunks stay readable where they are
            _log.warning("event=file-not-published layer=%s error=%s", self._name, error)
