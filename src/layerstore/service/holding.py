"""The mounts of one keeper: the one that its mount point shows, and detached ones with users."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from layerstore import fuse, limits
from layerstore.errors import MountError
from layerstore.service import held
from layerstore.service.held import HeldMount
from layerstore.service.systemd import Notifier

_log = logging.getLogger(__name__)


class Holding:
    """What is held; each mount is also given to systemd, if that keeps descriptors."""

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier
        self.mounts: list[HeldMount] = []

    def settle(self, mountpoint: Path, *, resend: bool) -> None:
        """Have a mount at ``mountpoint``, first in ``mounts``: one that is there already, or a new
        one; the others are detached.  MountError.
        """
        self.drop_dead()
        here = [mount for mount in self.mounts if mount.is_at(mountpoint)]
        others = [mount for mount in self.mounts if mount not in here]
        _unmount(others)
        self.mounts = [*here, *others]
        self._give_up_oldest()
        if here:
            _log.info("event=mount-kept mountpoint=%s", mountpoint)
            return
        if fuse.find_mount(mountpoint) is None:  # else fuse.mount decides what to do about it
            try:
                mountpoint.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise MountError(
                    f"cannot create: {error.strerror}", subject=str(mountpoint)
                ) from error
        mount = held.mount_fresh(mountpoint, resend=resend)
        self.mounts.insert(0, mount)
        if not mount.negotiated.can_resend:
            _log.warning("event=no-resend mountpoint=%s", mountpoint)
        for name, fd in held.stored(mount).items():
            self._notifier.keep(name, fd)
            if fd not in mount.fds:
                os.close(fd)

    def drop_dead(self) -> None:
        """Let go of mounts that nobody can use any more."""
        for mount in self.mounts:
            if not mount.alive:
                self._drop(mount)

    def unmount(self) -> None:
        """Leave a plain directory.  Who has files open keeps them, and the mount stays held."""
        _unmount(self.mounts)

    def _drop(self, mount: HeldMount) -> None:
        for name in held.names_of(mount):
            self._notifier.forget(name)
        mount.close()
        self.mounts = [other for other in self.mounts if other is not mount]

    def _give_up_oldest(self) -> None:
        """So many as fit into one message can be handed on, with the one that is to come."""
        while len(self.mounts) >= limits.KEEPER_MOUNTS:
            _log.error("event=mount-given-up device=0:%d", self.mounts[-1].minor)
            self._drop(self.mounts[-1])


def _unmount(mounts: Sequence[HeldMount]) -> None:
    for mount in mounts:
        if mount.attached:
            try:
                fuse.unmount(mount.mountpoint)
            except MountError as error:
                _log.error("event=unmount-failed error=%s", error)
