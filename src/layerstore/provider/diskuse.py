"""What ``layerstore df`` and ``layerstore gc`` tell: the disk use, by layer and image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from layerstore.content import Room
from layerstore.errors import UnknownObject
from layerstore.provider.eviction import NO_LAYER, LayerFacts, Standing, Step
from layerstore.provider.housekeeping import Housekeeper
from layerstore.provider.state import State

_WITHOUT_LAYER: Final = "orphaned"
"""The standing of files that no layer needs."""


class DiskUse:
    """Reports about a store.  Methods take seconds where there are many files."""

    def __init__(self, root: Path, state: State, room: Room, housekeeper: Housekeeper) -> None:
        self._root = root
        self._state = state
        self._room = room
        self._housekeeper = housekeeper

    def report(self) -> Mapping[str, object]:
        """What takes how much, and what of it could go."""
        survey = self._housekeeper.survey()
        usage, room = survey.usage, self._room
        disk = room.file_system()
        references = self._references()
        evictable = [layer for layer in survey.layers if layer.standing <= Standing.IDLE]
        unreferenced = [one for one in evictable if one.standing <= Standing.UNREFERENCED]
        return {
            "root": str(self._root),
            "used": usage.total,
            "limit": room.allowed.limit,
            "high": room.allowed.high_bytes,
            "low": room.allowed.low_bytes,
            "free": disk.free,
            "keep_free": room.reserve(disk),
            "blobs": sum(usage.blobs.values()),
            "files": sum(usage.objects.values()),
            "file_count": usage.files,
            "metadata": sum(usage.metadata.values()),
            "other": usage.other,
            "reclaimable": survey.orphans + _size(evictable),
            "unreferenced": survey.orphans + _size(unreferenced),
            "layers": [self._layer(layer, references, usage.metadata) for layer in survey.layers],
            "images": self._images(survey.layers, usage.metadata),
        }

    def collect(self, *, dry_run: bool, everything: bool) -> Mapping[str, object]:
        """Remove what no graph root refers to; ``everything``: all but what runs or is pinned."""
        extent = Standing.IDLE if everything else Standing.UNREFERENCED
        steps = self._housekeeper.collect(extent, dry=dry_run)
        references = self._references()
        return {
            "dry_run": dry_run,
            "size": sum(step.size for step in steps),
            "removed": [self._removal(step, references) for step in steps],
        }

    def pinned(self) -> Mapping[str, object]:
        """The pinned images, and how many of their layers are known and complete."""
        return {
            "images": [
                {
                    "reference": image.reference,
                    "layers": len(image.slots),
                    "complete": image.complete
                    and all(self._state.is_complete(slot) for slot in image.slots),
                }
                for image in sorted(self._state.kept.images(), key=lambda one: one.reference)
            ]
        }

    def unpin(self, reference: str) -> Mapping[str, object]:
        """Let an image be evicted again; UnknownObject if it was not pinned."""
        if not self._state.kept.let_go(reference):
            raise UnknownObject("the image is not pinned", subject=reference)
        return {}

    def _references(self) -> dict[int, list[str]]:
        found: dict[int, set[str]] = {}
        for view in self._state.views():
            found.setdefault(view.slot, set()).add(view.reference)
        return {slot: sorted(filter(None, names)) for slot, names in found.items()}

    def _digest(self, slot: int) -> str:
        record = self._state.layer(slot)
        return str(record.blob_digest) if record else ""

    def _layer(
        self, layer: LayerFacts, references: Mapping[int, list[str]], metadata: Mapping[int, int]
    ) -> dict[str, object]:
        return {
            "slot": layer.slot,
            "digest": self._digest(layer.slot),
            "references": references.get(layer.slot, []),
            "standing": layer.standing.word,
            "complete": self._state.is_complete(layer.slot),
            "last_used": layer.used,
            "blob": layer.blob,
            "files": layer.files,
            "metadata": metadata.get(layer.slot, 0),
        }

    def _images(
        self, layers: Iterable[LayerFacts], metadata: Mapping[int, int]
    ) -> list[dict[str, object]]:
        by_slot = {layer.slot: layer for layer in layers}
        images: dict[str, set[int]] = {}
        for view in self._state.views():
            if view.reference:
                images.setdefault(view.reference, set()).add(view.slot)
        kept = {image.reference: image.slots for image in self._state.kept.images()}
        for reference, pinned in kept.items():
            images.setdefault(reference, set()).update(pinned)
        report: list[dict[str, object]] = []
        for reference, slots in sorted(images.items()):
            mine = [by_slot[slot] for slot in sorted(slots) if slot in by_slot]
            going = [layer for layer in mine if layer.standing <= Standing.IDLE]
            report.append(
                {
                    "reference": reference,
                    "layers": len(mine),
                    "size": _size(mine) + sum(metadata.get(layer.slot, 0) for layer in mine),
                    "reclaimable": _size(going),
                    "pinned": reference in kept,
                }
            )
        return report

    def _removal(self, step: Step, references: Mapping[int, list[str]]) -> dict[str, object]:
        orphaned = step.slot == NO_LAYER
        return {
            "digest": "" if orphaned else self._digest(step.slot),
            "references": references.get(step.slot, []),
            "standing": _WITHOUT_LAYER if orphaned else step.standing.word,
            "size": step.size,
        }


def _size(layers: Iterable[LayerFacts]) -> int:
    return sum(layer.size for layer in layers)
