"""Content-Range, Retry-After and error bodies."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerstore import limits
from layerstore.errors import AuthenticationError, NotFound, RateLimited, RegistryError
from layerstore.registry.answers import (
    ContentRange,
    make_error,
    parse_content_range,
    parse_length,
    retry_after,
)


@given(st.integers(0, 10**17), st.integers(1, 10**17), st.integers(0, 10**17))
def test_content_range_is_read_as_written(start: int, count: int, behind: int) -> None:
    end, total = start + count, start + count + behind
    assert parse_content_range(f"bytes {start}-{end - 1}/{total}") == ContentRange(
        start, end, total
    )
    assert parse_content_range(f"bytes {start}-{end - 1}/*") == ContentRange(start, end, None)
    assert parse_content_range(f"bytes {start}-{end - 1}/{end - 1}") is None


@pytest.mark.parametrize("text", [None, "", "bytes", "bytes -1-2/3", "bytes 5-4/9", "bytes 0-0/0"])
def test_content_range_that_is_none(text: str | None) -> None:
    assert parse_content_range(text) is None


@given(st.text())
def test_any_text_is_taken(text: str) -> None:
    parse_content_range(text)
    parse_length(text)
    pause = retry_after(text, 0.0)
    assert pause is None or 0 <= pause <= limits.RETRY_AFTER_MAX_SECONDS


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (401, "UNAUTHORIZED", AuthenticationError),
        (403, "DENIED", AuthenticationError),
        (404, "NAME_UNKNOWN", NotFound),
        (400, "MANIFEST_UNKNOWN", NotFound),
        (429, "TOOMANYREQUESTS", RateLimited),
        (500, "BLOB_UNKNOWN", RegistryError),
        (418, "TEAPOT", RegistryError),
    ],
)
def test_kinds_of_errors(status: int, code: str, kind: type[RegistryError]) -> None:
    body = json.dumps({"errors": [{"code": code, "message": "words", "detail": {"a": 1}}]})
    error = make_error(status, body.encode(), "subject")
    assert type(error) is kind
    assert (error.status, error.codes) == (status, (code,))
    assert "words" in str(error)


@given(st.binary())
def test_any_error_body_is_taken(body: bytes) -> None:
    assert make_error(500, body, "").status == 500
