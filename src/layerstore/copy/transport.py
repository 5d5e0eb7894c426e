"""Where images are copied from and to: what every transport offers.

A source gives manifests and blobs by digest, a destination takes them.  Transports are
named as in containers/image: ``docker://REFERENCE`` for a registry, ``oci:`` and ``dir:``
for directories, ``oci-archive:`` and ``docker-archive:`` for single files,
``containers-storage:`` for the storage of Podman.

Both classes are inherited from by the transports: what most of them do alike stands here.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

from layerstore.errors import UnsupportedFormat, VerificationError
from layerstore.formats import Compression, LayerStream
from layerstore.image import Descriptor, Digest, Reference, media_types
from layerstore.registry import FetchedManifest

PIECE_BYTES: Final = 1 << 20
Pieces = Callable[[], Iterable[bytes]]


class BlobStream(Protocol):
    """A blob's bytes in order, not verified; a context manager."""

    def read(self, n: int, /) -> bytes:
        """At most ``n`` bytes, ``b""`` only at the end."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class ImageSource(ABC):
    """Read side of a transport; methods may be called from several threads.

    ``transport`` and ``identity`` are what policy.json knows the image by; ``reference`` is
    the logical name under which an additional layer store may know its layers, None where
    the transport has none.
    """

    @property
    @abstractmethod
    def transport(self) -> str:
        """The transport's name, ``docker`` for example."""

    @property
    def identity(self) -> Reference | str:
        """The image as policy.json names it; ``""`` matches the transport's default only."""
        return ""

    @property
    def reference(self) -> Reference | None:
        """The image's logical name, if it has one."""
        return None

    @property
    def names(self) -> tuple[Reference, ...]:
        """What an image that is pulled from here is called in the storage, as Podman 5 does."""
        return () if self.reference is None else (self.reference,)

    @abstractmethod
    def manifest(self, digest: Digest | None = None) -> FetchedManifest:
        """The manifest that the name stands for, or the one called ``digest``, verified."""

    @abstractmethod
    def blob(self, digest: Digest, limit: int) -> bytes:
        """A small blob, verified."""

    @abstractmethod
    def open_blob(self, digest: Digest, size: int) -> BlobStream:
        """A whole blob of ``size`` bytes as a stream."""

    @abstractmethod
    def read_range(self, digest: Digest, size: int, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` of a blob of ``size`` bytes, not verified."""

    def gives_blob(self, digest: Digest) -> bool:
        """Whether ``open_blob`` has these bytes; where not, ``layer_diff`` has the layer's."""
        return True

    def layer_diff(self, layer: Descriptor, diff_id: Digest) -> BlobStream:
        """The uncompressed tar stream of a layer, not verified."""
        return DiffStream(self.open_blob(layer.digest, layer.size))

    def signatures(self, digest: Digest) -> tuple[bytes, ...]:
        """Simple signatures of the manifest ``digest``, in order."""
        return ()

    def close(self) -> None:
        """Give up connections."""
        return


class ImageDestination(ABC):
    """Write side of a transport; methods may be called from several threads.

    Nothing is under the destination's name before ``put_manifest`` of the ``top`` one, and
    where the destination is one file or directory not before ``commit``; ``close`` without
    ``commit`` leaves nothing behind that was not there.
    """

    @property
    def manifest_types(self) -> tuple[str, ...]:
        """Media types of manifests and indexes that can be put, the preferred first."""
        return media_types.ALL_MANIFESTS

    @property
    def layer_form(self) -> Compression | None:
        """``NONE``: layers must be plain; ``GZIP``: plain ones shall be compressed; None: as is."""
        return None

    @property
    def digest(self) -> Digest | None:
        """The digest that the destination's name demands of the manifest."""
        return None

    @property
    def takes_signatures(self) -> bool:
        """Whether ``put_signatures`` stores anything."""
        return False

    @abstractmethod
    def has_blob(self, digest: Digest, size: int) -> bool:
        """Whether the blob need not be put."""

    def known_size(self, digest: Digest) -> int | None:
        """The size of a blob that was put before; None where that is not known."""
        return None

    def take_over(self, source: ImageSource, digest: Digest) -> bool:
        """Try to take a blob from ``source`` without moving its bytes."""
        return False

    @abstractmethod
    def put_blob(self, digest: Digest, pieces: Pieces, size: int) -> None:
        """Store a blob; ``pieces()`` gives its bytes, anew for each attempt.

        An error that the pieces raise (content that is not what it should be) passes on and
        leaves no blob behind.
        """

    def put_config(self, digest: Digest, raw: bytes) -> None:
        """Store an image's config."""
        if not self.has_blob(digest, len(raw)):
            self.put_blob(digest, lambda: (raw,), len(raw))

    @abstractmethod
    def put_manifest(self, raw: bytes, media_type: str, *, top: bool) -> None:
        """Store a manifest by digest; the ``top`` one under the destination's name."""

    def put_signatures(self, signatures: Sequence[bytes], digest: Digest, *, top: bool) -> None:
        """Store the signatures of a manifest that was put."""
        raise UnsupportedFormat("signatures cannot be stored there")

    def commit(self) -> None:
        """Publish what was put."""
        return

    def close(self) -> None:
        """Give up connections, and what was not committed."""
        return


class DiffStream:
    """The tar stream inside a blob; closing it closes the blob."""

    def __init__(self, blob: BlobStream) -> None:
        """Takes the blob over; raises what reading its first bytes does."""
        self._blob = blob
        try:
            self._tar = LayerStream(blob)
        except BaseException as error:
            blob.__exit__(type(error), error, None)
            raise

    def read(self, n: int, /) -> bytes:
        """At most ``n`` bytes; raises ``InvalidLayer``."""
        return self._tar.read(n)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._blob.__exit__(kind, error, trace)


class HashedStream:
    """Passes a stream on and keeps its digest and length."""

    def __init__(self, stream: BlobStream, digest: Digest, check: Callable[[int], None]) -> None:
        """``check`` is called with the number of bytes after each read, and may raise."""
        self._stream = stream
        self._wanted = digest
        self._hash = hashlib.new(digest.algorithm)
        self._check = check
        self.size = 0

    def read(self, n: int, /) -> bytes:
        """At most ``n`` bytes."""
        data = self._stream.read(n)
        self._hash.update(data)
        self.size += len(data)
        self._check(len(data))
        return data

    def verify(self, size: int, subject: str) -> None:
        """Read what is left; raise ``VerificationError`` unless size and digest are right."""
        while self.read(PIECE_BYTES):
            pass
        found = f"{self._wanted.algorithm}:{self._hash.hexdigest()}"
        if (found, self.size) != (self._wanted, size):
            raise VerificationError(
                f"expected {self._wanted} of {size} bytes, found {found} in {self.size} bytes",
                subject=subject,
                advice="the content was damaged or replaced on its way",
            )


def file_pieces(path: Path) -> Pieces:
    """The contents of a file for ``put_blob``."""

    def pieces() -> Iterable[bytes]:
        with path.open("rb") as file:
            while data := file.read(PIECE_BYTES):
                yield data

    return pieces
