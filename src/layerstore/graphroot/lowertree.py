"""The layers below an overlay layer, asked what they have at a path.

Overlay's own marks (kernel documentation, ``filesystems/overlayfs.rst``): a character device 0:0
is a whiteout, ``trusted.overlay.opaque`` (``user.`` in a user namespace) set to ``y`` hides
what the layers below have in a directory.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Self

from layerstore.graphroot.beneath import Beneath

_OPAQUE: Final = (b"trusted.overlay.opaque", b"user.overlay.opaque")


def is_whiteout(found: os.stat_result) -> bool:
    """Say whether a file is overlay's mark of a deletion."""
    return stat.S_ISCHR(found.st_mode) and not found.st_rdev


def is_opaque(directory: int) -> bool:
    """Say whether an open directory hides what lies below it."""
    for name in _OPAQUE:
        try:
            if os.getxattr(directory, name) == b"y":
                return True
        except OSError:  # the usual case: it has none
            continue
    return False


class LowerTrees:
    """The ``diff`` directories ``lowers``, nearest first; a context manager.

    One is opened when it is asked for the first time.  All methods raise OSError.
    """

    def __init__(self, lowers: Sequence[Path]) -> None:
        self._lowers = lowers
        self._trees: list[Beneath] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def find(self, path: bytes) -> os.stat_result | None:
        """What the nearest layer that has ``path`` has there; None if one deletes it before."""
        for number in range(len(self._lowers)):
            tree = self._tree(number)
            found = tree.stat(path)
            if found is not None:
                return None if is_whiteout(found) else found
            if _deleted_above(tree, path):
                return None
        return None

    def open_file(self, path: bytes) -> int:
        """A new descriptor of a regular file in the nearest layer that has it."""
        for number in range(len(self._lowers)):
            try:
                return self._tree(number).open_file(path)
            except (FileNotFoundError, NotADirectoryError):
                continue
        raise FileNotFoundError(path)

    def _tree(self, number: int) -> Beneath:
        while len(self._trees) <= number:
            lower = self._lowers[len(self._trees)]
            self._trees.append(self._stack.enter_context(Beneath(lower)))
        self._trees[number].trim()
        return self._trees[number]


def _deleted_above(tree: Beneath, path: bytes) -> bool:
    while path := path.rpartition(b"/")[0]:
        found = tree.stat(path)
        if found is not None:
            return is_whiteout(found)
    return False
