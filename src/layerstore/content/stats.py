"""Counters of what was needed, fetched and refused."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter

from layerstore.content.scheduler import Priority


@dataclasses.dataclass(slots=True)
class LayerStats:
    """Bytes of one layer's compressed blob."""

    total_bytes: int
    needed_bytes: int = 0
    fetched_bytes: int = 0
    failed_units: int = 0


class ContentStats:
    """Sums over all layers.  Thread-safe where it matters (additions)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.needed_bytes = 0
        self.failed_units = 0
        self._resolving = 0
        self._fetched = dict.fromkeys(Priority, 0)
        self._requests = dict.fromkeys(Priority, 0)
        self._failed_reads: Counter[str] = Counter()

    def needed(self, size: int) -> None:
        """A read asked for this many compressed bytes for the first time."""
        with self._lock:
            self.needed_bytes += size

    def resolved(self, size: int) -> None:
        """So many bytes were fetched to read footers and TOCs."""
        with self._lock:
            self._resolving += size

    def fetched(self, priority: Priority, size: int) -> None:
        """So many bytes came from a registry."""
        with self._lock:
            self._fetched[priority] += size

    def request(self, priority: Priority) -> None:
        """A range request was sent."""
        with self._lock:
            self._requests[priority] += 1

    def read_failed(self, reason: str) -> None:
        """A process got EIO, for a reason that is an error's code."""
        with self._lock:
            self._failed_reads[reason] += 1

    def as_dict(self) -> dict[str, object]:
        """For the status report."""
        with self._lock:
            return {
                "needed_bytes": self.needed_bytes,
                "fetched_bytes": {
                    "toc": self._resolving,
                    **{p.name.lower(): n for p, n in self._fetched.items()},
                },
                "range_requests": {p.name.lower(): n for p, n in self._requests.items()},
                "refused_units": self.failed_units,
                "failed_reads": dict(self._failed_reads),
            }
