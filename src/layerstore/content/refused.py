"""Units whose bytes were wrong: counted, told, and remembered for a moment."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Final

from layerstore import limits
from layerstore.content.stats import ContentStats, LayerStats
from layerstore.errors import ContentError

_log = logging.getLogger(__name__)

_TRIES: Final = 2  # bytes that are wrong are fetched once more, at once


class RefusedUnits:
    """Those of one layer; ``distrust`` is called at each, before it is fetched again."""

    def __init__(
        self, name: str, stats: LayerStats, totals: ContentStats, distrust: Callable[[], None]
    ) -> None:
        self._name = name
        self._stats = stats
        self._totals = totals
        self._distrust = distrust
        self._refused: dict[int, tuple[int, float, ContentError]] = {}

    def add(self, unit: int, error: ContentError) -> None:
        """The bytes of this unit were wrong."""
        count = self._refused.get(unit, (0, 0.0, error))[0] + 1
        self._refused[unit] = (count, time.monotonic(), error)
        self._stats.failed_units += 1
        self._totals.failed_units += 1
        self._distrust()
        _log.error("event=bytes-refused layer=%s unit=%d error=%s", self._name, unit, error)

    def check(self, units: Iterable[int]) -> None:
        """Raise the error of a unit that was wrong twice a moment ago: a third try must wait."""
        for unit in units:
            count, when, error = self._refused.get(unit, (0, 0.0, None))
            if error is None:
                continue
            if time.monotonic() - when > limits.FAILURE_SECONDS:
                self._refused.pop(unit, None)
            elif count >= _TRIES:
                raise error
