"""The service itself: a store on mounts that a keeper holds, and whom it may ask about it."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import queue
import resource
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from layerstore import __version__, limits
from layerstore.provider import limit_arenas, unsized
from layerstore.service import standins
from layerstore.service.checking import check_methods
from layerstore.service.child import Leave
from layerstore.service.control import ControlServer
from layerstore.service.diskuse import disk_methods
from layerstore.service.fetching import fetch_methods
from layerstore.service.graphneeds import graph_roots, image_stores
from layerstore.service.held import HeldMount
from layerstore.service.indexing import index_methods
from layerstore.service.opening import open_store
from layerstore.service.recordrepair import RecordRepair
from layerstore.service.sessions import Sessions
from layerstore.service.settings import Settings

_log = logging.getLogger(__name__)

# Worker threads that run Python code give way to the loops this often.
_SWITCH_SECONDS: Final = 0.0005


class Service:
    """The store below ``root`` on ``mounts``, the first of which is the one that is attached.

    ``keeper`` is what the keeper says of itself for `layerstore status`.  As a context manager:
    from the end of ``with`` on, state and control socket are free for the next server.  Raises
    ServiceError if the state stays in use, StorageError and ConfigError.
    """

    def __init__(
        self,
        mounts: Sequence[HeldMount],
        root: Path,
        settings: Settings,
        keeper: Mapping[str, Any],
    ) -> None:
        self._mounts = mounts
        self._root = root
        self._keeper = dict(keeper)
        self._news: queue.SimpleQueue[tuple[HeldMount, Exception | None] | None]
        self._news = queue.SimpleQueue()
        self._stack = contextlib.ExitStack()
        self._settings = settings
        self._leave = Leave.CLEAN
        self._telling = threading.Lock()
        self._opened = False
        self._heard_early: dict[str, Any] = {}

    def __enter__(self) -> Service:
        sys.setswitchinterval(_SWITCH_SECONDS)
        _raise_file_limit()
        limit_arenas()
        with contextlib.ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()
        with self._telling:
            self._opened = True
        if self._heard_early:
            self.keeper_says(self._heard_early)
        return self

    def __exit__(self, *_: object) -> None:
        if self._leave is Leave.CLEAN:
            self._stack.close()
        else:
            self._sessions.stop()
            self._store.let_go(sync=self._leave is Leave.SYNCED)

    def _open(self, stack: contextlib.ExitStack) -> None:
        root, config = self._root, self._settings.config
        store = stack.enter_context(
            open_store(
                root,
                config,
                patience=limits.SERVER_LOCK_SECONDS,
                registry=self._settings.registry,
            )
        )
        roots = graph_roots(config) if config.repair.enabled else ()
        repair = RecordRepair(roots, image_stores(config))
        stack.callback(repair.close)
        sessions = Sessions(
            self._mounts, store, released=repair.released, ended=lambda *news: self._news.put(news)
        )
        stack.callback(sessions.close)
        stack.callback(sessions.stop)
        self._store, self._sessions = store, sessions
        store.layers.quarantined = sessions.forget_layer
        started = time.time()

        def status(_: Mapping[str, object]) -> Mapping[str, object]:
            return {
                "version": __version__,
                "pid": os.getpid(),
                "keeper_pid": self._keeper.get("pid"),
                "keeper": self._keeper,
                "mountpoint": self._mounts[0].mountpoint,
                "root": str(root),
                "uptime_seconds": round(time.time() - started, 1),
                "read_errors": sessions.read_errors,
                "records_rebuilt": repair.rebuilt,
                "fuse": sessions.statistics(),
                **store.status(),
            }

        methods = {
            **fetch_methods(store.fetches),
            **index_methods(store),
            **check_methods(store.checks),
            **disk_methods(store.disk_use),
        }
        store.fetches.resume_kept()
        control = ControlServer(root, {"status": status, **methods})
        stack.callback(control.close)
        gc.collect()
        gc.freeze()
        sessions.start()
        _log.info(
            "event=serving mountpoint=%s root=%s pid=%d mounts=%d",
            self._mounts[0].mountpoint, root, os.getpid(), len(self._mounts),
        )  # fmt: skip

    def keeper_says(self, news: Mapping[str, Any]) -> None:
        """What has changed with the keeper; also before the state is open."""
        with self._telling:
            if not self._opened:
                self._heard_early.update(news)
                return
        self._keeper.update(news)
        if news.get("draining"):
            self.leave_stand_ins()

    def sign_of_life(self, alive: Callable[[], None]) -> None:
        """Call ``alive``, from some thread, as soon as all mounts are seen to be served.

        At once while the state is being opened: a disk may take its time.
        """
        if self._opened:
            self._sessions.sign_of_life(alive)
        else:
            alive()

    def leave_stand_ins(self) -> None:
        """Where the store is not mounted any more: see `standins`."""
        mountpoint = Path(self._mounts[0].mountpoint)
        standins.leave(mountpoint, self._root, unsized(self._store.views()))

    def stop(self, leave: Leave = Leave.CLEAN) -> None:
        """Make `next_end` return None; from any thread and from signal handlers.

        Unless ``leave`` is CLEAN the end of ``with`` does not wait for what runs, and the process
        must end then.
        """
        self._leave = leave
        self._news.put(None)

    def next_end(self) -> HeldMount | None:
        """Wait for the next mount that is gone; None after `stop`.  Raises what broke a loop."""
        news = self._news.get()
        if news is None:
            return None
        mount, error = news
        if error is not None:
            raise error
        return mount


def _raise_file_limit() -> None:
    """Take as many descriptors as are permitted: three a layer, and those of open objects."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, limits.OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
