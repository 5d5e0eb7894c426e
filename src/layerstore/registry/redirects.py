"""Where redirects may lead, and how long a blob's redirect target is used again.

Registries answer a blob request with a redirect to a signed address at an
object store.  Ranges of one blob come in quick succession, so the address is
kept for a short while and the extra hop saved.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from urllib.parse import urljoin, urlsplit

import msgspec

from layerstore import limits
from layerstore.errors import RegistryError


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port; raises ``ValueError`` for a port that is none."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return parts.scheme, (parts.hostname or "").lower(), port


def checked(url: str, location: str, *, insecure: bool, subject: str) -> str:
    """The absolute address that ``location`` means, seen at ``url``.

    Raises ``RegistryError`` for what is no HTTP address, carries a user name,
    or leads from HTTPS to plain HTTP unless ``insecure``.
    """
    try:
        following = urljoin(url, location)
        scheme, host, _ = origin(following)
        usable = scheme in ("http", "https") and bool(host)
        usable = usable and urlsplit(following).username is None
    except ValueError:
        usable = False
    if not usable:
        raise RegistryError(
            f"redirected to something that is no address: {location[:200]!r}", subject=subject
        )
    if scheme == "http" and url.startswith("https:") and not insecure:
        raise RegistryError("redirected from HTTPS to plain HTTP", subject=subject)
    return following


class Target(msgspec.Struct, frozen=True):
    """A redirect's end; ``same_origin`` means that the registry redirected to itself."""

    url: str
    same_origin: bool
    expires: float


class TargetCache:
    """Redirect targets by key, bounded in time and number.  Thread-safe."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._targets: OrderedDict[str, Target] = OrderedDict()

    def get(self, key: str) -> Target | None:
        """A target that is still fresh."""
        with self._lock:
            target = self._targets.get(key)
            if target is not None and target.expires <= self._clock():
                del self._targets[key]
                return None
            return target

    def put(self, key: str, url: str, *, same_origin: bool) -> None:
        """Remember a target; the oldest one makes room."""
        target = Target(url, same_origin, self._clock() + limits.REDIRECT_SECONDS)
        with self._lock:
            self._targets[key] = target
            self._targets.move_to_end(key)
            while len(self._targets) > limits.REDIRECT_ENTRIES:
                self._targets.popitem(last=False)

    def drop(self, key: str) -> None:
        """Forget a target that no longer works."""
        with self._lock:
            self._targets.pop(key, None)
