"""A disk that loses power: a file system in a file, of which copies are what is left at a moment.

Linux writes to the file what the file system gives to its disk, and only that: what still waits in
memory is not in a copy.  The file system is mounted so that the two drift apart: metadata comes
every second, the bytes of files much later or never (``data=writeback,nodelalloc,commit=1``), so
that names and sizes are there without bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_MKFS: Final = ("mkfs.ext4", "-q", "-F", "-J", "size=4", "-E", "lazy_itable_init=0", "-m", "0")
_OPTIONS: Final = "noatime,commit=1,data=writeback,nodelalloc"
_QUIET_TRIES: Final = 2000
_PAGE: Final = 4096
_STAMP_TAG: Final = 314_159_265


class Disk:
    """A file system of ``size`` bytes in ``file``, mounted on ``mountpoint`` while it is entered."""

    def __init__(self, file: Path, mountpoint: Path, size: int) -> None:
        self.file: Final = file
        self._mountpoint = mountpoint
        with file.open("wb") as made:
            made.truncate(size)
        subprocess.run([*_MKFS, str(file)], check=True)

    def __enter__(self) -> Disk:
        self._mountpoint.mkdir(parents=True, exist_ok=True)
        _mount(self.file, self._mountpoint, _OPTIONS)
        device = os.stat(self._mountpoint).st_dev
        self._statistics = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", str(self._mountpoint)], check=True)

    def power_loss(self, target: Path) -> None:
        """Copy what is on the disk at this moment to ``target``."""
        for _ in range(_QUIET_TRIES):
            before = self._written()
            copy_sparse(self.file, target)
            if before is not None and before == self._written():
                return  # nothing was written meanwhile, so it is the state of one moment
        raise TimeoutError("the disk is written to all the time")

    def _written(self) -> str | None:
        fields = self._statistics.read_text().split()
        return None if fields[8] != "0" else fields[4]  # I/Os in flight, writes completed


def _mount(file: Path, mountpoint: Path, options: str = "noatime") -> None:
    subprocess.run(["mount", "-o", f"loop,{options}", str(file), str(mountpoint)], check=True)


@contextlib.contextmanager
def mounted(file: Path, mountpoint: Path) -> Iterator[Path]:
    """A file system for the time of a block; its journal is replayed."""
    mountpoint.mkdir(parents=True, exist_ok=True)
    _mount(file, mountpoint)
    try:
        yield mountpoint
    finally:
        for _ in range(50):
            ended = subprocess.run(["umount", str(mountpoint)], capture_output=True, check=False)
            if ended.returncode == 0:
                break
            time.sleep(0.1)
        else:
            subprocess.run(["umount", "-l", str(mountpoint)], check=True)


def copy_sparse(source: Path, target: Path) -> None:
    """Copy what is allocated of a file."""
    with source.open("rb") as file, target.open("wb") as out:
        size = os.fstat(file.fileno()).st_size
        out.truncate(size)
        at = 0
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                return
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            while at < end:
                piece = os.pread(file.fileno(), min(end - at, 1 << 20), at)
                os.pwrite(out.fileno(), piece, at)
                at += len(piece)


def spoil(root: Path, chance: random.Random) -> int:
    """Do to the service's files in ``root`` the worst that a disk may do; how many were spoilt.

    Each file that the service cannot know to be synced keeps its name, and by chance loses bytes
    or its end.  The database is left to its own journal, which the copied disk already cut off.
    """
    synced = synced_generation(root)
    spoilt = 0
    for path in sorted((*root.glob("content/*/**/*"), *root.glob("layers/*/*"))):
        if path.is_dir() or _is_synced(path, synced) or chance.random() < 0.3:
            continue
        found = path.stat()
        if not found.st_size:
            continue
        with path.open("r+b") as file:
            match chance.randrange(4):
                case 0:
                    file.truncate(chance.randrange(found.st_size))
                case 1:
                    file.truncate(0)
                    file.truncate(found.st_size)
                case 2:
                    start = chance.randrange(found.st_size)
                    file.seek(start)
                    file.write(bytes(min(found.st_size - start, _PAGE)))
                case _:
                    file.seek(chance.randrange(found.st_size))
                    file.write(b"\xee")  # what was there before
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
        spoilt += 1
    return spoilt


def synced_generation(root: Path) -> int:
    """Up to where the mark of the cache says that everything is on the disk; 0 without one."""
    try:
        mark = json.loads((root / "content/synced").read_bytes().partition(b"\n")[0])
    except (OSError, ValueError):
        return 0
    return int(mark["synced"])


def _is_synced(path: Path, synced: int) -> bool:
    generation, tag = divmod(path.stat().st_mtime_ns, 10**9)
    return tag == _STAMP_TAG and generation <= synced
