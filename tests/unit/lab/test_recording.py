"""The recording proxy changes nothing and counts everything."""

import contextlib
import http.client
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from lab.recording import RecordingProxy

BODY = bytes(range(256)) * 8192  # 2 MiB


class Upstream(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = BODY
        status = 200
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            body, status = BODY[int(first) : int(last) + 1], 206
        self.send_response(status)
        if self.path == "/chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n")
            return
        if self.path == "/short":
            self.close_connection = True
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Host", self.headers["Host"])
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:1000] if self.path == "/short" else body)

    do_HEAD = do_GET  # noqa: N815 - http.server names it

    def do_PATCH(self) -> None:
        if self.headers.get("Transfer-Encoding"):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(202)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy() -> Iterator[RecordingProxy]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    with RecordingProxy(f"127.0.0.1:{server.server_port}") as running:
        yield running
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def client(proxy: RecordingProxy) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=10)
    yield connection
    connection.close()


def test_bodies_pass_unchanged_and_are_counted_with_their_range(
    proxy: RecordingProxy, client: http.client.HTTPConnection
) -> None:
    client.request("GET", "/blob?x=1")
    answer = client.getresponse()
    assert answer.read() == BODY
    assert answer.headers["X-Host"] == proxy.host
    client.request("GET", "/blob", headers={"Range": "bytes=10-19"})
    assert client.getresponse().read() == BODY[10:20]
    client.request("HEAD", "/blob")
    assert client.getresponse().read() == b""
    seen = [(r.method, r.path, r.status, r.bytes, r.range) for r in proxy.requests()]
    assert seen == [
        ("GET", "/blob?x=1", 200, len(BODY), None),
        ("GET", "/blob", 206, 10, "bytes=10-19"),
        ("HEAD", "/blob", 200, 0, None),
    ]
    proxy.clear()
    assert proxy.requests() == []


def test_chunked_answers_and_uploads_pass(
    proxy: RecordingProxy, client: http.client.HTTPConnection
) -> None:
    client.request("GET", "/chunked")
    assert client.getresponse().read() == b"hello world"
    pieces = [b"a" * 70_000, b"b" * 10]
    client.request("PATCH", "/upload", body=iter(pieces), encode_chunked=True)
    assert client.getresponse().read() == b"".join(pieces)
    client.request("PATCH", "/upload", body=b"sized")
    assert client.getresponse().read() == b"sized"
    assert [r.bytes for r in proxy.requests()] == [11, 70_010, 5]


def test_an_answer_cut_short_stays_cut_short(
    proxy: RecordingProxy, client: http.client.HTTPConnection
) -> None:
    client.request("GET", "/short")
    with pytest.raises(http.client.IncompleteRead):
        client.getresponse().read()
    assert proxy.requests()[0].bytes == 1000


def test_the_delay_comes_before_the_answer(
    proxy: RecordingProxy, client: http.client.HTTPConnection
) -> None:
    proxy.delay = 0.2
    before = time.monotonic()
    client.request("HEAD", "/blob")
    client.getresponse().read()
    assert time.monotonic() - before >= 0.2


def test_without_an_upstream_it_answers_502_and_after_close_nothing() -> None:
    with RecordingProxy("127.0.0.1:1") as proxy:
        connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=10)
        connection.request("GET", "/v2/")
        with contextlib.closing(connection.getresponse()) as answer:
            assert answer.status == 502
        connection.close()
        port = proxy.port
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with pytest.raises(OSError, match="refused"):
        connection.request("GET", "/v2/")
