"""Whether the Podman that shares a graph root can bear layers that are known by their TOC only.

Podman before 5.0 (containers/image before 5.30) wants the size of every layer of every image, and
takes it for unknown where a record has no diff ID.  One such image is enough that ``podman
images`` and ``podman system df`` fail for the whole storage; ``podman run`` pulls it again.
Nothing in a record helps: a diff ID that nobody verified must not stand there (``reuse``).  So
beside an old Podman images are pulled as a whole, unless dialect L is allowed, or somebody who
knows better says so.

A graph root does not say which versions use it.  The Podman of this machine is asked for its
version; without one, a database of the kind that old versions had tells.
"""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

from layerstore import limits

_log = logging.getLogger(__name__)
_FIRST: Final = (5, 0)
_VERSION: Final = re.compile(r"podman version (\d+)\.(\d+)")


def bears_toc_layers(graph_root: Path) -> bool:
    """Whether layers that are known by their TOC only may be put into ``graph_root``."""
    version = podman_version()
    if version is not None:
        return version >= _FIRST
    return (graph_root / "db.sql").exists() or not (graph_root / "libpod/bolt_state.db").exists()


def podman_version() -> tuple[int, int] | None:
    """The version of the Podman in ``PATH``; None if there is none that tells."""
    program = shutil.which("podman")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, "--version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=limits.HELPER_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        _log.warning("%s does not tell its version: %s", program, error)
        return None
    found = _VERSION.match(done.stdout.decode(errors="replace"))
    return None if found is None else (int(found[1]), int(found[2]))


def ask(graph_root: Path) -> Future[bool]:
    """``bears_toc_layers`` while something else is done."""
    pool = ThreadPoolExecutor(1, "podman-version")
    future = pool.submit(bears_toc_layers, graph_root)
    pool.shutdown(wait=False)
    return future
