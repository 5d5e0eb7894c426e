"""How fast is the FUSE request loop?  An in-memory tree, a server process, a client process.

    python benchmarks/fuse_loop.py [--files 20000] [--rounds 3]

Prints operations per second of the best round, and the server's CPU milliseconds in it.
Needs root and /dev/fuse.
"""

from __future__ import annotations

import argparse
import errno
import multiprocessing
import os
import resource
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from layerstore.fuse import (
    Answer,
    Attr,
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
)

FILES_PER_DIRECTORY = 40
SMALL = b"x" * 3000
LARGE_BYTES = 256 * 1024 * 1024


class MemoryTree(Operations):
    """Two levels: directories of small files, and one large file; replies are built before."""

    def __init__(self, files: int) -> None:
        self.names: dict[int, dict[bytes, int]] = {1: {}}
        self.attrs = {1: Attr(1, stat.S_IFDIR | 0o755, nlink=2)}
        self.data: dict[int, bytes] = {}
        node = 1
        for number in range(0, files, FILES_PER_DIRECTORY):
            node += 1
            directory = node
            self.names[1][b"d%05d" % number] = directory
            self.names[directory] = {}
            self.attrs[directory] = Attr(directory, stat.S_IFDIR | 0o755, nlink=2)
            for file in range(FILES_PER_DIRECTORY):
                node += 1
                self.names[directory][b"f%05d" % file] = node
                self.attrs[node] = Attr(node, stat.S_IFREG | 0o644, size=len(SMALL), blocks=8)
        self.large = node + 1
        self.names[1][b"large"] = self.large
        self.attrs[self.large] = Attr(self.large, stat.S_IFREG | 0o644, size=LARGE_BYTES)
        self.pattern = memoryview(bytes(range(256)) * 8192)
        self.missing = negative_entry()
        self.listings: dict[int, list[bytes]] = {}
        self.plus: dict[int, list[bytes]] = {}

    def lookup(self, request: Request, parent: int, name: bytes) -> Answer:
        node = self.names[parent].get(name)
        return self.missing if node is None else entry_reply(node, self.attrs[node])

    def getattr(self, request: Request, nodeid: int) -> Answer:
        return attr_reply(self.attrs[nodeid])

    def read(self, request: Request, nodeid: int, offset: int, size: int) -> Answer:
        if nodeid == self.large:
            return self.pattern[: max(0, min(size, LARGE_BYTES - offset))]
        return SMALL[offset : offset + size]

    def readdir(self, request: Request, nodeid: int, offset: int, size: int) -> Answer:
        records = self.listings.get(nodeid)
        if records is None:
            records = self.listings[nodeid] = [
                wire.pack_dirent(node, cookie, self.attrs[node].mode >> 12, name)
                for cookie, (name, node) in enumerate(self.names[nodeid].items(), 1)
            ]
        return wire.fill(records[offset:], size)

    def readdirplus(self, request: Request, nodeid: int, offset: int, size: int) -> Answer:
        records = self.plus.get(nodeid)
        if records is None:
            records = self.plus[nodeid] = [
                wire.pack_direntplus(
                    entry_reply(node, self.attrs[node]),
                    node,
                    cookie,
                    self.attrs[node].mode >> 12,
                    name,
                )
                for cookie, (name, node) in enumerate(self.names[nodeid].items(), 1)
            ]
        return wire.fill(records[offset:], size)

    def getxattr(self, request: Request, nodeid: int, name: bytes, size: int) -> Answer:
        return errno.ENODATA


def serve(fd: int, files: int, options: SessionOptions, control: Connection) -> None:
    session = Session(fd, MemoryTree(files), options=options)
    control.send("ready")

    def report() -> None:
        while True:
            try:
                control.recv()
            except EOFError:
                return
            used = resource.getrusage(resource.RUSAGE_SELF)
            control.send((used.ru_utime + used.ru_stime, session.statistics()["requests"]))

    threading.Thread(target=report, daemon=True).start()
    session.run()


def find(root: str) -> int:
    seen = 0
    for directory, names, files in os.walk(root):
        for name in files:
            os.lstat(os.path.join(directory, name))
        seen += len(names) + len(files)
    return seen


def stat_all(paths: list[str]) -> int:
    for path in paths:
        os.stat(path)
    return len(paths)


def stat_missing(paths: list[str]) -> int:
    for path in paths:
        try:
            os.stat(path + ".none")
        except FileNotFoundError:
            continue
    return len(paths)


def read_small(paths: list[str]) -> int:
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        if len(os.read(fd, 8192)) != len(SMALL):
            raise SystemExit("wrong bytes")
        os.close(fd)
    return len(paths)


def read_large(path: str) -> int:
    fd = os.open(path, os.O_RDONLY)
    total = 0
    while block := os.read(fd, 1 << 20):
        total += len(block)
    os.close(fd)
    return total >> 20


def xattr_all(paths: list[str]) -> int:
    for path in paths:
        try:
            os.getxattr(path, "user.none")
        except OSError:
            continue
    return len(paths)


Measured = dict[str, tuple[float, float, dict[str, int]]]
Phase = dict[str, Callable[[], int]]


def phases(root: str, files: int) -> list[Phase]:
    """What is measured, each phase on a fresh mount with nothing cached."""
    paths = [
        f"{root}/d{d:05d}/f{f:05d}"
        for d in range(0, files, FILES_PER_DIRECTORY)
        for f in range(FILES_PER_DIRECTORY)
    ]
    return [
        {
            "find cold": lambda: find(root),
            "find warm": lambda: find(root),
            "getxattr": lambda: xattr_all(paths[:5000]),
            "open+read small": lambda: read_small(paths[:5000]),
            "read large MiB": lambda: read_large(f"{root}/large"),
        },
        {
            "stat cold": lambda: stat_all(paths),
            "stat warm": lambda: stat_all(paths),
            "missing cold": lambda: stat_missing(paths),
            "missing warm": lambda: stat_missing(paths),
        },
    ]


def run_phase(root: str, phase: Phase, files: int, options: SessionOptions) -> Measured:
    results: Measured = {}
    fd = mount_direct(root)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=serve, args=(fd, files, options, theirs))
    process.start()
    os.close(fd)
    theirs.close()

    def ask() -> tuple[float, dict[str, int]]:
        ours.send(None)
        cpu, requests = ours.recv()
        return cpu, requests

    try:
        ours.recv()
        for name, work in phase.items():
            cpu, before = ask()
            start = time.perf_counter()
            count = work()
            took = time.perf_counter() - start
            after_cpu, after = ask()
            requests = {k: v - before.get(k, 0) for k, v in after.items()}
            results[name] = (
                count / took,
                (after_cpu - cpu) * 1000,
                {k: v for k, v in requests.items() if v},
            )
    finally:
        unmount(root)
        process.join(10)
        if process.is_alive():
            process.kill()
    return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--readdirplus", default="always")
    arguments = parser.parse_args()
    options = SessionOptions(readdirplus=arguments.readdirplus)
    best: Measured = {}
    with tempfile.TemporaryDirectory() as root:
        for _ in range(arguments.rounds):
            for phase in phases(root, arguments.files):
                measured = run_phase(root, phase, arguments.files, options)
                for name, result in measured.items():
                    if name not in best or best[name][0] < result[0]:
                        best[name] = result
    for name, (rate, cpu, requests) in best.items():
        sys.stdout.write(f"{name:18} {rate:12,.0f}/s {cpu:8.0f} ms CPU  {requests}\n")


if __name__ == "__main__":
    main()
