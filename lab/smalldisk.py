"""A small file system of its own, to be filled or for what it is: on a loop device, or in memory.

A *thin* one promises more than it has, as thin pools and overbooked virtual machines do: writes
succeed, and get lost when the kernel wants to bring them to the device.  A *coarse* one is ext4
that keeps times as whole seconds; *ramfs* has no attributes, and takes what memory there is.
"""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

Kind = Literal["ext4", "tmpfs", "thin", "coarse", "ramfs"]

_PIECE: Final = 1 << 16
_RAMFS: Final = ("mount", "-t", "ramfs", "-o", "mode=0700", "ramfs")


class SmallDisk:
    """``size`` bytes, mounted on ``directory``, which is made.  A context manager; for root.

    The file of the loop device lies beside the directory.
    """

    def __init__(self, directory: Path, kind: Kind, size: int) -> None:
        self.directory: Final = directory
        self._kind: Final = kind
        self._size: Final = size
        self._pool: Final = directory.with_name(directory.name + ".pool")
        self._image: Final = self._pool / "image"
        self._filler: Final = (self._pool if kind == "thin" else directory) / "filler"

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True)
        tmpfs = ("mount", "-t", "tmpfs", "-o", f"size={self._size},mode=0700", "tmpfs")
        if self._kind in ("tmpfs", "ramfs"):
            _run(*(tmpfs if self._kind == "tmpfs" else _RAMFS), self.directory)
            return self
        self._pool.mkdir()
        if self._kind == "thin":
            _run(*tmpfs, self._pool)
        with self._image.open("wb") as image:
            image.truncate(self._size)
        coarse = ("-I", "128") if self._kind == "coarse" else ()
        _run("mkfs.ext4", "-q", "-m", "0", *coarse, self._image)
        _run("mount", "-o", "loop", self._image, self.directory)  # the device goes with the mount
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for place in (self.directory, self._pool):
            subprocess.run(["umount", "--lazy", str(place)], check=False, capture_output=True)
        self._image.unlink(missing_ok=True)

    def fail(self) -> None:
        """An error of the file system: the kernel makes it read only, whoever has files open.

        For ext4 only.
        """
        _run("mount", "-o", "remount,errors=remount-ro", self.directory)
        device = Path(f"/sys/dev/block/{_numbers(self.directory)}").resolve().name
        Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("a test")

    def repair(self) -> None:
        """Unmount it, have its file system checked, and mount it again."""
        _run("umount", self.directory)
        subprocess.run(["e2fsck", "-y", str(self._image)], check=False, capture_output=True)
        _run("mount", "-o", "loop", self._image, self.directory)

    @property
    def room(self) -> int:
        """Bytes that are free."""
        found = os.statvfs(self._filler.parent)
        return found.f_bavail * found.f_frsize

    def fill(self, leave: int = 0) -> None:
        """Take the room, but for about ``leave`` bytes; to the last byte if that is 0."""
        with self._filler.open("ab", buffering=0) as filler:
            for piece in (_PIECE, 512):
                try:
                    while not leave or self.room > leave:
                        filler.write(b"\xff" * piece)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise

    def free(self) -> None:
        """Give it back."""
        self._filler.unlink()

    def left(self, below: str) -> list[Path]:
        """All files in a part of it."""
        return [one for one in (self.directory / below).rglob("*") if one.is_file()]


def _run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True)


def _numbers(directory: Path) -> str:
    device = directory.stat().st_dev
    return f"{os.major(device)}:{os.minor(device)}"
