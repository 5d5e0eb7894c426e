"""A service over a registry that takes its time: reads can be met while they wait for bytes.

No Podman is needed: the store's protocol is paths, so a client is any program that reads a file.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from lab.fdstore import FdStore
from lab.rig import layer_path
from lab.simimages import Publisher
from lab.simregistry import Fault, SimRegistry
from lab.store import LayerstoreService
from layerstore.service import request

_QUIET: Final = "prefetch = false\nbackground_fetch = false\n"
_DIRECT: Final = "dd if={} of=/dev/null iflag=direct bs=64k status=none"
_SLEEP_SECONDS: Final = 60.0
_SEED: Final = b"layerstore"


class SleepyStore:
    """``service``, and a layer of ``names`` of which nothing was read yet.  A context manager."""

    def __init__(
        self,
        directory: Path,
        *,
        variables: Mapping[str, str] | None = None,
        fd_store: FdStore | None = None,
    ) -> None:
        self._registry: Final = SimRegistry()
        directory.mkdir(parents=True, exist_ok=True)
        files = {f"file{number}": _content(number) for number in range(12)}
        self._sums: Final = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        self.names: Final = list(files)
        self._image: Final = Publisher(self._registry).push("sleepy/image", "1", [files])
        self.registries_conf: Final = directory / "registries.conf"
        self.registries_conf.write_text(
            f'[[registry]]\nlocation = "{self._registry.host}"\ninsecure = true\n'
        )
        self._reference: Final = f"{self._registry.host}/sleepy/image:1"
        self.service: Final = LayerstoreService(
            directory,
            environment={
                **os.environ,
                "CONTAINERS_REGISTRIES_CONF": str(self.registries_conf),
                **(variables or {}),
            },
            config=_QUIET,
            fd_store=fd_store,
        )

    def configure(self, more: str) -> None:
        """Write another configuration file."""
        self.service.configure(_QUIET + more)

    @property
    def layer(self) -> Path:
        """The files, as a path through the mount point."""
        digest = self._image.manifest["layers"][0]["digest"]
        return layer_path(self.service.mountpoint, self._reference, digest) / "diff"

    def look_up(self) -> None:
        """Have the layer known; from then on its bytes come slowly."""
        assert sorted(os.listdir(self.layer)) == sorted(self.names)
        self.slowness: Fault = self._registry.fault("latency", match="blobs/")

    def reader(
        self, name: str, directory: str | None = None, *, direct: bool = False
    ) -> subprocess.Popen[str]:
        """A process that reads a file, and waits for the registry by now.

        This server will not get the bytes for a long while; the next one will at once.
        ``directory`` is where the file is, if not below the mount point; ``direct`` reads past the
        page cache, so that each error is the reader's.
        """
        path = f"{directory or self.layer}/{name}"
        before = self.open_requests()
        process = self._asleep(_DIRECT.format(path).split() if direct else ["sha256sum", path])
        end = time.monotonic() + 20
        while self.open_requests() <= before:
            assert time.monotonic() < end, "no read came"
            time.sleep(0.01)
        return process

    def fetch(self) -> subprocess.Popen[str]:
        """`layerstore fetch` of the image, which waits for the registry by now."""
        command = [sys.executable, "-m", "layerstore.cli", "fetch", "--quiet", self._reference]
        return self._asleep([*command, "--root", str(self.service.root)])

    def _asleep(self, command: list[str]) -> subprocess.Popen[str]:
        asked = self.slowness.hits
        self.slowness.seconds = _SLEEP_SECONDS
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        end = time.monotonic() + 20
        while self.slowness.hits == asked:
            assert time.monotonic() < end, "the registry is asked for nothing"
            time.sleep(0.01)
        self.slowness.seconds = 0.0
        return process

    def is_right(self, name: str, process: subprocess.Popen[str]) -> bool:
        """Wait for a reader: whether it got every byte."""
        out, said = process.communicate(timeout=60)
        assert (process.returncode, said) == (0, "")
        return out.split()[0] == self._sums[name]

    def reads(self, name: str) -> bool:
        """Whether a file can be read, and is right."""
        command = ["sha256sum", str(self.layer / name)]
        # another process, which can be given up
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            return self.is_right(name, process)
        finally:
            process.kill()

    def error_of(self, process: subprocess.Popen[str]) -> str:
        """Wait for a reader that fails: what it said."""
        _, said = process.communicate(timeout=60)
        assert process.returncode == 1
        return said

    def open_requests(self) -> int:
        """How many requests the server has not answered."""
        return int(self.status()["fuse"]["events"]["open"])

    def status(self) -> dict[str, Any]:
        """`layerstore status`, without a process for it."""
        return request(self.service.root, "status")

    def __enter__(self) -> Self:
        self._registry.__enter__()
        self.service.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.service.__exit__(kind, value, traceback)
        self._registry.__exit__(kind, value, traceback)


def _content(number: int) -> bytes:
    """300,000 bytes that do not compress, the same each time."""
    digest = hashlib.shake_256(_SEED + bytes([number]))
    return digest.digest(300_000)
