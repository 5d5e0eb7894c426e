"""Clients of a simulated registry, with a clock that only moves when they sleep."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lab.simregistry import SimRegistry
from layerstore.image import Reference
from layerstore.registry import RegistriesConf, Registry, RegistryClient, RegistrySettings


@dataclass
class Clock:
    """A clock that sleeping moves on; ``slept`` lists the pauses."""

    now: float = 1000.0
    slept: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


MakeRegistry = Callable[..., SimRegistry]
MakeClient = Callable[..., RegistryClient]


@pytest.fixture
def make_registry(clock: Clock) -> Iterator[MakeRegistry]:
    """Starts simulated registries whose tokens live by the test's clock."""
    started: list[SimRegistry] = []

    def make(**options: Any) -> SimRegistry:
        registry = SimRegistry(clock=clock, **options)
        started.append(registry)
        return registry.__enter__()

    yield make
    for registry in started:
        registry.close()


@pytest.fixture
def make_client(clock: Clock) -> Iterator[MakeClient]:
    """Makes clients for which the given hosts are insecure; they never really sleep."""
    made: list[RegistryClient] = []

    def make(
        *registries: SimRegistry, conf: tuple[Registry, ...] = (), **options: Any
    ) -> RegistryClient:
        entries = tuple(
            Registry(prefix=registry.host, location=registry.host, insecure=True)
            for registry in registries
        )
        defaults: dict[str, Any] = {
            "registries": RegistriesConf((*entries, *conf)),
            "clock": clock,
            "sleep": clock.sleep,
            "wall": clock,
            "jitter": lambda: 1.0,
            "read_seconds": 0.4,
            "connect_seconds": 2.0,
        }
        client = RegistryClient(RegistrySettings(**{**defaults, **options}))
        made.append(client)
        return client

    yield make
    for client in made:
        client.close()


@pytest.fixture
def real_time() -> dict[str, Any]:
    """Settings that run by the real clock."""
    return {"clock": time.monotonic, "sleep": time.sleep, "wall": time.time}


@pytest.fixture
def reference() -> Callable[..., Reference]:
    """A reference into a simulated registry."""

    def make(registry: SimRegistry, name: str = "a/b:1") -> Reference:
        return Reference.parse(f"{registry.host}/{name}")

    return make


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A throw-away authority and a certificate for 127.0.0.1 (by openssl)."""
    place = tmp_path_factory.mktemp("tls")
    (place / "ext").write_text("subjectAltName=IP:127.0.0.1\n")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=place, check=True, capture_output=True, timeout=60)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(
        "req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=ca", "-days", "2"
    )
    openssl("req", *key, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=server")
    openssl(
        "x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
        "-out", "server.crt", "-days", "2", "-extfile", "ext",
    )  # fmt: skip
    (place / "authority").mkdir()
    (place / "authority/ca.crt").write_bytes((place / "ca.crt").read_bytes())
    return {name: place / name for name in ("authority", "ca.crt", "server.crt", "server.key")}
