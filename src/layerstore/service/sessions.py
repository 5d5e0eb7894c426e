"""The mounts that a server serves: one request loop each, in a thread of its own, over one store.

Usually there is one.  More are those that were unmounted while containers used them: node ids follow
from names, so they are the same in all of them.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from layerstore import fuse
from layerstore.errors import LayerstoreError
from layerstore.fuse.layerstore_fs import StoreFilesystem
from layerstore.provider import Store
from layerstore.service.held import HeldMount

_log = logging.getLogger(__name__)

Ended = Callable[[HeldMount, Exception | None], None]


class Sessions:
    """Serves ``mounts``; ``ended`` is told, from any thread, when one is gone or has failed."""

    def __init__(
        self,
        mounts: Sequence[HeldMount],
        store: Store,
        *,
        released: Callable[[], None],
        ended: Ended,
    ) -> None:
        self._ended = ended
        self._served = [
            (mount, _session(mount, StoreFilesystem(store, released=released))) for mount in mounts
        ]
        self._threads = [
            threading.Thread(target=self._run, args=each, name=f"fuse-{each[0].name}", daemon=True)
            for each in self._served
        ]

    def start(self) -> None:
        """Ask the kernel for what the last server left open, and begin."""
        for mount, session in self._served:
            if not session.resend():
                failed = session.fail_lost()
                if failed:
                    _log.warning(
                        "event=requests-failed count=%d mountpoint=%s", failed, mount.mountpoint
                    )
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End all loops; what is open stays with the kernel.  ``ended`` is not told."""
        for _, session in self._served:
            session.stop()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def sign_of_life(self, alive: Callable[[], None]) -> None:
        """Call ``alive``, from some thread, when every loop has come round; not after `close`."""
        missing = [session for _, session in self._served]

        def came_round() -> None:
            missing.pop()
            if not missing:
                alive()

        for _, session in self._served:
            session.ask(came_round)

    def close(self) -> None:
        """After `stop`: drop late answers, end idle workers."""
        for _, session in self._served:
            session.close()
            _filesystem(session).close()

    def forget_layer(self, slot: int) -> None:
        """Have the kernel forget what it keeps of a layer's contents.  Not for a loop's thread."""
        for _, session in self._served:
            _filesystem(session).forget_layer(session, slot)

    @property
    def read_errors(self) -> int:
        """How many reads failed."""
        return sum(_filesystem(session).read_errors for _, session in self._served)

    def statistics(self) -> Mapping[str, Mapping[str, int]]:
        """The counters of `fuse.Session.statistics`, of all mounts together."""
        total: dict[str, Counter[str]] = {}
        for _, session in self._served:
            for group, counts in session.statistics().items():
                total.setdefault(group, Counter()).update(counts)
        return total

    def _run(self, mount: HeldMount, session: fuse.Session) -> None:
        try:
            ended = session.run()
        except LayerstoreError as error:
            self._ended(mount, error)
        else:
            if ended is fuse.Ended.UNMOUNTED:
                self._ended(mount, None)


def _session(mount: HeldMount, filesystem: StoreFilesystem) -> fuse.Session:
    journal = None if mount.journal is None else fuse.Journal(mount.journal)
    return fuse.Session(mount.fd, filesystem, negotiated=mount.negotiated, journal=journal)


def _filesystem(session: fuse.Session) -> StoreFilesystem:
    assert isinstance(session.operations, StoreFilesystem)
    return session.operations
