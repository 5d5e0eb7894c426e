"""Bringing whole images here ahead of time, for ``layerstore fetch``.

Each layer ends complete and verified, so that it is served in both dialects from then on,
whatever its form, and needs no registry.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from layerstore import limits
from layerstore.content import Room
from layerstore.errors import LayerstoreError, NoRoom, ServiceError, UnknownObject
from layerstore.formats.announced import announced
from layerstore.image import Descriptor, Digest, Platform, Reference
from layerstore.provider.images import Images
from layerstore.provider.indexes import Indexes
from layerstore.provider.ingests import Ingests
from layerstore.provider.layers import Layers
from layerstore.provider.loader import Loader
from layerstore.provider.refusal import QUARANTINED, Refusal
from layerstore.provider.sources import Sources
from layerstore.provider.state import LayerRecord, State

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_MORE_ROOM = "raise disk.limit, or pin the image, which is never evicted"


@dataclasses.dataclass(slots=True)
class FetchedLayer:
    """A layer on its way: ``state`` is waiting, fetching, verifying, complete or refused."""

    digest: Digest
    form: str
    size: int
    state: str = "waiting"
    reason: str = ""
    detail: str = ""
    fetched: Callable[[], int] = lambda: 0

    def report(self) -> dict[str, object]:
        """For the control socket."""
        fields = ("digest", "form", "size", "state", "reason", "detail")
        done = self.size if self.state in ("verifying", "complete") else self.fetched()
        return {"fetched": min(done, self.size)} | {one: getattr(self, one) for one in fields}


class _Job:
    def __init__(self, keep: str = "") -> None:
        self.keep = keep  # the pinned image that its layers are of
        self.layers: list[FetchedLayer] = []
        self.error: LayerstoreError | None = None
        self.cancelled = threading.Event()
        self.finished = threading.Event()


class Fetches:
    """What is being fetched ahead, by job.  Thread-safe."""

    def __init__(
        self,
        state: State,
        images: Images,
        loader: Loader,
        layers: Layers,
        ingests: Ingests,
        sources: Sources,
        indexes: Indexes,
        room: Room,
    ) -> None:
        self._state = state
        self._images = images
        self._loader = loader
        self._layers = layers
        self._ingests = ingests
        self._sources = sources
        self._indexes = indexes
        self._room = room
        self._lock = threading.Lock()
        self._jobs: OrderedDict[str, _Job] = OrderedDict()

    def start(self, reference: str, platforms: Iterable[str] | None, *, keep: bool = False) -> str:
        """Begin to fetch an image; the job's name.

        ``platforms`` are those to fetch, none: the host's; None: all.  ``keep`` pins the image
        at once, whatever comes of the fetch.  Raises InvalidReference, UsageError, ServiceError,
        StorageError.
        """
        parsed = Reference.parse(reference)
        named = None if platforms is None else tuple(platforms)
        wanted = None if named is None else tuple(map(Platform.parse, named)) or (Platform.host(),)
        job = _Job(str(parsed) if keep else "")
        if keep:
            self._state.kept.keep(job.keep, msgspec.json.encode(named).decode())
        with self._lock:
            while len(self._jobs) >= limits.FETCH_JOBS:
                oldest = next(
                    (name for name, one in self._jobs.items() if one.finished.is_set()), None
                )
                if oldest is None:
                    raise ServiceError("too many images are being fetched")
                del self._jobs[oldest]
            name = secrets.token_hex(8)  # the next server must not know it for another's
            self._jobs[name] = job
        threading.Thread(
            target=self._run, args=(job, parsed, wanted), name=f"fetch-job-{name}", daemon=True
        ).start()
        return name

    def resume_kept(self) -> None:
        """After a start: go on to fetch pinned images that are not complete yet."""
        for image in self._state.kept.images():
            if not image.complete:
                platforms = msgspec.json.decode(image.platforms, type=tuple[str, ...] | None)
                self.start(image.reference, platforms, keep=True)

    def status(self, name: str) -> dict[str, object]:
        """How far a job is; UnknownObject if there is none of this name."""
        job = self._job(name)
        return {
            "done": job.finished.is_set(),
            "layers": [layer.report() for layer in job.layers],
            "failure": None if job.error is None else str(job.error),
        }

    def cancel(self, name: str) -> None:
        """Wait for nothing more; what is being fetched goes on in the background."""
        self._job(name).cancelled.set()

    def close(self) -> None:
        """End all jobs."""
        with self._lock:
            for job in self._jobs.values():
                job.cancelled.set()

    def _job(self, name: str) -> _Job:
        with self._lock:
            job = self._jobs.get(name)
        if job is None:
            raise UnknownObject("no such job", subject=name)
        return job

    # -- in the job's threads --------------------------------------------------------

    def _run(self, job: _Job, reference: Reference, wanted: tuple[Platform, ...] | None) -> None:
        try:
            deadline = time.monotonic() + limits.RESOLVE_SECONDS
            work = []
            seen = set()
            for manifest, diff_ids in self._images.chosen(reference, wanted, deadline):
                for descriptor, diff_id in zip(manifest.layers, diff_ids, strict=True):
                    promised = announced(descriptor)
                    claim = (descriptor.digest, promised.toc_digest, diff_id)
                    if claim in seen:
                        continue
                    seen.add(claim)
                    layer = FetchedLayer(descriptor.digest, promised.form.value, descriptor.size)
                    job.layers.append(layer)
                    how = self._fetch_lazy if promised.form.lazy else self._fetch_ordinary
                    work.append((how, layer, descriptor, diff_id))
            with ThreadPoolExecutor(limits.INGEST_WORKERS, "fetch-layer") as pool:
                for how, layer, descriptor, diff_id in work:
                    pool.submit(self._fetch, job, how, layer, reference, descriptor, diff_id)
            if job.keep and all(layer.state == "complete" for layer in job.layers):
                self._state.kept.set_complete(job.keep)
        except LayerstoreError as error:
            job.error = error
        except Exception as error:
            _log.exception("fetching %s failed", reference)
            job.error = ServiceError(f"unexpected failure, see the log: {error}")
        job.finished.set()

    def _fetch(
        self,
        job: _Job,
        how: Callable[[_Job, FetchedLayer, Reference, Descriptor, Digest], None],
        layer: FetchedLayer,
        reference: Reference,
        descriptor: Descriptor,
        diff_id: Digest,
    ) -> None:
        try:
            if job.cancelled.is_set():
                raise ServiceError("it was cancelled")
            layer.state = "fetching"
            how(job, layer, reference, descriptor, diff_id)
            layer.state = "complete"
        except LayerstoreError as error:
            refusal = Refusal.of(error)
            layer.reason, layer.detail, layer.state = refusal.reason, str(error), "refused"
        except Exception as error:
            _log.exception("fetching layer %s failed", descriptor.digest)
            layer.reason, layer.detail, layer.state = "internal", str(error), "refused"

    def _fetch_lazy(
        self,
        job: _Job,
        layer: FetchedLayer,
        reference: Reference,
        descriptor: Descriptor,
        diff_id: Digest,
    ) -> None:
        deadline = time.monotonic() + limits.RESOLVE_SECONDS
        record = self._loader.load(reference, descriptor, diff_id, deadline)
        self._complete(job, layer, reference, record)

    def _complete(
        self, job: _Job, layer: FetchedLayer, reference: Reference, record: LayerRecord
    ) -> None:
        """All of a layer that has an index, by the ranges that are missing."""
        self._sources.add(record.slot, reference)
        self._layers.touch(record.slot)
        if job.keep:
            self._state.kept.keep_layer(job.keep, record.slot)
        began = time.time()
        if not self._state.is_complete(record.slot):
            self._require_room(job, record.size)
            content = self._layers.open(record.slot).content
            layer.fetched = lambda: content.stored_bytes
            arrived = threading.Event()
            errors: list[Exception] = []

            def done(error: Exception | None) -> None:
                if error is not None:
                    errors.append(error)
                arrived.set()

            self._layers.hasten(record.slot, done)
            self._wait(job, arrived)
            if errors:
                raise errors[0]
        layer.state = "verifying"
        self._wait(job, self._layers.verified(record.slot))
        now = self._state.layer(record.slot)
        if now is not None and now.quarantine:
            raise Refusal(QUARANTINED, f"the layer is in quarantine: {now.quarantine}")
        if now is None or not now.verified:
            if self._state.evicted(record.slot) >= began:
                raise NoRoom("it was evicted before it was checked", advice=_MORE_ROOM)
            raise ServiceError("the layer could not be checked, see the service's log")

    def _require_room(self, job: _Job, size: int) -> None:
        """Raises NoRoom for a layer that would be evicted as soon as it is here, if not before."""
        high = self._room.allowed.high_bytes
        if high is not None and size > high and not job.keep:
            raise NoRoom(
                f"it has {size} bytes, and above {high} bytes the store evicts", advice=_MORE_ROOM
            )

    def _fetch_ordinary(
        self,
        job: _Job,
        layer: FetchedLayer,
        reference: Reference,
        descriptor: Descriptor,
        diff_id: Digest,
    ) -> None:
        known = self._ingests.here(descriptor.digest, diff_id)
        known = known or self._indexes.given(descriptor, diff_id)
        if known is not None:
            self._complete(job, layer, reference, known)
            return
        self._require_room(job, descriptor.size)
        ingest = self._ingests.start(reference, descriptor, diff_id, urgent=True)
        layer.fetched = lambda: ingest.fetched
        try:
            self._wait(job, ingest.finished)
        except ServiceError:
            ingest.urgent = False
            raise
        if ingest.error is not None:
            raise ingest.error
        if job.keep and ingest.record is not None:
            self._state.kept.keep_layer(job.keep, ingest.record.slot)

    @staticmethod
    def _wait(job: _Job, event: threading.Event) -> None:
        while not event.wait(_POLL_SECONDS):
            if job.cancelled.is_set():
                raise ServiceError("it was cancelled")
