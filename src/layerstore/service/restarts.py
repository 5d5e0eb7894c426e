"""How often servers came to nothing, and how long their keeper waits before it starts the next."""

from __future__ import annotations

import time
from dataclasses import dataclass

from layerstore import limits


@dataclass(slots=True)
class Restarts:
    """``count`` servers died unasked, the last one of ``last_cause``.

    ``trouble`` is why there is no server, and has been none for several starts; else empty.
    """

    count: int = 0
    last_cause: str = ""
    trouble: str = ""
    _failures: int = 0  # starts in a row that came to nothing

    def died(self, why: str, served_since: float | None) -> None:
        """A server died that served since then (time.monotonic()), or not yet."""
        self.count += 1
        self.last_cause = why
        if (
            served_since is not None
            and time.monotonic() - served_since > limits.SERVER_STEADY_SECONDS
        ):
            self._failures = 0

    def served(self) -> None:
        """A server serves."""
        self.trouble = ""

    def wait_seconds(self, why: str) -> float:
        """So long until the next start, as none serves and the last one ended so: 0 the first
        time, then ever longer, but never for ever.
        """
        wait = 0.0
        if self._failures:
            self.trouble = why
            doubled = limits.RESTART_FIRST_SECONDS * 2.0 ** min(self._failures - 1, 20)
            wait = min(doubled, limits.RESTART_MAX_SECONDS)
        self._failures += 1
        return wait
