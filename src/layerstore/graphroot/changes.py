"""What a layer changes of the layers below it: the lines of ``podman diff``.

The rules are those of containers/storage (``pkg/archive``: ``OverlayChanges``, ``changes``):
paths in sorted order; a whiteout is a deletion, and so is an opaque directory that a layer below
has; what a layer below has is changed, but a directory only if its mode, size or time differ;
everything else is added.  Before an addition or deletion stand the directories above it that were
not reported yet, as changed.

Where a program makes the mounts, Podman compares the two mounted trees instead (``ChangesDirs``):
what one of them has and the other has not, and what differs in mode, owner, device or attributes,
or, but for directories, in size or time.  Directories above any change are changed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from layerstore.errors import StorageError
from layerstore.graphroot.beneath import Beneath
from layerstore.graphroot.lowertree import LowerTrees, is_opaque, is_whiteout
from layerstore.graphroot.merged import Merged, Node

ENGINE_FILES: Final = frozenset(
    (
        *(b"/dev", b"/proc", b"/sys", b"/run", b"/run/notify", b"/run/.containerenv"),
        *(b"/run/secrets", b"/run/podman-init", b"/etc/hostname", b"/etc/hosts"),
        *(b"/etc/resolv.conf", b"/etc/mtab"),
    )
)
"""Paths that the engine itself makes in containers; Podman leaves them out (``libpod/diff.go``)."""

_SECOND: Final = 10**9


@dataclass(frozen=True, slots=True)
class Change:
    """One path, beginning with ``/``: ``A`` added, ``C`` changed, ``D`` deleted."""

    kind: Literal["A", "C", "D"]
    path: bytes

    def __str__(self) -> str:
        return f"{self.kind} {os.fsdecode(self.path)}"


def changes(diff: Path, lowers: Sequence[Path], *, by_program: bool = False) -> Iterator[Change]:
    """Compare ``diff`` with the ``diff`` directories below it, nearest first, as Podman prints it.

    ``by_program``: a program makes the mounts of the graph root.  Raises StorageError.
    """
    for change in all_changes(diff, lowers, by_program=by_program):
        if change.path not in ENGINE_FILES:
            yield change


def all_changes(
    diff: Path, lowers: Sequence[Path], *, by_program: bool = False
) -> Iterator[Change]:
    """The same with what the engine makes in containers."""
    try:
        if by_program:
            with Merged([diff, *lowers]) as merged:
                yield from _compare(merged)
            return
        with Beneath(diff) as tree, LowerTrees(lowers) as below:
            yield from _walk(tree, below)
    except OSError as error:
        raise StorageError(f"cannot be compared: {error}", subject=str(diff)) from error


def _walk(tree: Beneath, below: LowerTrees) -> Iterator[Change]:
    reported: set[bytes] = set()
    ahead = _names(tree, b"")
    while ahead:
        path = ahead.pop()
        tree.trim()
        found = tree.stat(path)
        if found is None:  # a container at work has removed it
            continue
        is_directory = stat.S_ISDIR(found.st_mode)
        if is_directory:
            ahead += _names(tree, path)
        kind = _kind(tree, below, path, found)
        if kind is None:
            continue
        if is_directory:
            reported.add(path)
        if kind != "C":
            yield from _above(path, reported)
        yield Change(kind, b"/" + path)


def _kind(
    tree: Beneath, below: LowerTrees, path: bytes, found: os.stat_result
) -> Literal["A", "C", "D"] | None:
    if is_whiteout(found):
        return "D"
    lower = below.find(path)
    if lower is None:
        return "A"
    if not stat.S_ISDIR(found.st_mode):
        return "C"
    if is_opaque(tree.directory(path)):
        return "D"
    return None if _same_directory(found, lower) else "C"


def _same_directory(one: os.stat_result, other: os.stat_result) -> bool:
    if one.st_mode != other.st_mode or one.st_size != other.st_size:
        return False
    return _same_time(one, other)


def _same_time(one: os.stat_result, other: os.stat_result) -> bool:
    first, second = one.st_mtime_ns, other.st_mtime_ns
    # A time without fraction may have lost it.
    return first == second or (
        first // _SECOND == second // _SECOND and not (first % _SECOND and second % _SECOND)
    )


def _compare(merged: Merged) -> Iterator[Change]:
    """The changes between the stack without its first layer and the whole."""
    reported: set[bytes] = set()
    ahead: list[tuple[bytes, Node | None, Node | None]] = [(b"", merged.root(0), merged.root(1))]
    while ahead:
        path, new, old = ahead.pop()
        kind = _kind_of(merged, path, new, old) if path else None
        if kind is not None:
            yield from _above(path, reported)
            reported.add(path)
            yield Change(kind, b"/" + path)
        # Where the first layer has no directory nothing can differ.
        if new is None or 0 not in new.layers:
            continue
        ours = merged.children(path, new)
        theirs = merged.children(path, old) if old is not None else {}
        start = path + b"/" if path else b""
        for name in sorted(ours.keys() | theirs.keys(), reverse=True):
            one = ours.get(name)
            if one is None or one.layer == 0:
                ahead.append((start + name, one, theirs.get(name)))


def _kind_of(
    merged: Merged, path: bytes, new: Node | None, old: Node | None
) -> Literal["A", "C", "D"] | None:
    if new is None:
        return "D"
    if old is None:
        return "A"
    one, other = new.found, old.found
    same = (one.st_mode, one.st_uid, one.st_gid, one.st_rdev) == (
        *(other.st_mode, other.st_uid, other.st_gid, other.st_rdev),
    )
    if same and not new.is_directory:
        same = one.st_size == other.st_size and _same_time(one, other)
    if same:
        same = merged.attributes(path, new) == merged.attributes(path, old)
    return None if same else "C"


def _above(path: bytes, reported: set[bytes]) -> Iterator[Change]:
    missing = []
    while path := path.rpartition(b"/")[0]:
        if path not in reported:
            missing.append(path)
            reported.add(path)
    for each in reversed(missing):
        yield Change("C", b"/" + each)


def _names(tree: Beneath, path: bytes) -> list[bytes]:
    start = path + b"/" if path else b""
    names = sorted(map(os.fsencode, os.listdir(tree.directory(path))), reverse=True)
    return [start + name for name in names]
