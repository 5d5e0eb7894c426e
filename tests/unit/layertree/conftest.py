"""TOC entries and indexes with few words."""

import hashlib
import io
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from layerstore.formats.toc import TocEntry
from layerstore.layertree import LayerIndex, build_index

TOC_OFFSET = 1 << 40


def sha(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def reg(name: str, data: bytes = b"", offset: int = 0, **more: Any) -> TocEntry:
    """A regular file of one chunk (none if empty)."""
    fields: dict[str, Any] = {"mode": 0o644, "size": len(data), "digest": sha(data)}
    if data:
        fields |= {"offset": offset or 1000, "chunk_digest": sha(data)}
    return TocEntry(name=name, type="reg", **(fields | more))


def chunked(name: str, pieces: list[bytes], offset: int = 1000, **more: Any) -> list[TocEntry]:
    """A regular file and its chunks, each in a member of its own."""
    whole = b"".join(pieces)
    found = []
    start = 0
    for number, piece in enumerate(pieces):
        fields: dict[str, Any] = {
            "offset": offset + 100 * number,
            "chunk_offset": start,
            "chunk_size": len(piece),
            "chunk_digest": sha(piece),
        }
        if number == 0:
            fields |= {"size": len(whole), "digest": sha(whole), "mode": 0o644}
            found.append(TocEntry(name=name, type="reg", **(fields | more)))
        else:
            found.append(TocEntry(name=name, type="chunk", **fields))
        start += len(piece)
    return found


def build(
    entries: Iterable[TocEntry], toc_offset: int = TOC_OFFSET, blob_size: int | None = None
) -> LayerIndex:
    out = io.BytesIO()
    summary = build_index(
        entries, out, blob_size=toc_offset + 51 if blob_size is None else blob_size,
        toc_offset=toc_offset,
    )  # fmt: skip
    index = LayerIndex.from_bytes(out.getvalue())
    assert summary.file_bytes == len(out.getvalue())
    assert (summary.entries, summary.names, summary.files) == (
        index.entries,
        index.names,
        index.files,
    )
    assert (summary.chunks, summary.members) == (index.chunks, index.members)
    assert (summary.content_bytes, summary.landmark) == (index.content_bytes, index.landmark)
    return index


class Toc:
    """What the tests of this directory share."""

    sha = staticmethod(sha)
    reg = staticmethod(reg)
    chunked = staticmethod(chunked)
    build = staticmethod(build)
    end = TOC_OFFSET

    @staticmethod
    def entry(name: str, kind: str, **more: Any) -> TocEntry:
        return TocEntry(name=name, type=kind, **more)

    @staticmethod
    def dir(name: str, mode: int = 0o755, **more: Any) -> TocEntry:
        return TocEntry(name=name, type="dir", mode=mode, **more)

    @staticmethod
    def link(name: str, target: str) -> TocEntry:
        return TocEntry(name=name, type="hardlink", link_name=target)

    @staticmethod
    def symlink(name: str, target: str) -> TocEntry:
        return TocEntry(name=name, type="symlink", link_name=target)

    @staticmethod
    def paths(index: LayerIndex) -> dict[bytes, int]:
        return dict(index.walk())


@pytest.fixture(scope="session")
def toc() -> type[Toc]:
    return Toc


@pytest.fixture(scope="session")
def shown() -> Callable[[Iterable[TocEntry]], list[bytes]]:
    """The paths that a list of entries makes, without the root."""
    return lambda entries: [path for path, _ in build(entries).walk() if path]
