"""Whether a name that was resolved once is answered again, now that the policy may be another one.

Who uses a layer already goes on with it, whatever the policy says now: a container must never lose
its files.  A path does not tell who asks, so that is decided by what is known of uses: the use
count, and if that is zero (it is a hint, and may have been lost) what the graph roots link to and
what is mounted.  A name that the policy does not permit and that nobody uses is resolved anew, as
if it had never been heard of.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from layerstore import limits
from layerstore.image import Reference
from layerstore.provider.dialect import Dialect
from layerstore.provider.needs import LookAtNeeds, Needs
from layerstore.provider.policy import DialectL, Ordinary, Policy
from layerstore.provider.state import State, View
from layerstore.provider.workers import WorkerPool

_log = logging.getLogger(__name__)


class Allowance:
    """Judges known views by ``policy``, which stays as it is.  Thread-safe."""

    def __init__(self, state: State, policy: Policy, needs: LookAtNeeds) -> None:
        self._state = state
        self._policy = policy
        self._look_at_needs = needs
        self._needs = Needs()
        self._looked = float("-inf")
        self._found: set[int] = set()
        self._kept: set[int] = set()
        self._lookers = WorkerPool("in-use", 1, limits.RESOLVE_QUEUE)

    def found(self, view: View) -> None:
        """The view was resolved under this policy."""
        self._found.add(view.key)

    def permits(self, view: View) -> bool:
        """Whether the policy is known to have nothing against the view.  Never waits."""
        if view.dialect is Dialect.TOC or view.key in self._found:
            return True
        if self._policy.dialect_l is DialectL.OFF or self._ordinary_off(view):
            return False
        record = self._state.layer(view.slot)
        return self._policy.dialect_l is DialectL.LAZY or (record is not None and record.verified)

    def _ordinary_off(self, view: View) -> bool:
        """Whether the layer is not to be shown if the image announces no TOC of it."""
        # Whether it does stands in the manifest: resolving anew tells, once.
        if view.reference:
            policy = self._policy.ordinary_for(Reference.parse(view.reference))
            return policy is Ordinary.OFF
        return Ordinary.OFF in (self._policy.ordinary, *self._policy.ordinary_by_prefix.values())

    def name_seconds(self, view: View) -> int | None:
        """How long a client's kernel may keep the view's names; None: for ever."""
        if view.dialect is Dialect.TOC:
            return None
        return limits.BLOB_NAME_SECONDS if self.permits(view) else 0

    def stands(self, view: View) -> bool:
        """Whether the view is to be shown at once.  Never waits."""
        return self.permits(view) or (self._state.uses(view.key) > 0 and self._keep(view))

    def _keep(self, view: View) -> bool:
        if view.key not in self._kept:
            self._kept.add(view.key)
            _log.info("event=kept-in-use reference=%s layer=%s", view.reference or "-", view.name)
        return True

    def settle(self, view: View, show: Callable[[], None], anew: Callable[[], None]) -> None:
        """Call ``show`` if the view stands or is used, else ``anew``: at once or in another thread.

        Where nobody can tell whether it is used, it counts as used.
        """
        look = partial(self._look, view, show, anew)
        if self.stands(view) or not self._lookers.submit(look):
            show()

    def _look(self, view: View, show: Callable[[], None], anew: Callable[[], None]) -> None:
        try:
            used = self._is_used(view)
        except Exception:
            _log.exception("looking who uses %s failed", view.name)
            used = True
        if used and self._keep(view):
            show()
        else:
            anew()

    def _is_used(self, view: View) -> bool:
        began = time.monotonic()
        # All layers of a pull are asked for.  Who came since the last look is counted; who went may
        # still be seen in it, so it is good for a no only.
        if began - self._looked > limits.IN_USE_LOOK_SECONDS or self._seen(view):
            self._needs, self._looked = self._look_at_needs(), began
        return self._state.uses(view.key) > 0 or self._seen(view)

    def _seen(self, view: View) -> bool:
        needs = self._needs
        return not needs.known or view.key in needs.referenced or view.key in needs.mounted

    def close(self) -> None:
        """Begin no more looks."""
        self._lookers.close()
