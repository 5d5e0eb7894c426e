"""Mending what ``check`` found, the gentlest way first.

Interrupted work is cleared away, lost layer records and short links are made again, manifests
are restored from their second copy.  What cannot be restored is removed, as ``podman system
check --repair`` does, so that a pull can bring it back: a damaged layer with everything that
stands on it, and the images made of it.  Nothing that a container needs is ever removed; such
findings stay, and name the container.

A directory without a record may belong to a layer that another process holds in memory only
(containers/storage >= 1.58, in the middle of a pull).  Those of additional layer stores are
therefore removed only after ``limits.ORPHAN_SECONDS``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from layerstore import limits
from layerstore.errors import CorruptStorage, LayerstoreError
from layerstore.graphroot import bigdata, check, repair
from layerstore.graphroot.check import Advance, Finding, Kind, Report
from layerstore.graphroot.layers import LayerEdit
from layerstore.graphroot.mountpoints import MountPoints
from layerstore.graphroot.overlay import additional_layer_of
from layerstore.graphroot.records import ContainerRecord, ImageRecord
from layerstore.graphroot.removal import remove_tree
from layerstore.graphroot.staging import TempDirectory
from layerstore.graphroot.store import Store

_BROKEN: Final = frozenset((Kind.LAYER_MISSING, Kind.LAYER_CONTENT, Kind.LAYER_CHANGED))


def repair_storage(store: Store, *, full: bool = False, advance: Advance | None = None) -> Report:
    """Check and mend; the findings say what was done, and what is left.

    Raises ``CorruptStorage`` when one of the tables cannot be read at all: those are for a
    person to restore.
    """
    made = _creations(store)
    before = check.check(store, full=full, advance=advance)
    work = _Repair(store, before.findings, made)
    for step in (
        work.incomplete,
        work.lost_records,
        work.links,
        work.lowers,
        work.image_data,
        work.broken,
        work.names,
        work.mounts,
        work.orphans,
    ):
        step()
    after = check.check(store)
    still = {(found.kind, found.subject, found.detail) for found in after.findings}
    findings = [
        found
        if not found.repaired or (found.kind, found.subject, found.detail) not in still
        else found.with_repair("")
        for found in work.findings
    ]
    seen = {(found.kind, found.subject, found.detail) for found in findings}
    findings += [
        found
        for found in after.findings
        if (found.kind, found.subject, found.detail) not in seen and not _is_news(found)
    ]
    return Report(after.layers, after.images, after.containers, tuple(findings))


def _is_news(found: Finding) -> bool:
    """What a repair itself may leave behind is nothing to report."""
    return found.weight is check.Weight.NOTICE


def _creations(store: Store) -> Mapping[str, str]:
    return {record.id: record.created for record in store.layer_area.table.snapshot()}


class _Repair:
    """``made`` says when each layer was made that the check may have looked at."""

    def __init__(self, store: Store, findings: Iterable[Finding], made: Mapping[str, str]) -> None:
        self.store = store
        self.made = made
        self.findings = list(findings)
        self.rebuilt: set[str] = set()

    def _each(self, *kinds: Kind) -> list[tuple[int, Finding]]:
        return [
            (number, found)
            for number, found in enumerate(self.findings)
            if found.kind in kinds and not found.repaired
        ]

    def _done(self, number: int, what: str) -> None:
        self.findings[number] = self.findings[number].with_repair(what)

    # -- the gentle ones -----------------------------------------------------------------

    def incomplete(self) -> None:
        """Whoever takes the write lock clears interrupted layers away."""
        found = self._each(Kind.LAYER_INCOMPLETE)
        if found:
            with self.store.layer_area.editing():
                pass
        for number, _ in found:
            self._done(number, "removed")

    def lost_records(self) -> None:
        """Make the records again that newer containers/storage forgets."""
        if not self._each(Kind.LAYER_MISSING):
            return
        for image in repair.needs_rebuilding(self.store.images(), self.store.layer_areas):
            try:
                self.rebuilt.update(repair.rebuild_image(self.store.layer_areas, image))
            except LayerstoreError as error:
                self.findings.append(Finding(Kind.LAYER_MISSING, image.top_layer, str(error)))
        for number, found in self._each(Kind.LAYER_MISSING, Kind.ORPHAN_DIRECTORY):
            if found.subject in self.rebuilt:
                self._done(number, "its record was made again")

    def links(self) -> None:
        """Make short links and ``link`` files agree."""
        found = self._each(Kind.LAYER_LINK)
        if not found:
            return
        with self.store.layer_area.editing() as edit:
            overlay = self.store.layer_area.overlay
            overlay.recreate_links()
            for number, each in found:
                with contextlib.suppress(CorruptStorage):
                    if edit.get(each.subject) is not None:
                        overlay.link(each.subject)
                        self._done(number, "made again")

    def lowers(self) -> None:
        """Write ``lower`` as the layers below make it, the lowest layers first.

        Of all layers: what is mended below is news to everything above.
        """
        found = {each.subject: number for number, each in self._each(Kind.LAYER_LOWER)}
        if not found and not self.rebuilt:
            return
        overlay = self.store.layer_area.overlay
        with self.store.layer_area.editing() as edit:
            for layer in _parents_first(edit):
                record = edit.get(layer)
                if record is None or not record.parent or not overlay.exists(layer):
                    continue
                with contextlib.suppress(CorruptStorage):
                    if overlay.mend_lower(layer, record.parent) and layer in found:
                        self._done(found[layer], "written anew")

    def image_data(self) -> None:
        """Restore a manifest from its copy; correct sizes of items whose digest is right."""
        area = self.store.image_area
        found = self._each(Kind.IMAGE_DATA)
        for number, each in found:
            with area.editing() as edit:
                record = edit.get(each.subject)
                if record is None:
                    continue
                mended = _mended(area.image_directory(record.id), record)
                if mended is not None:
                    edit.put(mended)
                    edit.save()
                    self._done(number, "restored from its copy")

    def names(self) -> None:
        """Write the tables, which have each name once when they are loaded."""
        found = self._each(Kind.DUPLICATE_NAME)
        if not found:
            return
        with self.store.layer_area.editing() as layers:
            layers.save()
        with self.store.image_area.editing() as images:
            images.save()
        containers = self.store.container_area.table
        with containers.lock.writing():
            containers.save(containers.load())
        for number, _ in found:
            self._done(number, "left to the last one that has it")

    def mounts(self) -> None:
        """Forget mounts of layers that are gone."""
        found = {each.subject: number for number, each in self._each(Kind.MOUNT)}
        if not found:
            return
        points = MountPoints(self.store.layer_area.run_directory)
        with self.store.layer_area.table.lock.writing(), points.lock.writing():
            points.save([point for point in points.load() if point.id not in found])
        for number in found.values():
            self._done(number, "forgotten")

    # -- removal ---------------------------------------------------------------------------

    def broken(self) -> None:
        """Remove layers that cannot be restored, with what stands on them."""
        broken = {each.subject for _, each in self._each(*_BROKEN)}
        damaged = {each.subject for _, each in self._each(Kind.IMAGE_DATA)}
        if not broken and not damaged:
            return
        images_area, containers = self.store.image_area, self.store.container_area.table
        with (
            self.store.layer_area.editing() as layers,
            images_area.editing() as images,
            containers.lock.reading(),
        ):
            broken = {one for one in broken if self._is_broken(layers, one)}
            damaged = {one for one in damaged if self._is_damaged(images.get(one))}
            doomed = _with_children(layers, broken)
            lost = {
                image.id
                for image in images.records
                if image.id in damaged or doomed.intersection((image.layer, *image.mapped_layers))
            }
            needed = _needed(containers.load(), layers, images.records)
            kept_layers, kept_images = _closure(needed, doomed, lost, layers, images.records)
            for image in sorted(lost - kept_images):
                images.delete(image)
            layers.delete(_children_first(layers, doomed - kept_layers))
        for number, each in self._each(*_BROKEN, Kind.IMAGE_DATA):
            users = needed.get(each.subject, ())
            if each.subject in kept_layers | kept_images:
                self.findings[number] = Finding(
                    each.kind,
                    each.subject,
                    f"{each.detail}; kept for container {users[0]}" if users else each.detail,
                    users,
                )
            elif each.subject in lost:
                self._done(number, "image removed: pull it again")
            elif each.subject not in broken:
                self._done(number, "meanwhile others replaced it")
            else:
                self._done(number, "removed with the images made of it: pull them again")

    def _is_broken(self, layers: LayerEdit, layer: str) -> bool:
        """Whether a layer that was found broken before the lock still is.

        Others may have removed it since then, and pulled it again.
        """
        record = layers.get(layer)
        if record is None:
            return all(
                record.id != layer
                for area in self.store.layer_areas[1:]
                for record in area.records()
            )
        return self.made.get(layer) == record.created

    def _is_damaged(self, image: ImageRecord | None) -> bool:
        if image is None:
            return False
        directory = self.store.image_area.image_directory(image.id)
        problems = (check.image_data_problem(directory, image, key) for key in image.big_data_names)
        return check.lacks_manifest(self.store, image) or any(problems)

    def orphans(self) -> None:
        """Remove directories and files that no record knows."""
        overlay = self.store.layer_area.overlay
        oldest = time.time() - limits.ORPHAN_SECONDS
        with (
            TempDirectory(overlay.tempdirs) as bin_,
            self.store.layer_area.editing() as layers,
            self.store.image_area.editing() as images,
        ):
            for number, each in self._each(Kind.ORPHAN_DIRECTORY):
                directory = overlay.home / each.subject
                if layers.get(each.subject) is not None:
                    continue
                with contextlib.suppress(OSError, CorruptStorage):
                    young = directory.lstat().st_mtime > oldest
                    if additional_layer_of(directory) is not None and young:
                        continue
                overlay.detach(each.subject, bin_)
                self._done(number, "removed")
            for number, each in self._each(Kind.ORPHAN_FILE):
                owner = Path(each.subject).name.partition(".")[0]
                if layers.get(owner) is None and images.get(owner) is None:
                    remove_tree(Path(each.subject))
                    self._done(number, "removed")


def _parents_first(edit: LayerEdit) -> list[str]:
    order: list[str] = []
    placed: set[str] = set()
    records = {record.id: record for record in edit.records}
    for start in records:
        way: list[str] = []
        layer = start
        while layer in records and layer not in placed and layer not in way:
            way.append(layer)
            layer = records[layer].parent
        order += way[::-1]
        placed.update(way)
    return order


def _children_first(edit: LayerEdit, layers: set[str]) -> list[str]:
    return [layer for layer in reversed(_parents_first(edit)) if layer in layers]


def _with_children(edit: LayerEdit, layers: set[str]) -> set[str]:
    """``layers`` and everything that stands on them."""
    found = set(layers)
    for layer in _parents_first(edit):
        record = edit.get(layer)
        if record is not None and record.parent in found:
            found.add(layer)
    return found


def _needed(
    containers: Iterable[ContainerRecord], layers: LayerEdit, images: Iterable[ImageRecord]
) -> Mapping[str, tuple[str, ...]]:
    """For each layer and image the containers that need it."""
    needed: dict[str, tuple[str, ...]] = {}
    tops = {image.id: (image.layer, *image.mapped_layers) for image in images}
    for container in containers:
        name = container.names[0] if container.names else container.id
        for start in (container.layer, *tops.get(container.image, ())):
            layer, seen = start, set[str]()
            while layer and layer not in seen:
                seen.add(layer)
                needed[layer] = (*needed.get(layer, ()), name)
                record = layers.get(layer)
                layer = record.parent if record is not None else ""
        if container.image:
            needed[container.image] = (*needed.get(container.image, ()), name)
    return {key: tuple(dict.fromkeys(names)) for key, names in needed.items()}


def _closure(
    needed: Mapping[str, tuple[str, ...]],
    doomed: set[str],
    lost: set[str],
    layers: LayerEdit,
    images: Iterable[ImageRecord],
) -> tuple[set[str], set[str]]:
    """The layers and images that stay for the sake of containers.

    A broken layer under a container's stays with all that stands on it, and the images of
    what stays stay as well.
    """
    kept = {layer for layer in doomed if layer in needed}
    kept_images = {image for image in lost if image in needed}
    for image in images:
        if image.id in kept_images:
            kept.update(_below(layers, (image.layer, *image.mapped_layers)) & doomed)
    return kept, kept_images


def _below(layers: LayerEdit, tops: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for top in tops:
        layer = top
        while layer and layer not in found:
            found.add(layer)
            record = layers.get(layer)
            layer = record.parent if record is not None else ""
    return found


def _mended(directory: Path, image: ImageRecord) -> ImageRecord | None:
    """The record after its items were restored where a copy proves what they were."""
    copies = (bigdata.MANIFEST, f"{bigdata.MANIFEST}-{image.manifest_digest}")
    manifest = _intact(directory, copies, str(image.manifest_digest))
    listed = bigdata.BigData.of(image)
    for key in image.big_data_names:
        if not check.image_data_problem(directory, image, key):
            continue
        # An item whose key is the digest of its bytes proves itself, whatever the record says.
        wanted = key.removeprefix(f"{bigdata.MANIFEST}-")
        data = manifest if key in copies else _intact(directory, (key,), wanted)
        if data is None:
            return None
        bigdata.write(directory, key, data)
        listed = listed.with_item(key, data)
    return listed.put_into(image)


def _intact(directory: Path, keys: Iterable[str], wanted: str) -> bytes | None:
    """The first of the items that has the digest ``wanted``."""
    for key in keys:
        with contextlib.suppress(LayerstoreError, OSError):
            data = bigdata.read(directory, key)
            if bigdata.digest_of(key, data) == wanted:
                return data
    return None
