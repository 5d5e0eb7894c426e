"""What to do for each layer of an image that is to come into a graph root.

``reuse`` has the rules; here the storage and the layer stores are asked.  Nothing is written,
and no lock is held for longer than a look into the records.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import msgspec
from msgspec.structs import replace

from layerstore.copy.chosen import ChosenImage
from layerstore.copy.intostorage import IntoStorage
from layerstore.copy.reuse import (
    How,
    WantedLayer,
    in_place,
    in_place_by_toc,
    in_place_by_word,
    proven_diff_id,
)
from layerstore.errors import CorruptStorage, StorageError
from layerstore.graphroot.als import AlsLayer, LayerStores, read_info
from layerstore.graphroot.images import Image
from layerstore.graphroot.layers import Layer
from layerstore.graphroot.store import Store
from layerstore.image import Digest, Reference

_log = logging.getLogger(__name__)
OLD_PODMAN: Final = (
    "are not asked: the Podman of this machine fails on layers that are known by their TOC"
)


class Plan(msgspec.Struct, frozen=True):
    """How a layer is to be had: ``layer`` is one in the storage, ``found`` in a layer store."""

    wanted: WantedLayer
    how: How
    layer: Layer | None = None
    found: AlsLayer | None = None
    twin: bool = False  # its content is that of a layer further down


class Planner:
    """Plans for one image.  Layers found in ``stores`` are held by those until they are closed.

    ``refused`` says of which layers the stores were not asked, and why.
    """

    def __init__(
        self,
        store: Store,
        reference: Reference | None,
        image: ChosenImage,
        stores: LayerStores,
        options: IntoStorage,
    ) -> None:
        """``reference`` is the logical name that the layer stores know the image by."""
        self._store = store
        self._reference = reference
        self._image = image
        self._stores = stores
        self._options = options
        self.refused: tuple[str, ...] = ()

    def plan(self) -> list[Plan]:
        """What to do for each layer, as things stand now."""
        known = _Known(self._store)
        wanted = self._image.layers
        for image in self._store.images():
            if self._image.manifest.digest == image.digest:
                whole = self._whole(image)
                if whole is not None:
                    return whole
        plans: list[Plan] = []
        parent: str | None = ""
        for one in wanted:
            there = None if parent is None else self._in_place(known, parent, one)
            if there is None:
                break
            plans.append(there)
            parent = there.layer.id if there.layer is not None else None
        rest = wanted[len(plans) :]
        offers = self._offers([one for one in rest if not known.with_content(one.diff_id)], plans)
        pulled: set[Digest] = set()
        for one in rest:
            plan = self._elsewhere(known, one, offers.get(one.index))
            if plan.how is How.PULLED:
                if one.diff_id in pulled:
                    plan = replace(plan, twin=True)
                pulled.add(one.diff_id)
            plans.append(plan)
        return plans

    def _whole(self, image: Image) -> list[Plan] | None:
        """The layers of an image of the same manifest, if each is what it should be."""
        plans: list[Plan] = []
        below = ""
        try:
            chain = image.layers()
            if len(chain) != len(self._image.layers):
                return None
            for wanted, layer in zip(self._image.layers, chain, strict=True):
                plan = self._is(layer, below, wanted)
                if plan is None:
                    return None
                plans.append(plan)
                below = layer.id
        except CorruptStorage as error:
            _log.warning("image %s is not used: %s", image.id, error)
            return None
        return plans

    def _is(self, layer: Layer, parent: str, wanted: WantedLayer) -> Plan | None:
        """A layer of the storage on ``parent``, if it is the wanted one."""
        record = layer.record
        if in_place(record, parent, wanted.diff_id, lazy=layer.is_lazy):
            return Plan(wanted, How.SHARED, layer)
        if wanted.toc is not None and in_place_by_toc(record, parent, wanted.toc):
            return (
                Plan(wanted, How.TOC, layer) if alive(layer, self._options.lookup_seconds) else None
            )
        if self._options.dialect_l and in_place_by_word(record, parent, wanted):
            return (
                Plan(wanted, How.SHARED, layer)
                if alive(layer, self._options.lookup_seconds)
                else None
            )
        return None

    def _in_place(self, known: _Known, parent: str, wanted: WantedLayer) -> Plan | None:
        """The layer in the storage that is the wanted one already."""
        found = [self._is(layer, parent, wanted) for layer in known.on(parent)]
        plans = [plan for plan in found if plan is not None]
        return min(plans, key=lambda plan: plan.how is How.TOC, default=None)

    def _offers(self, wanted: list[WantedLayer], plans: list[Plan]) -> dict[int, AlsLayer]:
        """What the layer stores have, asked at once; each directory once in an image."""
        if not self._stores:
            return {}
        by_toc = [one for one in wanted if one.toc is not None]
        if by_toc and not self._options.toc_layers:
            self.refused = tuple(f"{one.descriptor.digest}: {OLD_PODMAN}" for one in by_toc)
            by_toc = []
        asked = wanted if self._options.dialect_l else by_toc
        if not asked:
            return {}
        with ThreadPoolExecutor(min(len(asked), self._options.parallel), "lookup") as pool:
            found = list(pool.map(self._offer, asked))
        used = {plan.layer.additional_layer for plan in plans if plan.layer is not None}
        offers: dict[int, AlsLayer] = {}
        for one, layer in zip(asked, found, strict=True):
            if layer is None:
                continue
            if layer.path in used:
                # An overlay cannot have the same directory twice.
                layer.release()
                continue
            used.add(layer.path)
            offers[one.index] = layer
        return offers

    def _offer(self, wanted: WantedLayer) -> AlsLayer | None:
        reference = self._reference
        found = None
        if wanted.toc is not None and self._options.toc_layers:
            found = self._stores.find_by_toc(reference, wanted.toc)
        if found is None and self._options.dialect_l:
            found = self._stores.find_by_blob(reference, wanted.descriptor.digest)
            if found is not None and found.facts.diff_digest != wanted.diff_id:
                found.release()
                found = None
        return found

    def _elsewhere(self, known: _Known, wanted: WantedLayer, offer: AlsLayer | None) -> Plan:
        layer = known.with_content(wanted.diff_id)
        if layer is not None:
            return Plan(wanted, How.LOCAL, layer)
        if offer is not None:
            return Plan(wanted, How.ALS, found=offer)
        return Plan(wanted, How.PULLED)


def alive(layer: Layer, seconds: float) -> bool:
    """Whether a layer's content can be reached: its layer store may be gone."""
    try:
        additional = layer.additional_layer
        if additional is not None:
            read_info(additional, seconds=seconds)
    except (OSError, StorageError) as error:
        _log.warning("layer %s is not used: %s", layer.id, error)
        return False
    return True


class _Known:
    """The layers of the storage, for one question after the other."""

    def __init__(self, store: Store) -> None:
        self._on: dict[str, list[Layer]] = {}
        self._content: dict[Digest, list[Layer]] = {}
        for layer in store.layers():
            self._on.setdefault(layer.parent, []).append(layer)
            if layer.record.diff_digest is not None:
                self._content.setdefault(layer.record.diff_digest, []).append(layer)

    def on(self, parent: str) -> list[Layer]:
        """The layers directly on ``parent``."""
        return self._on.get(parent, [])

    def with_content(self, diff_id: Digest) -> Layer | None:
        """A layer whose content was checked against ``diff_id``."""
        for layer in self._content.get(diff_id, []):
            if proven_diff_id(layer.record, lazy=layer.is_lazy) == diff_id:
                return layer
        return None
