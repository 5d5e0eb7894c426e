"""Checkpoints: a gzip stream is read from the middle, whoever wrote it."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import itertools
import random
import subprocess
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isal import igzip

from layerstore.errors import ContentError, InvalidLayer, StorageError
from layerstore.formats.checkpoints import (
    CheckpointReader,
    Checkpoints,
    write_checkpoints,
)

WORDS = [b"layer", b"store", b"podman", b"overlay", b"\0\0\0\0", b"blob", b"digest "]


def text(size: int, seed: int = 1) -> bytes:
    chooser = random.Random(seed)
    pieces = []
    length = 0
    while length < size:
        piece = chooser.choice(WORDS) + bytes([chooser.randrange(256)])
        pieces.append(piece)
        length += len(piece)
    return b"".join(pieces)[:size]


PLAIN = text(3_000_000)


def read_all(packed: bytes, spacing: int, piece: int = 70_000) -> tuple[bytes, CheckpointReader]:
    reader = CheckpointReader(io.BytesIO(packed), spacing)
    pieces = []
    while data := reader.read(piece):
        pieces.append(data)
    return b"".join(pieces), reader


def reread(packed: bytes, plain: bytes, reader: CheckpointReader, path: Path) -> None:
    """Every span between two points comes from its own bytes of the blob only."""
    points = reader.points
    write_checkpoints(points, path)
    codec = Checkpoints.open(path, lambda member: points[member].offset)
    ends = [*(point.offset for point in points[1:]), len(packed)]
    plain_ends = [*(point.plain_offset for point in points[1:]), len(plain)]
    for number, point in enumerate(points):
        needed = plain_ends[number] - point.plain_offset
        got = codec.decompress(number, packed[point.offset : ends[number]], needed=needed)
        assert got == plain[point.plain_offset : plain_ends[number]]
        if needed > 10:
            assert (
                codec.decompress(number, packed[point.offset : ends[number]], needed=10)
                == (plain[point.plain_offset : point.plain_offset + 10])
            )


def members(*parts: bytes) -> bytes:
    return b"".join(map(gzip.compress, parts))


def pigz(plain: bytes) -> bytes:
    """Blocks end on whole bytes where a stream is flushed, as parallel compressors do."""
    packer = zlib.compressobj(6, wbits=31)
    pieces = [
        packer.compress(plain[at : at + 131_072]) + packer.flush(zlib.Z_SYNC_FLUSH)
        for at in range(0, len(plain), 131_072)
    ]
    return b"".join(pieces) + packer.flush()


@pytest.mark.parametrize(
    "packed",
    [
        gzip.compress(PLAIN, 1),
        gzip.compress(PLAIN, 6),
        gzip.compress(PLAIN, 9),
        gzip.compress(PLAIN, 0),
        igzip.compress(PLAIN, 1),
        pigz(PLAIN),
        members(*(PLAIN[at : at + 50_000] for at in range(0, len(PLAIN), 50_000))),
    ],
    ids=["level 1", "level 6", "level 9", "stored", "isal", "flushed", "members"],
)
def test_every_span_is_read_alone(packed: bytes, tmp_path: Path):
    plain, reader = read_all(packed, 200_000)
    assert hashlib.sha256(plain).digest() == hashlib.sha256(PLAIN).digest()
    reread(packed, PLAIN, reader, tmp_path / "checkpoints")
    assert len(reader.points) > 2 or packed == igzip.compress(PLAIN, 1)


def test_points_are_not_closer_than_asked(tmp_path: Path):
    _, reader = read_all(pigz(PLAIN), 500_000)
    offsets = [point.plain_offset for point in reader.points]
    assert all(b - a >= 500_000 for a, b in itertools.pairwise(offsets))
    assert 4 <= len(offsets) <= 6


def test_what_gzip_itself_writes(tmp_path: Path):
    packed = subprocess.run(["gzip", "-6"], input=PLAIN, capture_output=True, check=True).stdout
    plain, reader = read_all(packed, 300_000)
    assert plain == PLAIN
    reread(packed, PLAIN, reader, tmp_path / "checkpoints")


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 90_000), st.integers(0, 9)), min_size=1, max_size=4),
    st.integers(1, 100_000),
    st.integers(1, 60_000),
)
def test_any_members_any_spacing(parts: list[tuple[int, int]], spacing: int, piece: int):
    plain = b"".join(text(size, level) for size, level in parts)
    packed = b"".join(gzip.compress(text(size, level), level) for size, level in parts)
    found, reader = read_all(packed, spacing, piece)
    assert found == plain
    path = Path(f"/tmp/checkpoints-{id(parts)}")
    try:
        reread(packed, plain, reader, path)
    finally:
        path.unlink(missing_ok=True)


def test_damage_and_truncation_are_noticed():
    packed = gzip.compress(PLAIN[:100_000])
    for wrong in (
        b"",
        packed[:-1],
        packed[:5000],
        packed[:12],
        packed + b"garbage",
        packed[:5000] + bytes([packed[5000] ^ 0x55]) + packed[5001:],
        b"not gzip at all",
    ):
        with pytest.raises(InvalidLayer):
            read_all(wrong, 10_000)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_only_raise_content_errors(data: bytes):
    for wrong in (data, b"\x1f\x8b\x08\0\0\0\0\0\0\3" + data):
        with contextlib.suppress(ContentError):
            read_all(wrong, 10)


def test_a_damaged_file_is_noticed(tmp_path: Path):
    path = tmp_path / "checkpoints"
    _, reader = read_all(pigz(PLAIN), 500_000)
    write_checkpoints(reader.points, path)
    good = path.read_bytes()
    for wrong in (b"", good[:-1], good[:20], good[:50] + b"x" + good[51:]):
        path.write_bytes(wrong)
        with pytest.raises(StorageError):
            Checkpoints.open(path, lambda _: 0)
    path.write_bytes(good)
    codec = Checkpoints.open(path, lambda _: 5)
    with pytest.raises(StorageError):
        codec.decompress(0, b"", needed=1)
