"""A registry in this process that answers well, or badly on demand.

``SimRegistry`` serves the OCI distribution API on a loopback port with threads:
manifests, blobs with single byte ranges, uploads and cross-repository mounts,
optional basic or token authentication (``/token`` on the same port), optional
TLS, and optional redirects of blobs to a second port, the "storage", which never
should see an Authorization header.  Everything is in memory::

    with SimRegistry() as registry:
        digest = registry.add_blob("a/b", b"...")
        fault = registry.fault("reset", match="blobs/", after=10, times=1)
        ...                            # talk to registry.host
        assert fault.hits == 1
        assert registry.count("GET", "/blobs/") == 2

Every request is logged, on both ports.  A ``Fault`` applies to requests whose
``"METHOD /path?query"`` its ``match`` (a regular expression) is found in; the
first one that matches, is not used up and not skipped wins, except ``latency``,
which adds to the others.  Kinds and their parameters:

=============== ==========================================================================
``latency``     wait ``seconds`` before the answer
``stall``       send ``after`` body bytes, then nothing for ``seconds``, then close
``reset``       reset the connection: before the answer, or behind ``after`` body bytes
``short``       announce the whole body, close after ``after`` bytes
``range``       send ``value`` as Content-Range (or none, if empty)
``ignore-range`` answer 200 with the whole blob though a range was asked for
``flip``        flip one bit of the byte ``after`` in the body
``other``       send ``data`` in place of the content (another digest's bytes)
``status``      answer ``status`` with ``headers`` and ``data`` (a JSON error by default)
``header``      add ``headers`` to a right answer
``chunked``     send the body without a Content-Length
``redirect``    answer 307 to ``value``
=============== ==========================================================================

A fault with a ``chance`` below 1 hits that part of the requests it matches, drawn from a
generator that ``seed`` begins: several together make a registry that is bad in every way.
``happened`` counts what went wrong, by kind, tokens and addresses that had expired included.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import secrets
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self
from urllib.parse import parse_qs, urlsplit

Kind = Literal[
    "latency",
    "stall",
    "reset",
    "short",
    "range",
    "ignore-range",
    "flip",
    "other",
    "status",
    "header",
    "chunked",
    "redirect",
]

_OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
_RANGE: Final = re.compile(r"bytes=(\d+)-(\d*)")
_BLOB: Final = re.compile(r"/v2/(.+)/blobs/(sha256:[0-9a-f]{64})")
_MANIFEST: Final = re.compile(r"/v2/(.+)/manifests/([^/]+)")
_UPLOAD: Final = re.compile(r"/v2/(.+)/blobs/uploads/([^/]*)")
_STORAGE: Final = re.compile(r"/storage/(sha256:[0-9a-f]{64})")
_CODES: Final = {401: "UNAUTHORIZED", 403: "DENIED", 404: "NAME_UNKNOWN", 429: "TOOMANYREQUESTS"}
_STEP: Final = 64 * 1024


@dataclass
class Fault:
    """One thing that goes wrong; ``hits`` counts how often it did."""

    kind: Kind
    match: re.Pattern[str]
    times: int | None = None
    skip: int = 0
    after: int | None = None
    seconds: float = 0.0
    status: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)
    data: bytes | None = None
    value: str = ""
    chance: float = 1.0
    hits: int = 0


@dataclass(frozen=True)
class Logged:
    """One request: ``server`` is ``registry`` or ``storage``; header names in lower case.

    ``status`` is 0 when the connection was reset before an answer; ``sent`` are
    body bytes.
    """

    server: str
    method: str
    path: str
    headers: Mapping[str, str]
    status: int
    sent: int

    @property
    def authorization(self) -> str | None:
        """The Authorization header."""
        return self.headers.get("authorization")


@dataclass
class _Reply:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class SimRegistry:
    """See the module's text.  A context manager; its state may be changed while it runs.

    ``users`` maps names to passwords; with authentication on and ``anonymous``
    set, tokens for reading are given to everybody.  ``identity_tokens`` are
    OAuth2 refresh tokens that are taken.  Tokens live ``token_seconds`` of
    ``clock`` and announce ``announced_seconds`` (the same by default).  With ``redirect``
    blobs come from the storage, whose addresses are good for ``redirect_seconds`` (None: for
    ever), then answered 403.
    """

    def __init__(
        self,
        *,
        auth: Literal["", "basic", "bearer"] = "",
        users: Mapping[str, str] | None = None,
        anonymous: bool = False,
        identity_tokens: tuple[str, ...] = (),
        token_seconds: float = 300.0,
        announced_seconds: float | None = None,
        redirect: bool = False,
        redirect_seconds: float | None = None,
        seed: int = 0,
        tls: tuple[Path, Path] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.auth = auth
        self.users = dict(users or {})
        self.anonymous = anonymous
        self.identity_tokens = set(identity_tokens)
        self.token_seconds = token_seconds
        self.announced_seconds = announced_seconds
        self.redirect = redirect
        self.redirect_seconds = redirect_seconds
        self._random = random.Random(seed)
        self._expired: Counter[str] = Counter()
        self._signatures: dict[str, float] = {}
        self.clock = clock
        self._lies: dict[tuple[str, str], bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.repositories: dict[str, set[str]] = {}  # repository -> digests of its blobs
        self.manifests: dict[tuple[str, str], tuple[bytes, str]] = {}  # by tag or digest
        self.log: list[Logged] = []
        self.faults: list[Fault] = []
        self.connections = 0
        self._uploads: dict[str, bytes] = {}
        self._tokens: dict[str, tuple[frozenset[str], float]] = {}
        self._lock = threading.Lock()
        self.stopping = threading.Event()
        self._servers = [_Server(self, name, tls) for name in ("registry", "storage")]
        self._threads: list[threading.Thread] = []
        self._scheme = "http" if tls is None else "https"

    # -- set-up -------------------------------------------------------------------

    @property
    def host(self) -> str:
        """``127.0.0.1:PORT``, as it stands in a reference."""
        return f"127.0.0.1:{self._servers[0].server_address[1]}"

    @property
    def storage_host(self) -> str:
        """Where redirected blobs come from."""
        return f"127.0.0.1:{self._servers[1].server_address[1]}"

    @property
    def url(self) -> str:
        """Address of the registry without a path."""
        return f"{self._scheme}://{self.host}"

    @property
    def storage_url(self) -> str:
        """Address of the storage without a path."""
        return f"{self._scheme}://{self.storage_host}"

    def add_blob(self, repository: str, data: bytes) -> str:
        """Store a blob; gives its digest."""
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        with self._lock:
            self.blobs[digest] = data
            self.repositories.setdefault(repository, set()).add(digest)
        return digest

    def lie_about(self, repository: str, digest: str, data: bytes) -> None:
        """Have one repository serve other bytes under a digest."""
        with self._lock:
            self._lies[repository, digest] = data
            self.repositories.setdefault(repository, set()).add(digest)

    def add_manifest(
        self, repository: str, raw: bytes, *tags: str, media_type: str = _OCI_MANIFEST
    ) -> str:
        """Store a manifest under its digest and ``tags``; gives its digest."""
        digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
        with self._lock:
            self.repositories.setdefault(repository, set())
            for name in (digest, *tags):
                self.manifests[repository, name] = (raw, media_type)
        return digest

    def fault(
        self,
        kind: Kind,
        match: str = "",
        *,
        times: int | None = None,
        skip: int = 0,
        after: int | None = None,
        seconds: float = 0.0,
        status: int = 500,
        headers: Mapping[str, str] | None = None,
        data: bytes | None = None,
        value: str = "",
        chance: float = 1.0,
    ) -> Fault:
        """Let something go wrong ``times`` times (None: always) after ``skip`` right answers."""
        fault = Fault(
            kind,
            re.compile(match),
            times=times,
            skip=skip,
            after=after,
            seconds=seconds,
            status=status,
            headers=headers or {},
            data=data,
            value=value,
            chance=chance,
        )
        with self._lock:
            self.faults.append(fault)
        return fault

    def revoke_tokens(self) -> None:
        """Make all tokens given so far worthless."""
        with self._lock:
            self._tokens.clear()

    @property
    def happened(self) -> Counter[str]:
        """How often what went wrong: by kind of fault, ``expired-token`` and ``expired-address``."""
        with self._lock:
            found = self._expired.copy()
            for fault in self.faults:
                found[fault.kind] += fault.hits
            return found

    def count(self, method: str = "", path: str = "") -> int:
        """Logged requests of a method whose path holds a text."""
        return len(self.requests(method, path))

    def requests(self, method: str = "", path: str = "") -> list[Logged]:
        """Logged requests of a method whose path holds a text."""
        with self._lock:
            return [
                entry
                for entry in self.log
                if (not method or entry.method == method) and path in entry.path
            ]

    # -- running ------------------------------------------------------------------

    def __enter__(self) -> Self:
        for server in self._servers:
            thread = threading.Thread(
                target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
            )
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop, and cut every connection."""
        self.stopping.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()
            server.cut()
        for thread in self._threads:
            thread.join()

    # -- used by the handlers --------------------------------------------------------

    def record(self, entry: Logged) -> None:
        """Append to the log."""
        with self._lock:
            self.log.append(entry)

    def connected(self) -> None:
        """Count a connection."""
        with self._lock:
            self.connections += 1

    def pick(self, text: str) -> tuple[float, Fault | None]:
        """Latency and the fault for a request."""
        latency, chosen = 0.0, None
        with self._lock:
            for fault in self.faults:
                is_due = fault.times is None or fault.hits < fault.times
                if not is_due or fault.match.search(text) is None:
                    continue
                if fault.kind != "latency" and chosen is not None:
                    continue
                if fault.chance < 1.0 and self._random.random() >= fault.chance:
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                fault.hits += 1
                if fault.kind == "latency":
                    latency += fault.seconds
                else:
                    chosen = fault
        return latency, chosen

    def answer(
        self, server: str, method: str, target: str, headers: Mapping[str, str], body: bytes
    ) -> _Reply:
        """The right answer to a request."""
        parts = urlsplit(target)
        query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        if server == "storage":
            match = _STORAGE.fullmatch(parts.path)
            with self._lock:
                data = self.blobs.get(match[1]) if match else None
                if not self._is_signed(query.get("signature", "")):
                    self._expired["expired-address"] += 1
                    return _problem(403)
            return _problem(404) if data is None else _ranged(data, headers.get("range"))
        if parts.path == "/token":
            return self._token(method, parts.query, headers, body)
        refusal = self._refusal(method, parts.path, headers.get("authorization"), query)
        if refusal is not None:
            return refusal
        if parts.path == "/v2/":
            return _Reply(200, b"{}", {"Content-Type": "application/json"})
        if match := _UPLOAD.fullmatch(parts.path):
            return self._upload(method, match[1], match[2], query, body)
        if match := _BLOB.fullmatch(parts.path):
            return self._blob(match[1], match[2], headers.get("range"))
        if match := _MANIFEST.fullmatch(parts.path):
            return self._manifest(method, match[1], match[2], headers, body)
        return _problem(404)

    def _is_signed(self, signature: str) -> bool:
        return self.redirect_seconds is None or self.clock() < self._signatures.get(signature, 0.0)

    def _blob(self, repository: str, digest: str, wanted: str | None) -> _Reply:
        with self._lock:
            known = digest in self.repositories.get(repository, ())
            data = self._lies.get((repository, digest), self.blobs.get(digest))
        if not known or data is None:
            return _problem(404, "BLOB_UNKNOWN")
        if self.redirect:
            signature = secrets.token_hex(8)
            if self.redirect_seconds is not None:
                with self._lock:
                    self._signatures[signature] = self.clock() + self.redirect_seconds
            place = f"{self.storage_url}/storage/{digest}?signature={signature}"
            return _Reply(307, b"", {"Location": place})
        reply = _ranged(data, wanted)
        reply.headers["Docker-Content-Digest"] = digest
        return reply

    def _manifest(
        self, method: str, repository: str, name: str, headers: Mapping[str, str], body: bytes
    ) -> _Reply:
        if method == "PUT":
            kind = headers.get("content-type", _OCI_MANIFEST)
            digest = self.add_manifest(repository, body, name, media_type=kind)
            place = f"/v2/{repository}/manifests/{digest}"
            return _Reply(201, b"", {"Location": place, "Docker-Content-Digest": digest})
        with self._lock:
            found = self.manifests.get((repository, name))
        if found is None:
            return _problem(404, "MANIFEST_UNKNOWN")
        digest = f"sha256:{hashlib.sha256(found[0]).hexdigest()}"
        return _Reply(200, found[0], {"Content-Type": found[1], "Docker-Content-Digest": digest})

    def _upload(
        self, method: str, repository: str, name: str, query: Mapping[str, str], body: bytes
    ) -> _Reply:
        if method == "POST":
            mounted, source = query.get("mount", ""), query.get("from", "")
            with self._lock:
                if mounted in self.repositories.get(source, ()):
                    self.repositories.setdefault(repository, set()).add(mounted)
                    return _Reply(201, b"", {"Location": f"/v2/{repository}/blobs/{mounted}"})
                name = secrets.token_hex(8)
                self._uploads[name] = b""
            return _Reply(202, b"", {"Location": f"/v2/{repository}/blobs/uploads/{name}?_s=1"})
        with self._lock:
            if name not in self._uploads:
                return _problem(404, "BLOB_UPLOAD_UNKNOWN")
            data = self._uploads[name] + body
            if method == "PATCH":
                self._uploads[name] = data
                place = f"/v2/{repository}/blobs/uploads/{name}?_s=2"
                return _Reply(202, b"", {"Location": place, "Range": f"0-{len(data) - 1}"})
            del self._uploads[name]
        if method == "DELETE":
            return _Reply(204)
        digest = query.get("digest", "")
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
            return _problem(400, "DIGEST_INVALID")
        self.add_blob(repository, data)
        return _Reply(201, b"", {"Location": f"/v2/{repository}/blobs/{digest}"})

    @property
    def open_uploads(self) -> int:
        """Uploads begun and neither finished nor cancelled."""
        with self._lock:
            return len(self._uploads)

    # -- authentication -------------------------------------------------------------

    def _refusal(
        self, method: str, path: str, given: str | None, query: Mapping[str, str]
    ) -> _Reply | None:
        if not self.auth:
            return None
        if self.auth == "basic":
            if self._user(given) is not None:
                return None
            return _problem(401, headers={"WWW-Authenticate": 'Basic realm="sim, registry"'})
        match = re.match(r"/v2/(.+?)/(blobs|manifests)/", path)
        actions = "pull" if method in ("GET", "HEAD") else "pull,push"
        wanted = [f"repository:{match[1]}:{actions}"] if match else []
        if "mount" in query:
            wanted.append(f"repository:{query.get('from', '')}:pull")
        token = (given or "").removeprefix("Bearer ")
        with self._lock:
            scopes, expires = self._tokens.get(token, (frozenset[str](), 0.0))
        if self.clock() < expires and scopes.issuperset(wanted):
            return None
        if expires:
            with self._lock:
                self._expired["expired-token"] += self.clock() >= expires
        scope = f',scope="{" ".join(wanted)}"' if wanted else ""
        challenge = f'Bearer realm="{self.url}/token",service="sim"{scope}'
        return _problem(401, headers={"WWW-Authenticate": challenge})

    def _user(self, given: str | None) -> str | None:
        scheme, _, value = (given or "").partition(" ")
        if scheme.lower() != "basic":
            return None
        name, _, password = base64.b64decode(value).decode().partition(":")
        return name if self.users.get(name) == password else None

    def _token(self, method: str, query: str, headers: Mapping[str, str], body: bytes) -> _Reply:
        form = parse_qs(body.decode() if method == "POST" else query)
        scopes = frozenset(scope for text in form.get("scope", []) for scope in text.split())
        if method == "POST":
            allowed = form.get("refresh_token", [""])[-1] in self.identity_tokens
        else:
            given = headers.get("authorization")
            is_reading = all(scope.endswith(":pull") for scope in scopes)
            allowed = self._user(given) is not None
            allowed = allowed or (given is None and self.anonymous and is_reading)
        if not allowed:
            return _problem(401)
        token = secrets.token_urlsafe(12)
        with self._lock:
            self._tokens[token] = (scopes, self.clock() + self.token_seconds)
        announced = self.token_seconds
        if self.announced_seconds is not None:
            announced = self.announced_seconds
        name = "access_token" if method == "POST" else "token"
        answer = json.dumps({name: token, "expires_in": announced}).encode()
        return _Reply(200, answer, {"Content-Type": "application/json"})


def _problem(status: int, code: str = "", headers: Mapping[str, str] | None = None) -> _Reply:
    code = code or _CODES.get(status, "UNKNOWN")
    body = json.dumps({"errors": [{"code": code, "message": code.lower(), "detail": None}]})
    return _Reply(status, body.encode(), {"Content-Type": "application/json", **(headers or {})})


def _ranged(data: bytes, wanted: str | None) -> _Reply:
    match = _RANGE.fullmatch(wanted) if wanted else None
    if match is None:
        return _Reply(200, data, {"Content-Type": "application/octet-stream"})
    start = int(match[1])
    end = min(int(match[2]) + 1, len(data)) if match[2] else len(data)
    if start >= end:
        return _Reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
    return _Reply(
        206,
        data[start:end],
        {
            "Content-Type": "application/octet-stream",
            "Content-Range": f"bytes {start}-{end - 1}/{len(data)}",
        },
    )


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, registry: SimRegistry, name: str, tls: tuple[Path, Path] | None) -> None:
        self.registry = registry
        self.name = name
        self._open: set[socket.socket] = set()
        self._open_lock = threading.Lock()
        self._tls: ssl.SSLContext | None = None
        if tls is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(*tls)
        super().__init__(("127.0.0.1", 0), _Handler)

    def finish_request(self, request: Any, client_address: Any) -> None:
        self.registry.connected()
        if self._tls is not None:  # here, in the connection's own thread
            try:
                request = self._tls.wrap_socket(request, server_side=True)
            except OSError:
                return  # the client speaks no TLS, or does not trust us
        with self._open_lock:
            self._open.add(request)
        try:
            super().finish_request(request, client_address)
        finally:
            with self._open_lock:
                self._open.discard(request)
            if self._tls is not None:
                request.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that a test or a fault broke is nothing to print."""

    def cut(self) -> None:
        with self._open_lock:
            for connection in self._open:
                try:
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)
                except OSError:
                    continue


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Requests go to the registry's log, not to standard error."""

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith("do_"):  # the base class looks for do_GET, do_HEAD and so on
            return self._serve
        raise AttributeError(name)

    def _serve(self) -> None:
        registry = self.server.registry
        headers = {name.lower(): value for name, value in self.headers.items()}
        expected = int(headers.get("content-length", "0"))
        body = self.rfile.read(expected)
        if len(body) < expected:  # the client gave up
            self.close_connection = True
            return
        latency, fault = registry.pick(f"{self.command} {self.path}")
        if latency:
            registry.stopping.wait(latency)
        kind = fault.kind if fault is not None else ""
        seen = dict(headers)
        if kind == "ignore-range":
            seen.pop("range", None)
        if kind == "reset" and fault is not None and fault.after is None:
            registry.record(Logged(self.server.name, self.command, self.path, headers, 0, 0))
            self._reset()
            return
        reply = registry.answer(self.server.name, self.command, self.path, seen, body)
        if fault is not None:
            reply = _spoil(reply, fault)
        # Logged before the answer goes out: a test that has the answer finds the entry.
        length = 0 if self.command == "HEAD" else len(reply.body)
        registry.record(
            Logged(self.server.name, self.command, self.path, headers, reply.status, length)
        )
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if kind == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
        elif reply.status != 204:
            self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            self._send(reply.body, fault)

    def _send(self, body: bytes, fault: Fault | None) -> None:
        kind = fault.kind if fault is not None else ""
        if kind == "chunked":
            for start in range(0, len(body), _STEP):
                piece = body[start : start + _STEP]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\n\r\n")
            return
        if fault is None or kind not in ("stall", "reset", "short"):
            self.wfile.write(body)
            return
        self.wfile.write(body[: fault.after or 0])
        self.wfile.flush()
        if kind == "stall":
            self.server.registry.stopping.wait(fault.seconds or 3600)
        elif kind == "reset":
            # A reset overtakes what is still in the buffers: let it arrive.
            time.sleep(0.05)
            self._reset()
            return
        self.close_connection = True

    def _reset(self) -> None:
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()
        self.close_connection = True


def _spoil(reply: _Reply, fault: Fault) -> _Reply:
    if fault.kind == "status":
        made = _problem(fault.status, headers=fault.headers)
        return made if fault.data is None else _Reply(fault.status, fault.data, dict(fault.headers))
    if fault.kind == "redirect":
        return _Reply(307, b"", {"Location": fault.value})
    if fault.kind == "header":
        reply.headers.update(fault.headers)
    elif fault.kind == "other" and fault.data is not None:
        reply.body = (fault.data * (len(reply.body) // max(len(fault.data), 1) + 1))[
            : len(reply.body)
        ]
        if reply.status == 200:
            reply.body = fault.data
    elif fault.kind == "range":
        reply.headers.pop("Content-Range", None)
        if fault.value:
            reply.headers["Content-Range"] = fault.value
    elif fault.kind == "flip" and reply.body:
        spoilt = bytearray(reply.body)
        spoilt[(fault.after or 0) % len(spoilt)] ^= 1
        reply.body = bytes(spoilt)
    return reply
