"""Reading one HTTP response body: bounded, counted, with time-outs."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable
from typing import Final, Self

import urllib3
from urllib3.exceptions import HTTPError, ReadTimeoutError
from urllib3.response import BaseHTTPResponse

from layerstore.errors import DeadlineExceeded, LimitExceeded, NetworkError
from layerstore.registry.stats import Stats

_STEP_BYTES: Final = 1 << 20
_SMALL_BYTES: Final = 64 << 10  # worth reading to keep a connection
# What a body read can raise: urllib3 maps nearly everything, the rest comes from
# a response that another thread closes meanwhile.
_BROKEN: Final = (HTTPError, OSError, ValueError, AttributeError, http.client.HTTPException)


class Body:
    """The body of ``response``; ``expected`` is its length in bytes if known.

    Every read ends within ``read_seconds`` of silence and before ``deadline``
    (monotonic seconds).
    """

    def __init__(
        self,
        response: BaseHTTPResponse,
        *,
        expected: int | None,
        subject: str,
        stats: Stats,
        clock: Callable[[], float],
        read_seconds: float,
        deadline: float | None,
    ) -> None:
        self._response = response
        self._subject = subject
        self._stats = stats
        self._clock = clock
        self._read_seconds = read_seconds
        self._deadline = deadline
        self._closed = False
        self._ended = False
        self.expected = expected
        self.received = 0

    def read_some(self, limit: int) -> bytes:
        """Between 1 and ``limit`` bytes, ``b""`` only at the end.

        Raises ``NetworkError`` when the body ends early, breaks or stalls.
        """
        if self.expected is not None:
            limit = min(limit, self.expected - self.received)
            self._ended = self._ended or self.received == self.expected
        if self._ended:
            self.finish()
            return b""
        if self._closed:
            raise NetworkError("the body was closed", subject=self._subject)
        self._arm()
        try:
            data = self._response.read1(min(limit, _STEP_BYTES))
        except ReadTimeoutError as error:
            self.close()
            self._check_deadline()
            raise NetworkError(
                f"stalled: no data for {self._read_seconds:g} seconds after {self._progress()}",
                subject=self._subject,
            ) from error
        except _BROKEN as error:
            if self._closed:  # by another thread
                raise NetworkError("the body was closed", subject=self._subject) from error
            self.close()
            raise NetworkError(
                f"connection broken after {self._progress()}: {describe(error)}",
                subject=self._subject,
            ) from error
        if not data:
            if self.expected is not None:
                self.close()
                raise NetworkError(f"short body: {self._progress()}", subject=self._subject)
            self._ended = True
            self.finish()
            return b""
        self.received += len(data)
        self._stats.add(received=len(data))
        if self.received == self.expected:
            self.finish()  # the connection is free before the caller comes back
        return data

    def read(self, size: int) -> bytes:
        """Exactly ``size`` bytes, fewer only at the end."""
        parts: list[bytes] = []
        missing = size
        while missing > 0 and (data := self.read_some(missing)):
            parts.append(data)
            missing -= len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_all(self, limit: int) -> bytes:
        """The whole body; raises ``LimitExceeded`` if it is longer than ``limit``."""
        if self.expected is not None and self.expected > limit:
            self.close()
            raise LimitExceeded(
                f"{self.expected} bytes announced, at most {limit} are taken",
                subject=self._subject,
            )
        data = self.read(limit + 1)  # reads past a body of unknown length, to see its end
        if len(data) > limit:
            self.close()
            raise LimitExceeded(f"more than {limit} bytes", subject=self._subject)
        return data

    def finish(self) -> None:
        """Give the connection back for reuse after the last byte."""
        if self._closed:
            return
        self._closed = True
        try:
            # The read past the end is what makes http.client and urllib3 notice it.
            extra = self._response.read(1)
        except _BROKEN:
            extra = b"?"
        if extra:
            self._response.close()
        self._response.release_conn()

    def close(self) -> None:
        """Drop the connection unless the body was read to its end."""
        if self._closed:
            return
        self._closed = True
        connection = self._socket()
        if connection is not None:
            try:
                # Wakes a thread that waits in recv; SSLSocket.shutdown would not.
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
            except OSError:
                connection = None
        try:
            self._response.close()
        except _BROKEN:
            connection = None
        self._response.release_conn()

    def _socket(self) -> socket.socket | None:
        connection = self._response.connection
        if isinstance(connection, http.client.HTTPConnection):
            found = connection.sock
            return found if isinstance(found, socket.socket) else None
        return None

    def _arm(self) -> None:
        if self._deadline is None:
            return
        self._check_deadline()
        if (connection := self._socket()) is not None:
            left = max(self._deadline - self._clock(), 0.001)
            connection.settimeout(min(self._read_seconds, left))

    def _check_deadline(self) -> None:
        if self._deadline is not None and self._clock() >= self._deadline:
            self.close()
            raise DeadlineExceeded(f"out of time after {self._progress()}", subject=self._subject)

    def _progress(self) -> str:
        of = "" if self.expected is None else f" of {self.expected}"
        return f"{self.received}{of} bytes"


class BlobReader:
    """Bytes of a blob from one HTTP response; use as a context manager.

    ``start`` is the offset in the blob of the first byte that ``read`` gives:
    the offset asked for, or 0 when the registry ignored the range.  ``length``
    counts the bytes that will be given in all, ``total`` those of the whole
    blob.  ``partial`` tells a range (206) from a whole blob (200).  Nothing is
    resumed here: after a ``NetworkError`` the caller opens the rest anew.
    """

    def __init__(self, body: Body, *, start: int, length: int, total: int, partial: bool) -> None:
        self._body = body
        self.start = start
        self.length = length
        self.total = total
        self.partial = partial

    @property
    def position(self) -> int:
        """Offset in the blob of the next byte."""
        return self.start + self._body.received

    def read(self, size: int) -> bytes:
        """Exactly ``size`` bytes, fewer only at the end, ``b""`` after it.

        Raises ``NetworkError`` on a reset, a short body or a stall, and
        ``DeadlineExceeded`` when the deadline given to ``open_blob`` has passed.
        """
        if size < 0:
            raise ValueError("size must not be negative")
        return self._body.read(size)

    def read_some(self, limit: int) -> bytes:
        """What has arrived, 1 to ``limit`` bytes; ``b""`` only at the end."""
        return self._body.read_some(limit)

    def close(self) -> None:
        """Abort; may be called from another thread, which ends a read there."""
        self._body.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        kind = "partial" if self.partial else "whole"
        return f"BlobReader({kind}, {self.start}+{self.length} of {self.total})"


def discard(response: BaseHTTPResponse) -> None:
    """Get rid of a response; keeps the connection if little is left to read."""
    length = response.length_remaining  # 0 for the answer to a HEAD
    try:
        if length is not None and length <= _SMALL_BYTES:
            response.read()
        else:
            response.close()
    except _BROKEN:
        response.close()
    response.release_conn()


def describe(error: BaseException) -> str:
    """A short text for an exception of the HTTP library, without object addresses."""
    if isinstance(error, urllib3.exceptions.NewConnectionError | urllib3.exceptions.ProtocolError):
        cause = error.__cause__ or error.__context__
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        if isinstance(error, urllib3.exceptions.ProtocolError) and error.args:
            return " ".join(str(part) for part in error.args)[:200]
    if isinstance(error, urllib3.exceptions.ConnectTimeoutError):
        return "no connection in time"
    if isinstance(error, ReadTimeoutError):
        return "no answer in time"
    return (str(error) or type(error).__name__)[:200]
