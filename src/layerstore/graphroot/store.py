"""A graph root as a whole: what `podman images`, `podman pull` and `podman rmi` work on.

Several processes, ours and Podman's, work on it at once.  Locks are taken in the
order that all tools keep: ``storage.lock``, ``layers.lock``, ``images.lock``,
``containers.lock``, and never held while something is downloaded or extracted:
layers are made in a staging directory and only renamed under the lock.

Additional image stores are other graph roots whose layers and images can be used
and are never changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Self, TypeVar

from layerstore.errors import (
    ConfigError,
    CorruptStorage,
    InUse,
    StorageError,
    UnknownObject,
)
from layerstore.formats import Compression
from layerstore.graphroot import als, atomic, bigdata
from layerstore.graphroot.containers import Container, ContainerArea
from layerstore.graphroot.images import (
    NO_SIGNATURES,
    Image,
    ImageArea,
    ImageEdit,
    check_documents,
    check_names,
    check_replaceable,
    creation_time,
    resolve,
    signature_items,
    with_names,
)
from layerstore.graphroot.layers import Addition, Layer, LayerArea
from layerstore.graphroot.lockfile import LockFile
from layerstore.graphroot.offers import AlsOffer
from layerstore.graphroot.overlay import RootAttributes, inherited_from, refuse_other_driver
from layerstore.graphroot.published import Published
from layerstore.graphroot.records import (
    ImageRecord,
    LayerRecord,
    now,
)
from layerstore.graphroot.staged import DIFF, TAR_SPLIT, StagedLayer
from layerstore.graphroot.staging import Staging, TempDirectory, remove_stale
from layerstore.graphroot.storageconf import StorageConfig
from layerstore.graphroot.whiteouts import WhiteoutStyle, in_user_namespace
from layerstore.image import Digest

if TYPE_CHECKING:
    from layerstore.graphroot.deletion import Removed

COMPRESSION_NUMBERS: Final = {Compression.NONE: 0, Compression.GZIP: 2, Compression.ZSTD: 4}

_Found = TypeVar("_Found", Layer, Container)


class Store:
    """One graph root with its additional image stores.  Threads may share it."""

    def __init__(self, config: StorageConfig, *, read_only: bool = False) -> None:
        """Use ``open``; this makes and checks nothing."""
        self.config: Final = config
        self.read_only: Final = read_only
        root, run = config.graph_root, config.run_root
        others = [
            (
                LayerArea(path, run, read_only=True, additional=True),
                ImageArea(path, read_only=True, additional=True),
            )
            for path in config.additional_image_stores
        ]
        self.layer_area: Final = LayerArea(
            root, run, read_only=read_only, others=tuple(layers for layers, _ in others)
        )
        self.image_area: Final = ImageArea(root, read_only=read_only)
        self.container_area: Final = ContainerArea(root, read_only=read_only)
        self.layer_areas: Final = (self.layer_area, *(layers for layers, _ in others))
        self.published: Published | None = Published.of(root)
        self.image_areas: Final = (self.image_area, *(images for _, images in others))

    @classmethod
    def open(cls, config: StorageConfig | None = None, *, read_only: bool = False) -> Self:
        """The storage of this machine, or the one ``config`` describes.

        Unless ``read_only``, directories that are missing are made, and what dead
        processes staged is removed.  Raises ``ConfigError``, ``StorageError``.
        """
        config = config or StorageConfig.from_system()
        config.check()
        refuse_other_driver(config.graph_root)
        for path in config.additional_image_stores:
            with atomic.storage_errors(path):
                found = path.is_dir()
            if not found:
                raise ConfigError("the additional image store is no directory", subject=str(path))
        store = cls(config, read_only=read_only)
        if not read_only:
            store._prepare()
        return store

    def _prepare(self) -> None:
        root, run = self.config.graph_root, self.config.run_root
        try:
            root.mkdir(0o700, parents=True, exist_ok=True)
            run.mkdir(0o700, parents=True, exist_ok=True)
            with LockFile.at(root / "storage.lock").writing():
                self.layer_area.overlay.prepare(mount_program=bool(self.config.mount_program))
                for path in (
                    self.layer_area.directory,
                    self.image_area.directory,
                    self.container_area.directory,
                    run / "overlay",
                    self.layer_area.run_directory,
                ):
                    path.mkdir(0o700, exist_ok=True)
            remove_stale(self.layer_area.overlay.tempdirs)
        except OSError as error:
            raise StorageError(
                f"the storage cannot be prepared: {error.strerror}", subject=str(error.filename)
            ) from error

    @property
    def mounts_by_program(self) -> bool:
        """Whether a program (fuse-overlayfs) makes the mounts of this graph root."""
        return bool(self.config.mount_program) or self.layer_area.overlay.has_mount_program

    @property
    def whiteouts(self) -> WhiteoutStyle:
        """How layers of this graph root note down deletions."""
        if self.mounts_by_program:
            return WhiteoutStyle.AUFS
        rootless = self.config.rootless or in_user_namespace()
        return WhiteoutStyle.USERXATTR if rootless else WhiteoutStyle.OVERLAY

    # -- layers ----------------------------------------------------------------

    def layers(self) -> list[Layer]:
        """All complete layers, those of the graph root itself first."""
        found: dict[str, Layer] = {}
        for area in self.layer_areas:
            for record in area.records():
                found.setdefault(record.id, Layer(record, area))
        return list(found.values())

    def layer(self, text: str) -> Layer:
        """The layer of this id, name, or beginning of an id; raises ``UnknownObject``."""
        return _find(self.layers(), text, "layer")

    def layer_chain(self, top: str) -> list[Layer]:
        """A layer and all below it, the base first; raises ``CorruptStorage``."""
        known = {layer.id: layer for layer in self.layers()}
        chain: list[Layer] = []
        while top:
            layer = known.pop(top, None)
            if layer is None:
                raise CorruptStorage("a layer of the image is missing", subject=top)
            chain.append(layer)
            top = layer.parent
        return chain[::-1]

    def layers_by_diff_id(self, digest: Digest, *, lazy: bool = False) -> list[Layer]:
        """Layers whose uncompressed tar stream is known to have this digest.

        What an additional layer store says about its layers is not known; with
        ``lazy`` such layers are given too.
        """
        return self._layers_by(lambda record: record.diff_digest == digest, lazy)

    def layers_by_blob_digest(self, digest: Digest, *, lazy: bool = False) -> list[Layer]:
        """Layers that came as the blob with this digest; see ``layers_by_diff_id``."""
        return self._layers_by(lambda record: record.compressed_diff_digest == digest, lazy)

    def layers_by_toc_digest(self, digest: Digest) -> list[Layer]:
        """Layers whose table of contents has this digest, lazy ones included."""
        return self._layers_by(lambda record: record.toc_digest == digest, lazy=True)

    def _layers_by(self, test: Callable[[LayerRecord], bool], lazy: bool) -> list[Layer]:
        return [
            layer for layer in self.layers() if test(layer.record) and (lazy or not layer.is_lazy)
        ]

    def staging(self) -> Staging:
        """Private directories to extract layers into, removed when the context is left."""
        self._want_writable()
        return TempDirectory(self.layer_area.overlay.tempdirs)

    def put_layer(
        self,
        layer_id: str,
        parent: str,
        staged: StagedLayer,
        *,
        names: Sequence[str] = (),
        toc_digest: Digest | None = None,
    ) -> Layer:
        """Make ``staged``, which was verified, a layer on ``parent`` ("" for none).

        If there is a layer of this id already, it is given and ``staged`` left alone.
        Raises ``UnknownObject`` if the parent is gone, ``StagingLost`` if what was
        staged is.
        """
        record = LayerRecord(
            id=layer_id,
            names=tuple(names),
            parent=parent,
            created=now(),
            compressed_diff_digest=staged.blob_digest,
            compressed_size=staged.blob_size,
            diff_digest=staged.diff_id,
            diff_size=staged.diff_size,
            toc_digest=toc_digest,
            compression=COMPRESSION_NUMBERS[staged.compression],
            uids=staged.uids,
            gids=staged.gids,
        )
        tar_split = staged.directory / TAR_SPLIT
        addition = Addition(
            record,
            self._root_attributes(parent),
            content=staged.directory / DIFF,
            own_attributes=staged.root_entry,
            tar_split=tar_split if tar_split.exists() else None,
        )
        ((layer, _),) = self._insert([addition])
        return layer

    def put_als_layers(self, parent: str, offers: Sequence[AlsOffer]) -> list[Layer]:
        """Make layers that additional layer stores have, each on the one before.

        Ends with the first that is there already and is another layer under this id, so that
        fewer may come back.  Either all others are made or, with ``StorageError``, none.
        Takes counts of its own: those of the lookups stay the caller's.
        """
        additions: list[Addition] = []
        attributes, below = self._root_attributes(parent), parent
        for offer in offers:
            path = offer.found.path
            additions.append(Addition(offer.record(below), attributes, additional=path))
            attributes, below = inherited_from(path / "diff", offer.layer_id), offer.layer_id
        layers: list[tuple[Layer, bool]] = []
        for offer in offers:
            offer.found.use()
        try:
            layers = self._insert(additions)
        finally:
            made = {number for number, (_, new) in enumerate(layers) if new}
            for number, offer in enumerate(offers):
                if number not in made:
                    als.release_path(offer.found.path)
        return [layer for layer, _ in layers]

    def _insert(self, additions: Sequence[Addition]) -> list[tuple[Layer, bool]]:
        """The layers, and whether they are new."""
        self._want_writable()
        if self.config.sync == "filesystem":
            self.layer_area.overlay.sync()
        with self.layer_area.editing() as edit:
            known = {layer.id: layer for layer in self._foreign_layers()}
            known |= {kept.id: Layer(kept, self.layer_area) for kept in edit.records}
            layers: list[tuple[Layer, bool]] = []
            new: list[Addition] = []
            for addition in additions:
                record = addition.record
                if record.id in known:
                    layers.append((known[record.id], False))
                    if addition.is_like(known[record.id].record):
                        continue
                    break
                if record.parent and record.parent not in known:
                    raise _no_layer(record.parent)
                known[record.id] = Layer(record, self.layer_area)
                layers.append((known[record.id], True))
                new.append(addition)
            edit.add(*new)
        return layers

    def _root_attributes(self, parent: str) -> RootAttributes:
        try:
            return self.layer_area.overlay.root_attributes(parent)
        except StorageError:
            if self.layer_area.overlay.directory(parent).is_dir():
                raise
            raise _no_layer(parent) from None

    def _foreign_layers(self) -> list[Layer]:
        return [Layer(record, area) for area in self.layer_areas[1:] for record in area.records()]

    def delete_layer(self, layer_id: str) -> None:
        """Delete one layer; raises ``InUse`` if anything needs it, ``UnknownObject``."""
        self._want_writable()
        if self.published is not None and layer_id in self.published.needed(self.layer_area):
            raise InUse("a client of this image store needs it", subject=layer_id)
        from layerstore.graphroot import deletion  # noqa: PLC0415 - pulls delete nothing

        deletion.delete_layer(self.layer_area, self.image_area, self.container_area, layer_id)

    # -- images ----------------------------------------------------------------

    def images(self) -> list[Image]:
        """All images, those of the graph root itself first."""
        found: dict[str, Image] = {}
        taken: set[str] = set()
        for area in self.image_areas:
            records = area.records()
            for record in records:
                image = Image(record, area, self)
                first = found.setdefault(record.id, image)
                if first is not image:
                    found[record.id] = first.completed(image, taken)
            taken.update(name for record in records for name in record.names)
        return list(found.values())

    def image(self, text: str) -> Image:
        """The image of this name, digest or id, as ``images.resolve`` understands it."""
        return resolve(self.images(), text)[0]

    def put_image(
        self,
        *,
        image_id: str,
        layer: str,
        names: Sequence[str],
        manifest: bytes,
        manifest_type: str = "",
        config: bytes,
        index: bytes | None = None,
        created: str = "",
        signatures: Sequence[bytes] = (),
        replace: bool = False,
    ) -> Image:
        """Make an image of ``layer`` ("" for none) and its stored documents.

        ``names`` are full references; they leave other images.  ``index`` is the one
        through which the manifest was chosen, ``manifest_type`` the media type it was
        served as.  An image of this id keeps its names and
        gets these in front; if it has another manifest, ``InUse`` is raised unless
        ``replace``, and if it has another top layer, in any case.  Raises
        ``UnknownObject`` if the layer is gone.
        """
        self._want_writable()
        check_names(names)
        check_documents(manifest, manifest_type, config)
        digest = bigdata.manifest_digest(manifest)
        documents = [index] if index is not None and index != manifest else []
        items = [(str(Digest.of(config)), config)]
        items += [(f"{bigdata.MANIFEST}-{Digest.of(found)}", found) for found in documents]
        items += [(f"{bigdata.MANIFEST}-{digest}", manifest), (bigdata.MANIFEST, manifest)]
        metadata, signed = signature_items(digest, signatures)
        new = ImageRecord(
            id=image_id,
            digest=Digest.of(documents[0]) if documents else digest,
            layer=layer,
            created=creation_time(created),
            metadata=metadata,
        )
        with self.layer_area.table.lock.reading():
            # Whoever deletes layers holds this lock for writing, so the layer stays.
            if layer and layer not in {found.id for found in self.layers()}:
                raise _no_layer(layer)
            return self._put_image(new, digest, names, [*items, *signed], replace)

    def _put_image(
        self,
        new: ImageRecord,
        manifest: Digest,
        names: Sequence[str],
        items: Sequence[tuple[str, bytes]],
        replace: bool,
    ) -> Image:
        with self.image_area.editing() as edit:
            record = edit.get(new.id)
            if record is None:
                edit.clear_directory(new.id)
                record = new
            else:
                check_replaceable(record, new.layer, manifest, replace)
                changed = record.manifest_digest != manifest
                if changed or new.metadata != NO_SIGNATURES:
                    record = dataclasses.replace(record, metadata=new.metadata)
                if changed or record.digest is None:
                    record = dataclasses.replace(record, digest=new.digest)
            record = with_names(edit.write(record, items), [*names, *record.names])
            edit.put(record)
            edit.save()
        return Image(record, self.image_area, self)

    def set_names(self, image_id: str, names: Sequence[str]) -> Image:
        """Call an image ``names`` and nothing else; see ``add_names``."""
        return self._rename(image_id, lambda _: names)

    def add_names(self, image_id: str, names: Sequence[str]) -> Image:
        """Give more names, full references, to an image; they leave other images.

        An image of an additional image store gets a record in the graph root itself.
        """
        return self._rename(image_id, lambda old: [*names, *old])

    def remove_names(self, image_id: str, names: Sequence[str]) -> Image:
        """Take names away from an image; those it does not have are no error."""
        return self._rename(image_id, lambda old: [name for name in old if name not in names])

    def _rename(self, image_id: str, change: Callable[[tuple[str, ...]], Sequence[str]]) -> Image:
        self._want_writable()
        with self.image_area.editing() as edit:
            record = edit.get(image_id) or self._pull_up(edit, image_id)
            names = change(record.names)
            check_names(names, known=record.names)
            record = with_names(record, names)
            edit.put(record)
            edit.save()
        return Image(record, self.image_area, self)

    def _pull_up(self, edit: ImageEdit, image_id: str) -> ImageRecord:
        for area in self.image_areas[1:]:
            for record in area.records():
                if record.id == image_id:
                    image = Image(record, area, self)
                    edit.clear_directory(image_id)
                    items = [(key, image.big_data(key)) for key in record.big_data_names]
                    return edit.write(record, items)
        raise UnknownObject("no such image", subject=image_id)

    def remove_image(self, name_or_id: str, *, force: bool = False) -> Removed:
        """What `podman rmi` does.

        One of several names is only taken away.  Otherwise the image goes, with the
        layers that nothing else needs, and with the nameless images that it was
        built from.  Raises ``InUse`` if a container was made from it,
        if it has several names and was called by its id or digest (unless ``force``), or
        if it belongs to an additional image store; ``UnknownObject``.
        """
        self._want_writable()
        images = self.images()
        image, name = resolve(images, name_or_id)
        if image.read_only:
            raise InUse("the image belongs to a read-only store", subject=name_or_id)
        from layerstore.graphroot import deletion  # noqa: PLC0415

        return deletion.remove_with_parents(self, images, image, name, force=force)

    def prune(self, *, all_images: bool = False) -> list[Removed]:
        """Delete images that no container uses and that have neither names nor children.

        With ``all_images`` names and children do not save them.
        """
        self._want_writable()
        from layerstore.graphroot import deletion  # noqa: PLC0415

        return deletion.prune(self, all_images=all_images)

    # -- containers ------------------------------------------------------------

    def containers(self) -> list[Container]:
        """All containers, the volatile ones included."""
        return [Container(record, self.container_area) for record in self.container_area.records()]

    def container(self, text: str) -> Container:
        """The container of this id, name, or beginning of an id; raises ``UnknownObject``."""
        return _find(self.containers(), text, "container")

    def _want_writable(self) -> None:
        if self.read_only:
            raise StorageError(
                "the storage was opened for reading", subject=str(self.config.graph_root)
            )


def _find(things: Sequence[_Found], text: str, kind: str) -> _Found:
    for thing in things:
        if thing.id == text:
            return thing
    for thing in things:
        if text in thing.names:
            return thing
    matching = [thing for thing in things if text and thing.id.startswith(text)]
    if len(matching) > 1:
        raise UnknownObject(f"{len(matching)} {kind}s have ids that begin so", subject=text)
    if not matching:
        raise UnknownObject(f"no such {kind}", subject=text)
    return matching[0]


def _no_layer(layer: str) -> UnknownObject:
    return UnknownObject("the layer does not exist, or no more", subject=layer)
