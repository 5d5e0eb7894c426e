"""Where the blobs of layers come from: every repository that a client named a layer in."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial

from layerstore import limits
from layerstore.errors import (
    ConfigError,
    ContentError,
    LayerstoreError,
    NetworkError,
    NotFound,
    RegistryError,
)
from layerstore.image import Reference
from layerstore.provider.images import Images
from layerstore.provider.state import LayerRecord, View
from layerstore.registry import BlobReader, RegistryClient

_log = logging.getLogger(__name__)


class Watched:
    """A response; ``broken`` is called when it breaks."""

    def __init__(self, reader: BlobReader, broken: Callable[[], None]) -> None:
        self.start = reader.start
        self.close = reader.close
        self._reader = reader
        self._broken = broken

    def read_some(self, limit: int) -> bytes:
        """See BlobReader."""
        try:
            return self._reader.read_some(limit)
        except NetworkError:
            self._broken()
            raise


class Sources:
    """References by the slot of their layer, the one to ask first at the front.  Thread-safe.

    ``patience`` says how many seconds reads of an image wait for a registry that gives no
    answer.
    """

    def __init__(self, client: RegistryClient, patience: Callable[[Reference], float]) -> None:
        self._client = client
        self._patience = patience
        self._lock = threading.Lock()
        self._references: dict[int, list[Reference]] = {}

    def add(self, slot: int, reference: Reference) -> None:
        """The blob of the layer can be fetched from this reference's repository, too."""
        with self._lock:
            known = self._references.setdefault(slot, [])
            repositories = [one.name for one in known]
            if reference.name in repositories:
                del known[repositories.index(reference.name)]
            known.insert(0, reference)

    def find_missing(self, views: Iterable[View], images: Images) -> None:
        """Layers that were only ever named without a reference: where they can be fetched."""
        for view in views:
            if view.reference or self.of(view.slot):
                continue
            try:
                match = images.find_anywhere(view.name, time.monotonic())
            except LayerstoreError as error:
                _log.warning("event=layer-without-source layer=%s error=%s", view.name, error)
            else:
                self.add(view.slot, match.reference)

    def of(self, slot: int) -> tuple[Reference, ...]:
        """The references of a layer, in the order of asking."""
        with self._lock:
            return tuple(self._references.get(slot, ()))

    def patience(self, slot: int) -> float:
        """Seconds that a read of the layer waits for an answer.  No I/O."""
        return max(map(self._patience, self.of(slot)), default=limits.OUTAGE_FAIL_SECONDS)

    def places(self, slot: int) -> str:
        """The hosts that are asked for the layer, for `Outages`."""
        hosts: set[str] = set()
        for reference in self.of(slot):
            try:
                hosts.update(self._client.hosts(reference))
            except ConfigError:
                continue  # the fetch itself meets it, and tells
        return ",".join(sorted(hosts))

    def ask_last(self, slot: int, reference: Reference | None = None) -> None:
        """A place (the first one if None) gave no bytes or wrong ones: ask others before it."""
        with self._lock:
            known = self._references.get(slot, [])
            if reference is None and known:
                reference = known[0]
            if reference in known:
                known.remove(reference)
                known.append(reference)

    def open(self, record: LayerRecord, offset: int, length: int, seconds: float) -> Watched:
        """A range of a layer's blob, from the first place that gives it; each is asked once.

        The head of the answer comes within ``seconds``.  Of several failures one that may pass
        is raised.
        """
        slot = record.slot
        failure: LayerstoreError = NotFound(
            "no reference is known for this layer", subject=record.blob_digest
        )
        for reference in self.of(slot):
            try:
                reader = self._client.open_blob(
                    reference,
                    record.blob_digest,
                    offset=offset,
                    length=length,
                    size=record.size,
                    answer_by=self._client.settings.clock() + seconds,
                    attempts=1,
                )
            except (RegistryError, NetworkError, ContentError, ConfigError) as error:
                failure = failure if failure.passing else error
                self.ask_last(slot, reference)
            else:
                return Watched(reader, partial(self.ask_last, slot, reference))
        raise failure
