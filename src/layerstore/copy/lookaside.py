"""Fetching simple signatures from where registries.d says they are.

containers/image "docs/signature-protocols.md": the signatures of a manifest are files
``<address>/<repository>@sha256=<hex>/signature-1``, ``-2`` and so on; the first one that is
missing ends the list.  Without an address they are in a directory of this machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self
from urllib.parse import unquote, urlsplit, urlunsplit

import urllib3

from layerstore import __version__, limits
from layerstore.copy.registriesd import RegistriesD
from layerstore.errors import ConfigError, NetworkError, RegistryError, StorageError
from layerstore.image import Digest, Reference
from layerstore.registry import RegistrySettings
from layerstore.registry.credentials import user_id

_SYSTEM: Final = Path("/var/lib/containers/sigstore")
_USER: Final = Path(".local/share/containers/sigstore")


@dataclass(frozen=True)
class Lookaside:
    """Signatures by registries.d; ``directory`` is the place without an address."""

    registries: RegistriesD = field(default_factory=RegistriesD)
    directory: Path = _SYSTEM
    settings: RegistrySettings = field(default_factory=RegistrySettings)

    @classmethod
    def from_system(
        cls,
        settings: RegistrySettings | None = None,
        *,
        env: Mapping[str, str] | None = None,
        uid: int | None = None,
        etc: Path = Path("/etc"),
    ) -> Self:
        """The machine's configuration; ``settings`` say how to reach hosts.

        Raises ``ConfigError``.
        """
        env = os.environ if env is None else env
        home = Path(env["HOME"]) if env.get("HOME") else None
        root = (user_id(env) if uid is None else uid) == 0
        directory = _SYSTEM if root or home is None else home / _USER
        registries = RegistriesD.from_system(home, etc)
        return cls(registries, directory, settings or RegistrySettings())

    def signatures(self, reference: Reference, manifest: Digest) -> tuple[bytes, ...]:
        """The signatures of ``manifest`` in the repository of ``reference``, in order.

        ``reference`` is the physical one, behind mirrors.  Raises ``ConfigError``,
        ``StorageError``, ``RegistryError``, ``NetworkError``.
        """
        address = self.registries.lookaside(reference)
        base = urlsplit(address or self.directory.as_uri())
        path = f"{base.path.rstrip('/')}/{reference.path}@{manifest.algorithm}={manifest.hex}"
        found: list[bytes] = []
        match base.scheme:
            case "file":
                if base.netloc not in ("", "localhost"):
                    raise ConfigError("a file of another host", subject=address)
                place = Path(unquote(path))
                while (data := _read(place / f"signature-{len(found) + 1}")) is not None:
                    _keep(found, data, str(reference))
            case "http" | "https":
                with self._manager(base.scheme, base.hostname or "") as http:
                    while True:
                        name = f"{path}/signature-{len(found) + 1}"
                        data = _get(
                            http, urlunsplit(base._replace(path=name, fragment="")), self.settings
                        )
                        if data is None:
                            break
                        _keep(found, data, str(reference))
            case _:
                raise ConfigError(
                    "signatures can be read from file:, http: and https: addresses only",
                    subject=address,
                )
        return tuple(found)

    def _manager(self, scheme: str, host: str) -> urllib3.PoolManager:
        proxy = self.settings.proxy_for(scheme, host)
        return urllib3.PoolManager() if proxy is None else urllib3.ProxyManager(proxy)


def _keep(found: list[bytes], data: bytes, subject: str) -> None:
    if len(data) > limits.SIGNATURE_BYTES:
        raise RegistryError("a signature is too large", subject=subject)
    if len(found) >= limits.SIGNATURES:
        raise RegistryError(f"more than {limits.SIGNATURES} signatures", subject=subject)
    found.append(data)


def _read(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(limits.SIGNATURE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror}", subject=str(path)) from error


def _get(http: urllib3.PoolManager, url: str, settings: RegistrySettings) -> bytes | None:
    timeout = urllib3.Timeout(connect=settings.connect_seconds, read=settings.read_seconds)
    retries = urllib3.Retry(settings.attempts - 1, redirect=limits.REDIRECTS, status=0)
    try:
        response = http.request(
            "GET",
            url,
            headers={"User-Agent": f"layerstore/{__version__}"},
            timeout=timeout,
            retries=retries,
            preload_content=False,
        )
        try:
            if response.status == 404:
                return None
            if response.status != 200:
                raise RegistryError(
                    f"signature: answered with status {response.status}",
                    subject=url,
                    status=response.status,
                )
            data: bytes = response.read(limits.SIGNATURE_BYTES + 1)
            return data
        finally:
            response.close()
    except urllib3.exceptions.HTTPError as error:
        raise NetworkError(f"signatures cannot be fetched: {error}", subject=url) from error
