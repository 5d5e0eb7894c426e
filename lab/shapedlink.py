"""A slower link on one machine: a network namespace, a veth pair and a token bucket.

The far end of the pair lies in a namespace of its own, and what leaves it towards this machine
passes `tc tbf`, as a download passes the line of a provider.  A server needs no process in the
namespace: a socket belongs to the namespace in which it was made, whoever uses it.
Needs root and iproute2.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import socket
import subprocess
from types import TracebackType
from typing import Final, Self

_CLONE_NEWNET: Final = 0x40000000
_BURST: Final = "128kb"  # two of the kernel's largest segments
_QUEUE: Final = "50ms"
_NETWORK: Final = "198.18.{}.{}"  # RFC 2544: reserved for benchmarks


class ShapedLink:
    """A link with ``rate`` (as tc writes it) towards this machine, unlimited away from it.

    A context manager.  Raises CalledProcessError or OSError where the machine does not permit it.
    """

    def __init__(self, rate: str = "100mbit") -> None:
        self.rate: Final = rate
        mark = secrets.token_hex(3)
        self._namespace: Final = f"lab-{mark}"
        self._near: Final = f"lab-{mark}a"
        self._far: Final = f"lab-{mark}b"
        network = int(mark[:2], 16)
        self._near_address: Final = _NETWORK.format(network, 1)
        self.address: Final = _NETWORK.format(network, 2)
        """The far end."""

    def listen(self) -> socket.socket:
        """A TCP socket that listens at the far end, on a free port."""
        libc = ctypes.CDLL(None, use_errno=True)

        def enter(descriptor: int) -> None:
            if libc.setns(descriptor, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "cannot enter the network namespace")

        here = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        there = os.open(f"/run/netns/{self._namespace}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            enter(there)
            try:
                return socket.create_server((self.address, 0), backlog=128)
            finally:
                enter(here)
        finally:
            os.close(here)
            os.close(there)

    def __enter__(self) -> Self:
        try:
            _ip("netns", "add", self._namespace)
            _ip("link", "add", self._near, "type", "veth",
                "peer", "name", self._far, "netns", self._namespace)  # fmt: skip
            _ip("address", "add", f"{self._near_address}/24", "dev", self._near)
            _ip("link", "set", self._near, "up")
            far = ("-n", self._namespace)
            _ip(*far, "address", "add", f"{self.address}/24", "dev", self._far)
            _ip(*far, "link", "set", self._far, "up")
            _run("tc", *far, "qdisc", "add", "dev", self._far, "root",
                 "tbf", "rate", self.rate, "burst", _BURST, "latency", _QUEUE)  # fmt: skip
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        _ip("link", "delete", self._near, check=False)
        _ip("netns", "delete", self._namespace, check=False)


def _ip(*arguments: str, check: bool = True) -> None:
    _run("ip", *arguments, check=check)


def _run(*command: str, check: bool = True) -> None:
    subprocess.run(command, check=check, capture_output=True, stdin=subprocess.DEVNULL)
