"""How much to fetch at once: what the link brings while one more request would wait.

Fetching neighbours costs their transfer time, another request costs a round
trip; both are equal at (bytes a second) x (time to the first byte).  On a fast
link that is megabytes, on a slow one a fraction of it.
"""

from __future__ import annotations

from layerstore import limits

_WEIGHT = 0.3  # of a new measurement
_ENOUGH_BYTES = 64 * limits.KIB  # shorter answers tell nothing about the rate
_ROUND_TRIPS = 2  # neighbours are wanted more often than not


class Pace:
    """Running means of latency and rate, and the window that follows from them."""

    def __init__(self) -> None:
        self._latency = 0.0
        self._rate = 0.0

    def measured(self, latency: float, size: int, seconds: float) -> None:
        """A request's first byte came after ``latency``, all ``size`` bytes after ``seconds``."""
        self._latency += (latency - self._latency) * (_WEIGHT if self._latency else 1.0)
        if size >= _ENOUGH_BYTES:
            rate = size / max(seconds - latency, 1e-4)
            self._rate += (rate - self._rate) * (_WEIGHT if self._rate else 1.0)

    @property
    def window(self) -> int:
        """Bytes to fetch for a read on demand, its neighbours included."""
        if not self._rate:
            return limits.DEMAND_RANGE_FIRST_BYTES
        wanted = int(self._rate * self._latency * _ROUND_TRIPS)
        return min(max(wanted, limits.DEMAND_RANGE_MIN_BYTES), limits.DEMAND_RANGE_PACED_BYTES)
