"""Messages between keeper, server and verbs: JSON objects, each one packet, with descriptors beside.

Sockets are AF_UNIX, SOCK_SEQPACKET: a packet is a message, and the end of a process is the end of
its socket.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from layerstore import limits
from layerstore.errors import ServiceError

_PEER: Final = struct.Struct("3i")


def send(link: socket.socket, message: Mapping[str, object], fds: Sequence[int] = ()) -> None:
    """Send one message.  OSError if the other side is gone."""
    data = json.dumps(message).encode()
    if fds:
        socket.send_fds(link, [data], fds)
    else:
        link.send(data)


def receive(link: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """The next message and its descriptors (close on exec); None if the other side is gone.

    ServiceError for something that is no message of ours, BlockingIOError if there is none yet.
    """
    try:
        data, fds, _, _ = socket.recv_fds(
            link, limits.KEEPER_MESSAGE_BYTES, limits.KEEPER_MOUNTS * 2
        )
    except ConnectionError:
        return None
    for fd in fds:
        os.set_inheritable(fd, False)  # recv_fds of Python 3.11 takes flags and ignores them
    if not data:
        return None
    try:
        message = json.loads(data)
    except ValueError:
        message = None
    if not isinstance(message, dict):
        for fd in fds:
            os.close(fd)
        raise ServiceError("a message that makes no sense came")
    return message, fds


def peer_may_ask(connection: socket.socket) -> bool:
    """Whether the other side is root or the user that this process runs as (SO_PEERCRED)."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    uid: int = _PEER.unpack(credentials)[1]
    return uid in (0, os.geteuid())


def listen(root: Path, name: str, kind: socket.SocketKind, backlog: int = 16) -> socket.socket:
    """A socket (0600) in the private directory ``root``, in place of one that a dead process left.

    OSError.
    """
    listener = socket.socket(socket.AF_UNIX, kind)
    try:
        with contextlib.suppress(FileNotFoundError):
            (root / name).unlink()
        with address(root, name) as where:
            before = os.umask(0o177)
            try:
                listener.bind(where)
            finally:
                os.umask(before)
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    return listener


@contextlib.contextmanager
def address(root: Path, name: str) -> Iterator[str]:
    """The path of a socket, short enough for any root: sun_path holds only 107 bytes."""
    descriptor = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)
