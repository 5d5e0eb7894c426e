"""Who is measured: Podman alone, layerstore, and a peer that speaks the same protocol.

A peer is the program `stargz-store` (or one with its command line) at the path that
LAYERSTORE_BENCH_PEER names.  It gets its own root and mount point, a configuration that lets it
talk plain HTTP to the registry (as its documentation describes: `resolver.host.HOST.mirrors`),
and is ended by SIGINT, the one signal that it answers by unmounting.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import layerstore
from lab.podman import PodmanEnv, unmount_below
from lab.store import LayerstoreService

PEER_VARIABLE: Final = "LAYERSTORE_BENCH_PEER"
_START_SECONDS: Final = 20.0
_STOP_SECONDS: Final = 20.0


@dataclass(frozen=True, slots=True)
class Load:
    """What a daemon has used so far; ``status`` is its own report, if it makes one."""

    cpu_seconds: float
    rss_bytes: int
    status: dict[str, Any]


class Daemon(Protocol):
    """A provider that runs."""

    @property
    def pid(self) -> int: ...
    def status(self) -> dict[str, Any]: ...


class Contender(Protocol):
    """A way to start containers."""

    @property
    def name(self) -> str: ...
    @property
    def lazy(self) -> bool: ...
    def serving(
        self, directory: Path, env: PodmanEnv, registry: str
    ) -> contextlib.AbstractContextManager[Daemon | None]:
        """Have its daemon run, with state below ``directory``, and ``env`` use it."""


class PlainPull:
    """Podman alone."""

    name = "plain pull"
    lazy = False

    @contextlib.contextmanager
    def serving(self, directory: Path, env: PodmanEnv, registry: str) -> Iterator[None]:
        yield None


class Layerstore:
    """The `layerstore serve` of this checkout."""

    name = "layerstore"
    lazy = True

    @contextlib.contextmanager
    def serving(self, directory: Path, env: PodmanEnv, registry: str) -> Iterator[Daemon]:
        environment = {
            **env.environment(),
            # the program of this checkout, wherever it lies
            "PYTHONPATH": str(Path(layerstore.__file__).parents[1]),
        }
        with LayerstoreService(directory, environment=environment) as service:
            env.configure_storage(additional_layer_store=service.mountpoint)
            yield service


class Peer:
    """Another provider."""

    lazy = True

    def __init__(self, program: Path) -> None:
        self._program = program
        self.name = program.name

    @classmethod
    def given(cls) -> Peer | None:
        """The one that the environment names."""
        program = os.environ.get(PEER_VARIABLE)
        return cls(Path(program)) if program else None

    @contextlib.contextmanager
    def serving(self, directory: Path, env: PodmanEnv, registry: str) -> Iterator[Daemon]:
        mountpoint, root, scratch = (directory / name for name in ("store", "root", "tmp"))
        for place in (mountpoint, root, scratch):
            place.mkdir(parents=True)
        config = directory / "config.toml"
        host = json.dumps(registry)
        config.write_text(f"[[resolver.host.{host}.mirrors]]\nhost = {host}\ninsecure = true\n")
        log = directory / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [self._program, "--config", config, "--root", root,
                 "--addr", directory / "store.sock", mountpoint],
                # its caches lie in temporary directories of their own
                env={**env.environment(), "TMPDIR": str(scratch)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            deadline = time.monotonic() + _START_SECONDS
            while not os.path.ismount(mountpoint):
                if process.poll() is not None or time.monotonic() > deadline:
                    said = log.read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"{self.name} did not mount: {said}")
                time.sleep(0.02)
            env.configure_storage(additional_layer_store=mountpoint)
            yield _PeerDaemon(process.pid)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            unmount_below(directory)


@dataclass(frozen=True, slots=True)
class _PeerDaemon:
    pid: int

    def status(self) -> dict[str, Any]:
        return {}


def load_of(daemon: Daemon) -> Load:
    """What the daemon's process has used so far."""
    process = Path(f"/proc/{daemon.pid}")
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    rss = int((process / "statm").read_text().split()[1]) * resource.getpagesize()
    return Load(cpu, rss, daemon.status())
