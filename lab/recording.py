"""A recording reverse proxy: every request that passes, with its Range and the bytes it cost.

The access log of Debian's docker-registry knows neither the Range header nor requests under way,
so tests that count fetched bytes put this proxy in front.  It passes everything through unchanged
(the Host header too, so that upload addresses lead back here) and can add a delay before each
response, as a registry that is far away would.
"""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final, Self

_PIECE: Final = 256 * 1024
_HOP_BY_HOP: Final = frozenset({"connection", "keep-alive", "transfer-encoding", "expect"})
_BODILESS: Final = frozenset({204, 304})


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it was answered.

    ``path`` includes the query; ``status`` is 0 while no answer came; ``bytes`` counts body bytes
    sent to the client; ``range`` is the Range header or None; ``started`` and ``ended`` (of the
    answer) are on the clock of ``time.monotonic`` (0.0 where that is not known).
    """

    method: str
    path: str
    status: int
    bytes: int
    range: str | None = None
    started: float = 0.0
    ended: float = 0.0


class _Entry:
    """A request under way: the mutable form of Request."""

    __slots__ = ("ended", "method", "path", "range", "sent", "started", "status")

    def __init__(self, method: str, path: str, range_: str | None) -> None:
        self.method = method
        self.path = path
        self.range = range_
        self.status = 0
        self.sent = 0
        self.started = time.monotonic()
        self.ended = 0.0

    def freeze(self) -> Request:
        return Request(
            self.method, self.path, self.status, self.sent, self.range, self.started, self.ended
        )


class RecordingProxy:
    """Listens on a free loopback port and forwards to ``upstream`` ("host:port", plain HTTP).

    A context manager.  ``delay`` (seconds before each response) may be changed at any time.
    """

    def __init__(self, upstream: str, *, delay: float = 0.0) -> None:
        self.upstream: Final = upstream
        self.delay = delay
        self._entries: list[_Entry] = []
        self._lock = threading.Lock()
        self._server = _Server(self)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        return self._server.server_port

    @property
    def host(self) -> str:
        """ "127.0.0.1:PORT", as it stands in an image reference."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    def requests(self) -> list[Request]:
        """Everything asked since the start or the last ``clear``, those under way included."""
        with self._lock:
            return [entry.freeze() for entry in self._entries]

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def close(self) -> None:
        """Stop listening and cut the connections that are open."""
        self._server.shutdown()
        self._server.server_close()
        self._server.cut()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self, method: str, path: str, range_: str | None) -> _Entry:
        entry = _Entry(method, path, range_)
        with self._lock:
            self._entries.append(entry)
        return entry


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, proxy: RecordingProxy) -> None:
        self.proxy = proxy
        self._open: set[socket.socket] = set()
        self._open_lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._open_lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._open_lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news; the record shows what it got."""

    def cut(self) -> None:
        with self._open_lock:
            connections = list(self._open)
        for connection in connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server
    _upstream: http.client.HTTPConnection | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):  # the base class looks up do_<METHOD>: all are passed on
            return self._forward
        raise AttributeError(name)

    def log_message(self, *_: object) -> None:
        """Nothing: the record is the log."""

    def finish(self) -> None:
        super().finish()
        if self._upstream is not None:
            self._upstream.close()

    def _forward(self) -> None:
        proxy = self.server.proxy
        entry = proxy._open(self.command, self.path, self.headers.get("Range"))
        try:
            self._pass_on(entry, proxy.delay)
        finally:
            entry.ended = time.monotonic()

    def _pass_on(self, entry: _Entry, delay: float) -> None:
        try:
            response = self._ask()
        except (OSError, http.client.HTTPException):
            self._drop_upstream()
            entry.status = 502
            self.close_connection = True
            self.send_error(502)
            return
        if delay > 0:
            time.sleep(delay)
        entry.status = response.status
        self._answer(response, entry)

    def _ask(self) -> http.client.HTTPResponse:
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "").lower()
        length = int(self.headers.get("Content-Length", "0"))
        if self._upstream is None:
            host, _, port = self.server.proxy.upstream.rpartition(":")
            self._upstream = http.client.HTTPConnection(host, int(port), timeout=120)
        connection = self._upstream
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in _HOP_BY_HOP:
                connection.putheader(name, value)
        if chunked:
            connection.putheader("Transfer-Encoding", "chunked")
        body = self._chunks() if chunked else self._sized(length) if length else None
        connection.endheaders(body, encode_chunked=chunked)
        return connection.getresponse()

    def _sized(self, length: int) -> Iterator[bytes]:
        while length:
            piece = self.rfile.read(min(length, _PIECE))
            if not piece:
                raise ConnectionResetError("the client stopped inside a body")
            length -= len(piece)
            yield piece

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(64).split(b";")[0], 16):
            yield from self._sized(size)
            self.rfile.readline(4)
        while self.rfile.readline(1024).strip():  # trailers
            pass

    def _answer(self, response: http.client.HTTPResponse, entry: _Entry) -> None:
        self.send_response_only(response.status, response.reason)
        for name, value in response.getheaders():
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        chunked = response.chunked
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if self.command == "HEAD" or response.status in _BODILESS:
            response.read()
            return
        while True:
            try:
                piece = response.read(_PIECE) if not chunked else response.read1(_PIECE)
            except (OSError, http.client.HTTPException):
                piece = b""
            if not piece:
                break
            # Counted first: a client that has the bytes must find them in the record.
            entry.sent += len(piece)
            try:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            except OSError:
                entry.sent -= len(piece)
                self._drop_upstream()
                self.close_connection = True
                return
        if chunked:
            self.wfile.write(b"0\r\n\r\n")
        elif response.length:  # the registry stopped short: the client must see that too
            self._drop_upstream()
            self.close_connection = True

    def _drop_upstream(self) -> None:
        if self._upstream is not None:
            self._upstream.close()
            self._upstream = None
