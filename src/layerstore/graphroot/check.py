"""What is wrong with a graph root: records, files and contents against each other.

Looking changes nothing; ``layerstore.graphroot.fsck`` repairs.  The quick part is done under
the read locks of layers, images and containers, in that order, so that what others are in the
middle of is never taken for damage.  The full part reads every ordinary layer and compares
its files with its archive (``contents``), without a lock.

Kinds are stable words.  They come in three weights: *damage* (something does not work),
*leftover* (it only takes room) and *notice* (nothing to repair here).
"""

from __future__ import annotations

import contextlib
import enum
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from layerstore.errors import CorruptStorage, LayerstoreError, StorageError, UsageError
from layerstore.graphroot import atomic, bigdata
from layerstore.graphroot.contents import layer_contents
from layerstore.graphroot.extract import ExtractOptions
from layerstore.graphroot.layers import Layer
from layerstore.graphroot.mountpoints import MountPoints
from layerstore.graphroot.overlay import additional_layer_of
from layerstore.graphroot.records import ContainerRecord, ImageRecord, LayerRecord
from layerstore.graphroot.store import Store
from layerstore.graphroot.whiteouts import in_user_namespace

_HEX: Final = re.compile(r"[0-9a-f]{64}")
_TAR_SPLIT: Final = ".tar-split.gz"


class Weight(enum.StrEnum):
    """How bad a finding is."""

    DAMAGE = "damage"
    LEFTOVER = "leftover"
    NOTICE = "notice"


class Kind(enum.StrEnum):
    """What can be wrong; the value is what is printed."""

    LAYER_MISSING = "layer-missing"
    LAYER_INCOMPLETE = "layer-incomplete"
    LAYER_CONTENT = "layer-content-missing"
    LAYER_CHANGED = "layer-changed"
    LAYER_UNREADABLE = "layer-unreadable"
    LAYER_ARCHIVE = "layer-archive-lost"
    LAYER_LOWER = "layer-lower-wrong"
    LAYER_LINK = "layer-link-lost"
    LAYER_STORE = "layer-store-unreachable"
    LAYER_UNUSED = "layer-unused"
    IMAGE_DATA = "image-data-damaged"
    DUPLICATE_NAME = "duplicate-name"
    CONTAINER_LAYER = "container-layer-missing"
    ORPHAN_DIRECTORY = "orphan-directory"
    ORPHAN_FILE = "orphan-file"
    MOUNT = "mount-of-no-layer"


_WEIGHTS: Final = {
    Kind.LAYER_ARCHIVE: Weight.NOTICE,
    Kind.LAYER_STORE: Weight.NOTICE,
    Kind.LAYER_UNUSED: Weight.NOTICE,
    Kind.LAYER_INCOMPLETE: Weight.LEFTOVER,
    Kind.ORPHAN_DIRECTORY: Weight.LEFTOVER,
    Kind.ORPHAN_FILE: Weight.LEFTOVER,
    Kind.MOUNT: Weight.LEFTOVER,
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    ``subject`` is the id of the layer, image or container, or a path; ``users`` are the
    images and containers that need it.  ``repaired`` says what was done about it, "" for
    nothing.
    """

    kind: Kind
    subject: str
    detail: str
    users: tuple[str, ...] = ()
    repaired: str = ""

    @property
    def weight(self) -> Weight:
        """How bad it is."""
        return _WEIGHTS.get(self.kind, Weight.DAMAGE)

    def with_repair(self, done: str) -> Finding:
        """The finding after something was done about it."""
        return replace(self, repaired=done)


@dataclass(frozen=True, slots=True)
class Report:
    """Everything found, and how much was looked at."""

    layers: int
    images: int
    containers: int
    findings: tuple[Finding, ...]

    @property
    def remaining(self) -> tuple[Finding, ...]:
        """What is still wrong; notices are not."""
        return tuple(
            found
            for found in self.findings
            if found.weight is not Weight.NOTICE and not found.repaired
        )


@dataclass(slots=True)
class _View:
    """The records of one moment."""

    store: Store
    layers: Mapping[str, LayerRecord]
    images: tuple[ImageRecord, ...]
    containers: tuple[ContainerRecord, ...]
    elsewhere: frozenset[str]  # layers of additional image stores
    findings: list[Finding] = field(default_factory=list)

    def add(self, kind: Kind, subject: str, detail: str, users: tuple[str, ...] = ()) -> None:
        self.findings.append(Finding(kind, subject, detail, users))

    def has_layer(self, layer: str) -> bool:
        return layer in self.layers or layer in self.elsewhere


Advance = Callable[[str, int, int], None]


def check(store: Store, *, full: bool = False, advance: Advance | None = None) -> Report:
    """Look at the whole graph root; ``advance(layer, number, count)`` tells of the full part.

    Raises ``CorruptStorage`` when one of the tables cannot be read at all, ``StorageError``.
    """
    with atomic.storage_errors(store.config.graph_root):
        return _check(store, full, advance)


def _check(store: Store, full: bool, advance: Advance | None) -> Report:
    elsewhere = frozenset(record.id for area in store.layer_areas[1:] for record in area.records())
    with _locked(store):
        written = store.layer_area.table.load_as_written()
        images = store.image_area.table.load_as_written()
        containers = store.container_area.table.load_as_written()
        view = _View(
            store, {record.id: record for record in written}, images, containers, elsewhere
        )
        for rule in _RULES:
            rule(view)
    if full:
        _contents(view, advance)
    return Report(len(view.layers), len(images), len(containers), tuple(view.findings))


@contextlib.contextmanager
def _locked(store: Store) -> Iterator[None]:
    with (
        store.layer_area.table.lock.reading(),
        store.image_area.table.lock.reading(),
        store.container_area.table.lock.reading(),
    ):
        yield


# -- rules: each looks at one kind of thing ----------------------------------------------


def _names(view: _View) -> None:
    for table in (view.layers.values(), view.images, view.containers):
        seen: dict[str, str] = {}
        for record in table:
            for name in record.names:
                if name in seen:
                    detail = f"the name {name!r} belongs to {seen[name]}, too"
                    view.add(Kind.DUPLICATE_NAME, record.id, detail)
                seen[name] = record.id


def _references(view: _View) -> None:
    """Whoever names a layer: children, images, containers."""
    wanted: dict[str, list[str]] = {}
    for layer in view.layers.values():
        if layer.parent and not view.has_layer(layer.parent):
            wanted.setdefault(layer.parent, []).append(f"layer {layer.id}")
    for image in view.images:
        for top in (image.layer, *image.mapped_layers):
            if top and not view.has_layer(top):
                wanted.setdefault(top, []).append(f"image {image.id}")
    for layer_id, users in wanted.items():
        view.add(Kind.LAYER_MISSING, layer_id, f"{users[0]} needs it", tuple(users))
    for container in view.containers:
        if container.layer and not view.has_layer(container.layer):
            view.add(
                Kind.CONTAINER_LAYER, container.id, f"its layer {container.layer} is not there"
            )
    used = {layer.parent for layer in view.layers.values()}
    used.update(top for image in view.images for top in (image.layer, *image.mapped_layers))
    used.update(container.layer for container in view.containers)
    for layer in view.layers.values():
        if layer.id not in used and not layer.incomplete:
            view.add(Kind.LAYER_UNUSED, layer.id, "no image, container or layer needs it")


def _directories(view: _View) -> None:
    overlay = view.store.layer_area.overlay
    for record in view.layers.values():
        if record.incomplete:
            view.add(Kind.LAYER_INCOMPLETE, record.id, "its making or removal was interrupted")
            continue
        directory = overlay.home / record.id
        if not os.path.lexists(directory / "diff"):
            view.add(Kind.LAYER_CONTENT, record.id, "its directory has no diff")
            continue
        _directory(view, record, directory)
    known = view.layers.keys()
    for name in overlay.layers():
        if name not in known:
            view.add(Kind.ORPHAN_DIRECTORY, name, f"{overlay.home / name} has no record")


def _directory(view: _View, record: LayerRecord, directory: Path) -> None:
    overlay = view.store.layer_area.overlay
    try:
        additional = additional_layer_of(directory)
    except CorruptStorage as error:
        view.add(Kind.LAYER_CONTENT, record.id, error.what)
        return
    try:
        if additional is not None:
            target = os.readlink(directory / "diff")
            if target != str(additional / "diff"):
                view.add(Kind.LAYER_CONTENT, record.id, f"diff leads to {target}")
                return
            if not os.path.isdir(target):
                view.add(Kind.LAYER_STORE, record.id, f"{target} cannot be reached now")
        elif (directory / "diff").is_symlink() or not (directory / "diff").is_dir():
            view.add(Kind.LAYER_CONTENT, record.id, "diff is no directory")
            return
        elif _came_as_an_archive(record) and view.store.layer_area.tar_split(record.id) is None:
            view.add(Kind.LAYER_CHANGED, record.id, "its tar-split is lost")
        name = (directory / "link").read_text("ascii")
        short = overlay.home / "l" / name
        if not short.is_symlink() or os.readlink(short) != f"../{record.id}/diff":
            view.add(Kind.LAYER_LINK, record.id, f"{short} does not lead to it")
        if record.parent and view.has_layer(record.parent):
            parent_link = (overlay.directory(record.parent) / "link").read_text("ascii")
            if overlay.lower(record.id) != (f"l/{parent_link}", *overlay.lower(record.parent)):
                view.add(Kind.LAYER_LOWER, record.id, "lower is not that of the layers below")
    except FileNotFoundError as error:
        view.add(Kind.LAYER_LINK, record.id, f"{error.filename} is missing")
    except CorruptStorage as error:
        view.add(Kind.LAYER_LOWER, record.id, str(error))
    except (OSError, UnicodeDecodeError) as error:
        view.add(Kind.LAYER_CONTENT, record.id, f"its directory cannot be read: {error}")


def _came_as_an_archive(record: LayerRecord) -> bool:
    """Whether a tar-split was made; partial pulls of containers/storage may go without."""
    partial = any("chunked" in key for key in record.big_data_names)
    return record.diff_digest is not None and record.toc_digest is None and not partial


def _files(view: _View) -> None:
    """Tar-split files and big data directories without a record."""
    for directory, known in (
        (view.store.layer_area.directory, view.layers.keys()),
        (view.store.image_area.directory, {image.id for image in view.images}),
    ):
        for name in sorted(_listed(directory)):
            owner = name.removesuffix(_TAR_SPLIT)
            if _HEX.fullmatch(owner) and owner not in known:
                view.add(Kind.ORPHAN_FILE, str(directory / name), "has no record")


def _listed(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def _images(view: _View) -> None:
    for image in view.images:
        directory = view.store.image_area.image_directory(image.id)
        for key in image.big_data_names:
            problem = image_data_problem(directory, image, key)
            if problem:
                view.add(Kind.IMAGE_DATA, image.id, f"{key}: {problem}")
        if image.layer and lacks_manifest(view.store, image):
            view.add(Kind.IMAGE_DATA, image.id, "it has no manifest")


def lacks_manifest(store: Store, image: ImageRecord) -> bool:
    """Whether nobody has the manifest of ``image``: it may be in an additional image store."""
    return bigdata.MANIFEST not in image.big_data_names and not any(
        record.id == image.id for area in store.image_areas[1:] for record in area.records()
    )


def image_data_problem(directory: Path, image: ImageRecord, key: str) -> str:
    """What is wrong with one big data item of an image, "" for nothing."""
    try:
        data = bigdata.read(directory, key)
    except (LayerstoreError, UsageError) as error:
        return str(error)
    size = image.big_data_sizes.get(key)
    if size is not None and size != len(data):
        return f"has {len(data)} bytes, the record says {size}"
    digest = image.big_data_digests.get(key)
    if digest is not None and bigdata.digest_of(key, data) != digest:
        return f"is not {digest}, as the record says"
    return ""


def _mounts(view: _View) -> None:
    area = view.store.layer_area
    points = MountPoints(area.run_directory, read_only=area.read_only)
    with points.lock.reading():
        for point in points.load():
            if not view.has_layer(point.id):
                view.add(Kind.MOUNT, point.id, f"counted as mounted at {point.path}")


_RULES: Final = (_names, _references, _directories, _files, _images, _mounts)


# -- contents ------------------------------------------------------------------------------

# What was found of a layer, or of one below it, so that its files prove nothing.
_NOT_TO_BE_READ: Final = frozenset(
    (Kind.LAYER_CONTENT, Kind.LAYER_CHANGED, Kind.LAYER_LOWER, Kind.LAYER_LINK)
)


def _contents(view: _View, advance: Advance | None) -> None:
    broken = {found.subject for found in view.findings if found.kind in _NOT_TO_BE_READ}
    area = view.store.layer_area
    records = [
        record
        for record in view.layers.values()
        if record.diff_digest is not None and not record.incomplete and record.id not in broken
    ]
    options = ExtractOptions(
        view.store.whiteouts, view.store.config.ignore_chown_errors, in_user_namespace()
    )
    for number, record in enumerate(records, 1):
        layer = Layer(record, area)
        if advance is not None:
            advance(record.id, number, len(records))
        if layer.is_lazy or area.tar_split(record.id) is None:
            continue  # its store verifies what it serves; nothing tells what else was in there
        kind, problem = _content_problem(layer, options)
        if problem and any(record == still for still in area.table.snapshot()):
            view.add(kind, record.id, problem)


def _content_problem(layer: Layer, options: ExtractOptions) -> tuple[Kind, str]:
    """What is wrong with the files of a layer, "" for nothing."""
    try:
        found = layer_contents(layer, options)
    except StorageError as error:
        if error.subject != str(layer.diff_path):
            raise  # the place for temporary files fails all layers
        return Kind.LAYER_UNREADABLE, error.what
    if found.changed or not found.lost:
        return Kind.LAYER_CHANGED, found.changed
    return Kind.LAYER_ARCHIVE, f"its archive cannot be put together again: {found.lost}"
