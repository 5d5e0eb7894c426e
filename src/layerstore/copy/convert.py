"""Convert an image, for one or all of its platforms, to a form that can be read lazily.

Every layer gets a new blob, with eStargz a new diff ID, too, so configs, manifests and the
index are rewritten from the layers upwards; all that layerstore does not know in them is kept.
The result is OCI, because descriptors of Docker manifests carry no annotations, and the
annotations are what makes a layer readable lazily.

Converting twice gives the same image: a layer that has the form already is kept as it is,
unless the options ask for something else, and the writers are deterministic.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerstore import limits
from layerstore.copy.context import CopyContext
from layerstore.copy.convertlayer import ConvertedLayer, LayerConverter, LayerProgress
from layerstore.copy.layerform import Estargz, LayerForm
from layerstore.copy.manifestedit import encode
from layerstore.copy.names import open_destination, open_source
from layerstore.copy.tocimage import TocImage, toc_image_name
from layerstore.copy.transport import ImageDestination, ImageSource
from layerstore.errors import InvalidManifest, NotFound, UnsupportedFormat, UsageError
from layerstore.image import (
    Descriptor,
    Digest,
    Index,
    Manifest,
    Platform,
    media_types,
    parse_config,
    parse_manifest,
)
from layerstore.registry import FetchedManifest, RegistrySettings

Progress = Callable[[LayerProgress], None]


@dataclass(frozen=True)
class ConvertOptions:
    """How to convert.

    ``platforms`` names those to convert, the others are left out; empty means all, and
    then entries that are no images are copied untouched.  ``force`` rebuilds layers that
    have the ``form`` already; so does any option of it that is not the default.
    ``jobs`` layers are under way at once, each with ``threads`` compressing.  Temporary
    files go to ``scratch``: for each layer under way its tar stream and its new blob.
    """

    form: LayerForm = field(default_factory=Estargz)
    platforms: tuple[Platform, ...] = ()
    force: bool = False
    jobs: int = 2
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    scratch: Path | None = None
    source_settings: RegistrySettings | None = None
    destination_settings: RegistrySettings | None = None


@dataclass(frozen=True, slots=True)
class ConvertedImage:
    """One platform's manifest, before and after."""

    platform: Platform
    source: Digest
    digest: Digest
    layers: tuple[ConvertedLayer, ...]


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """The manifest or index that the destination's name now stands for.

    ``not_found`` are the files asked for early that no layer holds.  ``toc_image`` names the
    image that holds the TOCs, if that is another one, and ``toc_image_digest`` its manifest.
    """

    source: Digest
    digest: Digest
    media_type: str
    images: tuple[ConvertedImage, ...]
    not_found: tuple[str, ...]
    toc_image: str | None = None
    toc_image_digest: Digest | None = None


def convert(
    src: str,
    dst: str,
    options: ConvertOptions | None = None,
    progress: Progress | None = None,
) -> ConvertResult:
    """Convert the image ``src`` to the form asked for and store it as ``dst``.

    Both have a transport (see ``names``), and may be the same.
    ``progress`` is called from several threads, one call at a time.

    Raises ``UsageError`` for names, ``VerificationError`` when a blob or the tar stream in
    it is not what the image says, and the errors of registries, disks and formats.  The
    destination's name is set last: after an error it stands for what it did before.
    """
    options = options or ConvertOptions()
    ctx = CopyContext(
        source_registry=options.source_settings,
        destination_registry=options.destination_settings,
        scratch=options.scratch,
    )
    with closing(open_source(src, ctx)) as source, closing(open_destination(dst, ctx)) as there:
        if there.digest is not None:
            raise UsageError("a destination is named by a tag, not by a digest", subject=dst)
        if media_types.OCI_MANIFEST not in there.manifest_types:
            raise UsageError("only places that take OCI images can hold lazy layers", subject=dst)
        if not options.form.external:
            result = convert_image(source, there, options, progress)
        else:
            with closing(TocImage(toc_image_name(dst), ctx)) as toc_image:
                result = convert_image(source, there, options, progress, toc_image)
        there.commit()
    return result


def convert_image(
    source: ImageSource,
    destination: ImageDestination,
    options: ConvertOptions,
    progress: Progress | None = None,
    toc_image: TocImage | None = None,
) -> ConvertResult:
    """Do what ``convert`` does between transports that are open already.

    ``toc_image`` is needed for a form that keeps TOCs apart.
    """
    lock = threading.Lock()

    def tell(event: LayerProgress) -> None:
        if progress is not None:
            with lock:
                progress(event)

    layers = LayerConverter(
        source,
        destination,
        options.form,
        rebuild=options.force or not options.form.default,
        threads=options.threads,
        scratch=options.scratch,
        progress=tell,
        toc_image=toc_image,
    )
    with ThreadPoolExecutor(max(1, options.jobs), "convert") as pool:
        work = _Conversion(source, destination, options, layers, pool, toc_image)
        try:
            return work.run()
        except BaseException:
            layers.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


@dataclass(frozen=True, slots=True)
class _Plan:
    """An image manifest read, and its layers on their way."""

    fetched: FetchedManifest
    manifest: Manifest
    config_raw: bytes
    platform: Platform
    layers: list[Future[ConvertedLayer]]


class _Conversion:
    def __init__(
        self,
        source: ImageSource,
        destination: ImageDestination,
        options: ConvertOptions,
        layers: LayerConverter,
        pool: ThreadPoolExecutor,
        toc_image: TocImage | None,
    ) -> None:
        self._source = source
        self._destination = destination
        self._options = options
        self._layers = layers
        self._pool = pool
        self._toc_image = toc_image
        self._toc_image_digest: Digest | None = None
        self._under_way: dict[tuple[Digest, Digest], Future[ConvertedLayer]] = {}
        self._images: list[ConvertedImage] = []

    def run(self) -> ConvertResult:
        top = self._source.manifest()
        document = parse_manifest(top.raw, top.media_type)
        if isinstance(document, Index):
            raw, media_type = self._index(top.raw, document)
            self._put_tocs()
            self._destination.put_manifest(raw, media_type, top=True)
        else:
            plan = self._plan(top, document)
            if self._options.platforms and not self._wanted(plan.platform):
                raise NotFound(f"the image is for {plan.platform} only")
            raw, media_type = self._finish(plan, top=True)
        found = {
            path for image in self._images for layer in image.layers for path in layer.prioritized
        }
        return ConvertResult(
            source=top.digest,
            digest=Digest.of(raw),
            media_type=media_type,
            images=tuple(self._images),
            not_found=tuple(path for path in self._options.form.prioritize if path not in found),
            toc_image=None if self._toc_image is None else str(self._toc_image.name),
            toc_image_digest=self._toc_image_digest,
        )

    def _put_tocs(self) -> None:
        """Store the image of the TOCs; before the image whose layers are to be read by them."""
        if self._toc_image is None:
            return
        layers = (future.result() for future in self._under_way.values())
        self._toc_image_digest = self._toc_image.finish(
            (layer.digest, *layer.external_toc)
            for layer in layers
            if layer.external_toc is not None
        )

    def _index(self, raw: bytes, index: Index) -> tuple[bytes, str]:
        plans: list[_Plan | None] = []
        chosen: list[int] = []
        for number, entry in enumerate(index.manifests):
            if entry.platform is not None and not self._wanted(entry.platform):
                continue
            plan = self._entry(entry)
            if plan is None and self._options.platforms:
                continue
            if plan is not None and entry.platform is None and not self._wanted(plan.platform):
                continue
            chosen.append(number)
            plans.append(plan)
        if not any(plans):
            raise NotFound("the index has no image for a platform that is asked for")
        # All layers of all platforms are on their way before the first is waited for.
        for plan in plans:
            if plan is not None:
                self._start(plan)
        document = json.loads(raw)
        entries: list[dict[str, Any]] = []
        for number, plan in zip(chosen, plans, strict=True):
            entry = document["manifests"][number]
            if plan is None:
                self._copy_untouched(index.manifests[number], 0)
                entries.append(entry)
                continue
            new, media_type = self._finish(plan, top=False)
            changes = {"mediaType": media_type, "digest": str(Digest.of(new)), "size": len(new)}
            entries.append(entry | changes)
        changed = {"mediaType": media_types.OCI_INDEX, "manifests": entries}
        if document == document | changed:
            return raw, media_types.OCI_INDEX
        return encode(document | changed), media_types.OCI_INDEX

    def _entry(self, entry: Descriptor) -> _Plan | None:
        """Read an entry of the index; None for one that is no image."""
        if not entry.may_be_image:
            return None
        fetched = self._source.manifest(entry.digest)
        manifest = parse_manifest(fetched.raw, entry.media_type)
        if isinstance(manifest, Index) or not manifest.is_image:
            return None
        return self._plan(fetched, manifest, start=False)

    def _plan(self, fetched: FetchedManifest, manifest: Manifest, *, start: bool = True) -> _Plan:
        subject = f"manifest {fetched.digest}"
        if not manifest.is_image:
            raise UnsupportedFormat(
                f"no container image: its config is {manifest.config.media_type}", subject=subject
            )
        raw = self._source.blob(manifest.config.digest, limits.CONFIG_BYTES)
        config = parse_config(raw)
        if len(config.diff_ids) != len(manifest.layers):
            raise InvalidManifest(
                f"{len(manifest.layers)} layers, but {len(config.diff_ids)} diff IDs",
                subject=subject,
            )
        plan = _Plan(fetched, manifest, raw, config.platform, [])
        if start:
            self._start(plan)
        return plan

    def _start(self, plan: _Plan) -> None:
        """Begin with the layers of an image; one that is under way already is shared."""
        diff_ids = parse_config(plan.config_raw).diff_ids
        for layer, diff_id in zip(plan.manifest.layers, diff_ids, strict=True):
            key = (layer.digest, diff_id)
            future = self._under_way.get(key)
            if future is None:
                future = self._pool.submit(self._layers.convert, layer, diff_id)
                self._under_way[key] = future
            plan.layers.append(future)

    def _finish(self, plan: _Plan, *, top: bool) -> tuple[bytes, str]:
        """Wait for the layers, store config and manifest; return the manifest."""
        layers = tuple(future.result() for future in plan.layers)
        config = plan.config_raw
        diff_ids = [str(layer.diff_id) for layer in layers]
        document = json.loads(config)
        if layers and document["rootfs"]["diff_ids"] != diff_ids:
            document["rootfs"]["diff_ids"] = diff_ids
            config = encode(document)
        config_digest = Digest.of(config)
        if not self._destination.has_blob(config_digest, len(config)):
            self._destination.put_blob(config_digest, lambda: (config,), len(config))
        raw = _manifest(plan.fetched.raw, config_digest, len(config), layers)
        if top:
            self._put_tocs()
        self._destination.put_manifest(raw, media_types.OCI_MANIFEST, top=top)
        self._images.append(
            ConvertedImage(plan.platform, plan.fetched.digest, Digest.of(raw), layers)
        )
        return raw, media_types.OCI_MANIFEST

    def _wanted(self, platform: Platform) -> bool:
        wanted = self._options.platforms
        return not wanted or any(one.rank(platform) == 0 for one in wanted)

    def _copy_untouched(self, entry: Descriptor, depth: int) -> None:
        """Bring over what an entry that is no image consists of."""
        if entry.media_type not in media_types.ALL_MANIFESTS:
            self._copy_blob(entry)
            return
        if depth > limits.INDEX_NESTING:
            raise InvalidManifest("indexes are nested too deeply", subject=str(entry.digest))
        fetched = self._source.manifest(entry.digest)
        document = parse_manifest(fetched.raw, entry.media_type)
        if isinstance(document, Index):
            for inner in document.manifests:
                self._copy_untouched(inner, depth + 1)
        else:
            for blob in (document.config, *document.layers):
                if not blob.urls:
                    self._copy_blob(blob)
        self._destination.put_manifest(fetched.raw, entry.media_type, top=False)

    def _copy_blob(self, blob: Descriptor) -> None:
        if self._destination.has_blob(blob.digest, blob.size):
            return
        if not self._destination.take_over(self._source, blob.digest):
            self._layers.copy_blob(blob)


def _manifest(
    raw: bytes, config: Digest, config_size: int, layers: tuple[ConvertedLayer, ...]
) -> bytes:
    """Return the manifest with new config and layers; the same bytes if nothing changes."""
    document = json.loads(raw)
    changed: dict[str, Any] = {
        "mediaType": media_types.OCI_MANIFEST,
        "config": document["config"]
        | {"mediaType": media_types.OCI_CONFIG, "digest": str(config), "size": config_size},
        "layers": [
            _descriptor(old, layer) for old, layer in zip(document["layers"], layers, strict=True)
        ],
    }
    return raw if document == document | changed else encode(document | changed)


def _descriptor(old: Mapping[str, Any], layer: ConvertedLayer) -> dict[str, Any]:
    new = dict(old) | {
        "mediaType": layer.media_type,
        "digest": str(layer.digest),
        "size": layer.size,
    }
    if layer.annotations:
        new["annotations"] = layer.annotations
    return new
