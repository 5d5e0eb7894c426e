"""Everything a client has to know about its surroundings, as one value."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Self
from urllib.request import getproxies_environment, proxy_bypass

from layerstore import __version__, limits
from layerstore.registry import registriesconf, tls
from layerstore.registry.credentials import AuthFile, CredentialSource, auth_files, user_id
from layerstore.registry.registriesconf import RegistriesConf

_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class RegistrySettings:
    """How to reach registries.

    ``credential_sources`` are asked before the ``auth_files``.  ``tls_verify``
    overrides ``insecure`` of registries.conf: False makes every registry
    insecure, True none.  ``cert_directory`` replaces certs.d.  ``clock`` is
    monotonic, ``wall`` seconds since 1970, ``jitter`` gives numbers in [0, 1);
    they and the bounds are here so that tests can change them.
    """

    registries: RegistriesConf = field(default_factory=RegistriesConf)
    auth_files: tuple[AuthFile, ...] = ()
    credential_sources: tuple[CredentialSource, ...] = ()
    helper_env: Mapping[str, str] | None = None
    cert_directories: tuple[Path, ...] = ()
    cert_directory: Path | None = None
    tls_verify: bool | None = None
    proxies: Mapping[str, str] = field(default_factory=dict)
    user_agent: str = f"layerstore/{__version__}"
    connect_seconds: float = limits.CONNECT_SECONDS
    read_seconds: float = limits.READ_SECONDS
    attempts: int = limits.ATTEMPTS
    clock: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    jitter: Callable[[], float] = random.random

    @classmethod
    def from_system(
        cls,
        *,
        env: Mapping[str, str] | None = None,
        home: Path | None = None,
        uid: int | None = None,
        etc: Path = Path("/etc"),
        auth_file: Path | None = None,
        registries_conf: Path | None = None,
        cert_directory: Path | None = None,
        tls_verify: bool | None = None,
        credential_sources: tuple[CredentialSource, ...] = (),
        registries: RegistriesConf | None = None,
    ) -> Self:
        """Read the machine's configuration as Podman does; raises ``ConfigError``.

        ``registries`` is what registries.conf said when it was read before: it is not read again.
        ``auth_file``, ``registries_conf`` and ``cert_directory`` are what a user
        names on a command line, the rest is for tests.
        """
        env = os.environ if env is None else env
        if home is None:
            home = Path(env["HOME"]) if env.get("HOME") else None
        files = auth_files(env, home, user_id(env) if uid is None else uid)
        if auth_file is not None:
            files = (AuthFile(auth_file, required=True),)
        if registries is None:
            main, dropins, required = registriesconf.system_files(env, home, etc / "containers")
            if registries_conf is not None:
                main, required = registries_conf, True
            registries = registriesconf.load(main, dropins, required=required)
        return cls(
            registries=registries,
            auth_files=files,
            credential_sources=credential_sources,
            helper_env=dict(env),
            cert_directories=tls.cert_directories(env, home, etc),
            cert_directory=cert_directory,
            tls_verify=tls_verify,
            proxies=getproxies_environment() if env is os.environ else {},
        )

    def with_sources(self, *sources: CredentialSource) -> Self:
        """The same settings that ask ``sources`` for credentials first."""
        return replace(self, credential_sources=(*sources, *self.credential_sources))

    def proxy_for(self, scheme: str, host: str) -> str | None:
        """Address of the proxy for a host (without port), None for a direct connection."""
        proxy = self.proxies.get(scheme)
        if not proxy or host.strip("[]") in _LOOPBACK:
            return None
        return None if proxy_bypass(host, dict(self.proxies)) else proxy
