"""What overlay mounts stand on: containers and images that run or are mounted, of whomever.

An overlay mount names its lower directories by their short links, ``l/<26 characters>``, absolute
or relative, in any mount namespace of the machine.  fuse-overlayfs does not show them, but its
mount point lies in the directory of the layer on top, whose file ``lower`` has them.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from layerstore.graphroot.overlay import Overlay, additional_layer_of, short_name_of

_SHORT: Final = re.compile(rb"(?:^|[/=:,\\])l/([A-Z0-9]{26})(?![A-Za-z0-9])")
_DIFF: Final = re.compile(rb"([^=:,\s]*)/([0-9a-f]{64})/diff(?![A-Za-z0-9])")
_GRAPH_ROOT: Final = re.compile(rb"[=:](/[^:,\\\s]+)/overlay/l/[A-Z0-9]{26}(?![A-Za-z0-9])")
_MERGED: Final = re.compile(rb" (/\S+)/merged ")


def short_names(text: bytes) -> list[bytes]:
    """The short names of layers in the options of a mount, or in a file ``lower``."""
    return _SHORT.findall(text)


def layer_ids(text: bytes) -> list[bytes]:
    """The ids of layers whose ``diff`` is named in the options of a mount."""
    return [layer for _, layer in _DIFF.findall(text)]


def layer_ids_in(text: bytes, overlay: Path) -> list[bytes]:
    """Those of `layer_ids` that may be in the directory ``overlay`` of a graph root.

    Elsewhere are only those whose directory can be seen, and is another one.
    """
    return [
        layer
        for parent, layer in _DIFF.findall(text)
        if not _is_elsewhere(Path(os.fsdecode(parent)), overlay)
    ]


def _is_elsewhere(directory: Path, overlay: Path) -> bool:
    if not directory.is_absolute():
        return False
    try:
        return not directory.samefile(overlay)
    except OSError:
        return False


def overlay_mounts() -> Iterator[bytes]:
    """The overlay mounts of every mount namespace: a line of mountinfo each."""
    return (line for line in _mounts() if b" - overlay " in line)


class Mounted(msgspec.Struct, frozen=True):
    """Short names and ids of layers that are mounted, or stand below one that is.

    ``graph_roots`` are those whose names the mounts tell.
    """

    layers: frozenset[bytes]
    graph_roots: frozenset[Path]


def mounted_layers() -> Mounted:
    """What is mounted on this machine now."""
    found: set[bytes] = set()
    roots: set[bytes] = set()
    for line in _mounts():
        if b" - overlay " in line:
            found.update(short_names(line), layer_ids(line))
            roots.update(_GRAPH_ROOT.findall(line))
        elif b"fuse-overlayfs" in line and (match := _MERGED.search(line)) is not None:
            with contextlib.suppress(OSError):
                found.update(short_names(Path(os.fsdecode(match[1]), "lower").read_bytes()))
    return Mounted(frozenset(found), frozenset(Path(os.fsdecode(root)) for root in roots))


def _mounts() -> Iterator[bytes]:
    seen: set[str] = set()
    for process in os.listdir("/proc"):
        if not process.isdigit():
            continue
        with contextlib.suppress(OSError):  # it ended
            namespace = os.readlink(f"/proc/{process}/ns/mnt")
            if namespace in seen:
                continue
            lines = Path(f"/proc/{process}/mountinfo").read_bytes().splitlines()
            seen.add(namespace)
            yield from lines


class LinkedLayer(msgspec.Struct, frozen=True):
    """A layer of a graph root whose content a layer store has, at ``path``."""

    id: str
    path: Path
    mounted: bool


def linked_layers(graph_root: Path, mounted: Mounted) -> list[LinkedLayer]:
    """The lazy layers of a graph root, by its files ``additionallayer``, whatever its records say.

    ``mounted`` is of ``mounted_layers``.  Raises StorageError, CorruptStorage for a file that
    cannot be understood.
    """
    overlay = Overlay(graph_root)
    found = []
    for layer in overlay.layers():
        path = additional_layer_of(overlay.home / layer)
        if path is None:
            continue
        name = short_name_of(overlay.home / layer) or ""
        is_mounted = not mounted.layers.isdisjoint((layer.encode(), name.encode()))
        found.append(LinkedLayer(layer, path, is_mounted))
    return found
