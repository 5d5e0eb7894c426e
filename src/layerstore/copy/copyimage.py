"""Copy an image from one place to another.

What the destination can take is copied as it is, byte for byte, and keeps its digests.
What it cannot take is changed as little as possible: layers unpacked or packed, the
manifest put into the words of the destination.  Layers move in parallel; config and
manifests follow when all of them are there, so that a name never stands for half an image.
"""

from __future__ import annotations

import contextlib
import enum
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from layerstore import limits
from layerstore.copy import progress
from layerstore.copy.chosen import choose_manifest
from layerstore.copy.context import CopyContext
from layerstore.copy.copylayer import LayerCopier, LayerPlan
from layerstore.copy.manifestedit import (
    CopiedLayer,
    Family,
    edit_index,
    edit_manifest,
    is_image,
)
from layerstore.copy.names import (
    STORAGE,
    open_destination,
    open_source,
    open_storage,
    parse_image_name,
)
from layerstore.copy.policy import Policy
from layerstore.copy.recompress import LEVELS, Form
from layerstore.copy.storage_destination import IntoStorage, pull_into
from layerstore.copy.storage_source import split_id
from layerstore.copy.transport import ImageDestination, ImageSource
from layerstore.errors import (
    InvalidManifest,
    LimitExceeded,
    UnsupportedFormat,
    UsageError,
)
from layerstore.formats import Compression
from layerstore.image import (
    Descriptor,
    Digest,
    Index,
    Manifest,
    Platform,
    Reference,
    media_types,
    parse_config,
    parse_manifest,
)
from layerstore.registry import FetchedManifest


class Platforms(enum.Enum):
    """What is copied of an image for several platforms."""

    SYSTEM = "system"
    """The image for one platform."""
    ALL = "all"
    """The index and all its images."""
    INDEX_ONLY = "index-only"
    """The index alone: its images are at the destination already."""


@dataclass(frozen=True, slots=True)
class CopyOptions:
    """How to copy.

    ``format`` is what the manifest shall be, ``compression`` what the layers shall be, of
    that ``level``; with ``force_compression`` also layers that the destination has in another
    form.  ``preserve_digests`` fails rather than changing anything.  ``tags`` are further
    names in a ``docker-archive``.
    """

    platforms: Platforms = Platforms.SYSTEM
    format: Family | None = None
    compression: Form | None = None
    level: int | None = None
    force_compression: bool = False
    preserve_digests: bool = False
    remove_signatures: bool = False
    tags: tuple[Reference, ...] = ()

    def __post_init__(self) -> None:
        if self.compression is Form.ZSTD and self.format is Family.DOCKER:
            raise UsageError("zstd layers have no place in Docker's manifests")
        if self.level is not None:
            form = self.compression or Form.GZIP
            levels = LEVELS.get(form.compression, range(0))
            if self.level not in levels:
                raise UsageError(
                    f"the level of {form.value} is {levels.start} to {levels.stop - 1}"
                )


@dataclass(frozen=True, slots=True)
class CopyResult:
    """The manifest or index that the destination's name now stands for.

    ``source`` is the digest of what was copied; ``image_id`` is set where the destination is
    a storage.
    """

    source: Digest
    digest: Digest
    media_type: str
    manifest: bytes
    image_id: str = ""


def copy_image(
    source_name: str,
    destination_name: str,
    ctx: CopyContext | None = None,
    options: CopyOptions | None = None,
) -> CopyResult:
    """Copy the image ``source_name`` to ``destination_name``, both with their transports.

    Raises ``PolicyRejected`` for an image that policy.json does not accept,
    ``VerificationError`` for content that is not what the image says, and the errors of
    names and transports.  After an error the destination's name stands for what it did.
    """
    ctx = ctx or CopyContext()
    options = options or CopyOptions()
    target = parse_image_name(destination_name)
    source = open_source(source_name, ctx)
    try:
        if target.transport == STORAGE:
            return _into_storage(source, target.rest, ctx, options)
        destination = open_destination(target, ctx, tags=options.tags)
        with contextlib.closing(destination):
            return copy_between(source, destination, ctx, options)
    finally:
        source.close()


def copy_between(
    source: ImageSource,
    destination: ImageDestination,
    ctx: CopyContext,
    options: CopyOptions | None = None,
) -> CopyResult:
    """Do what ``copy_image`` does between transports that are open already; commits."""
    options = options or CopyOptions()
    policy = machine_policy(ctx)
    stop = threading.Event()
    with ThreadPoolExecutor(max(1, ctx.parallel), "copy") as pool:
        layers = LayerCopier(source, destination, ctx.listener, ctx.scratch, stop)
        work = _Copy(source, destination, ctx, options, policy, layers, pool)
        try:
            result = work.run()
            destination.commit()
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return result


def machine_policy(ctx: CopyContext) -> Policy:
    """The policy of the context, else the machine's; raises ``ConfigError``."""
    home = os.environ.get("HOME")
    return ctx.policy or Policy.load(home=Path(home) if home else None)


def into_storage(source: ImageSource, ctx: CopyContext) -> IntoStorage:
    """How ``pull_into`` brings ``source`` into a storage under the settings of a copy."""
    policy = machine_policy(ctx)

    def check(manifest: FetchedManifest, signatures: Sequence[bytes]) -> None:
        policy.check(source.transport, source.identity, manifest.raw, signatures)

    return IntoStorage(
        platform=ctx.platform or Platform.host(),
        check=check,
        parallel=ctx.parallel,
        listener=ctx.listener,
    )


def _into_storage(
    source: ImageSource, rest: str, ctx: CopyContext, options: CopyOptions
) -> CopyResult:
    if options.platforms is not Platforms.SYSTEM:
        raise UsageError("a storage holds images for one platform each: copy one at a time")
    store, text = open_storage(rest, ctx)
    name, image_id = split_id(store, text)
    names = [] if image_id and not name else [str(Reference.parse(name))]
    how = into_storage(source, ctx)
    result = pull_into(store, source, names, _only_as(image_id, how) if image_id else how)
    manifest = store.image(result.image_id).manifest()
    media_type = parse_manifest(manifest).media_type
    return CopyResult(result.digest, Digest.of(manifest), media_type, manifest, result.image_id)


def _only_as(image_id: str, how: IntoStorage) -> IntoStorage:
    """``how``, for the image of this id only: no image comes under the id of another."""

    def check(manifest: FetchedManifest, signatures: Sequence[bytes]) -> None:
        how.check(manifest, signatures)
        parsed = parse_manifest(manifest.raw, manifest.media_type)
        if isinstance(parsed, Manifest) and parsed.config.digest.hex != image_id:
            raise UsageError(
                f"the image's ID is {parsed.config.digest.hex}, it cannot have another",
                subject=f"@{image_id}",
            )

    return replace(how, check=check)


class _Copy:
    def __init__(
        self,
        source: ImageSource,
        destination: ImageDestination,
        ctx: CopyContext,
        options: CopyOptions,
        policy: Policy,
        layers: LayerCopier,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._source = source
        self._destination = destination
        self._ctx = ctx
        self._options = options
        self._policy = policy
        self._layers = layers
        self._pool = pool
        self._tell = ctx.listener.message
        self._under_way: dict[tuple[Digest, Digest | None, LayerPlan], Future[CopiedLayer]] = {}

    def run(self) -> CopyResult:
        if self._options.platforms is Platforms.SYSTEM:
            platform = self._ctx.platform or Platform.host()
            chosen, _ = choose_manifest(self._source, platform)
        else:
            chosen = self._source.manifest()
        document = parse_manifest(chosen.raw, chosen.media_type)
        if isinstance(document, Index):
            raw, media_type = self._index(chosen, document, top=True)
        else:
            raw, media_type = self._image(chosen, document, top=True)
        return CopyResult(chosen.digest, Digest.of(raw), media_type, raw)

    # -- images -------------------------------------------------------------------

    def _image(
        self, fetched: FetchedManifest, manifest: Manifest, *, top: bool
    ) -> tuple[bytes, str]:
        signatures = self._signatures(fetched)
        fixed = self._fixed(signatures, top=top)
        if fixed and self._destination.layer_form is Compression.NONE:
            raise UsageError(f"the layers would have to be unpacked, but {fixed}")
        image = is_image(manifest)
        family = self._family(manifest, image=image, fixed=fixed)
        config = self._config(manifest)
        diff_ids: Sequence[Digest | None] = (None,) * len(manifest.layers)
        if image:
            diff_ids = parse_config(config).diff_ids
            if len(diff_ids) != len(manifest.layers):
                raise InvalidManifest(
                    f"{len(manifest.layers)} layers, but {len(diff_ids)} diff IDs",
                    subject=f"manifest {fetched.digest}",
                )
        plan = self._plan(manifest, family, image=image, fixed=fixed)
        futures = [
            self._start(layer, diff_id, plan)
            for layer, diff_id in zip(manifest.layers, diff_ids, strict=True)
        ]
        layers = [future.result() for future in futures]
        raw, media_type = edit_manifest(fetched.raw, manifest, family, layers)
        if fixed and raw != fetched.raw:
            raise UsageError(f"the manifest would have to be changed, but {fixed}")
        with self._ctx.listener.copying("config", manifest.config.digest, len(config)):
            self._destination.put_config(manifest.config.digest, config)
        self._tell(progress.WRITING_MANIFEST)
        self._destination.put_manifest(raw, media_type, top=top)
        self._store_signatures(signatures, fetched.digest, top=top)
        return raw, media_type

    def _config(self, manifest: Manifest) -> bytes:
        """The config, verified."""
        config = manifest.config
        if config.size > limits.CONFIG_BYTES:
            raise LimitExceeded(f"a config of {config.size} bytes", subject=config.digest)
        raw = self._source.blob(config.digest, limits.CONFIG_BYTES)
        if len(raw) != config.size:
            raise InvalidManifest(
                f"the config has {len(raw)} bytes, the manifest says {config.size}",
                subject=config.digest,
            )
        return raw

    def _start(
        self, layer: Descriptor, diff_id: Digest | None, plan: LayerPlan
    ) -> Future[CopiedLayer]:
        """Set a layer on its way; one that is on its way already is shared."""
        key = (layer.digest, diff_id, plan)
        future = self._under_way.get(key)
        if future is None:
            future = self._pool.submit(self._layers.copy, layer, diff_id, plan)
            self._under_way[key] = future
        return future

    def _plan(self, manifest: Manifest, family: Family, *, image: bool, fixed: str) -> LayerPlan:
        options = self._options
        converted = family is not Family.of(manifest.media_type)
        return LayerPlan(
            fixed=bool(fixed) or not image,
            compression=options.compression,
            level=options.level,
            force=options.force_compression,
            no_zstd=converted and family is Family.DOCKER,
        )

    def _family(self, manifest: Manifest, *, image: bool, fixed: str) -> Family:
        own = Family.of(manifest.media_type)
        wanted = self._options.format
        if wanted is None and image and self._options.compression is Form.ZSTD and not fixed:
            wanted = Family.OCI
        wanted = wanted or own
        offered = self._destination.manifest_types
        if wanted.manifest not in offered:
            if self._options.format is not None:
                raise UsageError(f"the destination does not take manifests of {wanted.value}")
            wanted = Family.of(offered[0])
        if wanted is not own and fixed:
            raise UsageError(f"the manifest would have to become {wanted.value}, but {fixed}")
        return wanted

    # -- indexes ------------------------------------------------------------------

    def _index(
        self, fetched: FetchedManifest, index: Index, *, top: bool, depth: int = 0
    ) -> tuple[bytes, str]:
        if depth >= limits.INDEX_NESTING:
            raise LimitExceeded("indexes are nested too deeply", subject=fetched.digest)
        family = self._index_family(index)
        signatures = self._signatures(fetched)
        fixed = self._fixed(signatures, top=top)
        new: dict[int, tuple[str, Digest, int]] = {}
        total = len(index.manifests)
        if self._options.platforms is Platforms.ALL:
            self._tell(f"Copying {total} of {total} images in list")
        for number, entry in enumerate(index.manifests):
            if self._options.platforms is Platforms.INDEX_ONLY:
                new[number] = (entry.media_type, entry.digest, entry.size)
                continue
            self._tell(f"Copying image {entry.digest} ({number + 1}/{total})")
            new[number] = self._entry(entry, depth)
        raw, media_type = edit_index(fetched.raw, index.media_type, family, new)
        if fixed and raw != fetched.raw:
            raise UsageError(f"the index would have to be changed, but {fixed}")
        self._tell(progress.WRITING_LIST)
        self._destination.put_manifest(raw, media_type, top=top)
        self._store_signatures(signatures, fetched.digest, top=top)
        return raw, media_type

    def _entry(self, entry: Descriptor, depth: int) -> tuple[str, Digest, int]:
        if entry.media_type not in media_types.ALL_MANIFESTS:
            self._layers.copy(entry, None, LayerPlan(fixed=True))
            return entry.media_type, entry.digest, entry.size
        fetched = self._source.manifest(entry.digest)
        document = parse_manifest(fetched.raw, entry.media_type)
        if isinstance(document, Index):
            raw, kind = self._index(fetched, document, top=False, depth=depth + 1)
        else:
            raw, kind = self._image(fetched, document, top=False)
        return kind, Digest.of(raw), len(raw)

    def _index_family(self, index: Index) -> Family:
        wanted = self._options.format or Family.of(index.media_type)
        offered = self._destination.manifest_types
        if wanted.index in offered:
            return wanted
        for family in Family:
            if family.index in offered and self._options.format is None:
                return family
        raise UnsupportedFormat(
            "the destination takes no index of several images",
            advice="copy the image of one platform",
        )

    # -- signatures and policy ----------------------------------------------------

    def _signatures(self, fetched: FetchedManifest) -> tuple[bytes, ...]:
        """Ask the policy about a manifest; return the signatures that are to be kept."""
        self._tell(progress.GETTING_SIGNATURES)
        source = self._source
        signatures = source.signatures(fetched.digest)
        self._policy.check(source.transport, source.identity, fetched.raw, signatures)
        if self._options.remove_signatures:
            return ()
        if signatures and not self._destination.takes_signatures:
            raise UnsupportedFormat(
                "the image is signed, and signatures cannot be stored at the destination",
                subject=fetched.digest,
                advice="copy it without them: --remove-signatures",
            )
        return signatures

    def _store_signatures(self, signatures: Sequence[bytes], digest: Digest, *, top: bool) -> None:
        if signatures:
            self._tell(progress.STORING_SIGNATURES)
            self._destination.put_signatures(signatures, digest, top=top)

    def _fixed(self, signatures: Sequence[bytes], *, top: bool) -> str:
        """Why the manifest must stay as it is; ``""`` if it may change."""
        if self._options.preserve_digests:
            return "digests are to be preserved"
        if signatures:
            return "that would break its signatures"
        if top and self._destination.digest is not None:
            return "the destination names its digest"
        return ""
