"""Loads on a layer store, each a process of its own that compares everything it gets.

    python -m lab.loads TASK        (a file that `lab.loadcrew` writes)

| kind       | one operation                                                                     |
|------------|-----------------------------------------------------------------------------------|
| read       | a file whole, in pieces of a random size and order, its SHA-256 compared          |
| stream     | the largest file from end to end, by one descriptor that stays open for ever      |
| mmap       | the same through a mapping, page faults in random order                           |
| walk       | names, attributes, link targets and extended attributes of a tree, and find(1)    |
| containers | `podman run --rm` of an image that is there, its output compared                  |
| resident   | one container that reads its files again and again, each round compared           |
| pulls      | `podman pull` of a new reference, a run, `podman rmi`                             |

What is right is what a plain pull extracted.  "Cold" means that the kernel has to ask: readers
have it forget the pages of a file before they read it, and ``forget_names`` is for whoever drives
the loads.

A load never ends by itself: SIGTERM lets it finish the operation under way.  It tells how far it
is on its *board*, a small mapped file, so that what it did and where it hangs can be seen even if
it never comes back.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import mmap
import os
import random
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Final, Literal

import msgspec

from lab import loadimages, trees
from lab.trees import Node, Tree

Kind = Literal["read", "stream", "mmap", "walk", "containers", "resident", "pulls"]

_COUNTS: Final = struct.Struct("<4Q2d")
_TEXT_BYTES: Final = 1024
_TOLD: Final = 100  # errors and wrong answers; the rest is only counted
_PAGE: Final = mmap.PAGESIZE
_SHORT_BYTES: Final = 8 << 20  # a page at a time and thrown away before: longer ones take too long
_PIECES: Final = (4096, 16_384, 65_536, 131_072, 1 << 20)
_PERMITTED: Final = frozenset((*trees.FORMAT_FILES, b"."))
_NICE: Final = 5  # loads take all processors: a new server is to come up between them
_COMMAND_SECONDS: Final = 300.0  # a hang is for the one who watches the board to notice


@dataclass(frozen=True, slots=True)
class Place:
    """A mounted image, and the file that holds the tree which it has to show."""

    root: Path
    tree: Path


@dataclass(frozen=True, slots=True)
class Runnable:
    """An image for Podman, and what it prints."""

    name: str
    prints: str


@dataclass(frozen=True, slots=True)
class Task:
    """What one process is to do; ``podman`` is the start of its command line."""

    kind: Kind
    board: Path
    seed: str
    places: tuple[Place, ...] = ()
    runnables: tuple[Runnable, ...] = ()
    podman: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Progress:
    """What a board says: counts since the start, and what is under way (``since`` 0: nothing).

    Times are on the clock of ``time.monotonic``, which is the same for all processes.
    """

    operations: int
    bytes: int
    errors: int
    wrong: int
    longest_seconds: float
    since: float
    doing: str


class Board:
    """The mapped file in which a load tells how far it is."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        size = _COUNTS.size + _TEXT_BYTES
        if create:
            path.write_bytes(bytes(size))
        with path.open("r+b") as file:
            self._map: Final = mmap.mmap(file.fileno(), size)
        self._counts = [0, 0, 0, 0]
        self._longest = 0.0
        self._since = 0.0

    def progress(self) -> Progress:
        """What stands there now."""
        operations, size, errors, wrong, longest, since = _COUNTS.unpack_from(self._map)
        text = self._map[_COUNTS.size :].rstrip(b"\0").decode(errors="replace")
        return Progress(operations, size, errors, wrong, longest, since, text)

    @contextlib.contextmanager
    def operation(self, doing: str) -> Iterator[None]:
        """Note one operation; OSError and failed commands in it are errors, and it goes on."""
        begun = self._since = time.monotonic()
        self.doing(doing)
        self._write()
        try:
            yield
        except (OSError, subprocess.SubprocessError) as error:
            self._counts[2] += 1
            self._tell(f"error: {doing}: {_said(error)}")
        self._counts[0] += 1
        self._longest = max(self._longest, time.monotonic() - begun)
        self._since = 0.0
        self._write()

    def doing(self, what: str) -> None:
        """Say more precisely what is under way."""
        raw = what.encode(errors="surrogateescape")[:_TEXT_BYTES]
        self._map[_COUNTS.size :] = raw.ljust(_TEXT_BYTES, b"\0")

    def got(self, size: int) -> None:
        """Count bytes that were read."""
        self._counts[1] += size
        self._write()

    def wrong(self, what: str) -> None:
        """Note an answer that is not what a plain pull gives."""
        self._counts[3] += 1
        self._tell(f"wrong: {what}")

    def _tell(self, what: str) -> None:
        if self._counts[2] + self._counts[3] <= _TOLD:
            print(what, file=sys.stderr, flush=True)

    def _write(self) -> None:
        _COUNTS.pack_into(self._map, 0, *self._counts, self._longest, self._since)


def save_tree(tree: Tree, path: Path) -> None:
    """Write a tree for `Place`."""
    path.write_bytes(msgspec.msgpack.encode(list(tree.items())))


def load_tree(path: Path) -> Tree:
    """Read what `save_tree` wrote."""
    return dict(msgspec.msgpack.decode(path.read_bytes(), type=list[tuple[bytes, Node]]))


def forget_names() -> None:
    """Have the kernel forget names and inodes that nobody uses, of all file systems (for root)."""
    Path("/proc/sys/vm/drop_caches").write_text("2\n")


class Load:
    """The work of one process."""

    def __init__(self, task: Task) -> None:
        self.task: Final = task
        self.board: Final = Board(task.board)
        self._random: Final = random.Random(task.seed)
        self._stopping = False
        self._number = 0
        self._trees: Final = {place: load_tree(place.tree) for place in task.places}
        self._files: Final = [
            (place, name)
            for place, tree in self._trees.items()
            for name, node in tree.items()
            if stat.S_ISREG(node.mode) and node.size and name not in _PERMITTED
        ]
        self._shorter: Final = [
            (place, name)
            for place, name in self._files
            if self._trees[place][name].size <= _SHORT_BYTES
        ]

    def run(self) -> None:
        """Do one operation after the other until SIGTERM."""
        signal.signal(signal.SIGTERM, self._stop)
        while not self._stopping:
            self.step()

    def step(self) -> None:
        """One operation; of a stream and a resident container all that come until SIGTERM."""
        work: dict[Kind, Callable[[], None]] = {
            "read": self._read,
            "stream": self._stream,
            "mmap": self._mapped,
            "walk": self._walk,
            "containers": self._container,
            "resident": self._resident,
            "pulls": self._pull,
        }
        work[self.task.kind]()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True

    # -- contents --------------------------------------------------------------------

    def _read(self) -> None:
        place, name = self._random.choice(self._shorter)
        node = self._trees[place][name]
        path = os.path.join(os.fsencode(place.root), name)
        with self.board.operation(f"read {_shown(path)}"):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                data = bytearray(node.size)
                for offset, size in self._pieces(node.size, self._random.choice(_PIECES)):
                    _fill(descriptor, memoryview(data)[offset : offset + size], offset)
                more = os.pread(descriptor, 1, node.size)
            finally:
                os.close(descriptor)
            self.board.got(node.size)
            self._compare(path, node, bytes(data) + more)

    def _stream(self) -> None:
        """Until the end of the load, like `_resident`: who holds a file open must not notice."""
        place, name = max(self._files, key=lambda file: self._trees[file[0]][file[1]].size)
        node = self._trees[place][name]
        path = os.path.join(os.fsencode(place.root), name)
        with open(path, "rb", buffering=0) as file:
            while not self._stopping:
                with self.board.operation(f"stream {_shown(path)}"):
                    file.seek(0)
                    data = bytearray()
                    while piece := file.read(_PIECES[2]):
                        data += piece
                        self.board.got(len(piece))
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    self._compare(path, node, bytes(data))

    def _mapped(self) -> None:
        place, name = self._random.choice(self._shorter)
        node = self._trees[place][name]
        path = os.path.join(os.fsencode(place.root), name)
        with self.board.operation(f"mmap {_shown(path)}"):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                with mmap.mmap(descriptor, node.size, prot=mmap.PROT_READ) as mapped:
                    mapped.madvise(mmap.MADV_RANDOM)
                    data = bytearray(node.size)
                    for offset, size in self._pieces(node.size, _PAGE * 16):
                        data[offset : offset + size] = mapped[offset : offset + size]
            finally:
                os.close(descriptor)
            self.board.got(node.size)
            self._compare(path, node, bytes(data))

    def _pieces(self, total: int, piece: int) -> list[tuple[int, int]]:
        """Where and how long: in order half of the time, else shuffled."""
        found = [(start, min(piece, total - start)) for start in range(0, total, piece)]
        if self._random.random() < 0.5:
            self._random.shuffle(found)
        return found

    def _compare(self, path: bytes, node: Node, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != node.digest:
            self.board.wrong(f"{_shown(path)}: other bytes ({len(data)} of {node.size})")

    # -- names -----------------------------------------------------------------------

    def _walk(self) -> None:
        place = self._random.choice(self.task.places)
        expected = self._trees[place]
        with self.board.operation(f"walk {place.root}"):
            found = trees.snapshot(place.root, contents=False)
            self._differences(place, trees.compare(_bare(expected), found, ignore=_PERMITTED))
        with self.board.operation(f"find {place.root}"):
            listed = subprocess.run(
                ["find", ".", "-printf", r"%P\t%m\t%U\t%G\t%l\0"],
                cwd=place.root,
                capture_output=True,
                check=True,
                timeout=_COMMAND_SECONDS,
            ).stdout.split(b"\0")
            wanted = {_find_line(name, node) for name, node in expected.items()}
            listing = {line for line in listed if line and line.split(b"\t")[0]}
            odd = {line for line in wanted ^ listing if line.split(b"\t")[0] not in _PERMITTED}
            self._differences(place, [_shown(line) for line in sorted(odd)])

    def _differences(self, place: Place, said: list[str]) -> None:
        if said:
            self.board.wrong(f"{place.root}: {len(said)} differences: {'; '.join(said[:5])}")

    # -- Podman ------------------------------------------------------------------------

    def _container(self) -> None:
        image = self._random.choice(self.task.runnables)
        with self.board.operation(f"run {image.name}"):
            self._start(image)

    def _resident(self) -> None:
        """Until the end of the load, in one container."""
        image = self.task.runnables[0]
        name = self.task.board.stem
        loop = f"while :; do {loadimages.RUN}; done"
        with subprocess.Popen(
            [*self.task.podman, "run", "--rm", "--pull=never", "--name", name,
             image.name, "sh", "-c", loop],
            env=self.task.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            while not self._stopping:
                with self.board.operation(f"resident {image.name}"):
                    said = process.stdout.read(len(image.prints)).decode(errors="replace")
                    self.board.got(len(said))
                    if said != image.prints:
                        self.board.wrong(f"{image.name} printed {said[-300:]!r}")
                        break
            self._podman("rm", "-f", "--time=0", name)

    def _pull(self) -> None:
        image = self.task.runnables[self._number % len(self.task.runnables)]
        self._number += 1
        with self.board.operation(f"pull {image.name}"):
            self._podman("pull", "-q", image.name)
            self.board.doing(f"run after pull {image.name}")
            self._start(image)
            self.board.doing(f"rmi {image.name}")
            self._podman("rmi", image.name)

    def _start(self, image: Runnable) -> None:
        said = self._podman("run", "--rm", "--pull=never", image.name)
        self.board.got(len(said))
        if said != image.prints:
            self.board.wrong(f"{image.name} printed {said[-300:]!r}")

    def _podman(self, *arguments: str) -> str:
        return subprocess.run(
            [*self.task.podman, *arguments],
            env=self.task.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            text=True,
            timeout=_COMMAND_SECONDS,
        ).stdout


def _fill(descriptor: int, target: memoryview, offset: int) -> None:
    """Read all of ``target`` from ``offset``; a file that ends before leaves the rest as it is."""
    while target:
        count = os.preadv(descriptor, [target], offset)
        if count == 0:
            return
        target, offset = target[count:], offset + count


def _bare(tree: Tree) -> Tree:
    """The tree as a walk sees it that opens no file."""
    return {name: replace(node, digest="") for name, node in tree.items()}


def _find_line(name: bytes, node: Node) -> bytes:
    mode = stat.S_IMODE(node.mode)
    return b"%b\t%o\t%d\t%d\t%b" % (name, mode, node.uid, node.gid, node.target)


def _shown(path: bytes) -> str:
    return path.decode(errors="backslashreplace")


def _said(error: OSError | subprocess.SubprocessError) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"{error}: {error.stderr!s}"[-2000:]
    return str(error)


def main() -> None:
    """Run the task that the file in the first argument describes."""
    faulthandler.enable()
    os.nice(_NICE)
    raw = Path(sys.argv[1]).read_bytes()
    Load(msgspec.msgpack.decode(raw, type=Task, dec_hook=_path)).run()


def _path(kind: type, value: object) -> object:
    """Paths in a task file are text."""
    return kind(value)


if __name__ == "__main__":
    main()
