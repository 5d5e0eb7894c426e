"""The service: mounts the store, runs the request loop, ends cleanly.

SIGTERM and SIGINT unmount lazily and leave the plain directory: Podman demands
that every configured store is a directory, and works without us then.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Final

from layerstore import __version__, fuse, limits
from layerstore.errors import ConfigError, MountError, ServiceError, StorageError
from layerstore.fuse.layerstore_fs import StoreFilesystem
from layerstore.graphroot.storageconf import StorageConfig
from layerstore.provider import Store, limit_arenas
from layerstore.service.config import Config
from layerstore.service.control import ControlServer
from layerstore.service.fetching import fetch_methods
from layerstore.service.opening import open_store
from layerstore.service.recordrepair import RecordRepair

_log = logging.getLogger(__name__)

# Worker threads that run Python code give way to the loop this often.
_SWITCH_SECONDS: Final = 0.0005


def serve(mountpoint: Path, root: Path, config: Config) -> None:
    """Serve the store on ``mountpoint`` until a signal or an unmount ends it.

    Raises ServiceError if another service uses ``root``, MountError, StorageError
    and ConfigError.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    _raise_file_limit()
    limit_arenas()
    _make_directories(mountpoint, root)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(open_store(root, config))
        repair = RecordRepair(_graph_roots(config))
        stack.callback(repair.close)
        filesystem = StoreFilesystem(store, released=repair.released)
        stack.callback(filesystem.close)
        _run(mountpoint, root, store, filesystem, repair, stack)
    _log.info("event=stopped mountpoint=%s", mountpoint)


def _run(
    mountpoint: Path,
    root: Path,
    store: Store,
    filesystem: StoreFilesystem,
    repair: RecordRepair,
    stack: contextlib.ExitStack,
) -> None:
    descriptor = fuse.mount(mountpoint)
    stack.callback(os.close, descriptor)
    stack.callback(_unmount, mountpoint)
    session = fuse.Session(descriptor, filesystem, options=fuse.SessionOptions(posix_acl=True))
    stack.callback(session.close)
    # a server that takes the mount over later needs to know what was agreed
    negotiated = session.handshake()
    (root / "session.json").write_text(negotiated.to_json())
    fuse.set_read_ahead(mountpoint)
    store.layers.quarantined = partial(filesystem.forget_layer, session)
    started = time.time()

    def status(_: Mapping[str, object]) -> Mapping[str, object]:
        return {
            "version": __version__,
            "pid": os.getpid(),
            "mountpoint": str(mountpoint),
            "root": str(root),
            "uptime_seconds": round(time.time() - started, 1),
            "read_errors": filesystem.read_errors,
            "records_rebuilt": repair.rebuilt,
            "fuse": session.statistics(),
            **store.status(),
        }

    control = ControlServer(root, {"status": status, **fetch_methods(store.fetches)})
    stack.callback(control.close)

    def stop(number: int, frame: FrameType | None) -> None:
        session.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    gc.collect()
    gc.freeze()
    _log.info("event=serving mountpoint=%s root=%s pid=%d", mountpoint, root, os.getpid())
    ended = session.run()
    _log.info("event=stopping reason=%s", ended.value)


def _graph_roots(config: Config) -> tuple[Path, ...]:
    """Where records are repaired; a storage.conf that makes no sense is for its users to tell."""
    if not config.repair.enabled:
        return ()
    if config.repair.graph_roots is not None:
        return tuple(map(Path, config.repair.graph_roots))
    try:
        return (StorageConfig.from_system().graph_root,)
    except ConfigError as error:
        _log.warning("event=no-graph-root error=%s", error)
        return ()


def _make_directories(mountpoint: Path, root: Path) -> None:
    if mountpoint.is_relative_to(root / "content") or root.is_relative_to(mountpoint):
        raise ServiceError("root directory and mount point lie in each other's way")
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot create: {error.strerror}", subject=str(root)) from error
    if fuse.find_mount(mountpoint) is not None:
        return  # fuse.mount decides what to do about it
    try:
        mountpoint.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MountError(f"cannot create: {error.strerror}", subject=str(mountpoint)) from error


def _raise_file_limit() -> None:
    """Take as many descriptors as are permitted: three a layer, and those of open objects."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, limits.OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _unmount(mountpoint: Path) -> None:
    try:
        fuse.unmount(mountpoint)
    except MountError as error:
        _log.error("event=unmount-failed error=%s", error)
