"""What lookups were refused a moment ago, and which registries give them no answer.

All of it is bounded in number and forgotten within seconds.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import TypeVar

from layerstore import limits
from layerstore.errors import LayerstoreError, NetworkError
from layerstore.image import Reference
from layerstore.provider.refusal import OUTAGE, Refusal
from layerstore.registry import RegistryClient

_K = TypeVar("_K", int, str)


class Refusals:
    """Thread-safe.  References are texts, empty where a store is asked without one."""

    def __init__(self, client: RegistryClient) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._refused: OrderedDict[int, tuple[float, Refusal]] = OrderedDict()
        self._unreachable: OrderedDict[str, tuple[float, Refusal]] = OrderedDict()
        self._asking: dict[str, list[float]] = {}

    def remember(self, key: int, refusal: Refusal) -> None:
        """The name with this hash was refused."""
        with self._lock:
            _put(self._refused, key, refusal)

    def recent(self, key: int, reference: str) -> Refusal | None:
        """What was refused a moment ago; an unreachable registry is not tried for each layer."""
        now = time.monotonic()
        with self._lock:
            when, refusal = self._refused.get(key, (0.0, None))
            if refusal is not None and now - when < limits.FAILURE_SECONDS:
                return refusal
            if not self._unreachable:
                return None
            for name in (reference, self._places(reference)):
                when, refusal = self._unreachable.get(name, (0.0, None))
                if refusal is None:
                    continue
                if now - when < limits.UNREACHABLE_SECONDS and not self._answered(reference, when):
                    return refusal
                del self._unreachable[name]
        return None

    def admits(self, reference: str) -> bool:
        """Whether a lookup may ask now: of a registry that says nothing only a few do at a time.

        Those of other registries are to find a worker.  Raises Refusal when it has been silent
        for a while.
        """
        now = time.monotonic()
        places = self._places(reference)
        with self._lock:
            waiting = self._asking.get(places, ())
            oldest = min(waiting, default=now)
            if len(waiting) < limits.RESOLVE_SILENT or self._answered(reference, oldest):
                return True
        if now - oldest < limits.OUTAGE_SUSPECT_SECONDS:
            return False
        raise Refusal(OUTAGE, f"{places} gave no answer for {now - oldest:.0f} seconds")

    @contextlib.contextmanager
    def asking(self, reference: str) -> Iterator[None]:
        """A lookup asks the registry of a reference; a NetworkError in it is remembered."""
        places = self._places(reference)
        began = time.monotonic()
        with self._lock:
            waiting = self._asking.setdefault(places, [])
            waiting.append(began)
        try:
            yield
        except NetworkError as error:
            if reference:
                with self._lock:
                    silent = not self._answered(reference, began)
                    _put(self._unreachable, places if silent else reference, Refusal.of(error))
            raise
        finally:
            with self._lock:
                waiting.remove(began)
                if not waiting:
                    self._asking.pop(places, None)

    def _answered(self, reference: str, when: float) -> bool:
        """Whether the registry of a reference answered anybody since then."""
        try:
            return self._client.answered_since(Reference.parse(reference), when)
        except LayerstoreError:
            return True

    def _places(self, reference: str) -> str:
        """The hosts that are asked for a reference; the reference itself if there are none."""
        try:
            return ",".join(self._client.hosts(Reference.parse(reference)))
        except LayerstoreError:
            return reference


def _put(known: OrderedDict[_K, tuple[float, Refusal]], key: _K, refusal: Refusal) -> None:
    # what led to it would keep whole images in memory
    refusal.__traceback__ = refusal.__cause__ = refusal.__context__ = None
    known[key] = (time.monotonic(), refusal)
    known.move_to_end(key)
    while len(known) > limits.RESOLVE_QUEUE:
        known.popitem(last=False)
