"""Reading TOCs and tar-splits of zstd:chunked layers, right and wrong ones."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab import tars
from layerstore import limits
from layerstore.errors import ContentError, InvalidLayer, LimitExceeded, VerificationError
from layerstore.formats.announced import Place
from layerstore.formats.compression import zstd
from layerstore.formats.zstdchunked import (
    parse_zstd_footer,
    read_zstd_toc,
    tar_length,
    tar_split_digest,
)
from layerstore.formats.zstdchunked_writer import write_zstd_chunked
from layerstore.image import Digest

KEY = "io.github.containers.zstd-chunked."
TOC = b'{"version":1,"entries":[]}'


def written() -> tuple[bytes, bytes, dict[str, str]]:
    tar, out = io.BytesIO(), io.BytesIO()
    tars.write_tar(
        tar,
        [
            tars.directory(b"d"),
            tars.regular(b"d/f", b"content" * 5000),
            tars.regular("d/ü".encode(), b"x"),
            tars.symlink(b"l", b"d"),
        ],
    )
    result = write_zstd_chunked(tar, out)
    return tar.getvalue(), out.getvalue(), result.annotations


def place(text: str) -> tuple[int, int]:
    offset, size = text.split(":")[:2]
    return int(offset), int(size)


def test_the_length_of_the_tar_stream_is_exact():
    tar, blob, notes = written()
    at, size = place(notes[KEY + "manifest-position"])
    toc = read_zstd_toc(
        blob[at : at + size],
        Digest.parse(notes[KEY + "manifest-checksum"]),
        compressed_digest=True,
    )
    expected = tar_split_digest(toc)
    assert expected is not None
    at, size = place(notes[KEY + "tarsplit-position"])
    assert tar_length(blob[at : at + size], expected) == len(tar)


def test_the_footer_tells_what_the_annotations_tell():
    _, blob, notes = written()
    footer = parse_zstd_footer(blob[-64:], len(blob))
    at, size = place(notes[KEY + "manifest-position"])
    assert (footer.toc.offset, footer.toc.size) == (at, size)
    assert footer.tar_split is not None
    at, size = place(notes[KEY + "tarsplit-position"])
    assert (footer.tar_split.offset, footer.tar_split.size) == (at, size)


def test_the_footer_of_the_first_form():
    tail = struct.pack("<4Q8s", 100, 20, 300, 1, b"GnUlInUx")
    assert parse_zstd_footer(b"before" + tail, 200).toc == Place(100, 20, 300)
    for wrong in (
        struct.pack("<4Q8s", 190, 20, 300, 1, b"GnUlInUx"),
        struct.pack("<4Q8s", 100, 20, 300, 2, b"GnUlInUx"),
        tail[1:],
        tail[:-1],
        b"",
    ):
        with pytest.raises(InvalidLayer):
            parse_zstd_footer(wrong, 200)


@given(st.binary(max_size=80))
def test_any_tail_is_a_footer_or_invalid(tail: bytes):
    for magic in (b"", b"GNUlInUx", b"GnUlInUx"):
        with contextlib.suppress(InvalidLayer):
            parse_zstd_footer(tail + magic, 1 << 40)


@pytest.mark.parametrize("compressed", [True, False])
def test_the_digest_covers_the_right_bytes(compressed: bool):
    packed = zstd.compress(TOC)
    right, wrong = (
        Digest.of(packed if compressed else TOC),
        Digest.of(TOC if compressed else packed),
    )
    assert read_zstd_toc(packed, right, compressed_digest=compressed) == TOC
    with pytest.raises(VerificationError):
        read_zstd_toc(packed, wrong, compressed_digest=compressed)


def test_a_toc_that_is_no_zstd_or_a_bomb_is_refused(monkeypatch: pytest.MonkeyPatch):
    for packed in (TOC, b"", zstd.compress(TOC)[:-3]):
        with pytest.raises(InvalidLayer):
            read_zstd_toc(packed, Digest.of(packed), compressed_digest=True)
    monkeypatch.setattr(limits, "TOC_BYTES", 1 << 20)
    bomb = zstd.compress(bytes(8 << 20))
    with pytest.raises(LimitExceeded):
        read_zstd_toc(bomb, Digest.of(bomb), compressed_digest=True)


@pytest.mark.parametrize("text", ['{"version":1}', '{"version":1,"tarSplitDigest":""}'])
def test_no_digest_of_a_tar_split(text: str):
    assert tar_split_digest(text.encode()) is None


@pytest.mark.parametrize(
    "text", ["", "[]", '{"version":1,"tarSplitDigest":5}', '{"version":1,"tarSplitDigest":"x"}']
)
def test_nonsense_in_the_place_of_the_digest(text: str):
    with pytest.raises(InvalidLayer):
        tar_split_digest(text.encode())


def lines(*values: Any) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def length(text: bytes) -> int:
    packed = zstd.compress(text)
    return tar_length(packed, Digest.of(packed))


SEGMENT = {"type": 2, "payload": base64.b64encode(bytes(512)).decode(), "position": 0}


def test_lines_are_added_up():
    assert length(b"") == 0
    text = lines(SEGMENT, {"type": 1, "name": "f", "size": 5, "payload": "x"}, {"type": 1}, SEGMENT)
    assert length(text) == 1029


@pytest.mark.parametrize(
    "text",
    [
        lines(SEGMENT)[:-1],
        lines(SEGMENT, {"type": 3}),
        lines({"type": 1, "size": -1}),
        lines({"type": 2, "payload": "&&&"}),
        lines({"type": 2, "payload": "\u00e9"}),
        lines({"type": 2, "payload": 5}),
        lines({"size": 1}),
        b"[]\n",
        b"{\n",
        b"\xff\n",
    ],
)
def test_a_damaged_tar_split_is_refused(text: bytes):
    with pytest.raises(InvalidLayer):
        length(text)


def test_a_tar_split_of_too_much_is_refused():
    with pytest.raises(LimitExceeded):
        length(lines({"type": 1, "size": limits.LAYER_BYTES}, {"type": 1, "size": 1}))
    with pytest.raises(LimitExceeded):
        length(bytes(3 * limits.TAR_EXTENDED_HEADER_BYTES))


@given(st.binary(max_size=400))
def test_arbitrary_bytes_only_raise_content_errors(data: bytes):
    with contextlib.suppress(ContentError):
        length(data)
    with contextlib.suppress(ContentError):
        tar_length(data, Digest.of(data))
    with contextlib.suppress(ContentError):
        tar_split_digest(data)
