"""Where images are copied from and to: what every transport offers.

A source gives manifests and blobs by digest, a destination takes them.  Transports are
named as in containers/image: ``docker://REFERENCE`` for a registry and
``oci:DIRECTORY[:TAG]`` for an OCI layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

from layerstore.errors import VerificationError
from layerstore.image import Digest
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


class ImageSource(Protocol):
    """Read side of a transport; methods may be called from several threads."""

    def manifest(self, digest: Digest | None = None) -> FetchedManifest:
        """The manifest that the name stands for, or the one called ``digest``, verified."""

    def blob(self, digest: Digest, limit: int) -> bytes:
        """A small blob, verified."""

    def open_blob(self, digest: Digest, size: int) -> BlobStream:
        """A whole blob of ``size`` bytes as a stream."""

    def read_range(self, digest: Digest, size: int, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` of a blob of ``size`` bytes, not verified."""

    def close(self) -> None:
        """Give up connections."""


class ImageDestination(Protocol):
    """Write side of a transport; methods may be called from several threads."""

    def has_blob(self, digest: Digest, size: int) -> bool:
        """Whether the blob need not be put."""

    def take_over(self, source: ImageSource, digest: Digest) -> bool:
        """Try to take a blob from ``source`` without moving its bytes."""

    def put_blob(self, digest: Digest, pieces: Pieces, size: int) -> None:
        """Store a blob; ``pieces()`` gives its bytes, anew for each attempt."""

    def put_manifest(self, raw: bytes, media_type: str, *, top: bool) -> None:
        """Store a manifest by digest; the ``top`` one under the destination's name."""

    def close(self) -> None:
        """Give up connections."""


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
