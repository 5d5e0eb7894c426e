"""What the keeper does: one loop over signals, servers, who asks, and time.

See `keeper` for what it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from layerstore import limits
from layerstore.errors import LayerstoreError, ServiceError, exit_status
from layerstore.service import held, messages, renewal
from layerstore.service.child import Child, Leave, Stage
from layerstore.service.holding import Holding
from layerstore.service.inforce import InForce
from layerstore.service.options import Options
from layerstore.service.place import Place
from layerstore.service.reception import Reception
from layerstore.service.restarts import Restarts
from layerstore.service.signalpipe import SignalPipe
from layerstore.service.systemd import Notifier

_log = logging.getLogger("layerstore.keeper")

_NO_RESEND: Final = "LAYERSTORE_NO_RESEND"  # for tests: do as on a kernel before 6.9


@dataclass(slots=True)
class Keeper:
    """The state of the loop.

    ``server`` has the mounts, or is on its way from or to them.  ``spare`` is the next one: it
    prepares itself and then waits until it is needed, because to start an interpreter and to load
    everything takes far longer than to take over, and because code that is loaded does not change
    when somebody installs another version.  ``candidate`` is the one of a reload; until it serves,
    both others stay.  ``in_force`` are the settings of the reload, or of the start, that succeeded.
    """

    options: Options
    notifier: Notifier
    holding: Holding
    signals: SignalPipe
    place: Place = field(default_factory=Place)
    in_force: InForce = field(default_factory=InForce.empty)
    server: Child | None = None
    spare: Child | None = None
    candidate: Child | None = None
    first: bool = True  # nothing was served yet: what fails now is the caller's to know
    stopping: bool = False  # a signal asked for the end
    abrupt: bool = False  # at once, whoever uses the mounts
    reloading: bool = False
    renewing: bool = False  # after a reload the keeper itself is to be replaced
    restarts: Restarts = field(default_factory=Restarts)
    start_at: float | None = None  # when the next server is to be started
    next_sign: float | None = None
    asking: list[socket.socket] = field(default_factory=list)  # who waits for the reload
    heir: socket.socket | None = None  # a new keeper that takes over
    predecessor: socket.socket | None = None  # an old keeper that waits until we serve
    ending: tuple[int, str] | None = None  # exit status, and what goes to standard error
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    _reception: Reception = field(init=False)

    def __post_init__(self) -> None:
        self._reception = Reception(self._selector, self._asked)

    # -- life ------------------------------------------------------------------------

    def run(self) -> int:
        """Keep the mount until its end; the exit status."""
        self._selector.register(self.signals.fd, selectors.EVENT_READ, self._signalled)
        if self.notifier.watchdog_seconds is not None:
            self.next_sign = time.monotonic()
        if self.server is None:
            self._safely(self._start)
        self._safely(self._reap)
        while self.ending is None:
            for key, _ in self._selector.select(self._wait_seconds()):
                self._safely(key.data)
            self._safely(self._reap)
            self._safely(self._timers)
        return self._end()

    def _safely(self, call: Callable[[], None]) -> None:
        """Nothing that goes wrong here may take the mount along; once it ends, nothing begins."""
        if self.ending is not None:
            return
        try:
            call()
        except LayerstoreError as error:
            if self.first:
                self._finish(exit_status(error), str(error))
            else:
                _log.error("event=keeper-failed error=%s", error)
        except Exception as error:
            _log.exception("event=keeper-failed error=%r", error)
            if self.first:
                self._finish(1, f"the keeper failed: {error!r}")

    def _end(self) -> int:
        assert self.ending is not None
        for child in self._children():
            child.kill()
        status, error = self.ending
        if error:
            print(f"layerstore: {error}", file=sys.stderr)
        if self.first and not self.notifier.stores:
            self.holding.unmount()
        if self.place.claimed:
            self.place.leave()
        if not self.first:
            _log.info("event=stopped mountpoint=%s", self.options.mountpoint)
        return status

    def _finish(self, status: int, error: str = "") -> None:
        self.ending = self.ending or (status, error)

    def _signalled(self) -> None:
        for number in self.signals.taken():
            if number in (signal.SIGTERM, signal.SIGINT):
                self._stop(signal.Signals(number).name)
            elif number == signal.SIGHUP:
                self._reload()

    def resume(self, state: renewal.State) -> None:
        """Go on where the keeper that this process was before left off."""
        self.holding.mounts, self.server, self.place = state.mounts, state.server, state.place
        self.restarts = Restarts(state.restarts, state.last_cause)
        self.in_force = state.in_force
        self.first = False
        if self.server is not None:
            self._watch(self.server)
        self.start_at = time.monotonic() + limits.SPARE_SECONDS
        self._reception.open(self.place.listener)
        _log.info("event=keeper-renewed pid=%d", os.getpid())

    # -- servers ---------------------------------------------------------------------

    def _children(self) -> list[Child]:
        every = (self.server, self.spare, self.candidate)
        return [child for child in every if child is not None]

    def _start(self) -> None:
        """Start a spare server; it becomes the server at once if there is none."""
        self.start_at = None
        if self.spare is None:
            self.spare = self._started(self.in_force)

    def _started(self, in_force: InForce) -> Child:
        child = Child.start(self.options.arguments(), in_force)
        self._watch(child)
        return child

    def _watch(self, child: Child) -> None:
        self._selector.register(child.link, selectors.EVENT_READ, partial(self._listen_to, child))

    def _listen_to(self, child: Child) -> None:
        for message in child.said():
            if "prepared" in message and child.stage is Stage.PREPARING:
                child.is_prepared(message["prepared"])
            elif "failed" in message:
                child.failure = str(message["failed"])
                child.failure_status = int(message.get("status", 1))
            elif "serving" in message and child.stage is Stage.STARTING:
                self._served(child)
            elif "sign" in message:
                child.gave_sign()
            elif "ended" in message:
                self.holding.drop_dead()
        if child.silent:  # it is ending: its exit tells how
            self._unwatch(child)
        elif child.stage is Stage.PREPARED:
            self._prepared(child)

    def _unwatch(self, child: Child) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(child.link)

    def _prepared(self, child: Child) -> None:
        """A new server can serve: it does if there is none, and the old one makes way if asked."""
        logging.getLogger("layerstore").setLevel(str(child.prepared["log_level"]))
        if self.first and not self.place.claimed:
            self._settle(child)
        if self.server is None and self.heir is None and not self.abrupt:
            self._promote(child)
        elif child is self.candidate and self.server is not None:
            self.server.retire(Leave.NOW)

    def _promote(self, child: Child) -> None:
        if child is self.spare:
            self.spare = None
        else:
            self.candidate = None
        self.server = child
        facts, fds = held.pack(self.holding.mounts)
        keeper = {
            "pid": os.getpid(),
            "restarts": self.restarts.count,
            "last_cause": self.restarts.last_cause,
            "draining": self.stopping,
            "fd_store": self.notifier.stores,
        }
        child.serve({"mounts": facts, "keeper": keeper}, fds)

    def _served(self, child: Child) -> None:
        child.served()
        self.restarts.served()
        self.in_force = child.in_force or self.in_force
        self.first = False
        if self.predecessor is not None:
            with contextlib.suppress(OSError):
                messages.send(self.predecessor, {"method": "taken"})
            self.predecessor.close()
            self.predecessor = None
        if not self.stopping:
            self.notifier.ready()
        self.start_at = time.monotonic() + limits.SPARE_SECONDS
        if self.reloading and self.candidate is None:
            _log.info("event=reloaded pid=%d", child.pid)
            if self.spare is not None:
                self.spare.dismiss()  # it has the old code and configuration
            self.renewing = True
            self._reloaded({"pid": child.pid})

    def _reap(self) -> None:
        for child in self._children():
            cause = child.reap()
            if cause is not None:
                self._listen_to(child)  # its last words
                self._unwatch(child)
                child.link.close()
                if child is self.server:
                    self.server = None
                    self._died(child, cause)
                else:
                    self._came_to_nothing(child, cause)

    def _came_to_nothing(self, child: Child, cause: str) -> None:
        """A new server ended before it could serve."""
        why = child.failure or f"the new server ended before it was ready ({cause}), see the log"
        if child is self.candidate:
            self.candidate = None
            _log.error("event=reload-failed error=%s", why)
            self._reloaded({"error": why})
            self.notifier.ready()
        else:
            self.spare = None
            if self.server is not None and child.stage is not Stage.RETIRING:
                _log.warning("event=spare-failed error=%s", why)
        if self.first:
            self._finish(child.failure_status, why)
        elif self.abrupt:
            self._finish_if_alone()
        elif self.server is not None:
            self.start_at = self.start_at or time.monotonic() + limits.SPARE_RETRY_SECONDS
        elif not self._children() and self.heir is None:
            self._restart_later(why)

    def _died(self, child: Child, cause: str) -> None:
        """The server that had the mounts is gone."""
        expected = child.stage is Stage.RETIRING
        why = f"{cause}: {child.failure}" if child.failure else cause
        self.holding.drop_dead()
        if self.first:
            self._finish(child.failure_status, child.failure or f"the server ended ({cause})")
        elif self.abrupt:
            self._finish_if_alone()
        elif self.heir is not None:
            self._hand_over()
        elif not self.holding.mounts:
            _log.info(
                "event=stopping reason=%s kept=none", "SIGTERM" if self.stopping else "unmounted"
            )
            self.abrupt = True
            self._stop_at_once()
        else:
            if not expected:
                self.restarts.died(why, child.served_since)
                _log.error("event=server-died pid=%d cause=%s", child.pid, why)
            ready = [one for one in (self.candidate, self.spare) if one is not None]
            prepared = [one for one in ready if one.stage is Stage.PREPARED]
            if self.reloading and self.candidate is None:
                then = "one that waited goes on as before" if prepared else "is started again"
                self._reloaded({"error": f"the new server ended ({why}), and {then}"})
            if prepared:
                self._promote(prepared[0])
            elif not ready:
                self._restart_later(why)

    def _finish_if_alone(self) -> None:
        if not self._children():
            self._finish(0)

    def _restart_later(self, why: str) -> None:
        """Start again: at once the first time, then ever later, but never give up."""
        wait = self.restarts.wait_seconds(why)
        if wait:
            _log.warning("event=restart-delayed seconds=%.1f error=%s", wait, why)
        self.start_at = time.monotonic() + wait

    def _settle(self, child: Child) -> None:
        """At the very start, once the first server knows the root directory: mount."""
        root = Path(child.prepared["root"])
        self.options = dataclasses.replace(self.options, root=root)
        taken = self.place.claim(root)
        if taken is not None:
            self.predecessor, mounts = taken
            self.holding.mounts += mounts
        self._reception.open(self.place.listener)
        self.holding.settle(self.options.mountpoint, resend=not os.environ.get(_NO_RESEND))

    # -- the end -----------------------------------------------------------------------

    def _stop(self, reason: str) -> None:
        if self.first:
            self._finish(0)
            return
        again, self.stopping = self.stopping, True
        self.notifier.stopping()
        if again or self.notifier.stores:
            kept = "fd-store" if self.notifier.stores else "none"
            _log.info("event=stopping reason=%s kept=%s", reason, kept)
            self._stop_at_once()
            return
        self.holding.unmount()
        self.holding.drop_dead()
        if self.holding.mounts:
            if self.server is not None:
                self.server.tell({"draining": True})
            _log.warning(
                "event=draining mounts=%d advice=%s", len(self.holding.mounts),
                "containers still use it; a second signal cuts them off",
            )  # fmt: skip
        else:
            _log.info("event=stopping reason=%s kept=none", reason)
            self._stop_at_once()

    def _stop_at_once(self) -> None:
        self.abrupt = True
        self.start_at = None
        self._end_waiting()
        if self.server is not None:
            self.server.retire(Leave.SYNCED if self.notifier.stores else Leave.CLEAN)
        self._finish_if_alone()

    def _end_waiting(self) -> None:
        for child in (self.spare, self.candidate):
            if child is not None:
                child.dismiss()

    # -- reload ------------------------------------------------------------------------

    def _reload(self) -> None:
        if self.first or self.stopping:
            self._reloaded({"error": "the service is starting or stopping"})
            return
        if not self.reloading:
            self.reloading = True
            self.notifier.reloading()
            _log.info("event=reloading")
        if self.candidate is None:
            self.candidate = self._started(InForce.empty())

    def _reloaded(self, answer: dict[str, object]) -> None:
        self.reloading = False
        for link in self.asking:
            self._reception.answer(link, answer)
        self.asking = []

    def _renew(self) -> None:
        """The keeper's own code, too, if the new one can be loaded."""
        self.renewing = False
        state = renewal.State(
            mounts=self.holding.mounts,
            server=self.server,
            place=self.place,
            in_force=self.in_force,
            restarts=self.restarts.count,
            last_cause=self.restarts.last_cause,
        )
        why = renewal.renew(state, self.options.arguments(), self.signals)
        _log.warning("event=keeper-not-renewed error=%s", why)
        self._signalled()

    # -- who asks --------------------------------------------------------------------

    def _asked(self, link: socket.socket, method: str | None) -> None:
        """Somebody asks for something, or is gone: None."""
        if link is self.heir and self.server is None and method is not None:
            _log.info("event=handed-over")
            self._finish(0)
        elif link is self.heir:
            self.heir = None
            link.close()
            self._safely(self._inherit_again)
        elif method is None:
            link.close()
        elif method == "reload":
            self.asking.append(link)
            self._reload()
        elif method == "take-over" and self.stopping and not self.abrupt:
            self._begin_hand_over(link)
        elif method == "word":
            self._reception.answer(link, self._word())
        else:
            self._reception.answer(link, {"error": "this service does not do that now"})

    def _word(self) -> dict[str, object]:
        """What there is to say while no server answers."""
        stages = [child.stage.value for child in self._children()]
        return {"trouble": self.restarts.trouble, "stages": stages}

    def _begin_hand_over(self, link: socket.socket) -> None:
        self.heir = link
        self.start_at = None
        self._end_waiting()
        if self.server is not None:
            self.server.retire(Leave.NOW)
        else:
            self._hand_over()

    def _hand_over(self) -> None:
        """No server of ours is left: give the mounts to the new keeper, and wait for its word."""
        assert self.heir is not None
        self.start_at = None
        facts, fds = held.pack(self.holding.mounts)
        self._reception.close(self.place.listener)
        self.place.leave()
        self._reception.listen_to(self.heir)
        try:
            messages.send(self.heir, {"mounts": facts, "pid": os.getpid()}, fds)
        except OSError as error:
            _log.warning("event=hand-over-failed error=%s", error)

    def _inherit_again(self) -> None:
        """The new keeper died before it served: everything is ours again."""
        assert self.options.root is not None
        _log.warning("event=hand-over-failed error=the new keeper ended before it served")
        if not self.place.claimed:
            self.place.claim(self.options.root)
            self._reception.open(self.place.listener)
        self.holding.drop_dead()
        if not self.holding.mounts:
            self._stop_at_once()
        elif self.server is None:
            self._start()

    # -- time ------------------------------------------------------------------------

    def _wait_seconds(self) -> float | None:
        times = [each for each in (self.start_at, self.next_sign) if each is not None]
        times += [at for child in self._children() for at in child.due]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _timers(self) -> None:
        now = time.monotonic()
        for child in self._children():
            if child.overdue(now):
                _log.error("event=server-killed pid=%d stage=%s", child.pid, child.stage.value)
                child.kill()
        if self.start_at is not None and self.start_at <= now and self.ending is None:
            try:
                self._start()
            except ServiceError as error:
                self._restart_later(str(error))
        if self.renewing and self._children() == [self.server] and not self.stopping:
            self._renew()
        if self.next_sign is not None and self.next_sign <= now:
            assert self.notifier.watchdog_seconds is not None
            self.next_sign = now + self.notifier.watchdog_seconds
            self.notifier.alive()
