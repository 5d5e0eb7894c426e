"""The additional layer store as a client sees it, without a file system.

`Store` answers what the file system asks: is this layer known, resolve it, count a use.  What is
known is answered from memory; the rest by workers, through a callback: a `View` or a `Refusal`.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

from layerstore import limits
from layerstore.content import ObjectStore, Outages, Room, Scheduler
from layerstore.errors import LayerstoreError, StorageError
from layerstore.formats.announced import Announced, announced
from layerstore.image import Descriptor, Digest, Manifest, Platform, Reference
from layerstore.provider import layerreport, names
from layerstore.provider.allowance import Allowance
from layerstore.provider.cachecheck import Checks, Place
from layerstore.provider.dialect import Dialect
from layerstore.provider.diskuse import DiskUse
from layerstore.provider.fetch import Fetches
from layerstore.provider.housekeeping import Housekeeper
from layerstore.provider.images import Images, Match
from layerstore.provider.indexes import Indexes
from layerstore.provider.info import diff_size, layer_info, toc_info
from layerstore.provider.ingests import Ingests
from layerstore.provider.layers import Layer, Layers
from layerstore.provider.loader import Loader
from layerstore.provider.needs import LookAtNeeds, unknown
from layerstore.provider.policy import DialectL, Ordinary, Policy
from layerstore.provider.refusal import (
    BEING_FETCHED,
    BUSY,
    CONTRADICTION,
    DIALECT_L_OFF,
    NO_ROOM,
    NOT_HERE,
    ORDINARY_OFF,
    QUARANTINED,
    REPEATED,
    Refusal,
)
from layerstore.provider.refusals import Refusals
from layerstore.provider.refuted import Claim, refuted
from layerstore.provider.sources import Sources
from layerstore.provider.state import LayerRecord, View
from layerstore.provider.statefile import Backup, open_state
from layerstore.provider.usecounts import UseCounts
from layerstore.provider.workers import WorkerPool
from layerstore.registry import RegistryClient

_log = logging.getLogger(__name__)

Answer = Callable[[View | Refusal], None]

# Refusals that cost nothing and may be over at any moment are not remembered.
_PASSING = frozenset((BEING_FETCHED, NOT_HERE, NO_ROOM, CONTRADICTION))
_UNPACKED = 4  # bytes on disk of a layer's blob and files, at most so many times the blob's


class Store:
    """A store with its state below ``root``.  Thread-safe."""

    def __init__(
        self,
        root: Path,
        client: RegistryClient,
        *,
        policy: Policy | None = None,
        needs: LookAtNeeds = unknown,
        prefetch: bool = True,
        background: bool = True,
    ) -> None:
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot create: {error.strerror}", subject=str(root)) from error
        self._root = root
        self._client = client
        self.policy = policy or Policy()
        self._state = open_state(root)
        self._backup = Backup(self._state, root)
        self._images = Images(self._state, client)
        self._room = Room(root, self.policy.disk)
        self._objects = ObjectStore(root / "content", self._room)
        self._loader = Loader(root / "layers", self._state, client, self._objects)
        self._scheduler = Scheduler()
        self._outages = Outages()
        self._sources = Sources(client, self.policy.patience)
        self.ingests = Ingests(self._state, client, self._objects, self._scheduler, self._loader)
        self.indexes = Indexes(self._state, self._loader)
        self.layers = Layers(
            self._state,
            self._objects,
            self._scheduler,
            self._loader,
            rebuild=self._rebuild,
            outages=self._outages,
            sources=self._sources,
            prefetch=prefetch,
            background=background,
        )
        self.fetches = Fetches(
            self._state, self._images, self._loader, self.layers, self.ingests,
            self._sources, self.indexes, self._room,
        )  # fmt: skip
        self.checks = Checks(Place(root, self._state, self._objects, self._loader, self.layers))
        self.housekeeper = Housekeeper(
            root, self._state, self.layers, self._objects, self._room, self.ingests, needs
        )
        self.disk_use = DiskUse(root, self._state, self._room, self.housekeeper)
        self._sources.find_missing(self._state.views(), self._images)
        self.allowance = Allowance(self._state, self.policy, needs)
        self._resolvers = WorkerPool("resolve", limits.RESOLVE_WORKERS, limits.RESOLVE_QUEUE)
        self._loaders = WorkerPool("toc", limits.RESOLVE_WORKERS, limits.RESOLVE_QUEUE)
        self._lock = threading.Lock()
        self._lookups: Counter[str] = Counter()
        self._pending: dict[int, list[Answer]] = {}
        self._waiting: Counter[str] = Counter()  # lookups by registry
        self._refusals = Refusals(client)
        self._uses = UseCounts(self._state)
        self._objects.ledger.keep_syncing(self._backup.renew)
        self._objects.disk.when_back(self._uses.save_soon)
        self._objects.disk.when_back(self._state.save_layers)
        self.layers.resume()
        self.housekeeper.start()

    def _rebuild(self, record: LayerRecord, references: tuple[Reference, ...]) -> None:
        how = self._loader if record.form.lazy else self.ingests
        how.rebuild(record, references)

    # -- lookups ---------------------------------------------------------------------

    def view(self, key: int) -> View | None:
        """The view with this name hash.  Never waits."""
        return self._state.view(key)

    def views_of(self, key: int) -> tuple[View, ...]:
        """The views of the reference with this name hash.  Never waits."""
        return self._state.views_of(key)

    def views(self) -> tuple[View, ...]:
        """All names that layers were shown under.  Never waits."""
        return self._state.views()

    def blob_size(self, view: View) -> int:
        """Size in bytes of the compressed layer."""
        record = self._state.layer(view.slot)
        return record.size if record else 0

    def references(self) -> tuple[str, ...]:
        """References with at least one view, sorted."""
        return tuple(sorted({view.reference for view in self._state.views() if view.reference}))

    def resolve(self, reference: str, name: Digest, answer: Answer) -> None:
        """Find out about a layer; ``answer`` is called once, perhaps at once.

        ``reference`` is empty for a store configured without ``:ref``.
        """
        key = names.name_hash(reference, name)
        known = self._state.view(key)
        anew = partial(self._resolve_anew, key, reference, name, answer)
        if known is None:
            anew()
            return

        def show() -> None:
            self.found(known)
            answer(known)

        self.allowance.settle(known, show, anew)

    def _resolve_anew(self, key: int, reference: str, name: Digest, answer: Answer) -> None:
        refusal = self._refusals.recent(key, reference)
        with self._lock:
            waiting = self._pending.get(key)
            if refusal is None and waiting is not None:
                waiting.append(answer)
                return
            if refusal is None and (
                len(self._pending) >= limits.RESOLVE_QUEUE
                or self._waiting[_registry(reference)] >= limits.RESOLVE_QUEUE_SHARE
            ):
                refusal = Refusal(BUSY, "too many lookups are waiting")
            if refusal is None:
                self._pending[key] = [answer]
                self._waiting[_registry(reference)] += 1
        if refusal is not None:
            self._count_refusal(reference, name, refusal)
            answer(refusal)
            return
        self._queue(key, reference, name, time.monotonic() + limits.RESOLVE_SECONDS)

    def _queue(self, key: int, reference: str, name: Digest, deadline: float) -> None:
        if not self._resolvers.submit(lambda: self._resolve(key, reference, name, deadline)):
            self._answer(key, reference, name, Refusal(BUSY, "too many lookups are waiting"))

    def judge(self, reference: str, name: Digest) -> View | Refusal:
        """Find out about a layer in this thread, as ``resolve`` does."""
        known = self._state.view(names.name_hash(reference, name))
        if known is not None and self.allowance.stands(known):
            return known
        try:
            return self._find(reference, name, time.monotonic() + limits.RESOLVE_SECONDS)
        except LayerstoreError as error:
            return Refusal.of(error)

    def inspected(self, reference: Reference, descriptor: Descriptor, diff_id: Digest) -> Layer:
        """Open a layer to look at it: fetches its TOC, or all of one that has none.

        Raises what keeps it from being read.
        """
        if announced(descriptor).form.lazy:
            deadline = time.monotonic() + limits.RESOLVE_SECONDS
            record = self._loader.load(reference, descriptor, diff_id, deadline)
        else:
            ingest = self.ingests.start(reference, descriptor, diff_id, urgent=True)
            ingest.finished.wait()
            if ingest.record is None:
                raise ingest.error or StorageError("the layer was not taken in")
            record = ingest.record
        return self.layers.open(record.slot)

    def chosen(
        self, reference: Reference, platforms: Collection[Platform] | None, deadline: float
    ) -> list[tuple[Manifest, tuple[Digest, ...]]]:
        """The images of a reference and the DiffIDs of their layers, see ``Images.chosen``."""
        return self._images.chosen(reference, platforms, deadline)

    def _resolve(self, key: int, reference: str, name: Digest, deadline: float) -> None:
        result: View | Refusal
        try:
            if time.monotonic() > deadline:
                raise Refusal(BUSY, "the lookup waited too long for a worker")
            meanwhile = self._refusals.recent(key, reference)
            if meanwhile is not None:
                raise meanwhile
            if not self._refusals.admits(reference):
                again = partial(self._queue, key, reference, name, deadline)
                self._outages.later(limits.RESOLVE_TURN_SECONDS, again)
                return
            with self._refusals.asking(reference):
                result = self._find(reference, name, deadline)
        except LayerstoreError as error:
            result = Refusal.of(error)
        except Exception:
            _log.exception("lookup of %s in %s failed", name, reference)
            result = Refusal("internal", "unexpected failure, see the log")
        self._answer(key, reference, name, result)

    def _answer(self, key: int, reference: str, name: Digest, result: View | Refusal) -> None:
        if isinstance(result, Refusal) and result.reason not in _PASSING:
            self._refusals.remember(key, result)
        with self._lock:
            waiting = self._pending.pop(key, [])
            self._waiting[_registry(reference)] -= 1
            self._waiting += Counter()  # forgets those of whom none waits
            if not isinstance(result, Refusal):
                self._lookups["resolved"] += len(waiting)
        for answer in waiting:
            if isinstance(result, Refusal):
                self._count_refusal(reference, name, result)
            answer(result)

    def _count_refusal(self, reference: str, name: Digest, refusal: Refusal) -> None:
        """Each refused lookup is one line in the log and one more of its reason."""
        self.count_lookup(refusal.reason)
        _log.warning(
            "event=lookup-refused reason=%s reference=%s layer=%s detail=%s",
            refusal.reason, reference or "-", name, refusal,
        )  # fmt: skip

    def _find(self, reference: str, name: Digest, deadline: float) -> View:
        self._objects.disk.check()  # what is found now could not be remembered
        match = (
            self._images.find(reference, name, deadline)
            if reference
            else self._images.find_anywhere(name, deadline)
        )
        if match.repeated:
            # its one path would stand for several lower directories: overlayfs refuses (ELOOP)
            raise Refusal(REPEATED, "the image has this layer more than once", subject=reference)
        diff_id = self._images.diff_id(match, deadline)
        if match.dialect is Dialect.TOC:
            record = self._load(match, diff_id, deadline)
            info = toc_info(record, diff_id)
        else:
            record = self._find_by_blob(match, diff_id, deadline)
            info = layer_info(record, diff_id, match.descriptor)
        self._sources.add(record.slot, match.reference)
        self.layers.open(record.slot)
        view = self._state.add_view(reference, name, match.dialect, record.slot, info)
        self.allowance.found(view)
        _log.info(
            "event=lookup-resolved reference=%s layer=%s dialect=%s form=%s slot=%d",
            reference or "-", name, match.dialect.value, record.form.value, record.slot,
        )  # fmt: skip
        self.layers.start(record.slot)
        return view

    def _load(self, match: Match, diff_id: Digest, deadline: float) -> LayerRecord:
        """The layer by its TOC, which is loaded if need be."""
        self._load_others(match, deadline)
        toc = announced(match.descriptor).toc_digest
        why = refuted(self._state, match.descriptor.digest, toc, diff_id)
        if why is not None:
            raise Refusal(QUARANTINED, f"the layer is in quarantine: {why}")
        return self._loader.load(match.reference, match.descriptor, diff_id, deadline)

    def _find_by_blob(self, match: Match, diff_id: Digest, deadline: float) -> LayerRecord:
        """The layer for a client that will believe what ``info`` says of blob and diff ID."""
        if self.policy.dialect_l is DialectL.OFF:
            raise Refusal(DIALECT_L_OFF, "layers are not served by their blob digest here")
        promised = announced(match.descriptor)
        policy = self.policy.ordinary_for(match.reference)
        if not promised.form.lazy and policy is Ordinary.OFF:
            raise Refusal(ORDINARY_OFF, "layers without a TOC are not served for this image")
        here = self.ingests.here(match.descriptor.digest, diff_id)
        if here is not None:
            return here
        if self.policy.dialect_l is DialectL.LAZY:
            lazily = self._find_lazily(match, promised, diff_id, deadline)
            if lazily is not None and diff_size(lazily, match.descriptor) is not None:
                return lazily
        return self._find_ordinary(match, policy, diff_id, deadline)

    def _find_lazily(
        self, match: Match, promised: Announced, diff_id: Digest, deadline: float
    ) -> LayerRecord | None:
        """The layer by its TOC, or by an index that this node was given."""
        if promised.form.lazy:
            record: LayerRecord | None = self._load(match, diff_id, deadline)
        else:
            record = self.indexes.given(match.descriptor, diff_id)
        if record is not None:
            self._check_claims(record)
        return record

    def _check_claims(self, record: LayerRecord) -> None:
        """Nobody may be shown a layer of which two images tell different stories."""
        others = [
            other
            for other in self._state.layers_of_blob(record.blob_digest)
            if other.slot != record.slot and not other.quarantine
        ]
        for other in others:
            if other.verified and other.diff_id != record.diff_id:
                why = f"the config states diff ID {record.diff_id}, it is {other.diff_id}"
                self.layers.quarantine(record.slot, Claim.DIFF_ID, why)
                raise Refusal(QUARANTINED, why)
        if others:
            for slot in (record.slot, *(other.slot for other in others)):
                if not self._state.is_complete(slot):
                    self.layers.hasten(slot, lambda _: None)
            raise Refusal(
                CONTRADICTION, "images tell different things of this layer; it is being checked"
            )

    def _find_ordinary(
        self, match: Match, policy: Ordinary, diff_id: Digest, deadline: float
    ) -> LayerRecord:
        """The layer without the help of a TOC: all of it must be here and verified."""
        if policy is Ordinary.OFF:
            raise Refusal(ORDINARY_OFF, "layers without a TOC are not served for this image")
        if policy is Ordinary.KNOWN:
            raise Refusal(NOT_HERE, "the layer has no TOC and is not complete here")
        if not self._room.allows(match.descriptor.size * _UNPACKED):
            raise Refusal(NO_ROOM, "the disk has no room to fetch the layer ahead")
        eager = policy is Ordinary.EAGER
        ingest = self.ingests.start(match.reference, match.descriptor, diff_id, urgent=eager)
        if eager:
            ingest.finished.wait(
                max(0.0, min(self.policy.eager_seconds, deadline - time.monotonic()))
            )
        if ingest.record is not None:
            return ingest.record
        if ingest.error is not None:
            raise ingest.error
        raise Refusal(BEING_FETCHED, "the layer has no TOC and is being fetched for later")

    def _load_others(self, match: Match, deadline: float) -> None:
        """Load the TOCs of the image's other layers meanwhile: their lookups follow."""
        for number, descriptor in enumerate(match.manifest.layers):
            if number != match.number and _is_lazy(descriptor):
                other = dataclasses.replace(match, number=number)
                self._loaders.submit(partial(self._load_ahead, other, deadline))

    def _load_ahead(self, match: Match, deadline: float) -> None:
        try:
            diff_id = self._images.diff_id(match, deadline)
            self._loader.load(match.reference, match.descriptor, diff_id, deadline)
        except LayerstoreError as error:
            # its own lookup, if one comes, tries again and gives the reason
            _log.debug("TOC of %s was not loaded ahead: %s", match.descriptor.digest, error)

    def refuse_quarantined(self, view: View) -> None:
        """A lookup met a layer that was shown once and is in quarantine now."""
        refusal = Refusal(QUARANTINED, "it was found to be false")
        self._count_refusal(view.reference, view.name, refusal)

    def quarantined(self, view: View) -> bool:
        """Whether the layer must not be shown any more.  Never waits."""
        record = self._state.layer(view.slot)
        return record is not None and bool(record.quarantine)

    def count_lookup(self, result: str) -> None:
        """Count a lookup by its result or reason."""
        with self._lock:
            self._lookups[result] += 1

    def found(self, view: View) -> None:
        """A lookup of a known layer was answered elsewhere."""
        self.count_lookup("known")
        self.layers.touch(view.slot)

    # -- use counts ---------------------------------------------------------------------

    def use(self, view: View) -> None:
        """A client says that it uses the layer."""
        self._uses.count(view.key, 1)

    def release(self, view: View) -> None:
        """A client says that it no longer uses the layer."""
        self._uses.count(view.key, -1)

    # -- report and end --------------------------------------------------------------------

    def status(self) -> dict[str, object]:
        """Everything that ``layerstore status`` shows."""
        with self._lock:
            lookups = dict(self._lookups)
        return {
            "lookups": lookups,
            "layers": layerreport.report(self._state, self.layers),
            "ingests": self.ingests.status(),
            "content": self.layers.stats.as_dict(),
            "outages": self._outages.status(),
            "disk": self._objects.disk.as_dict()
            | {
                "held_bytes": self._objects.shelf.size,
                "used_bytes": self._room.used,
                "limit_bytes": self._room.allowed.limit,
                "evicted_bytes": self.housekeeper.evicted_bytes,
            },
            "registry": {
                "requests": self._client.stats.requests,
                "received_bytes": self._client.stats.bytes,
                "retries": self._client.stats.retries,
            },
        }

    def let_go(self, *, sync: bool) -> None:
        """`close`, for a process that ends right then: what runs is not waited for."""
        self._uses.close()
        self.housekeeper.close(0.0)
        if sync:
            self._objects.ledger.end(clean=False)

    def close(self) -> None:
        """Stop fetching, write what is not written yet, close the files."""
        self.housekeeper.close()
        self.allowance.close()
        self._resolvers.close()
        self._loaders.close()
        self._outages.close()
        self._scheduler.close()
        self.fetches.close()
        self.checks.close()
        self.ingests.close()
        self._uses.close()
        self.layers.close()
        self._objects.close()
        self._backup.renew(last=True)
        self._state.close()
        self._objects.ledger.end()


def _registry(reference: str) -> str:
    return reference.partition("/")[0]


def _is_lazy(descriptor: Descriptor) -> bool:
    try:
        return announced(descriptor).form.lazy
    except LayerstoreError:
        return False
