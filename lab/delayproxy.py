"""A TCP relay that counts what passes and, if wanted, holds every byte back for a while.

It stands between clients and a registry in the demonstration and the benchmarks: all contenders
are counted at the same place, in the same way.  A delay is added to each direction without
limiting the bandwidth, as a longer line does (where the kernel has no netem).  Requests are
counted by their first lines: HTTP/1.1 clients send each request head in one piece, after the
answer before.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

_PIECE: Final = 256 * 1024
_HELD_BYTES: Final = 4 << 20  # enough for 3 Gbit/s at 10 ms; more would hide a slow client
_REQUEST: Final = re.compile(rb"(?:GET|HEAD|POST|PUT|PATCH|DELETE) /")
_CONNECT_SECONDS: Final = 10.0

Count = Callable[[bytes], None]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Counted since the start or the last ``clear``; ``bytes`` are those to the clients."""

    connections: int = 0
    requests: int = 0
    bytes: int = 0


class DelayProxy:
    """Relays connections from ``listener`` to ``upstream`` ("host:port"), ``delay`` seconds late.

    ``listener`` is a listening socket, which is closed at the end; a free loopback port by
    default.  A context manager.
    """

    def __init__(
        self, upstream: str, *, delay: float = 0.0, listener: socket.socket | None = None
    ) -> None:
        host, _, port = upstream.rpartition(":")
        self._upstream: Final = (host, int(port))
        self._delay: Final = delay
        self._listener: Final = listener or socket.create_server(("127.0.0.1", 0), backlog=128)
        self._lock = threading.Lock()
        self._connections = 0
        self._requests = 0
        self._bytes = 0
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def host(self) -> str:
        """ "ADDRESS:PORT", as it stands in an image reference."""
        address, port = self._listener.getsockname()[:2]
        return f"{address}:{port}"

    def traffic(self) -> Traffic:
        """What has passed so far."""
        with self._lock:
            return Traffic(self._connections, self._requests, self._bytes)

    def clear(self) -> None:
        """Count from zero again."""
        with self._lock:
            self._connections = self._requests = self._bytes = 0

    def close(self) -> None:
        """Stop listening and cut the connections that are open."""
        _shut(self._listener, socket.SHUT_RDWR)  # wakes the thread in accept()
        self._listener.close()
        with self._lock:
            for each in self._open:
                _shut(each, socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        with client:
            try:
                server = socket.create_connection(self._upstream, _CONNECT_SECONDS)
            except OSError:
                return
            with server, self._noted(client, server):
                server.settimeout(None)
                for end in (client, server):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                asking = threading.Thread(
                    target=self._pass_on, args=(client, server, self._count_asked), daemon=True
                )
                asking.start()
                self._pass_on(server, client, self._count_answered)
                asking.join()

    @contextlib.contextmanager
    def _noted(self, *ends: socket.socket) -> Iterator[None]:
        with self._lock:
            self._connections += 1
            self._open.update(ends)
        try:
            yield
        finally:
            with self._lock:
                self._open.difference_update(ends)

    def _pass_on(self, source: socket.socket, sink: socket.socket, count: Count) -> None:
        """One direction, until either side ends it."""
        with contextlib.ExitStack() as stack:
            take: Callable[[], bytes] = functools.partial(_receive, source)
            if self._delay > 0:
                line = _Line(self._delay)
                stack.callback(line.close)
                threading.Thread(target=line.fill, args=(source,), daemon=True).start()
                take = line.take
            while piece := take():
                count(piece)
                try:
                    sink.sendall(piece)
                except OSError:
                    break
        _shut(sink, socket.SHUT_WR)
        _shut(source, socket.SHUT_RD)

    def _count_asked(self, piece: bytes) -> None:
        if _REQUEST.match(piece):
            with self._lock:
                self._requests += 1

    def _count_answered(self, piece: bytes) -> None:
        with self._lock:
            self._bytes += len(piece)


class _Line:
    """Bytes under way: each piece comes out ``delay`` seconds after it went in."""

    def __init__(self, delay: float) -> None:
        self._delay = delay
        self._pieces: collections.deque[tuple[float, bytes]] = collections.deque()
        self._held = 0
        self._changed = threading.Condition()
        self._closed = False

    def fill(self, source: socket.socket) -> None:
        """Put in what the source sends, up to and with its end (an empty piece)."""
        piece = b"-"
        while piece:
            piece = _receive(source)
            with self._changed:
                self._changed.wait_for(lambda: self._held < _HELD_BYTES or self._closed)
                if self._closed:
                    return
                self._pieces.append((time.monotonic() + self._delay, piece))
                self._held += len(piece)
                self._changed.notify_all()

    def take(self) -> bytes:
        """The next piece when its time has come."""
        with self._changed:
            self._changed.wait_for(lambda: self._pieces)
            due, piece = self._pieces.popleft()
            self._held -= len(piece)
            self._changed.notify_all()
        time.sleep(max(0.0, due - time.monotonic()))
        return piece

    def close(self) -> None:
        """Nobody takes any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def _receive(source: socket.socket) -> bytes:
    try:
        return source.recv(_PIECE)
    except OSError:
        return b""


def _shut(end: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(how)
