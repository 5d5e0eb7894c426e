"""What the administrator decides about which layers are served.

*Dialect L* stores a layer under a diff ID that its client does not check: a lie of the
publisher, told while the layer is still being fetched, would spread to other images of
the same graph root.  ``lazy`` serves such layers at once and takes them back when the
background check finds a lie; ``verified`` waits for that check; ``off`` never serves.

*Ordinary layers* (no TOC) can be served in dialect L once all of them is here:

* ``off``: never;
* ``known``: if the layer is complete here;
* ``auto``: the same, and what is not here yet is fetched in the background, while the
  disk has room, for the next image or graph root;
* ``eager``: a lookup waits a bounded time for the layer.

*Outages*: where the registry gives no answer, a read on demand either ``wait``s a bounded
time for it, or is to ``fail`` after a few tries.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from layerstore import limits
from layerstore.errors import StorageError
from layerstore.image import Reference
from layerstore.registry import match_prefix

_T = TypeVar("_T")


class DialectL(enum.StrEnum):
    """When layers with a TOC are served by their blob digest."""

    OFF = "off"
    VERIFIED = "verified"
    LAZY = "lazy"


class Ordinary(enum.StrEnum):
    """When layers without a TOC are served."""

    OFF = "off"
    KNOWN = "known"
    AUTO = "auto"
    EAGER = "eager"


class Outage(enum.StrEnum):
    """What a read does whose registry gives no answer."""

    WAIT = "wait"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class DiskRoom:
    """How much of the disk fetching ahead may take.

    ``limit`` bounds the bytes below the store's root, None: no bound; ``keep_free`` is the
    part (0 to 1) of the file system that stays free.
    """

    limit: int | None = None
    keep_free: float = limits.DISK_KEEP_FREE

    def allows(self, root: Path, more: int) -> bool:
        """Whether ``more`` bytes may be added below ``root``; StorageError if it cannot be told."""
        try:
            disk = os.statvfs(root)
        except OSError as error:
            raise StorageError(f"cannot look: {error.strerror}", subject=str(root)) from error
        if disk.f_bavail * disk.f_frsize - more < disk.f_blocks * disk.f_frsize * self.keep_free:
            return False
        return self.limit is None or used_bytes(root) + more <= self.limit


def used_bytes(root: Path) -> int:
    """Bytes on disk of all files below ``root``."""
    total = 0
    for directory, _, files in os.walk(root):
        for name in files:
            try:
                total += os.lstat(f"{directory}/{name}").st_blocks * 512
            except OSError:
                continue  # it was removed meanwhile
    return total


@dataclass(frozen=True, slots=True)
class Policy:
    """All of it; what is by prefix is keyed as ``prefix`` in registries.conf."""

    dialect_l: DialectL = DialectL.LAZY
    ordinary: Ordinary = Ordinary.AUTO
    ordinary_by_prefix: Mapping[str, Ordinary] = field(default_factory=dict)
    eager_seconds: float = limits.EAGER_SECONDS
    disk: DiskRoom = DiskRoom()
    outage: Outage = Outage.WAIT
    outage_by_prefix: Mapping[str, Outage] = field(default_factory=dict)
    wait_seconds: float = limits.OUTAGE_WAIT_SECONDS

    def ordinary_for(self, reference: Reference) -> Ordinary:
        """The policy for a reference: that of the longest prefix that matches it."""
        return _longest(self.ordinary_by_prefix, reference, self.ordinary)

    def patience(self, reference: Reference) -> float:
        """Seconds that a read waits for the registry of a reference to answer."""
        if _longest(self.outage_by_prefix, reference, self.outage) is Outage.WAIT:
            return self.wait_seconds
        return limits.OUTAGE_FAIL_SECONDS


def _longest(by_prefix: Mapping[str, _T], reference: Reference, otherwise: _T) -> _T:
    """What stands under the longest prefix that matches."""
    text = str(reference)
    matching = [one for one in by_prefix if match_prefix(one, text) is not None]
    return by_prefix[max(matching, key=len)] if matching else otherwise
