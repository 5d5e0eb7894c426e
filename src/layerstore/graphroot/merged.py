"""What fuse-overlayfs shows of a stack of layers, without a mount.

It takes the kernel's marks and those of archives (github.com/containers/fuse-overlayfs, ``main.c``:
``load_dir``, ``is_directory_opaque``): a file ``.wh.NAME`` or a character device 0:0 deletes NAME in
the layers below, and a file ``.wh..wh..opq`` or an attribute hides what they have in a directory.
The layers of a graph root with a ``mount_program`` have all of these: Podman extracts archives as
they are, the program itself and layer stores write the others.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self

from layerstore.graphroot.beneath import Beneath, through
from layerstore.graphroot.lowertree import is_opaque, is_whiteout
from layerstore.graphroot.whiteouts import OPAQUE_MARKER, WHITEOUT_PREFIX

_META_PREFIX: Final = b".wh..wh."
_OPAQUE: Final = b"user.fuseoverlayfs.opaque"
_HIDDEN: Final = (b"user.fuseoverlayfs.", b"user.overlay.", b"user.containers.")
_CAPABILITY: Final = b"security.capability"


@dataclass(frozen=True, slots=True)
class Node:
    """A file as it is shown: that of the nearest ``layer`` that has it.

    For a directory ``layers`` are those whose contents it shows, nearest first.
    """

    layer: int
    found: os.stat_result
    layers: tuple[int, ...] = ()

    @property
    def is_directory(self) -> bool:
        """Whether it is one."""
        return stat.S_ISDIR(self.found.st_mode)


class Merged:
    """The ``diff`` directories of a stack, nearest first; a context manager.

    All methods raise OSError.  Numbers of layers are places in the stack.
    """

    def __init__(self, stack: Sequence[Path]) -> None:
        self._stack = stack
        self._trees: dict[int, Beneath] = {}
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def root(self, first: int) -> Node | None:
        """The root of the stack from the layer ``first`` on; None if there are no more."""
        layers: list[int] = []
        for number in range(first, len(self._stack)):
            layers.append(number)
            if self._is_opaque(number, b""):
                break
        if not layers:
            return None
        return Node(first, os.fstat(self._tree(first).root), tuple(layers))

    def children(self, path: bytes, directory: Node) -> dict[bytes, Node]:
        """What is in a directory, by name."""
        shown: dict[bytes, Node] = {}
        ended: set[bytes] = set()  # names of which no layer below is to be heard
        for number in directory.layers:
            listed = self._listed(number, path)
            # A whiteout wins over a file of the same layer, too.
            ended |= {
                name.removeprefix(WHITEOUT_PREFIX)
                for name, found in listed
                if name.startswith(WHITEOUT_PREFIX) or is_whiteout(found)
            }
            for name, found in listed:
                if name not in ended and not name.startswith(WHITEOUT_PREFIX):
                    self._show(shown, ended, path, name, Node(number, found))
        return shown

    def attributes(self, path: bytes, node: Node) -> tuple[bytes, dict[bytes, bytes]]:
        """The target, if it is a link, and those attributes by which Podman compares files."""
        parent, _, name = path.rpartition(b"/")
        directory = self._tree(node.layer).directory(parent)
        target = os.readlink(name, dir_fd=directory) if stat.S_ISLNK(node.found.st_mode) else b""
        file = through(directory, name)
        found = {}
        for key in map(os.fsencode, os.listxattr(file, follow_symlinks=False)):
            if key == _CAPABILITY or (key.startswith(b"user.") and not key.startswith(_HIDDEN)):
                found[key] = os.getxattr(file, key, follow_symlinks=False)
        return target, found

    def _show(
        self, shown: dict[bytes, Node], ended: set[bytes], path: bytes, name: bytes, node: Node
    ) -> None:
        known = shown.get(name)
        if node.is_directory:
            nearest = known or node
            shown[name] = replace(nearest, layers=(*nearest.layers, node.layer))
            if self._is_opaque(node.layer, path + b"/" + name if path else name):
                ended.add(name)
            return
        # A file below a directory is hidden by it, and so is what is below that file.
        shown.setdefault(name, node)
        ended.add(name)

    def _listed(self, number: int, path: bytes) -> list[tuple[bytes, os.stat_result]]:
        listed = []
        # A container at work may remove what is looked at.
        with suppress(FileNotFoundError, NotADirectoryError):
            directory = self._tree(number).directory(path)
            for name in map(os.fsencode, os.listdir(directory)):
                if not name.startswith(_META_PREFIX):
                    with suppress(FileNotFoundError):
                        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
                        listed.append((name, found))
        return listed

    def _is_opaque(self, number: int, path: bytes) -> bool:
        with suppress(FileNotFoundError, NotADirectoryError):
            directory = self._tree(number).directory(path)
            if is_opaque(directory):
                return True
            with suppress(OSError):
                if os.getxattr(directory, _OPAQUE) == b"y":
                    return True
            os.stat(OPAQUE_MARKER, dir_fd=directory, follow_symlinks=False)
            return True
        return False

    def _tree(self, number: int) -> Beneath:
        tree = self._trees.get(number)
        if tree is None:
            tree = self._trees[number] = self._opened.enter_context(Beneath(self._stack[number]))
        tree.trim()
        return tree
