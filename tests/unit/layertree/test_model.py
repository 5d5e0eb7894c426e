"""The index against a plain model of extraction, on random sequences of entries.

The model keeps a tree of Python objects and knows nothing of tables or numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import stat
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from layerstore.errors import InvalidLayer
from layerstore.formats.toc import TocEntry
from layerstore.layertree import LayerIndex, build_index

Path = tuple[str, ...]
MODES = {"reg": stat.S_IFREG, "char": stat.S_IFCHR, "fifo": stat.S_IFIFO, "dir": stat.S_IFDIR}


class Refused(Exception):
    """The model refuses the layer."""


@dataclasses.dataclass(eq=False)
class Node:
    kind: str  # dir, reg, symlink, char, fifo, whiteout or link
    mode: int
    uid: int = 0
    text: str = ""
    size: int = 0
    announced: bool = False
    opaque: bool = False
    children: dict[str, Node] = dataclasses.field(default_factory=dict)

    def real(self) -> bool:
        if self.kind == "dir":
            return self.announced or any(child.real() for child in self.children.values())
        return self.kind != "whiteout"


class Model:
    def __init__(self) -> None:
        self.root = Node("dir", 0o755, announced=True)

    def step(self, node: Node, part: str) -> Node | None:
        return node.children.get(part) if node.kind == "dir" else None

    def get(self, path: Path) -> Node | None:
        node: Node | None = self.root
        for part in path:
            node = self.step(node, part) if node else None
        return None if node is None or node.kind == "whiteout" else node

    def parent(self, path: Path, real: bool) -> Node | None:
        node = self.root
        for part in path[:-1]:
            child = node.children.get(part)
            if child is None or (real and child.kind == "whiteout"):
                child = node.children[part] = Node("dir", 0o755)
            if child.kind != "dir":
                if real or child.kind == "symlink":
                    raise Refused
                return None
            node = child
        return node

    def apply(self, path: Path, entry: TocEntry) -> None:
        if path and path[-1].startswith(".wh."):
            self.whiteout(path, entry)
            return
        parent = self.parent(path, real=True)
        assert parent is not None
        kind = entry.type
        new = Node(kind, entry.mode, entry.uid, entry.link_name, entry.size, announced=True)
        if kind == "dir":
            old = parent.children.get(path[-1]) if path else self.root
            if old is not None and old.kind == "dir":
                old.mode, old.uid, old.announced = entry.mode, entry.uid, True
                return
        parent.children.pop(path[-1], None)
        if kind == "hardlink":
            target = self.get(tuple(entry.link_name.split("/")))
            if target is not None and target.kind == "dir":
                raise Refused
            new.kind = "link"
            new = target or new
        parent.children[path[-1]] = new

    def whiteout(self, path: Path, entry: TocEntry) -> None:
        parent = self.parent(path, real=False)
        if parent is None:
            return
        if path[-1] == ".wh..wh..opq":
            parent.opaque = True
            return
        name = path[-1].removeprefix(".wh.")
        old = parent.children.get(name)
        if old is None or not old.real():
            parent.children[name] = Node("whiteout", 0, entry.uid)

    def resolve(self, node: Node) -> Node:
        seen = []
        while node.kind == "link":
            seen.append(node)
            found = self.get(tuple(node.text.split("/")))
            if found is None or found.kind == "dir" or found in seen:
                raise Refused
            node = found
        return node

    def snapshot(self) -> tuple[dict[bytes, Any], set[frozenset[bytes]]]:
        """Attributes by path, and the groups of paths that are one file."""
        found: dict[bytes, Any] = {}
        groups: dict[int, list[bytes]] = {}
        nodes: dict[bytes, Node] = {}

        def visit(path: str, node: Node) -> None:
            node = self.resolve(node)
            raw = path.encode()
            nodes[raw] = node
            groups.setdefault(id(node), []).append(raw)
            for name, child in node.children.items():
                visit(f"{path}/{name}" if path else name, child)

        visit("", self.root)
        for path, node in nodes.items():
            if node.kind == "dir":
                links = 2 + sum(child.kind == "dir" for child in node.children.values())
            else:
                links = len(groups[id(node)])
            if node.kind == "symlink":
                mode, size, text = stat.S_IFLNK | 0o777, len(node.text), node.text.encode()
            elif node.kind == "whiteout":
                mode, size, text = stat.S_IFCHR, 0, b""
            else:
                mode, size, text = MODES[node.kind] | node.mode, node.size, b""
            found[path] = (mode, node.uid, links, size, text, node.opaque)
        return found, {frozenset(group) for group in groups.values()}


def index_snapshot(index: LayerIndex) -> tuple[dict[bytes, Any], set[frozenset[bytes]]]:
    found: dict[bytes, Any] = {}
    groups: dict[int, list[bytes]] = {}
    for path, entry in index.walk():
        inode = index.inode(entry)
        text = index.symlink(entry) if stat.S_ISLNK(inode.mode) else b""
        opaque = index.xattr(entry, b"trusted.overlay.opaque") == b"y"
        found[path] = (inode.mode, inode.uid, inode.nlink, inode.size, text, opaque)
        groups.setdefault(entry, []).append(path)
        content = index.content(entry)
        if content is not None and content.size:
            assert index.chunk_owner(content.first_chunk) == entry
            assert index.chunk(content.first_chunk).size == content.size
    return found, {frozenset(group) for group in groups.values()}


names = st.sampled_from(["a", "b", "c"])
directories = st.lists(names, max_size=2).map(tuple)
last = st.one_of(
    names, names, names, st.sampled_from([".wh.a", ".wh.b", ".wh.c", ".wh..wh..opq"])
)  # fmt: skip
kinds = st.sampled_from(["dir", "dir", "reg", "reg", "data", "symlink", "hardlink", "char", "fifo"])
spellings = st.sampled_from(["{}", "./{}", "/{}", "{}/", ".//{}//"])


@st.composite
def entry_lists(draw: st.DrawFn) -> list[tuple[Path, TocEntry]]:
    found = []
    for number in range(draw(st.integers(0, 12))):
        path = (*draw(directories), draw(last))
        kind = draw(kinds)
        fields: dict[str, Any] = {"uid": number, "mode": draw(st.sampled_from([0o755, 0o600]))}
        if kind == "data":
            kind = "reg"
            fields |= {"size": number + 1, "offset": 1000 + number}
            fields["chunk_digest"] = "sha256:" + f"{number:064x}"
        elif kind in ("symlink", "hardlink"):
            fields["link_name"] = "/".join((*draw(directories), draw(names)))
        name = draw(spellings).format("/".join(path))
        found.append((path, TocEntry(name=name, type=kind, **fields)))
    return found


def compare(model: Model, entries: list[TocEntry]) -> None:
    expected: Any = None
    with contextlib.suppress(Refused):
        expected = model.snapshot()
    out = io.BytesIO()
    try:
        build_index(entries, out, blob_size=10_000, toc_offset=9_000)
    except InvalidLayer:
        assert expected is None
        return
    assert expected is not None
    assert index_snapshot(LayerIndex.from_bytes(out.getvalue())) == expected


@settings(max_examples=400)
@given(entry_lists())
def test_the_index_is_what_the_model_is(candidates: list[tuple[Path, TocEntry]]) -> None:
    # An entry that the model refuses is left out and the layer goes on, so that long
    # sequences stay interesting; that the index refuses it too is the next test's matter.
    accepted: list[tuple[Path, TocEntry]] = []
    for candidate in candidates:
        trial = Model()
        try:
            for path, entry in [*accepted, candidate]:
                trial.apply(path, entry)
            trial.snapshot()
        except Refused:
            continue
        accepted.append(candidate)
    model = Model()
    for path, entry in accepted:
        model.apply(path, entry)
    compare(model, [entry for _, entry in accepted])


@settings(max_examples=300)
@given(entry_lists())
def test_both_refuse_the_same(candidates: list[tuple[Path, TocEntry]]) -> None:
    model = Model()
    entries = [entry for _, entry in candidates]
    try:
        for path, entry in candidates:
            model.apply(path, entry)
    except Refused:
        try:
            build_index(entries, io.BytesIO(), blob_size=10_000, toc_offset=9_000)
        except InvalidLayer:
            return
        raise AssertionError("the index accepts what the model refuses") from None
    compare(model, entries)
