"""Modification times of a TOC: RFC 3339 text to nanoseconds since 1970.

Go writes ``2024-05-01T12:00:00Z``; fractions of any length and numeric offsets
are legal as well.  Empty means unknown, and so does Go's zero time (year 1).
"""

from __future__ import annotations

import functools
import re
from datetime import datetime
from typing import Final

from layerstore.errors import InvalidLayer

MIN_NS: Final = -(1 << 63)
MAX_NS: Final = (1 << 63) - 1

_SECOND: Final = 1_000_000_000
_EPOCH: Final = datetime(1970, 1, 1)
_GO_ZERO: Final = "0001-01-01T00:00:00Z"
_TEXT_CHARS: Final = 64
_PATTERN: Final = re.compile(
    r"(\d{4}-\d\d-\d\dT(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d)"
    r"(?:\.(\d+))?(?:Z|([+-])([01]\d|2[0-3]):([0-5]\d))",
    re.ASCII,
)


@functools.lru_cache(maxsize=1024)
def parse_time_ns(text: str) -> int:
    """Nanoseconds since the epoch; times that 64 bits cannot hold are clamped.

    Raises InvalidLayer for a text that is not RFC 3339.
    """
    if not text or text == _GO_ZERO:
        return 0
    match = _PATTERN.fullmatch(text) if len(text) <= _TEXT_CHARS else None
    if match is None:
        raise InvalidLayer(f"{text[:_TEXT_CHARS]!r} is no RFC 3339 time")
    try:
        since = datetime.fromisoformat(match[1]) - _EPOCH
    except ValueError as error:
        raise InvalidLayer(f"{text!r} is no date of the calendar") from error
    seconds = since.days * 86400 + since.seconds
    if match[3]:
        offset = int(match[4]) * 3600 + int(match[5]) * 60
        seconds += offset if match[3] == "-" else -offset
    nanoseconds = int(match[2][:9].ljust(9, "0")) if match[2] else 0
    return min(max(seconds * _SECOND + nanoseconds, MIN_NS), MAX_NS)
