"""Which contents go first when the disk has no room: a pure function over facts.

Layers are ranked by who needs them, and inside a rank by when they were last used.  A layer has
two kinds of content: its *blob*, as it came, and its *files*, which other layers may share; a file
goes with the last layer that needs it.  Layers of running containers give their files before any
of their blobs, because a file can be made of the blob again without a registry.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final


class Standing(enum.IntEnum):
    """Who needs a layer; what is smaller goes first."""

    QUARANTINED = 0
    UNREFERENCED = 1
    IDLE = 2
    RUNNING = 3
    PINNED = 4

    @property
    def word(self) -> str:
        """How it is called in reports."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """What is known of a layer's place on the disk.

    ``used`` is when somebody last used it (seconds since 1970); ``blob`` are the bytes of its
    blob on disk, ``files`` those of the files that go with it.
    """

    slot: int
    standing: Standing
    used: float
    blob: int = 0
    files: int = 0

    @property
    def size(self) -> int:
        """What goes with the layer."""
        return self.blob + self.files


@dataclass(frozen=True, slots=True)
class Step:
    """Contents of one layer to remove, and the bytes that this frees."""

    slot: int
    standing: Standing
    blob: bool
    files: bool
    size: int


NO_LAYER: Final = -1
"""In the place of a slot: files that no layer needs, of layers that were never finished."""


def in_order(layers: Iterable[LayerFacts]) -> list[LayerFacts]:
    """The layers, those that go first at the front."""
    return sorted(layers, key=lambda one: (one.standing, one.used, one.slot))


def plan(
    ordered: Sequence[LayerFacts], *, orphans: int = 0, wanted: int, extent: Standing
) -> list[Step]:
    """What to remove, in this order, to free ``wanted`` bytes, if there is so much.

    ``ordered`` is as ``in_order`` gives it, ``orphans`` bytes are in files that no layer needs.
    Layers in quarantine and orphans go in any case; nobody goes whose standing is beyond ``extent``,
    and pinned layers never.
    """
    steps = [Step(NO_LAYER, Standing.QUARANTINED, False, True, orphans)] if orphans else []
    freed = orphans
    running = []
    for layer in ordered:
        if not layer.size or layer.standing > min(extent, Standing.RUNNING):
            continue
        if layer.standing is Standing.RUNNING:
            running.append(layer)
        elif freed < wanted or layer.standing is Standing.QUARANTINED:
            steps.append(Step(layer.slot, layer.standing, True, True, layer.size))
            freed += layer.size
    for files in (True, False):
        for layer in running:
            size = layer.files if files else layer.blob
            if size and freed < wanted:
                steps.append(Step(layer.slot, layer.standing, not files, files, size))
                freed += size
    return steps
