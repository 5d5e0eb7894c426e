"""A small file system, real mounts of it, and clients in processes of their own.

The thread or process that serves a mount never touches it.  At the end of a test the
mount is detached and its descriptor closed, which ends every request still waiting.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from layerstore.errors import MountError
from layerstore.fuse import (
    FOREVER,
    Answer,
    Attr,
    Ended,
    Negotiated,
    Operations,
    Request,
    Session,
    SessionOptions,
    attr_reply,
    entry_reply,
    mount_direct,
    negative_entry,
    unmount,
    wire,
    xattr_answer,
    xattr_list_answer,
)

CLIENT_SECONDS = 20


class SmallFs(Operations):
    """A tree given as {path: bytes | {} | symlink str}, one node number per path."""

    def __init__(self, tree: dict[str, object] | None = None, valid: int = FOREVER) -> None:
        self.valid = valid
        self.names: dict[int, dict[bytes, int]] = {}
        self.attrs: dict[int, Attr] = {}
        self.data: dict[int, bytes] = {}
        self.links: dict[int, bytes] = {}
        self.xattrs: dict[bytes, bytes] = {b"user.colour": b"blue", b"trusted.overlay.opaque": b"y"}
        self.seen: list[tuple[str, object]] = []
        self._add(tree if tree is not None else {"hello": b"hello, world\n", "sub": {"x": b"1"}})

    def _add(self, value: object) -> int:
        node = len(self.attrs) + 1
        if isinstance(value, dict):
            self.attrs[node] = Attr(node, stat.S_IFDIR | 0o755, nlink=2)
            self.names[node] = {}
            for name, child in value.items():
                self.names[node][os.fsencode(name)] = self._add(child)
        elif isinstance(value, Attr):
            self.attrs[node] = value._replace(ino=node)
        elif isinstance(value, str):
            self.links[node] = value.encode()
            self.attrs[node] = Attr(node, stat.S_IFLNK | 0o777, size=len(value))
        else:
            assert isinstance(value, bytes)
            self.data[node] = value
            self.attrs[node] = Attr(node, stat.S_IFREG | 0o644, size=len(value))
        return node

    def lookup(self, request: Request, parent: int, name: bytes) -> Answer:
        self.seen.append(("lookup", name))
        node = self.names[parent].get(name)
        if node is None:
            return negative_entry(self.valid)
        return entry_reply(node, self.attrs[node], self.valid, self.valid)

    def getattr(self, request: Request, nodeid: int) -> Answer:
        self.seen.append(("getattr", nodeid))
        return attr_reply(self.attrs[nodeid], self.valid)

    def readlink(self, request: Request, nodeid: int) -> Answer:
        self.seen.append(("readlink", nodeid))
        return self.links[nodeid]

    def read(self, request: Request, nodeid: int, offset: int, size: int) -> Answer:
        self.seen.append(("read", nodeid))
        return self.data[nodeid][offset : offset + size]

    def _entries(self, nodeid: int) -> Iterator[tuple[bytes, int]]:
        yield b".", nodeid
        yield b"..", 1
        yield from self.names[nodeid].items()

    def readdir(self, request: Request, nodeid: int, offset: int, size: int) -> Answer:
        self.seen.append(("readdir", nodeid))
        records = [
            wire.pack_dirent(node, cookie, self.attrs[node].mode >> 12, name)
            for cookie, (name, node) in enumerate(self._entries(nodeid), 1)
        ]
        return wire.fill(records[offset:], size)

    def readdirplus(self, request: Request, nodeid: int, offset: int, size: int) -> Answer:
        self.seen.append(("readdirplus", nodeid))
        records = [
            wire.pack_direntplus(
                negative_entry(0)
                if name in (b".", b"..")
                else entry_reply(node, self.attrs[node], self.valid, self.valid),
                node,
                cookie,
                self.attrs[node].mode >> 12,
                name,
            )
            for cookie, (name, node) in enumerate(self._entries(nodeid), 1)
        ]
        return wire.fill(records[offset:], size)

    def getxattr(self, request: Request, nodeid: int, name: bytes, size: int) -> Answer:
        value = self.xattrs.get(name)
        return errno.ENODATA if value is None else xattr_answer(value, size)

    def listxattr(self, request: Request, nodeid: int, size: int) -> Answer:
        return xattr_list_answer(self.xattrs, size)

    def create(self, request: Request, parent: int, name: bytes, flags: int, mode: int) -> Answer:
        self.seen.append(("create", name))
        return errno.ENOENT

    def rmdir(self, request: Request, parent: int, name: bytes) -> Answer:
        self.seen.append(("rmdir", name))
        return errno.ENOENT


class HoldingFs(SmallFs):
    """Defers every READ (and LOOKUP of ``slow``) until the test answers it."""

    def __init__(self, timeout: float | None = None) -> None:
        super().__init__({"file": b"0123456789" * 100, "slow": b"s"})
        self.timeout = timeout
        self.held: list[Request] = []
        self.arrived = threading.Semaphore(0)
        self.cancelled = threading.Event()

    def _hold(self, request: Request) -> Answer:
        self.held.append(request)
        answer = request.defer(self.timeout, on_cancel=self.cancelled.set)
        self.arrived.release()
        return answer

    def read(self, request: Request, nodeid: int, offset: int, size: int) -> Answer:
        return self._hold(request)

    def lookup(self, request: Request, parent: int, name: bytes) -> Answer:
        if name == b"slow":
            return self._hold(request)
        return super().lookup(request, parent, name)

    def wait(self) -> Request:
        assert self.arrived.acquire(timeout=10), "no request arrived"
        return self.held[-1]


class Served:
    """A mounted `Session` whose loop runs in a thread of this process."""

    def __init__(
        self,
        mountpoint: Path,
        operations: Operations,
        fd: int,
        options: SessionOptions | None = None,
        negotiated: Negotiated | None = None,
    ) -> None:
        self.mountpoint = mountpoint
        self.fd = fd
        self.session = Session(fd, operations, options=options, negotiated=negotiated)
        self.ended: Ended | None = None
        self.clients: list[subprocess.Popen[str]] = []
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        self.ended = self.session.run()

    def start(self) -> Served:
        if self.session.negotiated is None:
            self.session.handshake()
        self.thread.start()
        return self

    def stop(self) -> None:
        if self.thread.is_alive():
            self.session.stop()
            self.thread.join(10)
        assert not self.thread.is_alive()

    def client(self, code: str, *arguments: str) -> subprocess.Popen[str]:
        """A process that runs ``code`` with the mount point in ``root``."""
        head = "import os, sys, signal, errno, stat\nroot = sys.argv[1]\nargs = sys.argv[2:]\n"
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", head + code, str(self.mountpoint), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.clients.append(process)
        return process

    def end_clients(self) -> None:
        """Once nothing is served any more: no client outlives its test."""
        for process in self.clients:
            process.kill()
            process.communicate(timeout=CLIENT_SECONDS)

    def ask(self, code: str, *arguments: str) -> str:
        """What ``code`` prints."""
        process = self.client(code, *arguments)
        try:
            said, _ = process.communicate(timeout=CLIENT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        assert process.returncode == 0, said
        return said.strip()


@pytest.fixture
def fuse_device() -> None:
    """Skips where /dev/fuse cannot be opened or mounting is not permitted."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as exc:
        pytest.skip(f"/dev/fuse: {exc.strerror}")


@pytest.fixture
def mountpoint(tmp_path: Path, fuse_device: None) -> Iterator[Path]:
    """An empty directory; whatever is mounted on it at the end is taken away."""
    path = tmp_path / "mnt"
    path.mkdir()
    yield path
    for _ in range(8):
        if not unmount(path):
            break


@pytest.fixture
def serve(mountpoint: Path) -> Iterator[Callable[..., Served]]:
    """serve(operations, options=...) mounts and serves until the end of the test."""
    started: list[Served] = []
    fds: list[int] = []

    def start(operations: Operations, options: SessionOptions | None = None) -> Served:
        try:
            fd = mount_direct(mountpoint)
        except MountError as exc:
            pytest.skip(f"mounting is not permitted: {exc}")
        fds.append(fd)
        served = Served(mountpoint, operations, fd, options=options)
        started.append(served)
        return served.start()

    yield start
    unmount(mountpoint)
    for served in started:
        served.stop()
    for fd in fds:
        os.close(fd)  # the last descriptor: the kernel fails what still waits
    for served in started:
        served.end_clients()
        served.session.close()


class Wire:
    """A session at one end of a socket pair and a pretended kernel at the other."""

    def __init__(self, operations: Operations, negotiated: Negotiated | None = None) -> None:
        self.kernel, self._other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.kernel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self._other.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.kernel.settimeout(10)
        self.session = Session(self._other.fileno(), operations, negotiated=negotiated)
        self.thread: threading.Thread | None = None

    def send(
        self, opcode: int, body: bytes = b"", *, unique: int = 2, nodeid: int = 1, pid: int = 0
    ) -> None:
        self.kernel.send(
            struct.pack("<IIQQIIIHH", 40 + len(body), opcode, unique, nodeid, 0, 0, pid, 0, 0)
            + body
        )

    def receive(self) -> tuple[int, int, bytes]:
        """(unique, errno, payload) of the next answer; its length field is checked."""
        message = self.kernel.recv(1 << 21)
        length, error, unique = struct.unpack_from("<IiQ", message)
        assert length == len(message)
        return unique, -error, message[16:]

    def ask(self, opcode: int, body: bytes = b"", **header: int) -> tuple[int, bytes]:
        self.send(opcode, body, **header)
        unique, error, payload = self.receive()
        assert unique == header.get("unique", 2)
        return error, payload

    def start(self) -> Wire:
        self.thread = threading.Thread(target=self.session.run, daemon=True)
        self.thread.start()
        return self

    def finish(self) -> list[tuple[int, int, bytes]]:
        """Let the session handle what was sent and end; the answers not yet received."""
        self.kernel.shutdown(socket.SHUT_WR)
        if self.thread is not None:
            self.thread.join(10)
            assert not self.thread.is_alive()
        else:
            self.session.run()
        self._other.close()
        answers = []
        with contextlib.suppress(ConnectionResetError):
            while message := self.kernel.recv(1 << 21):
                length, error, unique = struct.unpack_from("<IiQ", message)
                assert length == len(message)
                answers.append((unique, -error, message[16:]))
        return answers

    def close(self) -> None:
        if self.thread is not None and self.thread.is_alive():
            self.session.stop()
            self.thread.join(10)
        self.session.close()
        self._other.close()
        self.kernel.close()


@pytest.fixture
def connect() -> Iterator[Callable[..., Wire]]:
    """connect(operations) gives a `Wire`."""
    wires: list[Wire] = []

    def make(operations: Operations, negotiated: Negotiated | None = None) -> Wire:
        wires.append(Wire(operations, negotiated))
        return wires[-1]

    yield make
    for one in wires:
        one.close()


@pytest.fixture
def small_fs() -> type[SmallFs]:
    return SmallFs


@pytest.fixture
def holding_fs() -> type[HoldingFs]:
    return HoldingFs


@pytest.fixture
def dies() -> Callable[[subprocess.Popen[str], float], bool]:
    """dies(process, seconds): SIGKILL it and tell whether it is gone in time."""

    def kill(process: subprocess.Popen[str], seconds: float) -> bool:
        process.send_signal(signal.SIGKILL)
        end = time.monotonic() + seconds
        while process.poll() is None:
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True

    return kill


@pytest.fixture
def take_over() -> Iterator[Callable[..., Served]]:
    """take_over(served, operations): a new session on a dup of the descriptor, not started."""
    later: list[Served] = []

    def make(before: Served, operations: Operations) -> Served:
        before.stop()
        negotiated = before.session.negotiated
        assert negotiated is not None
        saved = Negotiated.from_json(negotiated.to_json())
        later.append(Served(before.mountpoint, operations, os.dup(before.fd), negotiated=saved))
        return later[-1]

    yield make
    for served in later:
        if served.thread.ident is not None:
            served.stop()
        os.close(served.fd)
        served.session.close()
