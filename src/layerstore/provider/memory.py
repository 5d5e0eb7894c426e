"""Keeping the C allocator small: glibc gives every thread an arena and returns little.

Measured with Podman starting a 260 MB image: 95 MiB resident without, 63 MiB with
both calls, no difference in time (glibc 2.36).  Other C libraries do without.
"""

from __future__ import annotations

import ctypes
from typing import Final

_M_ARENA_MAX: Final = -8  # malloc.h
_ARENAS: Final = 2

_LIBC: Final = ctypes.CDLL(None)


def limit_arenas() -> None:
    """Let all threads share few arenas; to be called before threads are started."""
    if hasattr(_LIBC, "mallopt"):
        _LIBC.mallopt(_M_ARENA_MAX, _ARENAS)


def give_back() -> None:
    """Return freed memory to the system, after something large was let go of."""
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)
