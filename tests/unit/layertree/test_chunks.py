"""Chunks, members and content keys."""

import hashlib
import struct
from collections.abc import Callable
from typing import Any

import pytest

from layerstore import limits
from layerstore.errors import InvalidLayer, LimitExceeded, UnsupportedFormat
from layerstore.formats.toc import TocEntry
from layerstore.layertree import Chunk, FileContent, LayerIndex, Member


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def entry_of(index: LayerIndex, path: bytes) -> int:
    entry = index.entry_of_path(path)
    assert entry is not None
    return entry


def test_a_file_of_one_chunk(toc: Any) -> None:
    index = toc.build([toc.reg("f", b"hello", 77)])
    entry = entry_of(index, b"f")
    key = digest(b"hello")
    assert index.content(entry) == FileContent(5, key, key, True, 0, 1)
    assert index.chunk(0) == Chunk(0, 5, key, 0, 0)
    assert index.chunk_owner(0) == entry
    assert index.member(0) == Member(77, toc.end)
    assert index.content_bytes == 5
    assert index.content(0) is None


def test_an_empty_file_has_no_chunk(toc: Any) -> None:
    index = toc.build([toc.reg("f"), TocEntry(name="g", type="reg")])
    for path in (b"f", b"g"):
        content = index.content(entry_of(index, path))
        assert content == FileContent(0, digest(b""), digest(b""), True, 0, 0)
    assert index.chunks == index.members == 0


def test_the_file_digest_serves_where_there_is_no_chunk_digest(toc: Any) -> None:
    index = toc.build([toc.reg("f", b"hello", chunk_digest="")])
    assert index.chunk(0).digest == digest(b"hello")


def test_the_chunk_digest_serves_where_there_is_no_file_digest(toc: Any) -> None:
    index = toc.build([toc.reg("f", b"hello", digest="")])
    content = index.content(entry_of(index, b"f"))
    assert content is not None
    assert content.digest == content.key == digest(b"hello")


@pytest.mark.parametrize("with_digest", [True, False])
def test_a_file_of_several_chunks(toc: Any, with_digest: bool) -> None:
    pieces = [b"aaaa", b"bb", b"cccccc"]
    entries = toc.chunked("f", pieces, 500)
    entries[2].chunk_size = 0  # the last one: up to the end
    if not with_digest:
        entries[0].digest = ""
    index = toc.build(entries)
    entry = entry_of(index, b"f")
    listed = b"layerstore chunk list v1\0"
    start = 0
    for number, piece in enumerate(pieces):
        listed += struct.pack("<QQ", start, len(piece)) + digest(piece)
        assert index.chunk(number) == Chunk(start, len(piece), digest(piece), number, 0)
        assert index.chunk_owner(number) == entry
        start += len(piece)
    known = digest(b"".join(pieces)) if with_digest else None
    assert index.content(entry) == FileContent(12, known, digest(listed), False, 0, 3)
    assert [index.member(number) for number in range(3)] == [
        Member(500, 600),
        Member(600, 700),
        Member(700, toc.end),
    ]


@pytest.mark.parametrize(
    ("offset", "end", "expected"),
    [
        (0, 12, [0, 1, 2]),
        (0, 1, [0]),
        (3, 5, [0, 1]),
        (4, 6, [1]),
        (5, 7, [1, 2]),
        (11, 99, [2]),
        (12, 13, []),
        (3, 3, []),
        (-5, 1, [0]),
    ],
)
def test_chunks_between(toc: Any, offset: int, end: int, expected: list[int]) -> None:
    index = toc.build([*toc.chunked("f", [b"aaaa", b"bb", b"cccccc"]), toc.reg("g", b"x", 2000)])
    entry = entry_of(index, b"f")
    assert list(index.chunks_between(entry, offset, end)) == expected
    assert list(index.chunks_between(0, offset, end)) == []
    assert list(index.chunks_between(entry_of(index, b"g"), 0, 1)) == [3]


def test_several_files_in_one_member(toc: Any) -> None:
    index = toc.build(
        [
            toc.reg("b", b"bbb", 100, inner_offset=1024),
            toc.reg("a", b"aaa", 100),
            toc.reg("c", b"c", 50),
            toc.reg("d", b"d", 200),
        ],
        toc_offset=300,
    )
    owner = {path: entry for path, entry in index.walk() if path}
    assert [index.member(number) for number in range(index.members)] == [
        Member(50, 100),
        Member(100, 200),
        Member(200, 300),
    ]
    owners = [
        [index.chunk_owner(chunk) for chunk in index.member_chunks(number)]
        for number in range(index.members)
    ]
    assert owners == [[owner[b"c"]], [owner[b"a"], owner[b"b"]], [owner[b"d"]]]
    for path, inner, member in ((b"a", 0, 1), (b"b", 1024, 1), (b"d", 0, 2)):
        content = index.content(owner[path])
        assert content is not None
        chunk = index.chunk(content.first_chunk)
        assert (chunk.inner_offset, chunk.member) == (inner, member)


def test_a_replaced_file_leaves_its_member_but_no_chunk(toc: Any) -> None:
    index = toc.build([toc.reg("f", b"old", 100), toc.reg("g", b"g", 200), toc.reg("f", b"n", 300)])
    assert index.chunks == 2
    assert index.members == 3
    assert [index.member_chunks(number) for number in range(3)] == [[], [0], [1]]
    content = index.content(entry_of(index, b"f"))
    assert content is not None
    assert index.chunk(content.first_chunk).digest == digest(b"n")
    assert index.content_bytes == 2


def test_numbers_out_of_range(toc: Any) -> None:
    index = toc.build([toc.reg("f", b"x")])
    calls: list[Callable[[int], object]] = [
        index.inode, index.mode, index.children, index.symlink, index.xattrs,
        index.content, index.chunk, index.chunk_owner, index.member, index.member_chunks,
        index.parent,
    ]  # fmt: skip
    for call in calls:
        for number in (-1, 2, 1 << 40):
            with pytest.raises(IndexError):
                call(number)


DIGEST = "sha256:" + "0" * 64
OTHER = "sha256:" + "1" * 64


def one(**fields: Any) -> list[TocEntry]:
    standard: dict[str, Any] = {"size": 10, "offset": 100, "chunk_digest": DIGEST}
    return [TocEntry(name="f", type="reg", **(standard | fields))]


def two(first: dict[str, Any], second: dict[str, Any]) -> list[TocEntry]:
    base: dict[str, Any] = {"offset": 100, "chunk_digest": DIGEST}
    return [
        TocEntry(name="f", type="reg", **(base | {"size": 10, "chunk_size": 4} | first)),
        TocEntry(name="f", type="chunk", **(base | {"offset": 200, "chunk_offset": 4} | second)),
    ]


ACCEPTED = {
    "plain": one(),
    "chunk size is the whole": one(chunk_size=10),
    "inside the first member": one(offset=0, inner_offset=512),
    "two chunks": two({}, {}),
    "two chunks, sizes said": two({}, {"chunk_size": 6}),
    "two chunks in one member": two({}, {"offset": 100, "inner_offset": 4}),
    "largest chunk": one(size=limits.CHUNK_BYTES),
}

REFUSED: dict[str, tuple[list[TocEntry], type[Exception]]] = {
    "no digest": (one(chunk_digest=""), InvalidLayer),
    "no chunk digest": (two({"chunk_digest": "", "digest": DIGEST}, {}), InvalidLayer),
    "no chunk digest on the second": (two({}, {"chunk_digest": ""}), InvalidLayer),
    "digests differ": (one(digest=OTHER), InvalidLayer),
    "empty with a digest": (one(size=0, digest=DIGEST), InvalidLayer),
    "sha512": (one(chunk_digest="sha512:" + "0" * 128), UnsupportedFormat),
    "upper case": (one(chunk_digest="sha256:" + "A" * 64), InvalidLayer),
    "spaces": (one(chunk_digest="sha256:" + "00 " * 21 + "0"), InvalidLayer),
    "short digest": (one(chunk_digest="sha256:00"), InvalidLayer),
    "no digest at all": (one(chunk_digest="junk"), InvalidLayer),
    "negative size": (one(size=-1), InvalidLayer),
    "nonsense size": (one(size=limits.FILE_BYTES + 1), InvalidLayer),
    "no position": (one(offset=0), InvalidLayer),
    "negative offset": (one(offset=-1), InvalidLayer),
    "in the TOC": (one(offset=1 << 40), InvalidLayer),
    "negative inner offset": (one(inner_offset=-1), InvalidLayer),
    "far inside": (one(inner_offset=limits.MEMBER_BYTES), LimitExceeded),
    "large chunk": (one(size=limits.CHUNK_BYTES + 1), LimitExceeded),
    "negative chunk size": (one(chunk_size=-1), InvalidLayer),
    "chunk larger than file": (one(chunk_size=11), InvalidLayer),
    "too little": (one(chunk_size=9), InvalidLayer),
    "does not begin at 0": (one(chunk_offset=1), InvalidLayer),
    "gap": (two({}, {"chunk_offset": 5}), InvalidLayer),
    "overlap in the file": (two({}, {"chunk_offset": 3}), InvalidLayer),
    "second too large": (two({}, {"chunk_size": 7}), InvalidLayer),
    "second too small": (two({}, {"chunk_size": 5}), InvalidLayer),
    "a chunk too many": (
        [*two({}, {}), TocEntry(name="f", type="chunk", offset=300, chunk_digest=DIGEST)],
        InvalidLayer,
    ),
    "a chunk of nothing": ([TocEntry(name="f", type="chunk", offset=300)], InvalidLayer),
    "a chunk of an empty file": (
        [TocEntry(name="f", type="reg"), TocEntry(name="f", type="chunk", offset=300)],
        InvalidLayer,
    ),
    "a chunk of a directory": (
        [*one(), TocEntry(name="d", type="dir"), TocEntry(name="f", type="chunk", offset=300)],
        InvalidLayer,
    ),
    "same place": (two({}, {"offset": 100}), InvalidLayer),
    "overlap in the member": (two({}, {"offset": 100, "inner_offset": 3}), InvalidLayer),
    "unknown type": (one(chunk_type="ones"), UnsupportedFormat),
    "unknown type later": (two({}, {"chunk_type": "ones"}), UnsupportedFormat),
    "ends before it begins": (one(end_offset=1), InvalidLayer),
    "ends behind the TOC": (one(end_offset=1 << 62), InvalidLayer),
    "a hole too small": (one(chunk_type="zeros", chunk_size=9), InvalidLayer),
    "a hole too large": (two({}, {"chunk_type": "zeros", "chunk_size": 7}), InvalidLayer),
    "a hole without end": (
        one(chunk_type="zeros", size=(limits.HOLE_PIECES + 1) << 30, chunk_size=0),
        LimitExceeded,
    ),
    "too small, then another file": (
        [*one(chunk_size=9), TocEntry(name="g", type="reg")],
        InvalidLayer,
    ),
    "malformed file digest": (one(digest="sha256:x"), InvalidLayer),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(toc: Any, case: str) -> None:
    assert toc.build(ACCEPTED[case]).chunks == len(ACCEPTED[case])


@pytest.mark.parametrize("case", REFUSED)
def test_refused(toc: Any, case: str) -> None:
    entries, error = REFUSED[case]
    with pytest.raises(error):
        toc.build(entries)


def test_overlap_of_different_files(toc: Any) -> None:
    with pytest.raises(InvalidLayer, match="overlap"):
        toc.build([toc.reg("a", b"aaa", 100), toc.reg("b", b"b", 100, inner_offset=2)])


@pytest.mark.parametrize(("toc_offset", "blob_size"), [(-1, 10), (11, 10), (0, 1 << 63)])
def test_a_toc_outside_its_blob(toc: Any, toc_offset: int, blob_size: int) -> None:
    with pytest.raises(InvalidLayer):
        toc.build([], toc_offset, blob_size)


def test_holes_are_in_no_member(toc: Any) -> None:
    entries = [
        TocEntry(name="a", type="reg", size=10, offset=100, chunk_size=4, chunk_digest=DIGEST),
        TocEntry(name="a", type="chunk", offset=200, chunk_offset=4, chunk_type="zeros"),
        TocEntry(name="b", type="reg", size=5, chunk_type="zeros"),
        TocEntry(name="c", type="reg", size=3 << 30, chunk_type="zeros"),
        TocEntry(name="d", type="reg", size=1, offset=300, chunk_digest=DIGEST),
    ]
    index = toc.build(entries)
    holes = [number for number in range(index.chunks) if index.chunk(number).hole]
    assert holes == [1, 2, 3, 4, 5]
    assert [index.chunk(number).size for number in holes] == [6, 5, 1 << 30, 1 << 30, 1 << 30]
    assert index.members == 2
    assert index.member(0) == Member(100, 300)
    assert [index.member_chunks(number) for number in range(2)] == [[0], [6]]
    contents = [index.content(entry_of(index, name)) for name in (b"a", b"b", b"c", b"d")]
    assert [content and content.plain for content in contents] == [False, False, False, True]
    assert len({content and content.key for content in contents}) == 4
    assert index.content_bytes == 10 + 5 + (3 << 30) + 1


def test_a_hole_is_the_same_whatever_digest_is_told_of_it(toc: Any) -> None:
    keys = set()
    for digest_text in ("", DIGEST):
        index = toc.build(
            [TocEntry(name="b", type="reg", size=5, chunk_type="zeros", chunk_digest=digest_text)]
        )
        keys.add(index.content(entry_of(index, b"b")).key)
    assert len(keys) == 1


def test_huge_sparse_sizes_are_counted_right(toc: Any) -> None:
    size = limits.CHUNK_BYTES
    entries = [
        TocEntry(name=f"f{number}", type="reg", size=size, offset=100 + number, chunk_digest=DIGEST)
        for number in range(40)
    ]
    index = toc.build(entries)
    assert index.content_bytes == 40 * size > 1 << 33
