"""Counters of one client."""

from __future__ import annotations

import threading


class Stats:
    """Thread-safe counters: ``requests`` sent, body ``bytes`` received and ``retries``."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests = 0
        self._bytes = 0
        self._retries = 0

    @property
    def requests(self) -> int:
        """HTTP requests sent, those to token servers and redirect targets included."""
        return self._requests

    @property
    def bytes(self) -> int:
        """Bytes of response bodies read."""
        return self._bytes

    @property
    def retries(self) -> int:
        """Requests repeated after a failure that may pass."""
        return self._retries

    def add(self, *, requests: int = 0, received: int = 0, retries: int = 0) -> None:
        """Count up."""
        with self._lock:
            self._requests += requests
            self._bytes += received
            self._retries += retries

    def __repr__(self) -> str:
        return f"Stats(requests={self._requests}, bytes={self._bytes}, retries={self._retries})"
