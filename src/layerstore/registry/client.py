"""The registry client: manifests, blobs and byte ranges, verified, from mirrors or home.

OCI distribution specification.  A reference's places come from registries.conf;
they are asked in order, and the one that served a manifest is asked first for
its blobs.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Self, TypeVar

import msgspec
from msgspec.structs import replace
from urllib3.response import BaseHTTPResponse

from layerstore import limits
from layerstore.errors import (
    ConfigError,
    ContentError,
    DeadlineExceeded,
    LayerstoreError,
    NetworkError,
    RegistryError,
    UsageError,
)
from layerstore.image import Digest, Reference, media_types
from layerstore.registry import answers, push
from layerstore.registry.body import BlobReader, discard
from layerstore.registry.credentials import Credential, CredentialStore
from layerstore.registry.push import ChunkSource
from layerstore.registry.registriesconf import Endpoint
from layerstore.registry.settings import RegistrySettings
from layerstore.registry.stats import Stats
from layerstore.registry.tokens import Access, TokenCache
from layerstore.registry.transport import Host, Request

_ACCEPT: Final = ", ".join(media_types.ALL_MANIFESTS)
_MIRROR_ATTEMPTS: Final = 2  # where another place can be asked, that is quicker
_T = TypeVar("_T")


class FetchedManifest(msgspec.Struct, frozen=True):
    """A manifest's exact bytes, the media type they were served with, their digest."""

    raw: bytes
    media_type: str
    digest: Digest


class RegistryClient:
    """Thread-safe and synchronous; one object serves a whole program.

    Every ``deadline`` is an absolute time of ``settings.clock``
    (``time.monotonic``).  All methods raise ``RegistryError`` (with the
    registry's codes), ``NetworkError`` and ``ConfigError``; after a deadline
    ``DeadlineExceeded``.
    """

    def __init__(self, settings: RegistrySettings) -> None:
        self.settings = settings
        self.stats = Stats()
        self._store = CredentialStore(
            settings.auth_files,
            settings.credential_sources,
            settings.helper_env,
            settings.registries.credential_helpers,
        )
        self._tokens = TokenCache(settings.clock, settings.jitter)
        self._lock = threading.Lock()
        self._hosts: OrderedDict[tuple[str, bool], Host] = OrderedDict()
        self._preferred: OrderedDict[str, tuple[float, Endpoint]] = OrderedDict()  # until when
        self._resting: dict[str, float] = {}  # host -> until when others are asked first

    # -- reading ------------------------------------------------------------------

    def manifest(
        self, ref: Reference, digest: Digest | None = None, *, deadline: float | None = None
    ) -> FetchedManifest:
        """The manifest or index of ``ref``, or the one called ``digest`` in its repository.

        Asked for by digest if there is one, and then verified: a place that
        serves other bytes counts as failed (``VerificationError`` if all do).
        """
        wanted = digest if digest is not None else ref.digest
        target = wanted if wanted is not None else ref.tag
        subject = str(ref) if digest is None else str(ref.with_digest(digest))

        def ask(place: Endpoint, until: float | None, attempts: int) -> FetchedManifest:
            request = Request(
                "GET",
                f"/v2/{place.path}/manifests/{target}",
                Access(place.physical),
                subject,
                headers=(("Accept", _ACCEPT),),
            )
            host = self._host(place)
            response, raw = host.fetch(request, limits.MANIFEST_BYTES, until, attempts)
            if wanted is not None:
                wanted.verify(raw, subject=f"{subject} from {place.host}")
            kind = media_types.essence(response.headers.get("Content-Type", ""))
            return FetchedManifest(raw, kind, wanted or Digest.of(raw))

        return self._everywhere(ref, ask, deadline, digested=wanted is not None)

    def blob(
        self, ref: Reference, digest: Digest, limit: int, *, deadline: float | None = None
    ) -> bytes:
        """A small blob as a whole, at most ``limit`` bytes, verified."""
        subject = f"{ref.name}@{digest}"

        def ask(place: Endpoint, until: float | None, attempts: int) -> bytes:
            request = self._blob_request(place, digest, subject)
            _, raw = self._host(place).fetch(request, limit, until, attempts)
            digest.verify(raw, subject=f"{subject} from {place.host}")
            return raw

        return self._everywhere(ref, ask, deadline, digested=True, preferring=True)

    def open_blob(
        self,
        ref: Reference,
        digest: Digest,
        *,
        offset: int = 0,
        length: int | None = None,
        size: int | None = None,
        deadline: float | None = None,
        answer_by: float | None = None,
        attempts: int | None = None,
    ) -> BlobReader:
        """Begin to read a blob, or ``length`` bytes of it from ``offset``.

        ``size`` is the blob's size as the manifest states it; an answer that
        disagrees is an error.  A length that reaches past the end is cut.  Only
        the answer's headers are retried, ``attempts`` times and until ``answer_by``
        (the deadline); the bytes are not verified.  A registry that ignores ranges
        gives a reader with ``partial`` False and ``start`` 0.
        """
        if offset < 0 or (length is not None and length <= 0):
            raise UsageError(f"no byte range: offset {offset}, length {length}")
        if size is not None and offset >= max(size, 1):
            raise UsageError(f"offset {offset} is behind the end of a blob of {size} bytes")
        subject = f"{ref.name}@{digest}"
        value = None
        if length is not None:
            value = f"bytes={offset}-{offset + length - 1}"
        elif offset > 0:
            value = f"bytes={offset}-"

        def ask(place: Endpoint, until: float | None, at_most: int) -> BlobReader:
            request = self._blob_request(place, digest, subject)
            if value is not None:
                request = replace(request, headers=(("Range", value),), expect=(200, 206))
            host = self._host(place)
            response = host.open(request, until, at_most)
            try:
                start, count, total = _extent(response, offset, length, size, subject)
            except LayerstoreError:
                discard(response)
                raise
            # The reader lives by the caller's deadline, not by this place's share.
            body = host.body(response, count, subject, deadline)
            partial = response.status == 206
            return BlobReader(body, start=start, length=count, total=total, partial=partial)

        return self._everywhere(
            ref,
            ask,
            deadline if answer_by is None else answer_by,
            digested=True,
            preferring=True,
            attempts=attempts,
        )

    # -- writing ------------------------------------------------------------------

    def has_blob(self, ref: Reference, digest: Digest) -> bool:
        """Whether the repository that ``ref`` would be pushed to holds a blob."""
        host, path = self._push_host(ref)
        return push.has_blob(host, path, digest, f"{ref.name}@{digest}")

    def mount_blob(self, ref: Reference, digest: Digest, source: Reference) -> bool:
        """Take a blob over from another repository of the same registry.

        False if the registry would not: upload it then.
        """
        if source.domain != ref.domain:
            return False
        host, path = self._push_host(ref)
        return push.mount_blob(host, path, digest, source.path, f"{ref.name}@{digest}")

    def upload_blob(self, ref: Reference, digest: Digest, chunks: ChunkSource, size: int) -> None:
        """Upload ``size`` bytes; ``chunks()`` gives them anew for each attempt."""
        host, path = self._push_host(ref)
        push.upload_blob(host, path, digest, chunks, size, subject=f"{ref.name}@{digest}")

    def put_manifest(self, ref: Reference, raw: bytes, media_type: str) -> Digest:
        """Store a manifest under ``ref``'s digest, else its tag; gives its digest."""
        if ref.digest is not None:
            ref.digest.verify(raw, subject=str(ref))
        host, path = self._push_host(ref)
        target = ref.digest or ref.tag or ""
        push.put_manifest(host, path, target, raw, media_type, subject=str(ref))
        return Digest.of(raw)

    def hosts(self, ref: Reference) -> tuple[str, ...]:
        """The hosts that are asked for blobs of ``ref``'s repository, in the order of registries.conf.

        Raises ``ConfigError``.
        """
        return tuple(place.host for place in self.settings.registries.endpoints(ref, digested=True))

    def answered_since(self, ref: Reference, when: float) -> bool:
        """Whether one of these hosts answered anything since a time of ``settings.clock``.

        Raises ``ConfigError``.
        """
        names = self.hosts(ref)
        with self._lock:
            known = [host for (name, _), host in self._hosts.items() if name in names]
        return any(host.answered_at > when for host in known)

    def served_by(self, ref: Reference) -> Endpoint:
        """The place that served the last manifest of ``ref``'s repository, else the first to ask.

        Raises ``ConfigError``.
        """
        return self._places(ref, digested=ref.digest is not None, preferring=True)[0]

    def credential(self, place: Endpoint) -> Credential | None:
        """What ``place`` is shown by this client, None for nothing; raises ``ConfigError``."""
        return self._store.lookup(place.physical)

    def close(self) -> None:
        """Close idle connections; the client can be used again."""
        with self._lock:
            hosts = list(self._hosts.values())
        for host in hosts:
            host.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- places -------------------------------------------------------------------

    def _host(self, place: Endpoint) -> Host:
        verify = self.settings.tls_verify
        insecure = place.insecure if verify is None else not verify
        key = (place.host, insecure)
        with self._lock:
            host = self._hosts.get(key)
            if host is None:
                host = self._hosts[key] = Host(
                    place.host,
                    insecure=insecure,
                    settings=self.settings,
                    store=self._store,
                    tokens=self._tokens,
                    stats=self.stats,
                )
            self._hosts.move_to_end(key)
            idle = self._hosts.popitem(last=False)[1] if len(self._hosts) > limits.HOSTS else None
        if idle is not None:
            idle.close()
        return host

    def _push_host(self, ref: Reference) -> tuple[Host, str]:
        place = self.settings.registries.push_endpoint(ref)
        return self._host(place), place.path

    def _blob_request(self, place: Endpoint, digest: Digest, subject: str) -> Request:
        return Request(
            "GET",
            f"/v2/{place.path}/blobs/{digest}",
            Access(place.physical),
            subject,
            redirect_key=f"{place.path}@{digest}",
        )

    def _places(self, ref: Reference, *, digested: bool, preferring: bool) -> list[Endpoint]:
        places = list(self.settings.registries.endpoints(ref, digested=digested))
        now = self.settings.clock()
        with self._lock:
            until, best = self._preferred.get(ref.name, (0.0, None))
            if preferring and best is not None and now < until:
                places = [best, *(place for place in places if place != best)]
            # A place that did not answer lately is not waited for before the others.
            return sorted(places, key=lambda place: self._resting.get(place.host, 0.0) > now)

    def _everywhere(
        self,
        ref: Reference,
        ask: Callable[[Endpoint, float | None, int], _T],
        deadline: float | None,
        *,
        digested: bool,
        preferring: bool = False,
        attempts: int | None = None,
    ) -> _T:
        most = self.settings.attempts if attempts is None else attempts
        places = self._places(ref, digested=digested, preferring=preferring)
        failures: list[tuple[Endpoint, LayerstoreError]] = []
        for number, place in enumerate(places):
            left = len(places) - number
            until = deadline
            if deadline is not None and left > 1:
                now = self.settings.clock()
                until = now + (deadline - now) / left
            try:
                found = ask(place, until, most if left == 1 else min(_MIRROR_ATTEMPTS, most))
            except (RegistryError, NetworkError, ContentError, ConfigError) as error:
                failures.append((place, error))
                if isinstance(error, NetworkError) and len(places) > 1:
                    self._rest(place)
                if deadline is not None and self.settings.clock() >= deadline:
                    break
                continue
            if not preferring:
                self._prefer(ref.name, place)
            return found
        raise _summary(failures)

    def _rest(self, place: Endpoint) -> None:
        with self._lock:
            now = self.settings.clock()
            self._resting = {host: until for host, until in self._resting.items() if until > now}
            self._resting[place.host] = now + limits.ENDPOINT_REST_SECONDS

    def _prefer(self, name: str, place: Endpoint) -> None:
        with self._lock:
            self._preferred[name] = self.settings.clock() + limits.PREFERRED_SECONDS, place
            self._preferred.move_to_end(name)
            while len(self._preferred) > limits.TOKENS:
                self._preferred.popitem(last=False)


def _extent(
    response: BaseHTTPResponse,
    offset: int,
    length: int | None,
    size: int | None,
    subject: str,
) -> tuple[int, int, int]:
    """First byte, byte count and total size that an answer's headers promise."""
    answers.refuse_encoding(response.headers, subject)
    announced = answers.parse_length(response.headers.get("Content-Length"))
    if response.status == 200:
        total = announced if announced is not None else size
        if total is None:
            raise RegistryError("answered without a length", subject=subject)
        if size is not None and total != size:
            raise RegistryError(f"blob has {total} bytes, not {size}", subject=subject)
        return 0, total, total
    value = response.headers.get("Content-Range")
    given = answers.parse_content_range(value)
    total_size = size if given is None or given.total is None else given.total
    if given is None or total_size is None:
        what = "without a Content-Range" if value is None else f"labelled {value!r}"
        raise RegistryError(f"sent a range {what}", subject=subject)
    if size is not None and total_size != size:
        raise RegistryError(f"blob has {total_size} bytes, not {size}", subject=subject)
    end = total_size if length is None else min(offset + length, total_size)
    if (given.start, given.end) != (offset, end):
        raise RegistryError(
            f"asked for bytes {offset}-{end - 1}, was sent {value!r}", subject=subject
        )
    if announced is not None and announced != end - offset:
        raise RegistryError(
            f"range of {end - offset} bytes comes with Content-Length {announced}", subject=subject
        )
    return offset, end - offset, total_size


def _summary(failures: list[tuple[Endpoint, LayerstoreError]]) -> LayerstoreError:
    """The primary's error if it was asked, else the last; it mentions the others."""
    if not failures:
        return DeadlineExceeded("out of time before any place was asked")
    primary = [error for place, error in failures if not place.mirror]
    main = primary[-1] if primary else failures[-1][1]
    others = [f"{place.host}: {error.what}" for place, error in failures if error is not main]
    if others:
        main.what = f"{main.what}; failed too: [{'; '.join(others)}]"
    return main
