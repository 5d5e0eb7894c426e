"""Which places give no answer, and what waits until they do.

*Places* is a text that names the hosts that one fetch asks, one after the other.  When they
give no answer, whatever needs them waits here, not in a worker, and one of those who wait is
sent to try again, after pauses that double up to a bound: one probe for all.  Any answer ends
the outage, and all go on at once.

Nothing is known of an outage but that it is one: who comes while it lasts and nobody waits
tries by himself, at most so often as a probe would.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from layerstore import limits
from layerstore.errors import LayerstoreError, NetworkError, OutageError

_log = logging.getLogger(__name__)

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that was sent to places and has no answer yet."""

    places: str
    number: int


@dataclass(slots=True, eq=False)
class _Waiting:
    again: Callable[[bool], None]
    give_up: Callable[[LayerstoreError], None]
    urgent: bool
    over: bool = False


@dataclass(slots=True, eq=False)
class _Outage:
    places: str
    since: float
    error: LayerstoreError
    tried: float
    tries: int = 0
    pause: float = 0.0
    probing_until: float = 0.0
    planned: float = math.inf  # when the timer looks at it next
    told: bool = False
    waiting: list[_Waiting] = field(default_factory=list)


def pause_after(tries: int, jitter: Callable[[], float] = random.random) -> float:
    """Seconds before the next try, after so many that failed: doubled each time, bounded."""
    longest = limits.BACKOFF_FIRST_SECONDS * 2.0 ** min(tries, 16)
    return min(longest, limits.OUTAGE_PROBE_SECONDS) * (0.5 + jitter() / 2)


def gone(places: str, seconds: float, error: LayerstoreError) -> OutageError:
    """What a read gets when its time is over."""
    return OutageError(
        f"no answer from {places} for {seconds:.0f} seconds: {error}",
        advice="it is asked again at the next read; see outages in operations.md",
    )


class Outages:
    """All outages of one store, and the timer that ends waits.  Thread-safe.

    Callbacks are called without a lock, from the timer's thread or that of who brought an
    answer; they must not wait.
    """

    def __init__(
        self, *, clock: Clock = time.monotonic, jitter: Callable[[], float] = random.random
    ) -> None:
        self._clock = clock
        self._jitter = jitter
        self._condition = threading.Condition()
        self._numbers = itertools.count()
        self._asked: dict[str, dict[int, float]] = {}
        self._outages: dict[str, _Outage] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._counts: Counter[str] = Counter()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="outages", daemon=True)
        self._thread.start()

    # -- what is known of places ---------------------------------------------------

    def asked(self, places: str) -> Asked:
        """A request is being sent; `answered` or `unanswered` must follow."""
        with self._condition:
            number = next(self._numbers)
            self._asked.setdefault(places, {})[number] = self._clock()
            return Asked(places, number)

    def answered(self, asked: Asked) -> None:
        """An answer came, if only that there is no such blob: an outage is over."""
        with self._condition:
            self._asked.pop(asked.places, None)  # whoever asked before is only late
            outage = self._outages.pop(asked.places, None)
            if outage is None:
                return
            waiting = [one for one in outage.waiting if not one.over]
            for one in waiting:
                one.over = True
            seconds = self._clock() - outage.since
            if outage.told:
                self._counts["ended"] += 1
        if outage.told:
            _log.warning(
                "event=outage-ended places=%s seconds=%.1f waiting=%d",
                outage.places, seconds, len(waiting),
            )  # fmt: skip
        for one in waiting:
            one.again(False)

    def unanswered(self, asked: Asked, error: LayerstoreError, *, sure: bool) -> None:
        """No answer came; ``sure`` says that it is worth calling an outage."""
        with self._condition:
            mine = self._asked.get(asked.places, {})
            latest = mine.pop(asked.number, None) is not None  # else others had answers since
            if not mine:
                self._asked.pop(asked.places, None)
            outage = self._outages.get(asked.places)
            if outage is None and sure and latest:
                outage = self._begin(asked.places, error)
            if outage is None:
                return
            outage.waiting = [one for one in outage.waiting if not one.over]
            outage.error = error
            outage.tries += 1
            outage.tried = self._clock()
            outage.probing_until = 0.0
            outage.pause = max(
                pause_after(outage.tries, self._jitter), getattr(error, "pause", 0.0)
            )
            self._counts["tries"] += 1
            told, outage.told = outage.told, True
            self._counts["begun"] += not told
            self._plan(outage)
        if not told:
            _log.warning("event=outage-begun places=%s error=%s", asked.places, error)

    def admits(self, places: str) -> bool:
        """Whether a request is worth sending: else `wait`.  May make the caller the probe."""
        with self._condition:
            now = self._clock()
            outage = self._outages.get(places)
            if outage is None:
                oldest = next(iter(self._asked.get(places, {}).values()), now)
                if now - oldest < limits.OUTAGE_SUSPECT_SECONDS:
                    return True
                what = f"no answer for {limits.OUTAGE_SUSPECT_SECONDS:g} seconds"
                outage = self._begin(places, NetworkError(what))
                outage.since = outage.tried = oldest
            if outage.probing_until > now or now < self._due(outage, urgent=True):
                return False
            self._probe_begins(outage)
            return True

    def untried(self, places: str) -> None:
        """The probe ended without a request."""
        with self._condition:
            outage = self._outages.get(places)
            if outage is not None:
                outage.probing_until = 0.0
                self._plan(outage)

    def since(self, places: str) -> float | None:
        """When the outage began (on the clock), None if there is none."""
        with self._condition:
            outage = self._outages.get(places)
            return None if outage is None else outage.since

    # -- waiting ----------------------------------------------------------------------

    def wait(
        self,
        places: str,
        again: Callable[[bool], None],
        give_up: Callable[[LayerstoreError], None],
        *,
        until: float | None,
        probed: bool = False,
    ) -> None:
        """Call ``again(probe)`` when the places are worth asking, or ``give_up`` when time is over.

        ``probe`` tells whether the one who waited is the probe.  ``until`` is a time of the
        clock; None: for ever, and not urgently.  Who was the probe (``probed``) is it again.
        """
        one = _Waiting(again, give_up, urgent=until is not None)
        with self._condition:
            if self._closed:
                return
            outage = self._outages.get(places)
            if outage is not None and (until is None or until > self._clock()):
                self._counts["waited"] += one.urgent
                outage.waiting.insert(0 if probed else len(outage.waiting), one)
                self._plan(outage)
                if until is not None:
                    self._at(until, lambda: self._expire(outage, one))
                return
        if outage is None:
            again(False)
        else:
            give_up(self._too_long(outage))

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """Call after a while."""
        with self._condition:
            self._at(self._clock() + seconds, call)

    def status(self) -> dict[str, object]:
        """For ``layerstore status``: what is out now, and counts since the start."""
        with self._condition:
            now = self._clock()
            return {
                **{name: self._counts[name] for name in ("begun", "ended", "tries", "waited")},
                "expired": self._counts["expired"],
                "now": [
                    {
                        "places": outage.places,
                        "seconds": round(now - outage.since, 1),
                        "waiting": sum(not one.over for one in outage.waiting),
                        "error": str(outage.error),
                    }
                    for outage in self._outages.values()
                    if outage.told
                ],
            }

    def close(self) -> None:
        """Wake nobody any more."""
        with self._condition:
            self._closed = True
            self._outages.clear()
            self._timers.clear()
            self._condition.notify_all()
        self._thread.join(1)

    # -- with the lock held -------------------------------------------------------------

    def _begin(self, places: str, error: LayerstoreError) -> _Outage:
        now = self._clock()
        outage = self._outages[places] = _Outage(places, now, error, tried=now)
        return outage

    def _probe_begins(self, outage: _Outage) -> None:
        """Somebody tries; should he never tell, another may some time later."""
        outage.probing_until = self._clock() + limits.OUTAGE_PROBE_LOST_SECONDS
        self._plan(outage)

    def _due(self, outage: _Outage, *, urgent: bool) -> float:
        pause = outage.pause if urgent else max(outage.pause, limits.OUTAGE_IDLE_SECONDS)
        return outage.tried + pause

    def _next(self, outage: _Outage) -> tuple[float, _Waiting] | None:
        """Who is to probe, and when; the urgent come first."""
        urgent = next((one for one in outage.waiting if one.urgent and not one.over), None)
        chosen = urgent or next((one for one in outage.waiting if not one.over), None)
        if chosen is None:
            return None
        return max(self._due(outage, urgent=chosen.urgent), outage.probing_until), chosen

    def _plan(self, outage: _Outage) -> None:
        """Have the next probe sent when it is due."""
        following = self._next(outage)
        if following is not None and following[0] < outage.planned:
            outage.planned = following[0]
            self._at(outage.planned, lambda: self._probe(outage))

    def _at(self, when: float, call: Callable[[], None]) -> None:
        if self._closed:
            return
        heapq.heappush(self._timers, (when, next(self._numbers), call))
        if self._timers[0][0] == when:
            self._condition.notify_all()

    # -- in the timer's thread ------------------------------------------------------------

    def _probe(self, outage: _Outage) -> None:
        with self._condition:
            outage.planned = math.inf
            if self._outages.get(outage.places) is not outage:
                return
            following = self._next(outage)
            if following is None or following[0] > self._clock():
                self._plan(outage)
                return
            chosen = following[1]
            chosen.over = True
            self._probe_begins(outage)
        chosen.again(True)

    def _expire(self, outage: _Outage, one: _Waiting) -> None:
        with self._condition:
            if one.over:
                return
            one.over = True
        one.give_up(self._too_long(outage))

    def _too_long(self, outage: _Outage) -> LayerstoreError:
        with self._condition:
            self._counts["expired"] += 1
            seconds = self._clock() - outage.since
        return gone(outage.places, seconds, outage.error)

    def _work(self) -> None:
        while True:
            with self._condition:
                while not self._closed and not (
                    self._timers and self._timers[0][0] <= self._clock()
                ):
                    self._condition.wait(
                        max(0.0, self._timers[0][0] - self._clock()) if self._timers else None
                    )
                if self._closed:
                    return
                call = heapq.heappop(self._timers)[2]
            try:
                call()
            except Exception:
                _log.exception("a wait for a registry ended badly")
