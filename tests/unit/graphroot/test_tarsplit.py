"""tar-split: the lines are Go's, the stream comes back, and a changed file is named."""

import base64
import gzip
import io
import json
from collections.abc import Callable
from typing import BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerstore.errors import CorruptStorage, InvalidLayer
from layerstore.graphroot.tarsplit import TarSplitWriter, assemble, crc64


def crc64_bitwise(data: bytes) -> int:
    """ISO 3309's polynomial x^64 + x^4 + x^3 + x + 1, reflected, as Go's crc64.ISO."""
    crc = (1 << 64) - 1
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xD800000000000000 if crc & 1 else 0)
    return crc ^ (1 << 64) - 1


def written(fill: Callable[[TarSplitWriter], None]) -> bytes:
    out = io.BytesIO()
    writer = TarSplitWriter(out)
    fill(writer)
    writer.close()
    return out.getvalue()


def lines(raw: bytes) -> list[str]:
    return gzip.decompress(raw).decode().splitlines()


def opener(files: dict[bytes, bytes]) -> Callable[[bytes], BinaryIO]:
    def open_file(name: bytes) -> BinaryIO:
        if name not in files:
            raise FileNotFoundError(2, "No such file or directory")
        return io.BytesIO(files[name])

    return open_file


def test_the_check_value_of_the_algorithm() -> None:
    assert crc64(b"123456789") == 0xB90956C775A41001
    assert crc64(b"") == 0


@given(st.binary(max_size=600), st.binary(max_size=600))
def test_the_crc_is_the_slow_one_and_goes_on(first: bytes, second: bytes) -> None:
    assert crc64(first) == crc64_bitwise(first)
    assert crc64(second, crc64(first)) == crc64_bitwise(first + second)


def test_the_lines_are_those_of_go() -> None:
    """Written by hand after tar/storage/entry.go and Go's encoding/json."""

    def fill(writer: TarSplitWriter) -> None:
        writer.segment(b"head")
        writer.file(b"./", 0, 0)
        writer.segment(b"")
        writer.file(b'a "quoted" <&> name\x01\\', 9, 0xB90956C775A41001)
        writer.file("\u2028 é".encode(), 0, 0)
        writer.file(b"latin-\xe9", 0, 0)
        writer.segment(b"\0\0")

    assert lines(written(fill)) == [
        '{"type":2,"payload":"aGVhZA==","position":0}',
        '{"type":1,"name":"./","payload":null,"position":1}',
        '{"type":1,"name":"a \\"quoted\\" \\u003c\\u0026\\u003e name\\u0001\\\\","size":9,'
        '"payload":"uQlWx3WkEAE=","position":2}',
        '{"type":1,"name":"\\u2028 é","payload":null,"position":3}',
        '{"type":1,"name_raw":"bGF0aW4t6Q==","payload":null,"position":4}',
        '{"type":2,"payload":"AAA=","position":5}',
    ]


@given(st.binary(max_size=40).filter(lambda name: b"\n" not in name))
def test_every_name_comes_through_json(name: bytes) -> None:
    (line,) = lines(written(lambda writer: writer.file(name, 0, 0)))
    parsed = json.loads(line)
    if "name_raw" in parsed:
        assert base64.b64decode(parsed["name_raw"]) == name
    else:
        assert parsed.get("name", "").encode() == name


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (b"a", b"a"),
        (b"a/", b"a"),
        (b"./a", b"a"),
        (b"a//b", b"a/b"),
        (b"x/../a", b"a"),
        (b"/a", b"//a"),
    ],
)
def test_a_path_may_not_come_twice(first: bytes, second: bytes) -> None:
    writer = TarSplitWriter(io.BytesIO())
    writer.file(first, 0, 0)
    with pytest.raises(InvalidLayer, match="twice"):
        writer.file(second, 0, 0)


def test_names_that_only_look_alike_are_two() -> None:
    writer = TarSplitWriter(io.BytesIO())
    for name in (b"a", b"/a", b"a ", b"..a", b".a", b"a/.b", b"a/b"):
        writer.file(name, 0, 0)


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=2000),
            st.tuples(st.binary(min_size=1, max_size=20), st.binary(max_size=3000)),
        ),
        max_size=10,
        unique_by=lambda item: id(item) if isinstance(item, bytes) else item[0].strip(b"./"),
    )
)
def test_the_stream_comes_back(items: list[bytes | tuple[bytes, bytes]]) -> None:
    def fill(writer: TarSplitWriter) -> None:
        for item in items:
            if isinstance(item, bytes):
                writer.segment(item)
            else:
                writer.file(item[0], len(item[1]), crc64(item[1]))

    files = {item[0]: item[1] for item in items if isinstance(item, tuple)}
    try:
        raw = written(fill)
    except InvalidLayer:  # two of the random names are one path
        return
    expected = b"".join(item if isinstance(item, bytes) else item[1] for item in items)
    for kept in (raw, gzip.decompress(raw)):
        assert b"".join(assemble(io.BytesIO(kept), opener(files))) == expected


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"other", "checksum"),
        (b"cont", "shorter"),
        (b"content and more", "longer"),
        (None, "No such file"),
    ],
)
def test_a_changed_file_is_named(content: bytes | None, said: str) -> None:
    original = b"conte" if said == "checksum" else b"content"
    raw = written(lambda writer: writer.file(b"etc/name", len(original), crc64(original)))
    files = {} if content is None else {b"etc/name": content}
    with pytest.raises(CorruptStorage, match=said) as caught:
        b"".join(assemble(io.BytesIO(raw), opener(files)))
    assert caught.value.subject == "etc/name"


@pytest.mark.parametrize(
    "raw",
    [
        b"no json\n",
        b'{"type":"x"}\n',
        b'{"type":2,"payload":"!!"}\n',
        b'{"type":1,"name_raw":"!!","size":1}\n',
        gzip.compress(b'{"type":2,"payload":"aGVhZA=="}\n' * 100, mtime=0)[:-9],
        gzip.compress(b'{"type":2}\n', mtime=0)[:12] + b"\xff" * 20,
    ],
)
def test_a_damaged_tar_split_is_told(raw: bytes) -> None:
    with pytest.raises(CorruptStorage, match="damaged"):
        b"".join(assemble(io.BytesIO(raw), opener({b"": b"x"})))


def test_long_paths_are_remembered_briefly() -> None:
    writer = TarSplitWriter(io.BytesIO())
    writer.file(b"d" * 4000, 0, 0)
    writer.file(b"d" * 3999 + b"e", 0, 0)
    assert max(map(len, writer._seen)) < 64
    with pytest.raises(InvalidLayer):
        writer.file(b"./" + b"d" * 4000, 0, 0)
