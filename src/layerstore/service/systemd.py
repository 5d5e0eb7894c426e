"""What systemd wants to hear, and the descriptors that it keeps: sd_notify(3), sd_listen_fds(3)."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Final

_log = logging.getLogger(__name__)

_FIRST: Final = 3  # SD_LISTEN_FDS_START
_LISTEN: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
_OURS: Final = frozenset(("NOTIFY_SOCKET", "FDSTORE", "WATCHDOG_USEC", "WATCHDOG_PID", *_LISTEN))


@dataclass(frozen=True, slots=True)
class Notifier:
    """Tells systemd, or nobody.

    ``stores``: it keeps descriptors.  systemd 254 and newer say so in ``FDSTORE``; for an older
    one the unit has to (``Environment=FDSTORE=1`` beside ``FileDescriptorStoreMax=``).
    ``watchdog_seconds`` is how often it wants a sign of life, None for never.
    """

    address: str
    stores: bool
    watchdog_seconds: float | None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Notifier:
        """The one that the environment names."""
        address = environment.get("NOTIFY_SOCKET", "")
        stores = address != "" and environment.get("FDSTORE", "0") not in ("", "0")
        watchdog = None
        if environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            with contextlib.suppress(KeyError, ValueError):
                watchdog = int(environment["WATCHDOG_USEC"]) / 2e6
        return cls(address, stores, watchdog)

    def ready(self) -> None:
        """The service serves."""
        self._send(f"READY=1\nMAINPID={os.getpid()}")

    def reloading(self) -> None:
        """A reload has begun; `ready` ends it."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send(f"RELOADING=1\nMONOTONIC_USEC={now}")

    def stopping(self) -> None:
        """The end has begun."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """A sign of life for the watchdog."""
        self._send("WATCHDOG=1")

    def keep(self, name: str, fd: int) -> None:
        """Have ``fd`` kept beyond the end of this process.

        systemd is told not to watch it: a request of a FUSE descriptor would wake it each time.
        """
        if self.stores:
            self._send(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", [fd])

    def forget(self, name: str) -> None:
        """Have descriptors of that name closed."""
        if self.stores:
            self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def _send(self, text: str, fds: Sequence[int] = ()) -> None:
        if not self.address:
            return
        where = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
                link.connect(where)
                if fds:
                    socket.send_fds(link, [text.encode()], fds)
                else:
                    link.send(text.encode())
        except OSError as error:
            _log.warning("event=notify-failed error=%s", error)


def received(environment: MutableMapping[str, str]) -> list[tuple[str, int]]:
    """The descriptors that systemd kept, with their names; close on exec from now on.

    Takes the variables away: they are true once only.
    """
    pid, count, names = (environment.pop(key, "") for key in _LISTEN)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    fds = range(_FIRST, _FIRST + int(count))
    for fd in fds:
        os.set_inheritable(fd, False)
    named = names.split(":")
    return [(named[place] if place < len(named) else "", fd) for place, fd in enumerate(fds)]


def without_ours(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a child that has nothing to say to systemd."""
    return {key: value for key, value in environment.items() if key not in _OURS}
