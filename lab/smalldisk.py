"""A small file system of its own, to be filled: ext4 on a loop device, or tmpfs."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

Kind = Literal["ext4", "tmpfs"]

_PIECE: Final = 1 << 16


class SmallDisk:
    """``size`` bytes, mounted on ``directory``, which is made.  A context manager; for root.

    The file of the loop device lies beside the directory.
    """

    def __init__(self, directory: Path, kind: Kind, size: int) -> None:
        self.directory: Final = directory
        self._kind: Final = kind
        self._size: Final = size
        self._image: Final = directory.with_name(directory.name + ".img")
        self._filler: Final = directory / "filler"

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True)
        if self._kind == "tmpfs":
            options = f"size={self._size},mode=0700"
            _run("mount", "-t", "tmpfs", "-o", options, "tmpfs", self.directory)
            return self
        with self._image.open("wb") as image:
            image.truncate(self._size)
        _run("mkfs.ext4", "-q", "-m", "0", self._image)
        _run("mount", "-o", "loop", self._image, self.directory)  # the device goes with the mount
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        subprocess.run(["umount", "--lazy", str(self.directory)], check=False, capture_output=True)
        self._image.unlink(missing_ok=True)

    @property
    def room(self) -> int:
        """Bytes that are free."""
        found = os.statvfs(self.directory)
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
