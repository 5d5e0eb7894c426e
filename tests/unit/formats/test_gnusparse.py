"""Sparse files in tar archives: the three forms of GNU tar, and what Go would refuse."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import pytest

from lab import sparse, tars
from layerstore import limits
from layerstore.errors import InvalidLayer, LimitExceeded, UnsupportedFormat
from layerstore.formats import TarReader
from layerstore.formats.tarstream import TarEntry

END = bytes(1024)


def archive(
    records: Iterable[tuple[str, bytes]], payload: bytes = b"", kind: bytes = b"0"
) -> bytes:
    """A tar of one entry with these PAX records, ``GNU.sparse.`` left out."""
    body = b"".join(tars._record(f"GNU.sparse.{key}".encode(), value) for key, value in records)
    header = tars._header(tars.regular(b"GNUSparseFile.0/f"), kind, len(payload))
    padding = bytes(-len(payload) % 512)
    return tars._extension(b"x", b"pax", body) + header + payload + padding + END


def read(data: bytes) -> list[tuple[TarEntry, bytes]]:
    """All entries with their files' contents."""
    reader = TarReader(io.BytesIO(data), sparse=True)
    found = []
    for entry in reader:
        payload = b"".join(iter(lambda: reader.read(1000), b""))
        if entry.sparse is not None:
            content = bytearray(entry.sparse.size)
            stream = io.BytesIO(payload)
            for offset, length in entry.sparse.pieces:
                content[offset : offset + length] = stream.read(length)
            assert stream.read() == b""
            payload = bytes(content)
        found.append((entry, payload))
    return found


def v1(numbers: bytes, data: bytes = b"", size: bytes = b"10") -> bytes:
    head = numbers + bytes(-len(numbers) % 512)
    records = [("major", b"1"), ("minor", b"0"), ("name", b"f"), ("realsize", size)]
    return archive(records, head + data)


def v0(text: bytes, data: bytes = b"", blocks: bytes = b"1", size: bytes = b"10") -> bytes:
    return archive([("size", size), ("numblocks", blocks), ("map", text)], data)


@pytest.mark.parametrize("version", sparse.VERSIONS)
def test_files_of_gnu_tar(tmp_path: Path, version: str) -> None:
    data = sparse.sparse_tar(tmp_path, version)
    found = {entry.name.decode(): (entry, content) for entry, content in read(data)}
    assert {name: content for name, (_, content) in found.items() if name != "d/"} == sparse.FILES
    assert found["d/full"][0].sparse is None
    entry = found["d/sparse"][0]
    assert entry.size < 100_000
    start = entry.header_offset
    assert data[start : entry.payload_offset] == entry.headers
    assert data[entry.payload_offset :][:5000] == b"A" * 5000


@pytest.mark.parametrize("version", sparse.VERSIONS)
def test_who_does_not_ask_for_them_is_told_the_name(tmp_path: Path, version: str) -> None:
    data = sparse.sparse_tar(tmp_path, version)
    with pytest.raises(UnsupportedFormat, match="sparse") as refused:
        list(TarReader(io.BytesIO(data)))
    assert refused.value.subject == "d/hole"


def test_gnus_own_type_is_refused_by_name(tmp_path: Path) -> None:
    """As Podman refuses it."""
    data = sparse.sparse_tar(tmp_path, "gnu")
    with pytest.raises(UnsupportedFormat, match="sparse") as refused:
        read(data)
    assert refused.value.subject == "d/hole"
    assert "--format=pax" in refused.value.advice


@pytest.mark.parametrize(
    ("data", "content"),
    [
        (v0(b"2,3", b"abc"), b"\0\0abc\0\0\0\0\0"),
        (v0(b"0,2,8,2", b"abyz", blocks=b"2"), b"ab\0\0\0\0\0\0yz"),
        (v0(b"0,0,10,0", blocks=b"2"), bytes(10)),
        (v1(b"1\n2\n3\n", b"abc"), b"\0\0abc\0\0\0\0\0"),
        (v1(b"0\n"), bytes(10)),
        (v1(b"1\n0\n10\nwhat follows is nothing\n", b"0123456789"), b"0123456789"),
        (
            archive([("major", b"0"), ("minor", b"1"), ("numblocks", b"0"), ("size", b"3")]),
            bytes(3),
        ),
        # versions that Go does not know are files as they are
        (archive([("major", b"2"), ("minor", b"0")], b"plain"), b"plain"),
        (archive([("major", b"1")], b"plain"), b"plain"),
        (archive([("realsize", b"99")], b"plain"), b"plain"),
    ],
)
def test_maps(data: bytes, content: bytes) -> None:
    ((entry, found),) = read(data)
    assert found == content
    assert entry.padding == -entry.size % 512


@pytest.mark.parametrize(
    "data",
    [
        v0(b"2,3", b"abcd"),  # more data than the map says
        v0(b"2,3", b"ab"),
        v0(b"8,3", b"abc"),  # behind the end
        v0(b"4,2,3,2", b"abcd", blocks=b"2"),  # not in order
        v0(b"0,3,2,2", b"abcde", blocks=b"2"),  # one over the other
        v0(b"-1,3", b"abc"),
        v0(b"3,-1", b""),
        v0(b"2,3", b"abc", blocks=b"2"),
        v0(b"2,3", b"abc", blocks=b""),
        v0(b"2,3", b"abc", size=b"-1"),
        v0(b"2,3", b"abc", size=b"x"),
        v0(b"2,3", b"abc", size=b"9223372036854775808"),
        v0(b"2,", b"abc"),
        v0(b"2, 3", b"abc"),
        v1(b"", b"abc"),
        v1(b"1\n2\n3", b"abc"),  # no end
        v1(b"-1\n2\n3\n", b"abc"),
        v1(b"9223372036854775807\n2\n3\n", b"abc"),
        v1(b"x\n2\n3\n", b"abc"),
        archive([("major", b"1"), ("minor", b"0"), ("realsize", b"10")]),
        archive([("map", b"0,0"), ("numblocks", b"1")], kind=b"5"),
        archive([("numbytes", b"3"), ("offset", b"2"), ("numblocks", b"1")], b"abc"),
        archive([("offset", b"2"), ("offset", b"2")]),
        archive([("offset", b"2,3"), ("numbytes", b"1")]),
        archive([("offset", b"2"), ("numblocks", b"1"), ("size", b"9")]),
    ],
)
def test_maps_that_cannot_be_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidLayer):
        read(data)


def test_the_entry_is_named() -> None:
    with pytest.raises(InvalidLayer) as refused:
        read(v1(b"x\n"))
    assert refused.value.subject == "f"


def test_maps_and_sizes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SPARSE_MAP_BYTES", 1024)
    with pytest.raises(LimitExceeded):
        read(v1(b"1000\n" + b"1\n" * 2000, b""))
    with pytest.raises(LimitExceeded):
        read(v1(b"0\n", size=b"%d" % (limits.LAYER_BYTES + 1)))
