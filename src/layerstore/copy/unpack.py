"""Filling a static layer store with the layers of images.

Each layer is fetched once, extracted, verified as a whole and given its names.  What is there
already stays, so that further images, or a newer one under the same tag, cost what is new
in them; names that are there are never taken away.  See ``layerstore.copy.staticstore``.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from layerstore.copy.chosen import Check, ChosenImage, choose_image
from layerstore.copy.context import CopyContext
from layerstore.copy.copyimage import machine_policy
from layerstore.copy.names import TRANSPORTS, open_source
from layerstore.copy.progress import ALREADY_EXISTS, PullListener, Quiet
from layerstore.copy.reuse import WantedLayer
from layerstore.copy.staticrepeats import Repeats, repeated_names
from layerstore.copy.staticstore import LayerFile, StaticStore, require_diff_id
from layerstore.copy.transport import ImageSource
from layerstore.errors import ContentError, NotFound, UnsupportedFormat, UsageError
from layerstore.image import Digest, Platform, Reference
from layerstore.registry import FetchedManifest

WAITING: Final = "Waiting for another run on the same directory..."
_REPEATED: Final = "an image has the layer more than once"
_JOBS: Final = 3


@dataclass(frozen=True, slots=True)
class UnpackOptions:
    """How to unpack.

    ``platforms`` are those of an index; empty means this machine's.  ``with_reference``: the
    names get the reference level.  ``jobs`` layers are under way at once.
    """

    platforms: tuple[Platform, ...] = ()
    with_reference: bool = False
    jobs: int = _JOBS


@dataclass(frozen=True, slots=True)
class UnpackedLayer:
    """One layer of an image and how it can be found now.

    ``toc_digest`` is its name in dialect T; where it has none although the image announces
    one, ``no_toc`` says why.  One that is ``left out`` has no name, because an image has it more
    than once (``layerstore.copy.staticrepeats``): clients pull it.
    """

    digest: Digest
    size: int
    diff_id: Digest
    how: Literal["unpacked", "exists", "left out"]
    toc_digest: str | None
    no_toc: str = ""


@dataclass(frozen=True, slots=True)
class UnpackedImage:
    """The image of one platform; ``layers`` from the lowest."""

    platform: Platform
    digest: Digest
    layers: tuple[UnpackedLayer, ...]


@dataclass(frozen=True, slots=True)
class UnpackResult:
    """What is in the store now; ``digest`` is that of the manifest or index named."""

    reference: Reference | None
    digest: Digest
    images: tuple[UnpackedImage, ...]


def unpack(
    name: str,
    directory: Path,
    options: UnpackOptions | None = None,
    ctx: CopyContext | None = None,
) -> UnpackResult:
    """Put the layers of the image ``name`` into the static store ``directory``.

    ``name`` is a reference or ``TRANSPORT:NAME``.  Raises ``PolicyRejected`` for an image that
    policy.json does not accept, and what ``unpack_image`` does.
    """
    ctx = ctx or CopyContext()
    policy = machine_policy(ctx)
    with_transport = name.partition(":")[0] in TRANSPORTS
    source = open_source(name if with_transport else f"docker://{name}", ctx)

    def check(found: FetchedManifest) -> None:
        signed = policy.needs_signatures(source.transport, source.identity)
        signatures = source.signatures(found.digest) if signed else ()
        policy.check(source.transport, source.identity, found.raw, signatures)

    try:
        return unpack_image(source, directory, options, ctx.listener, check=check)
    finally:
        source.close()


def unpack_image(
    source: ImageSource,
    directory: Path,
    options: UnpackOptions | None = None,
    listener: PullListener | None = None,
    *,
    check: Check = lambda _: None,
) -> UnpackResult:
    """Do what ``unpack`` does with an image that is open; the directory is made if missing.

    ``check`` may refuse a manifest.  Layers that are complete are published even if a later
    one fails.

    Raises ``UsageError`` for a source without the reference that ``with_reference`` needs, for a
    directory with other contents, and for an image that repeats a layer which the store offers
    already; ``VerificationError`` and ``InvalidLayer`` for a layer that is not what the image
    says, ``StorageError``, and the errors of the source.
    """
    options = options or UnpackOptions()
    listener = listener or Quiet()
    reference = source.reference if options.with_reference else None
    if options.with_reference and reference is None:
        raise UsageError(
            "an image from there has no reference, which the store would be asked with",
            advice="unpack it without the reference level",
        )
    images = _images(source, options.platforms, check)
    store = StaticStore(directory)
    with store.writing(lambda: listener.message(WAITING)):
        repeats = Repeats(store, reference)
        repeats.add(name for image in images for name in repeated_names(image.layers))
        work = _Work(source, store, reference, repeats, listener)
        with ThreadPoolExecutor(max(1, options.jobs), "unpack") as pool:
            try:
                done = [work.image(image, pool) for image in images]
            except BaseException:
                work.stop()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    top = images[0].index or images[0].manifest
    return UnpackResult(source.reference, top.digest, tuple(done))


def _images(source: ImageSource, platforms: Sequence[Platform], check: Check) -> list[ChosenImage]:
    """One image for each platform, each only once."""
    images: dict[Digest, ChosenImage] = {}
    for platform in platforms or (Platform.host(),):
        image = choose_image(source, platform, check)
        there = image.config.platform
        if platforms and there.os and not platform.matches(there):
            raise NotFound(f"no image for the platform {platform}", advice=f"there is: {there}")
        images.setdefault(image.manifest.digest, image)
    return list(images.values())


class _Stopped(Exception):
    """Another layer failed."""


class _Work:
    def __init__(
        self,
        source: ImageSource,
        store: StaticStore,
        reference: Reference | None,
        repeats: Repeats,
        listener: PullListener,
    ) -> None:
        self._source = source
        self._store = store
        self._reference = reference
        self._repeats = repeats
        self._listener = listener
        self._under_way: dict[Digest, Future[tuple[LayerFile, bool]]] = {}
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Let no layer go on."""
        self._stopped.set()

    def image(self, image: ChosenImage, pool: ThreadPoolExecutor) -> UnpackedImage:
        for layer in image.layers:
            digest = layer.descriptor.digest
            if digest not in self._under_way and self._may_have_name(layer):
                self._under_way[digest] = pool.submit(self._fetch, layer)
        layers = tuple([self._named(layer) for layer in image.layers])
        return UnpackedImage(image.config.platform, image.manifest.digest, layers)

    def _fetch(self, layer: WantedLayer) -> tuple[LayerFile, bool]:
        """The layer's record, and whether it had to be fetched."""
        descriptor = layer.descriptor
        there = self._store.layer(descriptor.digest)
        if there is not None:
            self._listener.skipped(descriptor.digest, ALREADY_EXISTS)
            return there, False
        if not self._source.gives_blob(descriptor.digest):
            raise UnsupportedFormat(
                "the source has the layer's files but no longer its blob",
                subject=descriptor.digest,
                advice="unpack the image from where it came from",
            )
        with (
            self._listener.copying("blob", descriptor.digest, descriptor.size) as item,
            self._source.open_blob(descriptor.digest, descriptor.size) as blob,
        ):

            def progress(count: int) -> None:
                if self._stopped.is_set():
                    raise _Stopped
                item.advance(count)

            return self._store.add_layer(descriptor, layer.diff_id, blob, progress), True

    def _may_have_name(self, layer: WantedLayer) -> bool:
        names = filter(None, (layer.descriptor.digest, layer.toc))
        return not all(map(self._repeats.has, names))

    def _named(self, layer: WantedLayer) -> UnpackedLayer:
        digest = layer.descriptor.digest
        if not self._may_have_name(layer):
            self._listener.message(f"Layer {digest} is left out, clients pull it: {_REPEATED}")
            return UnpackedLayer(digest, layer.descriptor.size, layer.diff_id, "left out", None)
        record, fetched = self._under_way[digest].result()
        require_diff_id(record, layer.diff_id)
        toc, reason = None, ""
        try:
            record, toc = self._store.add_toc(record, layer.descriptor.annotations)
        except ContentError as error:
            reason = str(error)
        if toc is not None and self._repeats.has(toc):
            toc, reason = None, _REPEATED
        if reason:
            self._listener.message(f"Layer {digest} is not offered by its TOC: {reason}")
        for name in filter(None, (digest, toc)):
            if not self._repeats.has(name):
                self._store.add_name(record, self._reference, name)
        return UnpackedLayer(
            digest=digest,
            size=record.size,
            diff_id=layer.diff_id,
            how="unpacked" if fetched else "exists",
            toc_digest=toc,
            no_toc=reason,
        )
