"""Verifying what arrives: members to chunks, chunks to objects.

Nothing reaches an object before its digest was checked.  A file of several
chunks is checked a second time as a whole: when the digest that the TOC
announces for it contradicts the verified chunks, the file is refused for good.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterator

from layerstore import limits
from layerstore.content.layermap import Chunk, FileContent, LayerMap, chunks_of
from layerstore.content.objects import ObjectStore
from layerstore.content.partial import PartialObject
from layerstore.content.scheduler import Priority, Scheduler
from layerstore.content.stats import ContentStats, LayerStats
from layerstore.errors import InvalidLayer, StorageError, VerificationError
from layerstore.formats.compression import Readable
from layerstore.formats.members import MemberCodec

_log = logging.getLogger(__name__)


class Ingester:
    """Takes the members of one layer into the object store.  Thread-safe."""

    def __init__(
        self,
        name: str,
        layer_map: LayerMap,
        codec: MemberCodec,
        objects: ObjectStore,
        scheduler: Scheduler,
        stats: LayerStats,
        totals: ContentStats,
    ) -> None:
        self._name = name
        self._map = layer_map
        self._codec = codec
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

    def take(
        self, member: int, data: bytes | Readable, wanted: Collection[int] = ()
    ) -> dict[int, memoryview]:
        """Verify and store the chunks of a member, given its compressed bytes.

        They come as a stream where the member ``is_long``.  Gives the contents of those
        chunks in ``wanted`` that are in it.  What the disk does not take is shelved, from the
        first wanted chunk on to a little beyond the last one; the rest is left alone then.

        Raises InvalidLayer, LimitExceeded, VerificationError; OSError of the stream.
        """
        found: dict[int, memoryview] = {}
        beyond = 0
        for number, chunk, payload in self._verified(member, data):
            if number in wanted:
                found[number] = payload
            if self._kept(number, chunk, payload):
                continue
            if found or not wanted:
                self._objects.shelf.put(chunk.digest, payload)
            if len(found) == len(wanted):
                beyond += len(payload)
                if beyond > limits.HELD_AHEAD_BYTES:
                    break
        return found

    def check_member(self, member: int, data: bytes | Readable) -> None:
        """Verify the chunks of a member without storing them; arguments and errors of take()."""
        for _ in self._verified(member, data):
            pass

    def is_long(self, member: int) -> bool:
        """Whether a member is too long to be held in memory decompressed."""
        chunks = self._map.member_chunks(member)
        last = self._map.chunk(chunks[-1]) if chunks else None
        return last is not None and last.inner_offset + last.size > limits.MEMBER_HELD_BYTES

    def _verified(
        self, member: int, data: bytes | Readable
    ) -> Iterator[tuple[int, Chunk, memoryview]]:
        chunks = [(number, self._map.chunk(number)) for number in self._map.member_chunks(member)]
        if not chunks:
            return
        if isinstance(data, bytes):
            needed = max(chunk.inner_offset + chunk.size for _, chunk in chunks)
            plain = memoryview(self._codec.decompress(member, data, needed=needed))
            payloads: Iterator[memoryview] = (
                plain[chunk.inner_offset : chunk.inner_offset + chunk.size] for _, chunk in chunks
            )
        else:
            payloads = _streamed(self._codec.stream(member, data), [chunk for _, chunk in chunks])
        for (number, chunk), payload in zip(chunks, payloads, strict=True):
            if len(payload) != chunk.size:
                raise InvalidLayer(f"chunk {number} is shorter than {chunk.size} bytes")
            if hashlib.sha256(payload).digest() != chunk.digest:
                raise VerificationError(f"chunk {number} does not have its announced digest")
            yield number, chunk, payload

    def _kept(self, number: int, chunk: Chunk, payload: memoryview) -> bool:
        """Store a verified chunk; False if the disk does not take it."""
        content = self._map.content(self._map.chunk_owner(number))
        if content is None:
            return True
        try:
            self._store(number, chunk, payload, content)
        except StorageError:
            return False
        return True

    def _store(self, number: int, chunk: Chunk, payload: memoryview, content: FileContent) -> None:
        if content.plain:
            self._objects.put(content.key, payload)
            return
        partial = self.partial(content)
        if partial is None:
            return
        last = partial.write(number - content.first_chunk, chunk.file_offset, payload)
        digest = content.digest
        if last and digest:
            self._scheduler.submit(
                Priority.PREFETCH, lambda: self._complete_object(content, partial, digest)
            )

    def partial(self, content: FileContent) -> PartialObject | None:
        """The object that fills up with this file's chunks, made if need be; holes are there.

        None if the whole file is an object already.  Raises StorageError.
        """
        partial = self._objects.partial(
            content.key, content.size, content.chunk_count, content.digest, create=True
        )
        if partial is not None and partial.fresh:
            for number in range(content.chunk_count):
                if self._map.chunk(content.first_chunk + number).hole:
                    partial.present.set(number)
            partial.fresh = False
        return partial

    def _complete_object(self, content: FileContent, partial: PartialObject, digest: bytes) -> None:
        """Check a large file as a whole, once all its chunks are there."""
        chunks = chunks_of(self._map, content)
        try:
            if not self._objects.complete(content.key, partial, digest, chunks):
                # readers have the rest brought anew
                _log.warning("event=object-damaged object=%s", content.key.hex())
        except VerificationError as error:
            self._contradictory[content.key] = error
            self._totals.failed_units += 1
            self._stats.failed_units += 1
            _log.error("event=file-refused layer=%s error=%s", self._name, error)
        except (StorageError, OSError) as error:
            # its chunks stay readable where they are
            _log.warning("event=file-not-published layer=%s error=%s", self._name, error)


def _streamed(stream: Readable, chunks: list[Chunk]) -> Iterator[memoryview]:
    """The contents of chunks, which are sorted, out of an uncompressed stream."""
    position = 0
    for chunk in chunks:
        while position < chunk.inner_offset:
            skipped = len(stream.read(min(limits.MIB, chunk.inner_offset - position)))
            if not skipped:
                raise InvalidLayer("a member is shorter than its chunks")
            position += skipped
        payload = bytearray()
        while len(payload) < chunk.size:
            piece = stream.read(min(limits.MIB, chunk.size - len(payload)))
            if not piece:
                raise InvalidLayer("a member is shorter than its chunks")
            payload += piece
        position += chunk.size
        yield memoryview(payload)
