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
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from layerstore import limits
from layerstore.content import DiskRoom
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
class Policy:
    """All of it; what is by prefix is keyed as ``prefix`` in registries.conf."""

    dialect_l: DialectL = DialectL.LAZY
    ordinary: Ordinary = Ordinary.AUTO
    ordinary_by_prefix: Mapping[str, Ordinary] = field(default_factory=dict)
    eager_seconds: float = limits.EAGER_SECONDS
    disk: DiskRoom = field(default_factory=DiskRoom)
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
