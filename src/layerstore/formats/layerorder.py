"""In which order the entries of a layer go into an eStargz blob.

Prioritised files come first, so that one sequential read at the start of the blob
brings what a container needs to start; each with its parent directories before it and
its hard link target before the link (stargz-snapshotter, docs/estargz.md).  The rest
keeps its order.  Of entries with the same name the last one counts, as when the archive
is extracted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from layerstore import limits
from layerstore.errors import InvalidLayer, LimitExceeded, UnsupportedFormat
from layerstore.formats.compression import Readable
from layerstore.formats.estargz import NO_PREFETCH_LANDMARK, PREFETCH_LANDMARK, TOC_NAME
from layerstore.formats.tarstream import DIRECTORY, HARD_LINK, TarEntry, TarReader

LANDMARKS: Final = frozenset(name.encode() for name in (PREFETCH_LANDMARK, NO_PREFETCH_LANDMARK))
_OWN_NAMES: Final = LANDMARKS | {TOC_NAME.encode()}
_NEW, _OPEN, _PLACED = range(3)


@dataclass(slots=True, eq=False)
class Item:
    """One entry of the input: its cleaned path, where its headers are, what it links to."""

    path: bytes
    header_offset: int
    type: bytes
    target: Item | None
    state: int = _NEW


@dataclass(slots=True)
class Order:
    """The items in the order of output; the first ``prioritized`` of them are wanted early."""

    items: list[Item] = field(default_factory=list)
    prioritized: int = 0
    found: tuple[str, ...] = ()


def clean_path(name: bytes) -> bytes:
    """Return ``name`` without ``.`` components, doubled, leading and trailing slashes.

    The root is ``b""``.  ``..`` takes back the component before it; a path that leaves the
    root raises ``InvalidLayer``.
    """
    if len(name) > limits.PATH_BYTES:
        raise LimitExceeded(f"a name in the tar archive has {len(name)} bytes")
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            if not parts:
                raise InvalidLayer(
                    "a name in the tar archive leads out of it", subject=repr(name)[:200]
                )
            parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    return b"/".join(parts)


def order_entries(tar: Readable, prioritize: Sequence[str] = ()) -> Order:
    """Read a whole tar stream and decide the order of its entries.

    ``prioritize`` lists paths; those that the layer does not hold are ignored.  An existing
    TOC and existing landmarks are left out.
    """
    return _place(*_scan(tar), prioritize)


def _scan(tar: Readable) -> tuple[list[Item], dict[bytes, Item]]:
    """Return the surviving items in archive order, and by path."""
    items: list[Item] = []
    names: dict[bytes, Item] = {}
    linked: list[Item] = []
    removed_directory = False
    for entry in TarReader(tar):
        path = clean_path(entry.name)
        if path in _OWN_NAMES:
            continue
        before = names.get(path)
        if before is not None and before.type == DIRECTORY and entry.type != DIRECTORY:
            removed_directory = True
        item = _item(entry, path, names)
        if item.target is not None:
            linked.append(item)
        names[path] = item
        items.append(item)
        if len(items) > limits.TOC_ENTRIES:
            raise LimitExceeded(f"the layer has more than {limits.TOC_ENTRIES} entries")
    if len(names) != len(items):
        items = [item for item in items if names[item.path] is item]
        for link in linked:
            target = link.target
            if names[link.path] is link and target and names[target.path] is not target:
                raise UnsupportedFormat(
                    "a hard link leads to a file that the layer replaces afterwards",
                    subject=repr(target.path)[:200],
                )
    if removed_directory:
        items = [item for item in items if not _buried(item, names)]
        names = {item.path: item for item in items}
    return items, names


def _item(entry: TarEntry, path: bytes, names: dict[bytes, Item]) -> Item:
    target = names.get(clean_path(entry.link_name)) if entry.type == HARD_LINK else None
    return Item(path, entry.header_offset, entry.type, target)


def _buried(item: Item, names: dict[bytes, Item]) -> bool:
    """Say whether a later entry put something else in the place of a parent directory."""
    path = item.path
    while slash := path.rfind(b"/") + 1:
        path = path[: slash - 1]
        parent = names.get(path)
        if (
            parent is not None
            and parent.type != DIRECTORY
            and parent.header_offset > item.header_offset
        ):
            return True
    return False


def _place(items: list[Item], names: dict[bytes, Item], prioritize: Iterable[str]) -> Order:
    order = Order()
    found: dict[str, None] = {}
    for wanted in prioritize:
        item = names.get(clean_path(wanted.encode("utf-8", "surrogateescape")))
        if item is not None:
            found[wanted] = None
            _place_one(item, names, order.items)
    order.found = tuple(found)
    order.prioritized = len(order.items)
    for item in items:
        _place_one(item, names, order.items)
    return order


def _place_one(first: Item, names: dict[bytes, Item], placed: list[Item]) -> None:
    """Append ``first`` after what must stand before it: nearest parent, hard link target."""
    stack = [first]
    while stack:
        item = stack[-1]
        if item.state != _NEW:
            stack.pop()
            if item.state == _OPEN:
                item.state = _PLACED
                placed.append(item)
            continue
        item.state = _OPEN
        if item.target is not None and item.target.state == _NEW:
            stack.append(item.target)
        parent = _parent(item.path, names)
        if parent is not None and parent.state == _NEW:
            stack.append(parent)


def _parent(path: bytes, names: dict[bytes, Item]) -> Item | None:
    while path:
        path = path[: max(0, path.rfind(b"/"))]
        if (item := names.get(path)) is not None:
            return item
    return None
