"""Authentication at a registry: basic, or bearer tokens from its token server.

Distribution token specification ("Token Authentication", "OAuth2").  Tokens are
kept by (realm, service, scope, credential) until they expire; threads that need
the same token wait for the one that fetches it.  A token is renewed a while before it
expires, at a time drawn at random for each, so that many services do not renew at once;
requests meanwhile go on with the old one.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlencode, urlsplit, urlunsplit

import msgspec

from layerstore import limits
from layerstore.errors import AuthenticationError, DeadlineExceeded, LayerstoreError
from layerstore.registry.challenge import Challenge, choose, parse_challenges
from layerstore.registry.credentials import Credential, CredentialStore

_EXPIRY_MARGIN_SECONDS: Final = 10
_CLIENT_ID: Final = "layerstore"


class TokenKey(msgspec.Struct, frozen=True):
    """What a token was issued for."""

    realm: str
    service: str
    scopes: tuple[str, ...]
    credential: Credential | None


@dataclass(slots=True)
class _Slot:
    # Held while a token is fetched; the other fields belong to the cache's lock.
    lock: threading.Lock = field(default_factory=threading.Lock)
    token: str | None = None
    asked: float = 0.0
    renew: float = 0.0
    expires: float = 0.0
    failures: int = 0
    failure: LayerstoreError | None = None


class TokenCache:
    """Tokens of one client.  ``clock`` is monotonic, ``jitter`` gives numbers in [0, 1)."""

    def __init__(self, clock: Callable[[], float], jitter: Callable[[], float]) -> None:
        self._clock = clock
        self._jitter = jitter
        self._lock = threading.Lock()
        self._slots: dict[TokenKey, _Slot] = {}

    def get(
        self, key: TokenKey, fetch: Callable[[], tuple[str, float]], deadline: float | None
    ) -> str:
        """The token for ``key``; ``fetch`` gives a new one and its seconds of life.

        One thread fetches, others wait and share its success or failure.
        """
        with self._lock:
            if len(self._slots) >= limits.TOKENS and key not in self._slots:
                self._slots.clear()
            slot = self._slots.setdefault(key, _Slot())
            seen = slot.failures
        old = self._usable(slot)
        patience = -1.0 if deadline is None else max(deadline - self._clock(), 0.0)
        if not slot.lock.acquire(timeout=0.0 if old else patience):
            if old:
                return old  # somebody renews it
            raise DeadlineExceeded("no token in time", subject=key.realm)
        try:
            with self._lock:
                if slot.token is not None and self._clock() < slot.renew:
                    return slot.token
                if slot.failure is not None and slot.failures > seen:
                    raise copy.copy(slot.failure)  # it failed while this thread waited
            asked = self._clock()
            try:
                token, seconds = fetch()
            except DeadlineExceeded:
                if old:
                    return old
                raise  # this thread's own haste says nothing about the server
            except LayerstoreError as error:
                with self._lock:
                    if old:  # it will do for a while
                        slot.renew = self._clock() + limits.TOKEN_RENEW_RETRY_SECONDS
                        return old
                    slot.failure, slot.failures = error, slot.failures + 1
                raise
            life = max(seconds - _EXPIRY_MARGIN_SECONDS, limits.TOKEN_MIN_SECONDS)
            with self._lock:
                slot.token, slot.expires, slot.failure = token, asked + life, None
                slot.asked, slot.renew = asked, asked + life * (0.9 + self._jitter() / 10)
            return token
        finally:
            slot.lock.release()

    def _usable(self, slot: _Slot) -> str:
        """The token, if it has not expired."""
        with self._lock:
            return slot.token if slot.token and self._clock() < slot.expires else ""

    def age(self, key: TokenKey, token: str) -> float:
        """Seconds since this token was asked for; 0 if it is not the present one."""
        with self._lock:
            slot = self._slots.get(key)
            return self._clock() - slot.asked if slot is not None and slot.token == token else 0.0

    def discard(self, key: TokenKey, token: str) -> None:
        """Forget ``token`` unless another one has taken its place."""
        with self._lock:
            slot = self._slots.get(key)
            if slot is not None and slot.token == token:
                slot.token = None


class TokenRequest(msgspec.Struct, frozen=True):
    """One request to a token server; ``form`` makes it a POST."""

    url: str
    authorization: str | None = None
    form: bytes | None = None


class _Answer(msgspec.Struct):
    token: str | None = None
    access_token: str | None = None
    expires_in: float | None = None


# Sends a token request until an absolute deadline and gives the 200 answer's body.
TokenTransport = Callable[[TokenRequest, float | None], bytes]


class Access(msgspec.Struct, frozen=True):
    """What a request wants to do.

    ``repository`` is the physical ``host/path`` under which credentials are
    looked up, ``actions`` is ``pull`` or ``push``, ``extra`` one more scope to
    ask for (the source of a mount).
    """

    repository: str
    actions: str = "pull"
    extra: str = ""


class Authenticator:
    """Authentication at one registry host, for any repository there.

    A challenge is remembered for each ``Access``, so that later requests carry
    their token at once.
    """

    def __init__(
        self,
        store: CredentialStore,
        tokens: TokenCache,
        transport: TokenTransport,
        *,
        allow_http: Callable[[], bool],
    ) -> None:
        self._store = store
        self._tokens = tokens
        self._transport = transport
        self._allow_http = allow_http
        self._lock = threading.Lock()
        self._challenges: dict[Access, Challenge] = {}

    def header(self, access: Access, deadline: float | None) -> str | None:
        """The Authorization header to begin with, None if nothing is known yet."""
        with self._lock:
            challenge = self._challenges.get(access)
        return None if challenge is None else self._respond(challenge, access, deadline)

    def answer(
        self, access: Access, values: list[str], sent: str | None, deadline: float | None
    ) -> str | None:
        """The header to try after a 401 or 403, None if there is nothing new to try.

        ``values`` are the WWW-Authenticate headers, ``sent`` is the
        Authorization header that was refused.
        """
        challenge = choose(parse_challenges(values))
        with self._lock:
            if challenge is None:
                challenge = self._challenges.get(access)
            if challenge is None:
                return None
            if len(self._challenges) >= limits.TOKENS:
                self._challenges.clear()
            self._challenges[access] = challenge
        if sent is not None:
            if sent.startswith("Bearer ") and challenge.scheme == "bearer":
                old = self._key(challenge, access, self._store.lookup(access.repository))
                self._tokens.discard(old, sent.removeprefix("Bearer "))
            self._store.lookup(access.repository, refresh=True)
        header = self._respond(challenge, access, deadline)
        return None if header == sent else header

    def may_have_expired(self, access: Access, sent: str | None) -> bool:
        """Whether a header that got a 403 holds a token that is old enough to be the reason."""
        with self._lock:
            challenge = self._challenges.get(access)
        if challenge is None or sent is None or not sent.startswith("Bearer "):
            return False
        key = self._key(challenge, access, self._store.lookup(access.repository))
        return self._tokens.age(key, sent.removeprefix("Bearer ")) >= limits.TOKEN_MIN_SECONDS

    def credentials_changed(self, access: Access) -> bool:
        """Read the credential again; whether it is another one than before."""
        before = self._store.lookup(access.repository)
        return self._store.lookup(access.repository, refresh=True) != before

    def _respond(self, challenge: Challenge, access: Access, deadline: float | None) -> str | None:
        credential = self._store.lookup(access.repository)
        if challenge.scheme == "basic":
            return credential.basic if credential is not None and credential.username else None
        try:
            return self._bearer(challenge, access, credential, deadline)
        except AuthenticationError:
            fresh = self._store.lookup(access.repository, refresh=True)
            if fresh == credential:
                raise
            return self._bearer(challenge, access, fresh, deadline)

    def _bearer(
        self,
        challenge: Challenge,
        access: Access,
        credential: Credential | None,
        deadline: float | None,
    ) -> str:
        key = self._key(challenge, access, credential)
        token = self._tokens.get(key, lambda: self._fetch(key, deadline), deadline)
        return f"Bearer {token}"

    def _key(self, challenge: Challenge, access: Access, credential: Credential | None) -> TokenKey:
        given = challenge.parameters
        scopes = dict.fromkeys((given.get("scope", "") + " " + access.extra).split())
        return TokenKey(given["realm"], given.get("service", ""), tuple(scopes), credential)

    def _fetch(self, key: TokenKey, deadline: float | None) -> tuple[str, float]:
        self._check_realm(key.realm)
        raw = self._transport(token_request(key), deadline)
        try:
            answer = msgspec.json.decode(raw, type=_Answer)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise AuthenticationError(
                "the token server's answer is no token", subject=key.realm
            ) from (error)
        token = answer.token or answer.access_token
        if not token or not token.isascii() or not token.isprintable():
            raise AuthenticationError("the token server gave no token", subject=key.realm)
        return token, answer.expires_in or float(limits.TOKEN_MIN_SECONDS)

    def _check_realm(self, realm: str) -> None:
        try:
            parts = urlsplit(realm)
        except ValueError:
            parts = urlsplit("")
        if parts.scheme not in ("https", "http") or not parts.hostname or parts.username:
            raise AuthenticationError("the registry names no usable token server", subject=realm)
        if parts.scheme == "http" and not self._allow_http():
            raise AuthenticationError(
                "the token server is plain HTTP, no credential is sent there",
                subject=realm,
                advice="set insecure = true for this registry in registries.conf if that is meant",
            )


def token_request(key: TokenKey) -> TokenRequest:
    """How to ask for a token: GET with basic authentication, or an OAuth2 refresh."""
    credential = key.credential
    if credential is not None and credential.identity_token:
        form = {
            "grant_type": "refresh_token",
            "refresh_token": credential.identity_token,
            "client_id": _CLIENT_ID,
            "service": key.service,
            "scope": " ".join(key.scopes),
        }
        return TokenRequest(key.realm, form=urlencode(form).encode("ascii"))
    query: list[tuple[str, str]] = []
    if credential is not None:
        query.append(("account", credential.username))
    if key.service:
        query.append(("service", key.service))
    query.extend(("scope", scope) for scope in key.scopes)
    parts = urlsplit(key.realm)
    joined = "&".join(part for part in (parts.query, urlencode(query)) if part)
    url = urlunsplit((parts.scheme, parts.netloc, parts.path, joined, ""))
    return TokenRequest(url, authorization=None if credential is None else credential.basic)
