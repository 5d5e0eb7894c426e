"""Cutting one HTTP response into the pieces that the caller asks for."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from layerstore.errors import NetworkError


class Response(Protocol):
    """A body under way (see registry.BlobReader): ``start`` is its first byte's offset."""

    start: int

    def read(self, size: int) -> bytes: ...
    def close(self) -> None: ...


# open(offset, length): bytes of the blob from a registry; it may answer from byte 0.
ByteSource = Callable[[int, int], Response]


class MemberStream:
    """Exact slices of a response, one after the other.

    ``piece`` is how much is asked of the connection at once: small where somebody
    waits for the first member, large in bulk work.
    """

    def __init__(self, source: ByteSource, offset: int, length: int, piece: int) -> None:
        self._response = source(offset, length)
        self._piece = piece
        self._buffer: bytes | memoryview = b""
        self._position = 0
        self.start = self._response.start

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._response.close()

    def take(self, size: int) -> memoryview:
        """The next ``size`` bytes; NetworkError when the body ends before."""
        have = len(self._buffer) - self._position
        if have < size:
            parts: list[bytes | memoryview] = [memoryview(self._buffer)[self._position :]]
            while have < size:
                part = self._response.read(max(self._piece, min(size - have, 8 * self._piece)))
                if not part:
                    raise NetworkError(f"the body ended {size - have} bytes early")
                parts.append(part)
                have += len(part)
            self._buffer = b"".join(parts)
            self._position = 0
        view = memoryview(self._buffer)[self._position : self._position + size]
        self._position += size
        return view
