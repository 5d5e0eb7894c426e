"""Waiting for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

_PAUSE_SECONDS: Final = 0.01


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Return as soon as ``condition`` holds; AssertionError if it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(_PAUSE_SECONDS)
