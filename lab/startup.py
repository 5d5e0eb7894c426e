"""How long does a container take from `podman pull` to its first line, and what does it fetch?

The one measurement that the demonstration and the benchmarks share.  The clock starts before the
pull; it stops when the first line of the program's output has come through Podman.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lab.delayproxy import DelayProxy, Traffic
from lab.podman import CommandError, PodmanEnv

_SECONDS: Final = 600.0
_ERRORS_BYTES: Final = 4000


@dataclass(frozen=True, slots=True)
class Startup:
    """One start from nothing.  ``traffic`` was counted when the first line came."""

    pull_seconds: float
    first_output_seconds: float
    line: str
    traffic: Traffic


def start_container(
    env: PodmanEnv,
    image: str,
    proxy: DelayProxy,
    *command: str,
    at_first_output: Callable[[], None] = lambda: None,
) -> Startup:
    """Pull ``image`` (through ``proxy``, whose counters are cleared) and run it once.

    ``at_first_output`` is called when the first line is there and the clock has stopped, while the
    container may still run.  Raises lab.podman.CommandError.
    """
    proxy.clear()
    started = time.monotonic()
    env.podman("pull", "--quiet", image, timeout=_SECONDS)
    pulled = time.monotonic()
    arguments = [*env.command("podman"), "run", "--rm", "--network=none", image, *command]
    with subprocess.Popen(
        arguments,
        env=env.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            line = _first_line(process)
            first = time.monotonic()
            traffic = proxy.traffic()
            at_first_output()
            _, errors = process.communicate(timeout=_SECONDS)
        except BaseException:
            process.kill()
            raise
    if process.returncode or not line:
        said = errors.decode(errors="replace")[-_ERRORS_BYTES:]
        result = subprocess.CompletedProcess(arguments, process.returncode or 1, line, said)
        raise CommandError(result)
    return Startup(pulled - started, first - started, line, traffic)


def drop_page_cache() -> bool:
    """Forget the contents of files that are in memory, as far as this machine permits it."""
    os.sync()
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("1\n")
        return True
    return False


def _first_line(process: subprocess.Popen[bytes]) -> str:
    """The first line of standard output; "" when it ends without one."""
    assert process.stdout is not None
    data = bytearray()
    deadline = time.monotonic() + _SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while b"\n" not in data:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise subprocess.TimeoutExpired(process.args, _SECONDS)
            piece = os.read(process.stdout.fileno(), 65536)
            if not piece:
                break
            data += piece
    return data.decode(errors="replace").partition("\n")[0]
