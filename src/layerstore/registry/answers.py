"""Reading what a registry answers: ranges, error bodies, Retry-After.

Pure functions over header values and bytes.  Sources: RFC 9110 sections 10.2.3
and 14.4, OCI distribution specification ("Error Codes").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Final

import msgspec

from layerstore import limits
from layerstore.errors import (
    AuthenticationError,
    NotFound,
    RateLimited,
    RegistryError,
)

_RANGE: Final = re.compile(r"bytes\s+(\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")
_MISSING: Final = frozenset(("NAME_UNKNOWN", "MANIFEST_UNKNOWN", "BLOB_UNKNOWN"))
_SHOWN_ERRORS: Final = 3


class ContentRange(msgspec.Struct, frozen=True):
    """``bytes start-(end-1)/total``: ``end`` is exclusive, ``total`` may be unknown."""

    start: int
    end: int
    total: int | None


def parse_content_range(value: str | None) -> ContentRange | None:
    """Read a Content-Range header; None if it makes no sense."""
    match = _RANGE.fullmatch(value.strip()) if value else None
    if match is None:
        return None
    start, last = int(match[1]), int(match[2])
    total = None if match[3] == "*" else int(match[3])
    if last < start or (total is not None and last >= total):
        return None
    return ContentRange(start, last + 1, total)


def parse_length(value: str | None) -> int | None:
    """Read a Content-Length header; None if absent or no plain number."""
    text = value.strip() if value else ""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def retry_after(value: str | None, now: float) -> float | None:
    """Seconds to wait that a Retry-After header asks for, at most the limit.

    ``now`` is the wall clock in seconds since 1970; None if the header is
    absent or makes no sense.
    """
    if not value:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:9]), limits.RETRY_AFTER_MAX_SECONDS)
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return min(max(moment.timestamp() - now, 0.0), limits.RETRY_AFTER_MAX_SECONDS)


class _Error(msgspec.Struct):
    code: str = ""
    message: str = ""


class _Errors(msgspec.Struct):
    errors: list[_Error] | None = None


def make_error(status: int, body: bytes, subject: str) -> RegistryError:
    """The error for a status outside 2xx, with the registry's own codes."""
    try:
        listed = msgspec.json.decode(body, type=_Errors).errors or []
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        listed = []
    codes = tuple(error.code[:64] for error in listed if error.code)
    words = "; ".join(
        ": ".join(part for part in (error.code[:64], error.message[:200]) if part)
        for error in listed[:_SHOWN_ERRORS]
    )
    what = f"registry answered {status}" + (f" ({words})" if words else "")
    kind: type[RegistryError] = RegistryError
    advice = ""
    if status in (401, 403):
        kind, advice = AuthenticationError, "log in with `podman login`"
    elif status == 404 or (400 <= status < 500 and _MISSING.intersection(codes)):
        kind = NotFound
    elif status == 429:
        kind, advice = RateLimited, "the registry limits requests; log in or wait"
    return kind(what, subject=subject, advice=advice, status=status, codes=codes)


def refuse_encoding(headers: Mapping[str, str], subject: str) -> None:
    """Raise ``RegistryError`` for a body that is not sent as it is."""
    encoding = headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise RegistryError(
            f"answered with Content-Encoding {encoding[:40]!r} though identity was asked for",
            subject=subject,
        )
