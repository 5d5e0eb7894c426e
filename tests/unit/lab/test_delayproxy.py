"""The relay passes everything on, counts it, and holds it back as long as asked."""

import http.client
import http.server
import threading
import time
from collections.abc import Iterator

import pytest

from lab.delayproxy import DelayProxy, Traffic

BODY = bytes(range(256)) * 20_000


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def upstream() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def _get(connection: http.client.HTTPConnection) -> bytes:
    connection.request("GET", "/x")
    return connection.getresponse().read()


@pytest.mark.parametrize("delay", [0.0, 0.03])
def test_passes_bytes_on_and_counts_them(upstream: str, delay: float) -> None:
    with DelayProxy(upstream, delay=delay) as proxy:
        connection = http.client.HTTPConnection(proxy.host, timeout=10)
        started = time.monotonic()
        assert _get(connection) == BODY
        assert time.monotonic() - started >= 2 * delay
        assert _get(connection) == BODY
        connection.close()
        traffic = proxy.traffic()
        assert (traffic.connections, traffic.requests) == (1, 2)
        assert traffic.bytes > 2 * len(BODY)
        proxy.clear()
        assert proxy.traffic() == Traffic()


def test_delay_does_not_limit_bandwidth(upstream: str) -> None:
    with DelayProxy(upstream, delay=0.2) as proxy:
        connection = http.client.HTTPConnection(proxy.host, timeout=10)
        started = time.monotonic()
        _get(connection)
        # twenty pieces of 256 KiB, one after the other, would take four seconds
        assert time.monotonic() - started < 3
        connection.close()


def test_an_upstream_that_is_gone_closes_the_connection() -> None:
    with DelayProxy("127.0.0.1:1") as proxy:
        connection = http.client.HTTPConnection(proxy.host, timeout=10)
        with pytest.raises((http.client.HTTPException, OSError)):
            _get(connection)
        connection.close()
