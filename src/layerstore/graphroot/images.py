"""``overlay-images``: the images of one graph root.

An image is a record in ``images.json`` that names its top layer, and big data
in the directory of its id: its config (key: the config's digest), its manifest
(``manifest``, and again under ``manifest-<digest>``), the index through which it
was chosen (``manifest-<digest>``), and signatures (``signatures`` and
``signature-<hex of the manifest>``: the blobs one after the other, their sizes
in the record's metadata).

A name belongs to one image at most: giving it to one takes it from the others.

Source: containers/image, storage/storage_dest.go; containers/storage, images.go.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from layerstore.errors import (
    CorruptStorage,
    InUse,
    InvalidManifest,
    InvalidReference,
    LayerstoreError,
    UnknownObject,
    UsageError,
)
from layerstore.graphroot import atomic, bigdata
from layerstore.graphroot.gone import unless_gone
from layerstore.graphroot.overlay import checked_component
from layerstore.graphroot.records import ZERO_TIME, ImageRecord, dumps, now, parse_time, same_time
from layerstore.graphroot.removal import remove_tree
from layerstore.graphroot.table import Table
from layerstore.image import Digest, ImageConfig, Index, Manifest, Reference, parse_config
from layerstore.image import parse_manifest as parse_any_manifest

if TYPE_CHECKING:
    from layerstore.graphroot.layers import Layer
    from layerstore.graphroot.store import Store

MANIFEST: Final = bigdata.MANIFEST
SIGNATURES: Final = "signatures"
NO_SIGNATURES: Final = "{}"
_ID: Final = re.compile(r"[0-9a-f]{64}")


class ImageArea:
    """The images of one graph root: its own, or those of an ``additional`` image store."""

    def __init__(
        self, graph_root: Path, *, read_only: bool = False, additional: bool = False
    ) -> None:
        self.directory: Final = graph_root / "overlay-images"
        self.read_only: Final = read_only
        self.additional: Final = additional
        self.table: Final = Table(self.directory, "images", ImageRecord, read_only=read_only)
        self._swept = False

    def records(self) -> tuple[ImageRecord, ...]:
        """The images at this moment."""
        return self.table.snapshot()

    def image_directory(self, image: str) -> Path:
        """Where the big data of the image lie."""
        return self.directory / checked_component(image)

    @contextlib.contextmanager
    def editing(self) -> Iterator[ImageEdit]:
        """Hold the write lock and change images; not to be nested."""
        with atomic.storage_errors(self.directory), self.table.lock.writing():
            edit = ImageEdit(self)
            if not self._swept:
                edit.sweep()
                self._swept = True
            try:
                yield edit
            except BaseException:
                # The disk may be full: big data without a record must not stay.
                with contextlib.suppress(LayerstoreError):
                    saved = ImageEdit(self)
                    for image in edit.touched:
                        saved.clear_directory(image)
                raise


class ImageEdit:
    """The images while the write lock is held; made by ``ImageArea.editing``."""

    def __init__(self, area: ImageArea) -> None:
        self.area: Final = area
        self._records: Final = {record.id: record for record in area.table.load()}
        self.touched: Final[set[str]] = set()  # whose big data were written or removed

    @property
    def records(self) -> tuple[ImageRecord, ...]:
        """All images as they are now, the oldest first."""
        return tuple(self._records.values())

    def get(self, image: str) -> ImageRecord | None:
        """The record of ``image``."""
        return self._records.get(image)

    def write(self, record: ImageRecord, items: Iterable[tuple[str, bytes]]) -> ImageRecord:
        """Store big data of an image, before its record says so; the record that says so."""
        listed = bigdata.BigData.of(record)
        self.touched.add(record.id)
        for key, data in items:
            bigdata.write(self.area.image_directory(record.id), key, data)
            listed = listed.with_item(key, data)
        return listed.put_into(record)

    def put(self, record: ImageRecord) -> None:
        """Add a record or replace that of the same id; its names leave other images."""
        taken = set(record.names)
        for other in self.records:
            if other.id != record.id and taken.intersection(other.names):
                kept = tuple(name for name in other.names if name not in taken)
                self._records[other.id] = replace(other, names=kept)
        self._records[record.id] = record

    def delete(self, image: str) -> None:
        """Remove the record, then the big data."""
        if self._records.pop(image, None) is not None:
            self.touched.add(image)
            self.save()
            remove_tree(self.area.image_directory(image))

    def clear_directory(self, image: str) -> None:
        """Remove big data that a crash left without a record."""
        if image not in self._records:
            remove_tree(self.area.image_directory(image))

    def sweep(self) -> None:
        """Remove temporary files, and the directories of all images that have no record.

        Everybody writes both under the lock, so these are what a crash left.  Without
        any record nothing is removed: then it may be the table that was lost.
        """
        atomic.sweep(self.area.directory)
        if not self._records:
            return
        with contextlib.suppress(OSError), os.scandir(self.area.directory) as entries:
            for entry in entries:
                if _ID.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                    self.clear_directory(entry.name)

    def save(self) -> None:
        """Write the records down."""
        self.area.table.save(self.records)


def with_names(record: ImageRecord, names: Sequence[str]) -> ImageRecord:
    """``record`` called ``names`` and nothing else; those that are new go into its history."""
    unique = tuple(dict.fromkeys(names))
    fresh = [name for name in unique if name not in record.names_history]
    return replace(record, names=unique, names_history=(*fresh, *record.names_history))


def check_names(names: Sequence[str], known: Sequence[str] = ()) -> None:
    """Raise ``UsageError`` unless all ``names`` are full references or ``known``."""
    for name in names:
        if name in known:
            continue
        try:
            full = str(Reference.parse(name))
        except InvalidReference as error:
            raise UsageError(
                f"cannot be the name of an image: {error.what}", subject=name
            ) from None
        if full != name:
            raise UsageError(f"is no full name of an image, {full} would be", subject=name)


def check_documents(manifest: bytes, manifest_type: str, config: bytes) -> None:
    """Raise ``InvalidManifest`` or ``VerificationError`` unless ``config`` is the manifest's."""
    parsed = parse_any_manifest(manifest, manifest_type or None)
    if isinstance(parsed, Index):
        raise InvalidManifest("the manifest of an image is an index")
    parsed.config.digest.verify(config, subject="config of the image")


def check_replaceable(old: ImageRecord, layer: str, digest: Digest, replace: bool) -> None:
    """Raise ``InUse`` if ``old`` is another image than this one; see ``Store.put_image``."""
    if old.layer != layer:
        raise InUse("an image of this id has another top layer", subject=old.id)
    if old.manifest_digest != digest and not replace:
        raise InUse(
            f"an image of this id has another manifest, {old.manifest_digest}", subject=old.id
        )


def creation_time(text: str) -> str:
    """What a config says about its time of creation, as a record wants it: as it is.

    For none, or Go's zero time, it is the present (containers/storage, images.go, "create").
    """
    written = same_time(text)
    if written is None or parse_time(written) == parse_time(ZERO_TIME):
        return now()
    return written


def signature_items(
    manifest: Digest, signatures: Sequence[bytes]
) -> tuple[str, list[tuple[str, bytes]]]:
    """The record's metadata, and the big data, for the signatures of a manifest."""
    if not signatures:
        return NO_SIGNATURES, []
    sizes = [len(signature) for signature in signatures]
    joined = b"".join(signatures)
    metadata = dumps({"signature-sizes": sizes, "signatures-sizes": {manifest: sizes}}).decode()
    return metadata, [(SIGNATURES, joined), (f"signature-{manifest.hex}", joined)]


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One step of an image's making, as its config tells it."""

    created: str
    created_by: str
    comment: str
    author: str
    empty_layer: bool
    layer: Layer | None
    """The layer that the step added, if it is there."""


@dataclass(frozen=True, slots=True)
class Image:
    """One image as it was when it was asked for."""

    record: ImageRecord
    area: ImageArea = field(repr=False, compare=False)
    store: Store = field(repr=False, compare=False)
    lender: ImageArea | None = field(default=None, repr=False, compare=False)
    """The additional image store whose big data these are; None: those of ``area``."""

    def completed(self, other: Image, taken: Collection[str]) -> Image:
        """With the big data of the same image in an additional image store, if it has none.

        Podman up to 4 names an image of such a store by a record without big data and without
        the names that it has there.  It keeps those of them that are not ``taken`` by others.
        """
        if MANIFEST in self.record.big_data_names or self.lender is not None:
            return self
        names = (*self.names, *(name for name in other.names if name not in taken))
        record = replace(
            self.record,
            names=tuple(dict.fromkeys(names)),
            digest=self.record.digest or other.record.digest,
            metadata=other.record.metadata,
        )
        record = bigdata.BigData.of(other.record).put_into(record)
        return Image(record, self.area, self.store, other.area)

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def names(self) -> tuple[str, ...]:
        """Its full names, ``host/path:tag`` or ``host/path@digest``."""
        return self.record.names

    @property
    def digest(self) -> Digest | None:
        """The digest that it is listed with: its manifest's or, as Podman does, its index's."""
        return self.record.digest

    @property
    def manifest_digest(self) -> Digest | None:
        """The digest of its manifest."""
        return self.record.manifest_digest

    @property
    def digests(self) -> tuple[Digest, ...]:
        """All digests it can be asked for by: its manifest's and an index's."""
        return self.record.digests

    @property
    def created(self) -> str:
        """When it was built, RFC 3339."""
        return self.record.created

    @property
    def top_layer(self) -> str:
        """The id of its top layer, "" if it has none."""
        return self.record.layer

    @property
    def read_only(self) -> bool:
        """Whether it belongs to an additional image store."""
        return self.area.additional

    @unless_gone
    def big_data(self, key: str) -> bytes:
        """One item of its big data; raises ``CorruptStorage`` if it is not there."""
        if key not in self.record.big_data_names:
            raise CorruptStorage(f"the image has no {key!r}", subject=self.id)
        return bigdata.read((self.lender or self.area).image_directory(self.id), key)

    def manifest(self) -> bytes:
        """The manifest, verified against its digest."""
        digest = self.manifest_digest
        if digest is None:
            return self.big_data(MANIFEST)
        key = f"{MANIFEST}-{digest}"
        raw = self.big_data(key if key in self.record.big_data_names else MANIFEST)
        if bigdata.manifest_digest(raw) != digest:
            raise CorruptStorage("the manifest is not the one of the record", subject=self.id)
        return raw

    def parsed_manifest(self) -> Manifest:
        """The manifest, read; raises ``InvalidManifest``."""
        found = parse_any_manifest(self.manifest())
        if isinstance(found, Index):
            raise InvalidManifest("the manifest of an image is an index", subject=self.id)
        return found

    def index(self, digest: Digest) -> bytes:
        """The manifest or index stored under ``digest``, verified."""
        raw = self.big_data(f"{MANIFEST}-{digest}")
        digest.verify(raw, subject=f"manifest of image {self.id}")
        return raw

    def config(self) -> bytes:
        """The config, verified against the digest in the manifest."""
        digest = self.parsed_manifest().config.digest
        raw = self.big_data(str(digest))
        digest.verify(raw, subject=f"config of image {self.id}")
        return raw

    def parsed_config(self) -> ImageConfig:
        """The config, read."""
        return parse_config(self.config())

    def signatures(self) -> tuple[bytes, ...]:
        """The signatures of the manifest, as they were stored."""
        try:
            metadata = json.loads(self.record.metadata or "{}")
            digest = self.manifest_digest
            sizes = metadata.get("signatures-sizes", {}).get(str(digest)) or []
            key = f"signature-{digest.hex}" if digest and sizes else SIGNATURES
            sizes = sizes or metadata.get("signature-sizes") or []
            counts = [int(size) for size in sizes]
        except (ValueError, AttributeError, TypeError) as error:
            raise CorruptStorage("the metadata are damaged", subject=self.id) from error
        if not counts:
            return ()
        joined = self.big_data(key)
        if sum(counts) != len(joined) or min(counts) < 0:
            raise CorruptStorage("the signatures have other sizes", subject=self.id)
        found = []
        for size in counts:
            found.append(joined[:size])
            joined = joined[size:]
        return tuple(found)

    @unless_gone
    def layers(self) -> list[Layer]:
        """Its layers, the base first; raises ``CorruptStorage`` if one is missing."""
        return self.store.layer_chain(self.top_layer) if self.top_layer else []

    def size(self) -> int:
        """Bytes of its layers (uncompressed) and big data, as ``podman images`` counts them."""
        sizes = sum(layer.size() for layer in self.layers())
        return sizes + sum(self.record.big_data_sizes.values())

    def history(self) -> list[HistoryEntry]:
        """How it was made, the oldest step first; empty where the config does not tell."""
        try:
            document = json.loads(self.config())
            steps: list[dict[str, Any]] = [step or {} for step in document.get("history") or []]
            layers = iter(self.layers())
            found = []
            for step in steps:
                empty = step.get("empty_layer") is True
                found.append(
                    HistoryEntry(
                        created=str(step.get("created") or ""),
                        created_by=str(step.get("created_by") or ""),
                        comment=str(step.get("comment") or ""),
                        author=str(step.get("author") or ""),
                        empty_layer=empty,
                        layer=None if empty else next(layers, None),
                    )
                )
        except (ValueError, AttributeError, TypeError) as error:
            raise CorruptStorage("the config is damaged", subject=self.id) from error
        return found


def resolve(images: Sequence[Image], text: str) -> tuple[Image, str]:
    """The image that ``text`` means, and the name of it that was meant, "" for none.

    In order: a full id (``sha256:`` may stand before it); a name as it is; a name
    completed with ``localhost/`` or ``docker.io``; a repository with a digest; a
    digest; a short name that only one image's name ends with; the beginning of an
    id.  Images that come first in ``images`` (those of the graph root itself) win
    over equal ones of other stores.  Raises ``UnknownObject`` for none and several.
    """
    if not text:
        raise UnknownObject("an empty name means no image")
    bare = text.removeprefix("sha256:")
    for image in images:
        if image.id == bare:
            return image, ""
    names = [text, f"localhost/{text}", f"localhost/{text}:latest"]
    reference = _reference(text)
    if reference is not None:
        names.append(str(reference))
    for name in names:
        for image in images:
            if name in image.names:
                return image, name
    found = _by_digest(images, text, reference)
    if found is not None:
        return found, ""
    if reference is not None and reference.digest is None:
        short = _by_short_name(images, text)
        if short is not None:
            return short
    matching = {image.id: image for image in reversed(images) if image.id.startswith(bare)}
    if len(matching) > 1:
        raise UnknownObject(f"{len(matching)} images have ids that begin so", subject=text)
    if not matching:
        raise UnknownObject("no such image", subject=text)
    return next(iter(matching.values())), ""


def _by_digest(images: Sequence[Image], text: str, reference: Reference | None) -> Image | None:
    if text.startswith("sha256:"):
        return next((image for image in images if text in image.digests), None)
    if reference is None or reference.digest is None:
        return None
    short = f"/{text.partition('@')[0]}"
    for image in images:
        repositories = [_repository(name) for name in image.names]
        if reference.digest in image.digests and any(
            found == reference.name or found.endswith(short) for found in repositories
        ):
            return image
    return None


def _by_short_name(images: Sequence[Image], text: str) -> tuple[Image, str] | None:
    first = text.partition("/")[0]
    if "/" in text and ("." in first or ":" in first or first == "localhost"):
        return None  # it has a registry
    end = "/" + (text if ":" in text else f"{text}:latest")
    found = {
        name: image for image in reversed(images) for name in image.names if name.endswith(end)
    }
    if len({image.id for image in found.values()}) > 1:
        names = ", ".join(sorted(found))
        raise UnknownObject(f"the short name means several images: {names}", subject=text)
    return next(((image, name) for name, image in found.items()), None)


def _reference(text: str) -> Reference | None:
    try:
        return Reference.parse(text)
    except InvalidReference:
        return None


def _repository(name: str) -> str:
    reference = _reference(name)
    return reference.name if reference is not None else ""
