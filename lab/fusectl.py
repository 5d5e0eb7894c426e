"""The kernel's side of one FUSE mount: how many requests wait, and the end of a hopeless one.

Source: Documentation/filesystems/fuse.rst, "control filesystem".  It is mounted in a place of its
own, because few machines in CI have it under /sys/fs/fuse/connections.
"""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from lab.fresh import fresh
from lab.podman import run
from layerstore import fuse


class FuseControl:
    """The connection behind the FUSE file system at ``mountpoint``.  A context manager."""

    def __init__(self, mountpoint: Path) -> None:
        mount = fuse.find_mount(mountpoint)
        assert mount is not None, f"nothing is mounted at {mountpoint}"
        self._place: Final = fresh("fusectl-")
        run(["mount", "-t", "fusectl", "none", str(self._place)])
        self._connection: Final = self._place / str(mount.minor)

    def waiting(self) -> int:
        """Requests that the kernel has for the server, sent or not, and got no answer to."""
        return int((self._connection / "waiting").read_text())

    def abort(self) -> None:
        """Fail every request from now on: what ends processes that wait for no server."""
        with contextlib.suppress(OSError):
            (self._connection / "abort").write_text("1")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        subprocess.run(["umount", "-l", str(self._place)], capture_output=True, check=False)
        self._place.rmdir()
