"""The transport ``docker://REFERENCE``: a repository of a registry."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import TracebackType
from typing import Final, Self

from layerstore import limits
from layerstore.copy.transport import ImageDestination, ImageSource, Pieces
from layerstore.errors import NetworkError, RegistryError
from layerstore.formats import Compression
from layerstore.image import Digest, Reference
from layerstore.registry import BlobReader, FetchedManifest, RegistryClient

_WORTH_BYTES: Final = 1 << 20


class RegistryImage(ImageSource, ImageDestination):
    """Source and destination in one.

    ``owned`` says that closing this closes the client, ``untagged`` that what is put gets no
    tag, only its digest.
    """

    transport = "docker"
    layer_form = Compression.GZIP

    def __init__(
        self,
        client: RegistryClient,
        reference: Reference,
        *,
        owned: bool = False,
        untagged: bool = False,
    ) -> None:
        self._client = client
        self._reference = reference
        self._owned = owned
        self._untagged = untagged

    @property
    def reference(self) -> Reference:
        """The image's name."""
        return self._reference

    @property
    def identity(self) -> Reference:
        """See ``ImageSource``."""
        return self._reference

    # -- source -------------------------------------------------------------------

    def manifest(self, digest: Digest | None = None) -> FetchedManifest:
        """See ``ImageSource``."""
        return self._client.manifest(self.reference, digest)

    def blob(self, digest: Digest, limit: int) -> bytes:
        """See ``ImageSource``."""
        return self._client.blob(self.reference, digest, limit)

    def open_blob(self, digest: Digest, size: int, offset: int = 0) -> ResumedBlob:
        """See ``ImageSource``; from ``offset`` on, and broken connections are taken up again."""
        return ResumedBlob(self._client, self.reference, digest, size, offset)

    def read_range(self, digest: Digest, size: int, offset: int, length: int) -> bytes:
        """See ``ImageSource``; a registry without ranges sends the blob from its start."""
        if length <= 0:
            return b""
        with self._client.open_blob(
            self.reference, digest, offset=offset, length=length, size=size
        ) as reader:
            _skip(reader, offset - reader.start)
            return reader.read(length)

    def signatures(self, digest: Digest) -> tuple[bytes, ...]:
        """What lies where registries.d says; raises ``ConfigError`` and errors of reading."""
        from layerstore.copy.lookaside import Lookaside  # noqa: PLC0415

        place = self._client.served_by(self.reference)
        physical = replace(self.reference, domain=place.host, path=place.path)
        settings = self._client.settings
        return Lookaside.from_system(settings, env=settings.helper_env).signatures(physical, digest)

    def close(self) -> None:
        """See ``ImageSource`` and ``ImageDestination``."""
        if self._owned:
            self._client.close()

    # -- destination --------------------------------------------------------------

    @property
    def digest(self) -> Digest | None:
        """See ``ImageDestination``."""
        return self._reference.digest

    def has_blob(self, digest: Digest, size: int) -> bool:
        """See ``ImageDestination``."""
        return self._client.has_blob(self.reference, digest)

    def take_over(self, source: ImageSource, digest: Digest) -> bool:
        """Mount a blob from another repository of the same registry."""
        if not isinstance(source, RegistryImage):
            return False
        try:
            return self._client.mount_blob(self.reference, digest, source.reference)
        except RegistryError:
            return False  # a convenience: what is wrong with the push, the upload will tell

    def put_blob(self, digest: Digest, pieces: Pieces, size: int) -> None:
        """See ``ImageDestination``."""
        self._client.upload_blob(self.reference, digest, pieces, size)

    def put_manifest(self, raw: bytes, media_type: str, *, top: bool) -> None:
        """See ``ImageDestination``."""
        named = top and not self._untagged
        reference = self.reference if named else self.reference.with_digest(Digest.of(raw))
        self._client.put_manifest(reference, raw, media_type)


class ResumedBlob:
    """A blob from ``offset`` on; a connection that breaks is taken up where it broke.

    ``close`` may be called from another thread, and ends a ``read`` that waits.
    """

    def __init__(
        self,
        client: RegistryClient,
        reference: Reference,
        digest: Digest,
        size: int,
        offset: int = 0,
    ) -> None:
        self._client = client
        self._reference = reference
        self._digest = digest
        self._size = size
        self._offset = offset
        self._failures = 0
        self._broken_at = offset
        self._reader: BlobReader | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def read(self, n: int, /) -> bytes:
        """At most ``n`` bytes, ``b""`` only at the end.  Raises ``NetworkError``."""
        while self._offset < self._size:
            try:
                data = self._opened().read_some(n)
            except NetworkError:
                self._drop()
                # Only a connection that brought something worth while earns a new count.
                if self._offset - self._broken_at >= _WORTH_BYTES:
                    self._failures = 0
                self._broken_at = self._offset
                self._failures += 1
                if self._failures >= limits.ATTEMPTS or self._closed.is_set():
                    raise
                self._closed.wait(limits.BACKOFF_FIRST_SECONDS * 2**self._failures)
                continue
            if not data:
                break
            self._offset += len(data)
            return data
        return b""

    def close(self) -> None:
        """Drop the connection; reads fail from now on."""
        self._closed.set()
        self._drop()

    def _opened(self) -> BlobReader:
        if self._reader is not None:
            return self._reader
        reader = self._client.open_blob(
            self._reference, self._digest, offset=self._offset, size=self._size
        )
        with self._lock:
            self._reader = reader
        if self._closed.is_set():
            raise NetworkError("the blob was closed", subject=str(self._digest))
        _skip(reader, self._offset - reader.start)
        return reader

    def _drop(self) -> None:
        with self._lock:
            reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _skip(reader: BlobReader, count: int) -> None:
    while count > 0 and (data := reader.read_some(count)):
        count -= len(data)
