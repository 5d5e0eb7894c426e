"""Where bytes of a blob come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Response(Protocol):
    """A body under way (see registry.BlobReader): ``start`` is its first byte's offset."""

    start: int

    def read_some(self, limit: int) -> bytes: ...
    def close(self) -> None: ...


# open(offset, length, seconds): bytes of the blob from a registry; it may answer from byte 0.
# The head of the answer comes within ``seconds``, else NetworkError.
ByteSource = Callable[[int, int, float], Response]
