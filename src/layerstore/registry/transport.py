"""HTTP to one registry host: connections, retries, redirects, authentication.

One ``Host`` stands for one host name under one TLS rule.  Redirects are followed
here and not by urllib3, because what may travel along is a matter of safety: the
Authorization header never reaches another origin, and a secure registry cannot
send us to plain HTTP.
"""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Callable, Iterable
from typing import Final, TypeVar
from urllib.parse import urljoin, urlsplit

import msgspec
import urllib3
from urllib3.response import BaseHTTPResponse

from layerstore import limits
from layerstore.errors import (
    DeadlineExceeded,
    LayerstoreError,
    NetworkError,
    RegistryError,
)
from layerstore.registry import answers, redirects, tls
from layerstore.registry.body import Body, describe, discard
from layerstore.registry.credentials import CredentialStore
from layerstore.registry.redirects import Target, TargetCache, origin
from layerstore.registry.settings import RegistrySettings
from layerstore.registry.stats import Stats
from layerstore.registry.tokens import Access, Authenticator, TokenCache, TokenRequest

_log = logging.getLogger(__name__)
_API_HOSTS: Final = {"docker.io": "registry-1.docker.io"}
_REDIRECTS: Final = frozenset((301, 302, 303, 307, 308))
_EXPIRED: Final = frozenset((400, 401, 403, 404, 410))  # of a redirect target used again
_PASSING: Final = frozenset((408, 429))
_AUTH_ROUNDS: Final = 3  # the challenge, a stale token, changed credentials
_UNREACHABLE: Final = (urllib3.exceptions.NewConnectionError, urllib3.exceptions.SSLError)
_T = TypeVar("_T")

BodySource = Callable[[], Iterable[bytes]]


class Request(msgspec.Struct, frozen=True):
    """One request to a registry; ``path`` begins with ``/v2/`` or is an absolute URL.

    ``body`` is called anew for every attempt, and its ``Content-Length`` stands
    in ``headers``.  ``expect`` are the statuses that are no error.  A
    ``redirect_key`` lets the place a redirect led to be used again for a while.
    """

    method: str
    path: str
    access: Access
    subject: str
    headers: tuple[tuple[str, str], ...] = ()
    body: BodySource | None = None
    expect: tuple[int, ...] = (200,)
    redirect_key: str | None = None


class _PassingError(Exception):
    """A failure worth another attempt: the error if there is none, and a pause to keep."""

    def __init__(self, error: LayerstoreError, pause: float | None = None) -> None:
        super().__init__(error.what)
        self.error = error
        self.pause = pause


class Host:
    """One registry host.  Thread-safe."""

    def __init__(
        self,
        name: str,
        *,
        insecure: bool,
        settings: RegistrySettings,
        store: CredentialStore,
        tokens: TokenCache,
        stats: Stats,
    ) -> None:
        self.name = name
        self.insecure = insecure
        self._settings = settings
        self._stats = stats
        self._api = _API_HOSTS.get(name, name)
        self._scheme = None if insecure else "https"
        self._scheme_lock = threading.Lock()
        self._context: ssl.SSLContext | None = None
        self._managers: dict[str | None, urllib3.PoolManager] = {}
        self._lock = threading.Lock()
        self._targets = TargetCache(settings.clock)
        self.answered_at = float("-inf")
        """When an answer last came that was no refusal to work (408, 429, 5xx)."""
        self._auth = Authenticator(
            store,
            tokens,
            self._token,
            allow_http=lambda: self.insecure,
        )

    # -- requests -----------------------------------------------------------------

    def open(
        self, request: Request, deadline: float | None, attempts: int | None = None
    ) -> BaseHTTPResponse:
        """Send with retries; the body of the answer is still to be read."""
        return self._retrying(
            lambda: self._authorised(request, deadline), request.subject, deadline, attempts
        )

    def fetch(
        self, request: Request, limit: int, deadline: float | None, attempts: int | None = None
    ) -> tuple[BaseHTTPResponse, bytes]:
        """Send and read the whole body of at most ``limit`` bytes, with retries for both."""

        def once() -> tuple[BaseHTTPResponse, bytes]:
            response = self._authorised(request, deadline)
            return response, self._read(response, limit, request.subject, deadline)

        return self._retrying(once, request.subject, deadline, attempts)

    def body(
        self,
        response: BaseHTTPResponse,
        expected: int | None,
        subject: str,
        deadline: float | None,
    ) -> Body:
        """Wrap the body of an answer."""
        return Body(
            response,
            expected=expected,
            subject=subject,
            stats=self._stats,
            clock=self._settings.clock,
            read_seconds=self._settings.read_seconds,
            deadline=deadline,
        )

    def close(self) -> None:
        """Close idle connections."""
        with self._lock:
            managers = list(self._managers.values())
            self._managers.clear()
        for manager in managers:
            manager.clear()

    # -- retries ------------------------------------------------------------------

    def _retrying(
        self, once: Callable[[], _T], subject: str, deadline: float | None, attempts: int | None
    ) -> _T:
        attempts = self._settings.attempts if attempts is None else attempts
        for attempt in range(attempts):
            self._check_deadline(deadline, subject)
            try:
                return once()
            except _PassingError as failure:
                self._check_deadline(deadline, subject, failure.error)
                pause = self._backoff(attempt) if failure.pause is None else failure.pause
                is_late = deadline is not None and self._settings.clock() + pause >= deadline
                if attempt + 1 >= attempts or is_late:
                    raise failure.error from failure.__cause__
                _log.debug("%s; again in %.1f s", failure.error, pause)
                self._stats.add(retries=1)
                self._settings.sleep(pause)
        raise NetworkError("no attempt allowed", subject=subject)

    def _backoff(self, attempt: int) -> float:
        pause = min(limits.BACKOFF_FIRST_SECONDS * (1 << attempt), limits.BACKOFF_MAX_SECONDS)
        return pause * (0.5 + self._settings.jitter() / 2)

    def _check_deadline(
        self, deadline: float | None, subject: str, cause: LayerstoreError | None = None
    ) -> None:
        if deadline is not None and self._settings.clock() >= deadline:
            what = f"out of time: {cause.what}" if cause is not None else "out of time"
            raise DeadlineExceeded(what, subject=subject) from cause

    # -- authentication -----------------------------------------------------------

    def _authorised(self, request: Request, deadline: float | None) -> BaseHTTPResponse:
        sent = self._auth.header(request.access, deadline)
        for _ in range(_AUTH_ROUNDS):
            response, ours = self._follow(request, sent, deadline)
            status = response.status
            if status in request.expect:
                return response
            error = self._error(response, request.subject, deadline)
            if status in _PASSING or status >= 500:
                raise self._passing(error, response)
            if status not in (401, 403) or not ours:
                raise error
            if (
                status == 403
                and not self._auth.may_have_expired(request.access, sent)
                and not self._auth.credentials_changed(request.access)
            ):
                raise error
            values = response.headers.getlist("WWW-Authenticate")
            header = self._auth.answer(request.access, values, sent, deadline)
            if header is None:
                raise error
            sent = header
        raise error

    def _passing(self, error: RegistryError, response: BaseHTTPResponse) -> _PassingError:
        wish = answers.retry_after(response.headers.get("Retry-After"), self._settings.wall())
        error.pause = wish or 0.0
        return _PassingError(error, wish)

    def _error(
        self, response: BaseHTTPResponse, subject: str, deadline: float | None
    ) -> RegistryError:
        body = b""
        try:
            # length_remaining is 0 for the answer to a HEAD, whatever its Content-Length.
            length = response.length_remaining
            body = self.body(response, length, subject, deadline).read_all(limits.ERROR_BODY_BYTES)
        except LayerstoreError:
            body = b""  # the status alone has to do
        return answers.make_error(response.status, body, subject)

    def _token(self, request: TokenRequest, deadline: float | None) -> bytes:
        return self._retrying(
            lambda: self._token_once(request, deadline),
            request.url.partition("?")[0],
            deadline,
            None,
        )

    def _token_once(self, request: TokenRequest, deadline: float | None) -> bytes:
        subject = request.url.partition("?")[0]
        headers = [("Accept", "application/json")]
        if request.authorization is not None:
            headers.append(("Authorization", request.authorization))
        if request.form is not None:
            form = request.form
            headers.append(("Content-Type", "application/x-www-form-urlencoded"))
            headers.append(("Content-Length", str(len(form))))
            response = self._send(
                "POST", request.url, headers, lambda: (form,), subject=subject, deadline=deadline
            )
        else:
            response, _, _ = self._chase("GET", request.url, headers, subject, deadline)
        if response.status == 200:
            return self._read(response, limits.TOKEN_BYTES, subject, deadline)
        error = self._error(response, subject, deadline)
        if response.status in _PASSING or response.status >= 500:
            raise self._passing(error, response)
        raise error

    def _read(
        self, response: BaseHTTPResponse, limit: int, subject: str, deadline: float | None
    ) -> bytes:
        try:
            answers.refuse_encoding(response.headers, subject)
        except RegistryError:
            discard(response)
            raise
        expected = answers.parse_length(response.headers.get("Content-Length"))
        try:
            return self.body(response, expected, subject, deadline).read_all(limit)
        except DeadlineExceeded:
            raise
        except NetworkError as error:
            raise _PassingError(error) from error

    # -- redirects ----------------------------------------------------------------

    def _follow(
        self, request: Request, authorization: str | None, deadline: float | None
    ) -> tuple[BaseHTTPResponse, bool]:
        """Send and follow redirects; whether the answer is from the registry itself."""
        plain = [("Accept-Encoding", "identity"), *request.headers]
        key = request.redirect_key
        target = None if key is None else self._targets.get(key)
        if key is not None and target is not None:
            try:
                response = self._again(request, target, plain, authorization, deadline)
            except _PassingError:
                self._targets.drop(key)
                raise
            if response is not None:
                return response, False
            self._targets.drop(key)
        headers = list(plain)
        if authorization is not None:
            headers.append(("Authorization", authorization))
        url = request.path
        if not url.startswith(("http://", "https://")):
            url = f"{self._base(deadline)}{url}"
        elif origin(url) != origin(self._base(deadline)):
            headers = plain
        if request.method not in ("GET", "HEAD"):
            body = request.body
            response = self._send(
                request.method, url, headers, body, subject=request.subject, deadline=deadline
            )
            return response, True
        response, last, ours = self._chase(request.method, url, headers, request.subject, deadline)
        if key is not None and last != url and response.status in (200, 206):
            self._targets.put(key, last, same_origin=ours)
        return response, ours

    def _again(
        self,
        request: Request,
        target: Target,
        plain: list[tuple[str, str]],
        authorization: str | None,
        deadline: float | None,
    ) -> BaseHTTPResponse | None:
        headers = list(plain)
        if target.same_origin and authorization is not None:
            headers.append(("Authorization", authorization))
        response = self._send(
            request.method, target.url, headers, subject=request.subject, deadline=deadline
        )
        if response.status in _EXPIRED or response.status in _REDIRECTS:
            discard(response)
            return None
        if response.status >= 429:
            error = self._error(response, request.subject, deadline)
            raise self._passing(error, response)
        return response

    def _chase(
        self,
        method: str,
        url: str,
        headers: list[tuple[str, str]],
        subject: str,
        deadline: float | None,
    ) -> tuple[BaseHTTPResponse, str, bool]:
        """Follow redirects; gives the answer, its address and whether the origin stayed."""
        same_origin = True
        for _ in range(limits.REDIRECTS + 1):
            response = self._send(method, url, headers, subject=subject, deadline=deadline)
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or not location:
                return response, url, same_origin
            discard(response)
            following = redirects.checked(url, location, insecure=self.insecure, subject=subject)
            if origin(following) != origin(url):
                same_origin = False
                headers = [pair for pair in headers if pair[0] != "Authorization"]
            url = following
        raise RegistryError(f"more than {limits.REDIRECTS} redirects", subject=subject)

    def location(self, response: BaseHTTPResponse, subject: str, deadline: float | None) -> str:
        """The checked absolute address of a ``Location`` header (of an upload)."""
        value = response.headers.get("Location")
        if not value:
            raise RegistryError("gave no upload location", subject=subject)
        base = self._retrying(lambda: self._base(deadline), subject, deadline, None)
        asked = urljoin(base, response.url or "/")
        return redirects.checked(asked, value, insecure=self.insecure, subject=subject)

    # -- connections --------------------------------------------------------------

    def _send(
        self,
        method: str,
        url: str,
        headers: list[tuple[str, str]],
        body: BodySource | None = None,
        *,
        subject: str,
        deadline: float | None,
    ) -> BaseHTTPResponse:
        """One exchange up to the headers of the answer."""
        self._check_deadline(deadline, subject)
        connect, read = self._settings.connect_seconds, self._settings.read_seconds
        if deadline is not None:
            left = max(deadline - self._settings.clock(), 0.001)
            connect, read = min(connect, left), min(read, left)
        self._stats.add(requests=1)
        place = urlsplit(url).netloc
        try:
            response = self._manager(url).urlopen(
                method,
                url,
                headers={"User-Agent": self._settings.user_agent, **dict(headers)},
                body=None if body is None else body(),
                timeout=urllib3.Timeout(connect=connect, read=read),
                retries=False,
                redirect=False,
                preload_content=False,
                decode_content=False,
            )
            if response.status not in _PASSING and response.status < 500:
                self.answered_at = self._settings.clock()
            return response
        except (urllib3.exceptions.LocationValueError, UnicodeError) as error:
            raise RegistryError(f"no usable address: {url[:200]!r}", subject=subject) from error
        except urllib3.exceptions.HTTPError as error:
            failure = NetworkError(f"{place}: {describe(error)}", subject=subject)
            if not self.insecure and (advice := tls.advice(error)) is not None:
                failure.advice = advice
                raise failure from error
            if self.insecure and isinstance(error, _UNREACHABLE):
                self._scheme = None  # it may have changed sides: look again
            raise _PassingError(failure) from error

    def _manager(self, url: str) -> urllib3.PoolManager:
        parts = urlsplit(url)
        proxy = self._settings.proxy_for(parts.scheme, parts.hostname or "")
        with self._lock:
            if self._context is None:
                self._context = tls.make_context(
                    self.name,
                    self._settings.cert_directories,
                    explicit=self._settings.cert_directory,
                    insecure=self.insecure,
                )
            manager = self._managers.get(proxy)
            if manager is None:
                manager = self._managers[proxy] = _make_manager(
                    proxy, self._context, insecure=self.insecure
                )
            return manager

    def _base(self, deadline: float | None) -> str:
        scheme = self._scheme
        if scheme is None:
            with self._scheme_lock:
                scheme = self._scheme
                if scheme is None:
                    scheme = self._scheme = self._probe(deadline)
        return f"{scheme}://{self._api}"

    def _probe(self, deadline: float | None) -> str:
        """Whether an insecure registry speaks TLS or plain HTTP: TLS is preferred."""
        failures: list[str] = []
        for scheme in ("https", "http"):
            try:
                response = self._send(
                    "GET",
                    f"{scheme}://{self._api}/v2/",
                    [],
                    subject=self.name,
                    deadline=deadline,
                )
            except _PassingError as failure:
                failures.append(f"{scheme}: {failure.error.what}")
            else:
                discard(response)
                return scheme
        raise _PassingError(NetworkError("; ".join(failures), subject=self.name))


class _UncheckedConnection(urllib3.connection.HTTPSConnection):
    """TLS to an insecure registry, without urllib3's warning for each connection.

    That the certificate is not checked is the administrator's decision.
    """

    def connect(self) -> None:
        super().connect()
        self.is_verified = True


class _UncheckedPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _UncheckedConnection


def _make_manager(
    proxy: str | None, context: ssl.SSLContext, *, insecure: bool
) -> urllib3.PoolManager:
    count = limits.CONNECTIONS_PER_HOST
    manager = (
        urllib3.PoolManager(maxsize=count, ssl_context=context)
        if proxy is None
        else urllib3.ProxyManager(proxy, maxsize=count, ssl_context=context)
    )
    if insecure:
        pools = {"http": urllib3.HTTPConnectionPool, "https": _UncheckedPool}
        manager.pool_classes_by_scheme = pools
    return manager
