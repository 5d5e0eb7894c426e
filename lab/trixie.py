"""Debian 13's container tools on a Debian 12 machine: a private root in ``.cache/trixie``.

The packages and every library they need are unpacked, nothing is installed.  The programs are then
bound to the private root: their ELF interpreter and run path point into it.  Starting them through
``ld-linux --library-path`` would be simpler, but these programs start themselves again through
/proc/self/exe (containers/storage to unpack layers, podman for its exit command), and that would
be the loader.

``python -m lab.trixie`` prepares the root and prints the versions.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lab import debian

SUITE: Final = "trixie"
_ROOT: Final = debian.CACHE / SUITE
_LOADER: Final = "usr/lib64/ld-linux-x86-64.so.2"
_LIBRARIES: Final = "usr/lib/x86_64-linux-gnu"
_PROGRAMS: Final = {
    "podman": "usr/bin/podman",
    "skopeo": "usr/bin/skopeo",
    "buildah": "usr/bin/buildah",
    "containers_storage": "usr/bin/containers-storage",
    "conmon": "usr/bin/conmon",
    "runc": "usr/sbin/runc",
    "netavark": "usr/lib/podman/netavark",
}
_PACKAGES: Final = (
    "podman",
    "skopeo",
    "buildah",
    "containers-storage",
    "conmon",
    "runc",
    "netavark",
    "libc6",
)
_VERSION: Final = 1  # raised when the way of unpacking changes


@dataclass(frozen=True, slots=True)
class TrixieTools:
    """The programs, runnable as they are; ``root`` is what they were unpacked into."""

    root: Path
    podman: Path
    skopeo: Path
    buildah: Path
    containers_storage: Path
    conmon: Path
    runc: Path
    netavark: Path


def ensure() -> TrixieTools:
    """Download and unpack what is missing; the second call only looks at a stamp.

    Safe to call from several processes at once.  Raises ``lab.debian.DebianError``.
    """
    tools = TrixieTools(
        root=_ROOT, **{name: _ROOT / program for name, program in _PROGRAMS.items()}
    )
    stamp = _ROOT / "stamp"
    # The run path is absolute: a checkout that moved must be bound anew.
    wanted = f"{_VERSION} {_ROOT}\n"
    if _is(stamp, wanted):
        return tools
    with debian.lock(debian.CACHE / f"{SUITE}.lock"):
        if _is(stamp, wanted):
            return tools
        if _ROOT.exists():
            shutil.rmtree(_ROOT)
        debian.unpack(debian.download(_PACKAGES, SUITE), _ROOT)
        for program in _PROGRAMS.values():
            _bind(_ROOT / program)
        debian.publish(stamp, wanted)
    return tools


def _is(stamp: Path, wanted: str) -> bool:
    return stamp.exists() and stamp.read_text() == wanted


def _bind(program: Path) -> None:
    """Let a program find the loader and, before all others, the libraries of the private root.

    DT_RPATH, not DT_RUNPATH: only the former counts for the libraries of libraries too.
    """
    result = subprocess.run(
        [
            *("patchelf", "--set-interpreter", str(_ROOT / _LOADER)),
            *("--force-rpath", "--set-rpath", str(_ROOT / _LIBRARIES), str(program)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise debian.DebianError(f"{program.name} cannot be bound: {result.stderr.strip()}")


def main() -> int:
    tools = ensure()
    for program in (tools.podman, tools.skopeo, tools.buildah, tools.conmon, tools.runc):
        result = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
        if result.returncode:
            print(f"{program}: {result.stderr.strip()}", file=sys.stderr)
            return 1
        print(result.stdout.splitlines()[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
