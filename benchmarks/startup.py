"""Time to first output of a real image, cold, again and again: who takes how long for what?"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.contenders import Contender, Load, load_of
from lab.delayproxy import DelayProxy
from lab.podman import PodmanEnv
from lab.shapedlink import ShapedLink
from lab.startup import Startup, drop_page_cache, start_container

ONE_WAY_SECONDS: Final = 0.01
RATE: Final = "100mbit"
READ_EVERYTHING: Final = (
    "sh", "-c", "find / -xdev -type f -print0 | xargs -0 cat | wc -c",
)  # fmt: skip
_NO_LOAD: Final = Load(0.0, 0, {})


@dataclass(frozen=True, slots=True)
class Link:
    """A way to the registry, as the clients see it."""

    name: str
    proxy: DelayProxy


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement; ``load`` is the daemon's at the first output."""

    startup: Startup
    load: Load


@contextlib.contextmanager
def unlimited(registry: str) -> Iterator[Link]:
    """Loopback."""
    with DelayProxy(registry) as proxy:
        yield Link("unlimited", proxy)


@contextlib.contextmanager
def shaped(registry: str) -> Iterator[Link]:
    """100 Mbit/s towards the clients, 10 ms each way."""
    with (
        ShapedLink(RATE) as line,
        DelayProxy(registry, delay=ONE_WAY_SECONDS, listener=line.listen()) as proxy,
    ):
        yield Link("100 Mbit/s, 20 ms", proxy)


def measure(
    contender: Contender,
    link: Link,
    image: str,
    scratch: Path,
    command: Sequence[str] = (),
) -> Sample:
    """Pull and run ``image`` ("name:tag") once: new graph root, new daemon, cold page cache.

    Raises lab.podman.CommandError.
    """
    home = scratch / f"run-{time.monotonic_ns()}"
    try:
        with (
            PodmanEnv(home / "podman", registries=[link.proxy.host]) as env,
            contender.serving(home / "daemon", env, link.proxy.host) as daemon,
        ):
            # What the first command of a fresh graph root sets up is nobody's to blame.
            env.podman("info")
            drop_page_cache()
            loads: list[Load] = []

            def note() -> None:
                if daemon is not None:
                    loads.append(load_of(daemon))

            try:
                startup = start_container(
                    env, f"{link.proxy.host}/{image}", link.proxy, *command, at_first_output=note
                )
            finally:
                env.cleanup()  # while the daemon still answers
            return Sample(startup, loads[0] if loads else _NO_LOAD)
    finally:
        shutil.rmtree(home, ignore_errors=True)
