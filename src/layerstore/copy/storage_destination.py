"""Images into a graph root: what is there is used, what is not is fetched, all of it verified.

A pull plans first, without a lock and before anything is written: which layers the storage
has, which an additional layer store has (``reuse`` has the rules).  The rest is fetched and
extracted by several threads at once, and the layers are committed from the lowest up, each as
soon as those below it are there, so that a pull that fails leaves layers that the next one
finds.  The image comes last.

Others work on the same graph root meanwhile.  A layer that somebody else commits first is
used; if somebody removes what this pull counted on, it begins anew, and finds what it has
fetched so far.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace

import msgspec

from layerstore import limits
from layerstore.copy import oldtools
from layerstore.copy.chosen import ChosenImage, choose_image
from layerstore.copy.intostorage import IntoStorage, LayerOutcome, PullResult
from layerstore.copy.layerfetch import FetchedLayer, LayerFetcher, given_up
from layerstore.copy.progress import (
    ALREADY_EXISTS,
    FOUND_BY_TOC,
    GETTING_SIGNATURES,
    STORING_SIGNATURES,
    WRITING_MANIFEST,
)
from layerstore.copy.pullplan import OLD_PODMAN, Plan, Planner, alive
from layerstore.copy.reuse import (
    How,
    KnownImage,
    WantedLayer,
    choose_image_id,
    in_place,
    in_place_by_toc,
    in_place_by_word,
    layer_ids,
    proven_diff_id,
    proven_toc,
)
from layerstore.copy.spool import Spool
from layerstore.copy.transport import ImageSource
from layerstore.errors import InUse, LayerstoreError, StorageError, UnknownObject
from layerstore.graphroot.als import AlsLayer, LayerStores
from layerstore.graphroot.identity import layer_id
from layerstore.graphroot.images import Image
from layerstore.graphroot.layers import Layer
from layerstore.graphroot.offers import AlsOffer
from layerstore.graphroot.staging import StagingLost
from layerstore.graphroot.store import Store
from layerstore.image import Digest, uncompressed_size
from layerstore.registry import FetchedManifest

__all__ = ["IntoStorage", "LayerOutcome", "PullResult", "pull_into"]

_log = logging.getLogger(__name__)


def pull_into(
    store: Store, source: ImageSource, names: Sequence[str], options: IntoStorage | None = None
) -> PullResult:
    """Bring the image of ``source`` into ``store`` and call it ``names`` (full references).

    Raises the errors of the source and of ``options.check``; ``InvalidManifest``,
    ``UnsupportedFormat``, ``InvalidLayer``, ``LimitExceeded`` and ``VerificationError`` for
    images that are not what they should be; ``StorageError``.  Layers that were committed
    before stay, whatever else was made is removed.
    """
    options = options or IntoStorage()
    listener, judge = options.listener, options.check
    specs = store.config.additional_layer_stores if options.layer_stores else ()
    bears = None
    if specs and options.toc_layers is None:
        bears = oldtools.ask(store.config.graph_root)  # it takes as long as a manifest
    signatures: list[bytes] = []

    def check(manifest: FetchedManifest) -> None:
        listener.message(GETTING_SIGNATURES)
        signatures.extend(source.signatures(manifest.digest))
        judge(manifest, signatures)

    image = choose_image(source, options.platform, check)
    has, wanted = image.config.platform, options.platform
    if has.architecture and not wanted.matches(has):  # artifacts are for none
        _log.warning("image platform (%s) does not match the expected platform (%s)", has, wanted)
    spool = Spool(store.config.graph_root) if options.keep_blobs else None
    if spool is not None:
        spool.expire()
    if bears is not None:
        options = replace(options, toc_layers=bears.result())
    stores = LayerStores(specs, lookup_seconds=options.lookup_seconds)
    try:
        for _ in range(limits.PULL_ATTEMPTS):
            with contextlib.suppress(_Vanished), LayerFetcher(store, source, spool) as fetcher:
                planner = Planner(store, source.reference, image, stores, options)
                pull = _Pull(store, image, fetcher, options)
                plans = planner.plan()
                if planner.refused:
                    listener.message(f"Layer stores {OLD_PODMAN}")
                layers = pull.layers(plans)
                found = pull.image(layers, names, signatures)
                if spool is not None:  # of a pull that died when its layer was in place already
                    for layer in layers:
                        spool.drop(layer.wanted.descriptor.digest)
                return PullResult(
                    found.id,
                    (image.index or image.manifest).digest,
                    image.manifest.digest,
                    tuple(names),
                    tuple(map(_outcome, layers)),
                    (*planner.refused, *(f"{m.path}: {m.reason}" for m in stores.misses)),
                )
    finally:
        stores.close()
    raise StorageError(
        "others remove the image's layers again and again",
        subject=str(store.config.graph_root),
        advice="try again when nothing else is removed there",
    )


class _Vanished(Exception):
    """Somebody removed a layer that was to be used."""


class _Done(msgspec.Struct, frozen=True):
    wanted: WantedLayer
    how: How
    layer: Layer

    @property
    def toc(self) -> Digest | None:
        """The TOC that the layer is identified by."""
        return proven_toc(self.layer.record)


def _outcome(done: _Done) -> LayerOutcome:
    blob = done.wanted.descriptor
    return LayerOutcome(blob.digest, done.wanted.diff_id, blob.size, done.how, done.layer.id)


class _Pull:
    """One attempt to have all layers of an image in the storage."""

    def __init__(
        self, store: Store, image: ChosenImage, fetcher: LayerFetcher, options: IntoStorage
    ) -> None:
        self._store = store
        self._image = image
        self._fetcher = fetcher
        self._options = options
        self._listener = options.listener

    def layers(self, plans: Sequence[Plan]) -> list[_Done]:
        """Have all layers committed, the lowest first."""
        with ThreadPoolExecutor(max(1, self._options.parallel), "pull") as pool:
            futures = [self._begin(plan, pool) for plan in plans]
            running = [future for future in futures if future is not None]
            done: list[_Done] = []
            try:
                while len(done) < len(plans):
                    if offered := self._commit_offers(plans, done):
                        done += offered
                        continue
                    plan, future = plans[len(done)], futures[len(done)]
                    if future is not None:
                        _first(running, future)
                    done.append(self._commit(plan, future, done))
            except BaseException as error:
                self._fetcher.stop()
                pool.shutdown(wait=True, cancel_futures=True)
                for left in running:
                    if not left.cancelled() and left.exception() is None:
                        left.result().abandoned()
                if isinstance(error, StorageError) and self._is_dead(done):
                    raise _Vanished from error
                raise
        return done

    def _is_dead(self, done: list[_Done]) -> bool:
        """Whether a layer store has died since its layers were committed."""
        return any(not alive(one.layer, self._options.lookup_seconds) for one in done[-1:])

    def _begin(self, plan: Plan, pool: ThreadPoolExecutor) -> Future[FetchedLayer] | None:
        digest = plan.wanted.descriptor.digest
        if plan.how is How.LOCAL:
            self._listener.skipped(digest, ALREADY_EXISTS)
            return pool.submit(self._copy, plan)
        if plan.how is How.PULLED and not plan.twin:
            return pool.submit(self._fetch, plan.wanted)
        self._listener.skipped(digest, FOUND_BY_TOC if plan.how is How.TOC else ALREADY_EXISTS)
        return None

    def _fetch(self, wanted: WantedLayer) -> FetchedLayer:
        blob = wanted.descriptor
        with self._listener.copying("blob", blob.digest, blob.size) as item:
            return self._fetcher.pull(wanted, item)

    def _copy(self, plan: Plan) -> FetchedLayer:
        """From the layer of the plan, or, if that is not what it should be, from the source."""
        assert plan.layer is not None
        try:
            return self._fetcher.copy(plan.wanted, plan.layer)
        except LayerstoreError as error:
            if given_up(error):
                raise
            _log.warning("layer %s cannot be copied, so it is pulled: %s", plan.layer.id, error)
            return self._fetch(plan.wanted)

    def _commit(self, plan: Plan, future: Future[FetchedLayer] | None, below: list[_Done]) -> _Done:
        wanted = plan.wanted
        parent = below[-1].layer.id if below else ""
        if plan.how in (How.SHARED, How.TOC):
            assert plan.layer is not None
            return _Done(wanted, plan.how, plan.layer)
        how = plan.how if plan.how is How.LOCAL else How.PULLED
        if future is not None:
            fetched = future.result()
        elif plan.twin and (twin := _twin(wanted, below)) is not None:
            how = How.LOCAL
            fetched = self._copy(Plan(wanted, how, twin))
        else:
            fetched = self._fetch(wanted)
        for _ in range(limits.STAGE_ATTEMPTS):
            try:
                return _Done(wanted, how, self._put(fetched, wanted, parent))
            except StagingLost:
                fetched.abandoned()
                fetched = self._fetch(wanted)
            except BaseException:
                fetched.abandoned()
                raise
        fetched.abandoned()
        raise StorageError("the staging directories are removed again and again")

    def _put(self, fetched: FetchedLayer, wanted: WantedLayer, parent: str) -> Layer:
        for one in layer_ids(parent, wanted.diff_id):
            try:
                layer = self._store.put_layer(one, parent, fetched.staged)
            except UnknownObject as error:
                raise _Vanished from error
            if in_place(layer.record, parent, wanted.diff_id, lazy=layer.is_lazy):
                fetched.committed()
                return layer
            _log.warning("layer %s is there, but nobody checked it: not used", one)
        raise StorageError("all ids of the layer are taken", subject=str(wanted.diff_id))

    def _commit_offers(self, plans: Sequence[Plan], below: list[_Done]) -> list[_Done]:
        """The next layers that layer stores have, as far as they can be used.

        All at once, because each write of the records costs two waits for the disk; if a store
        fails, the first alone.  Empty if the next layer is to come from elsewhere.
        """
        parent = below[-1].layer.id if below else ""
        rest = itertools.takewhile(lambda plan: plan.found is not None, plans[len(below) :])
        row: list[tuple[WantedLayer, AlsOffer]] = []
        for plan in rest:
            assert plan.found is not None
            on = row[-1][1].layer_id if row else parent
            row.append((plan.wanted, _offer(plan.found, plan.wanted, on)))
        layers: list[Layer] = []
        for count in dict.fromkeys((len(row), 1)) if row else ():
            try:
                layers = self._store.put_als_layers(parent, [offer for _, offer in row[:count]])
                break
            except UnknownObject as error:
                raise _Vanished from error
            except StorageError as error:
                _log.warning("%s is not used: %s", row[0][1].found.path, error)
        done: list[_Done] = []
        for layer, (wanted, offer) in zip(layers, row, strict=False):
            by_toc = offer.found.dialect == "T"
            if by_toc and wanted.toc is not None:
                usable = in_place_by_toc(layer.record, parent, wanted.toc)
            else:
                usable = not by_toc and in_place_by_word(layer.record, parent, wanted)
            if not usable:
                break
            done.append(_Done(wanted, How.ALS, layer))
            parent = layer.id
        return done

    def image(
        self, layers: list[_Done], names: Sequence[str], signatures: Sequence[bytes]
    ) -> Image:
        """Record the image."""
        image = self._image
        top = layers[-1].layer.id if layers else ""
        config = image.parsed.config
        with self._listener.copying("config", config.digest, config.size) as item:
            item.advance(config.size)
        self._listener.message(WRITING_MANIFEST)
        if signatures:
            self._listener.message(STORING_SIGNATURES)
        choice = choose_image_id(
            Digest.of(image.config_raw),
            image.manifest.digest,
            [done.toc for done in layers],
            top,
            self._known_image,
            usual_layers=all(_has_usual_id(done) for done in layers),
        )
        try:
            return self._store.put_image(
                image_id=choice.id,
                layer=top,
                names=names,
                manifest=image.manifest.raw,
                config=image.config_raw,
                index=None if image.index is None else image.index.raw,
                created=image.config.created,
                signatures=signatures,
                replace=choice.replace,
            )
        except (UnknownObject, InUse) as error:
            # The layers are gone, or somebody else made an image under this id just now.
            raise _Vanished from error

    def _known_image(self, one: str) -> KnownImage | None:
        for image in self._store.images():
            if image.id == one:
                config = next(
                    (key for key in image.record.big_data_names if key.startswith("sha256:")), None
                )
                return KnownImage(
                    image.manifest_digest,
                    None if config is None else Digest(config),
                    image.top_layer,
                )
        return None


def _offer(found: AlsLayer, wanted: WantedLayer, parent: str) -> AlsOffer:
    size = found.facts.diff_size
    if size < 0:
        announced = uncompressed_size(wanted.descriptor.annotations)
        size = size if announced is None else announced
    by_toc = found.dialect == "T"
    one = (
        layer_id(parent, toc_digest=wanted.toc)
        if by_toc
        else layer_id(parent, diff_id=wanted.diff_id)
    )
    return AlsOffer(one, found, wanted.diff_id, size)


def _has_usual_id(done: _Done) -> bool:
    layer = done.layer
    ids = layer_ids(layer.record.parent, done.wanted.diff_id)
    return done.toc is not None or layer.id == ids[0]


def _twin(wanted: WantedLayer, below: list[_Done]) -> Layer | None:
    for done in below:
        layer = done.layer
        if proven_diff_id(layer.record, lazy=layer.is_lazy) == wanted.diff_id:
            return layer
    return None


def _first(running: list[Future[FetchedLayer]], wanted: Future[FetchedLayer]) -> None:
    """Wait for one layer, or for the failure of any."""
    while not wanted.done():
        pending = [future for future in running if not future.done()]
        wait(pending, return_when=FIRST_COMPLETED)
        for future in running:
            if future.done() and not future.cancelled() and future.exception() is not None:
                future.result()
