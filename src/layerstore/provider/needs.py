"""Who needs a layer, as far as clients on this machine can be looked at.

Use counts are hints, so nothing follows from them alone: what is needed is read from the graph
roots and the mounts by whoever knows those (``service``), and handed over as `Needs`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from layerstore import limits
from layerstore.provider.eviction import Standing
from layerstore.provider.state import LayerRecord, State, View


@dataclass(frozen=True, slots=True)
class Needs:
    """Keys of the views that graph roots link to, and of those that are mounted.

    ``known`` is False if there are graph roots of which it could not be told, or none at all:
    then no layer can be called unreferenced.
    """

    referenced: Collection[int] = frozenset()
    mounted: Collection[int] = frozenset()
    known: bool = False


LookAtNeeds = Callable[[], Needs]


def unknown() -> Needs:
    """Where there is nothing to look at."""
    return Needs()


class Standings:
    """Where each layer stands at this moment."""

    def __init__(self, state: State, needs: Needs) -> None:
        self._state = state
        self._needs = needs
        self._now = time.time()
        self._views: dict[int, list[View]] = {}
        for view in state.views():
            self._views.setdefault(view.slot, []).append(view)
        self._kept = {slot for image in state.kept.images() for slot in image.slots}

    def of(self, record: LayerRecord) -> Standing:
        """The standing of a layer."""
        views = self._views.get(record.slot, [])
        if record.quarantine:
            return Standing.QUARANTINED
        if record.slot in self._kept:
            return Standing.PINNED
        if any(view.key in self._needs.mounted for view in views):
            return Standing.RUNNING
        if not views or not self._needs.known or self._is_referenced(views):
            return Standing.IDLE  # without views it was fetched ahead, for those who will come
        if self._is_being_pulled(record.slot, views):
            return Standing.IDLE
        return Standing.UNREFERENCED

    def _is_referenced(self, views: Iterable[View]) -> bool:
        return any(view.key in self._needs.referenced for view in views)

    def _is_being_pulled(self, slot: int, views: Iterable[View]) -> bool:
        """A client has taken it and may not have written it down yet."""
        recent = self._now - self._state.used(slot) < limits.PULL_SECONDS
        return recent and any(self._state.uses(view.key) for view in views)
