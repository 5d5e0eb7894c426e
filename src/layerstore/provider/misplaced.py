"""What stands where a file of a layer belongs and is none: put there by a person or a broken disk.

Nothing can be written in its place, so it has to go first.  Links that lead to what belongs there
are no misplaced things.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def misplaced(directory: Path) -> Iterator[Path]:
    """The directory of a layer if it is none, else what in it is no file.  Raises OSError."""
    if os.path.lexists(directory) and not directory.is_dir():
        yield directory
        return
    yield from no_files(directory)


def no_files(directory: Path) -> Iterator[Path]:
    """What in a directory of files is none; nothing where there is no directory.  Raises OSError."""
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    for entry in entries:
        if not entry.is_file() and os.path.lexists(entry.path):  # it may have gone meanwhile
            yield Path(entry.path)


def make_way(directory: Path) -> None:
    """Remove what is misplaced in a layer's directory.  Raises OSError."""
    for path in misplaced(directory):
        remove(path)


def remove(path: Path) -> None:
    """Remove whatever it is, if it is there.  Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
