"""The zstd:chunked writer: the tar stream stays, every chunk can be taken alone, TOC and tar-split
say what is there."""

import base64
import hashlib
import io
import json
import os
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import tars
from layerstore import limits
from layerstore.errors import InvalidLayer, LimitExceeded, UsageError
from layerstore.formats import LayerStream, iter_toc
from layerstore.formats.chunking import HOLE_BYTES, HOLE_PIECE_BYTES, Chunker
from layerstore.formats.zstdchunked_writer import (
    ZstdChunkedOptions,
    ZstdChunkedResult,
    write_zstd_chunked,
)

NOISE = hashlib.shake_256(b"noise").digest(1_000_000)
KEY = "io.github.containers.zstd-chunked."
LAYER = (
    tars.directory(b"bin"),
    tars.regular(b"bin/big", NOISE[:400_000] + bytes(100_000) + NOISE[400_000:], uid=5),
    tars.hard_link(b"bin/link", b"bin/big"),
    tars.symlink(b"sbin", b"bin"),
    tars.regular(b"empty"),
    tars.regular(b"set", b"id", mode=0o4755, xattrs={b"security.capability": b"\1\0\xff"}),
    tars.regular("\xfcml\xe4ut".encode(), b"name", mtime_ns=1_600_000_000_123_456_789),
    tars.regular(b"long" * 60, b"pax"),
    tars.regular(b"bin/" + b"gnu" * 80, b"gnu", form="gnu"),
    tars.whiteout(b"bin/gone"),
    tars.regular(b"sparse", bytes(300_000)),
)
OPTIONS = [
    ZstdChunkedOptions(),
    ZstdChunkedOptions(level=1, chunk_size=4096),
    ZstdChunkedOptions(level=3, chunk_size=4 << 20),
]


def pack(*members: tars.Member) -> bytes:
    out = io.BytesIO()
    tars.write_tar(out, members)
    return out.getvalue()


def write(
    tar: bytes, options: ZstdChunkedOptions | None = None, threads: int = 1
) -> tuple[ZstdChunkedResult, bytes]:
    out = io.BytesIO()
    result = write_zstd_chunked(io.BytesIO(tar), out, options, threads=threads)
    return result, out.getvalue()


def unpacked(data: bytes) -> bytes:
    stream = LayerStream(io.BytesIO(data))
    found = b""
    while piece := stream.read(1 << 20):
        found += piece
    return found


def placed(result: ZstdChunkedResult, blob: bytes, name: str) -> bytes:
    """The bytes that an annotation points to, decompressed to the length that it states."""
    offset, length, plain = (int(n) for n in result.annotations[KEY + name].split(":")[:3])
    assert blob[offset - 8 : offset] == struct.pack("<II", 0x184D2A50, length)
    document = unpacked(blob[offset : offset + length])
    assert len(document) == plain
    return document


def toc(result: ZstdChunkedResult, blob: bytes) -> dict[str, Any]:
    document = json.loads(placed(result, blob, "manifest-position"))
    assert isinstance(document, dict)
    return document


def files(document: dict[str, Any], blob: bytes) -> dict[str, bytes]:
    """Every regular file, put together from single frames as a lazy reader does."""
    found: dict[str, bytes] = {}
    whole: dict[str, Any] = {}
    for entry in document["entries"]:
        name = entry["name"]
        if entry["type"] == "reg":
            whole[name] = entry
            found[name] = b""
            if entry.get("size") and "chunkDigest" not in entry:
                found[name] = unpacked(blob[entry["offset"] : entry["endOffset"]])
        if "chunkDigest" in entry:
            assert entry.get("chunkOffset", 0) == len(found[name])
            if entry.get("chunkType") == "zeros":
                data = bytes(entry["chunkSize"])
            else:
                data = LayerStream(io.BytesIO(blob[entry["offset"] :])).read(entry["chunkSize"])
            assert len(data) == entry["chunkSize"]
            assert entry["chunkDigest"] == f"sha256:{hashlib.sha256(data).hexdigest()}"
            found[name] += data
    for name, entry in whole.items():
        assert len(found[name]) == entry.get("size", 0)
        if found[name]:
            assert entry["digest"] == f"sha256:{hashlib.sha256(found[name]).hexdigest()}"
        else:
            assert "digest" not in entry
    return found


@pytest.mark.parametrize("options", OPTIONS)
def test_the_tar_stream_is_what_it_was(options: ZstdChunkedOptions, tmp_path: Path) -> None:
    tar = pack(*LAYER)
    result, blob = write(tar, options)
    assert unpacked(blob) == tar
    assert result.diff_id == f"sha256:{hashlib.sha256(tar).hexdigest()}"
    assert result.digest == f"sha256:{hashlib.sha256(blob).hexdigest()}"
    assert (result.size, result.uncompressed_size) == (len(blob), len(tar))
    assert result.tar_split


@pytest.mark.parametrize("options", OPTIONS)
def test_files_come_back_from_single_frames(options: ZstdChunkedOptions) -> None:
    result, blob = write(pack(*LAYER), options)
    found = files(toc(result, blob), blob)
    for member in LAYER:
        if member.kind == tars.REGULAR:
            assert found[member.name.decode()] == member.content


def test_our_own_reader_of_tocs_takes_it() -> None:
    result, blob = write(pack(*LAYER))
    entries = list(iter_toc(placed(result, blob, "manifest-position")))
    chunks = [entry for entry in entries if entry.type == "chunk"]
    assert len(entries) - len(chunks) == len(LAYER)
    assert {entry.name for entry in chunks} == {"bin/big"}


def test_annotations_footer_and_digests() -> None:
    result, blob = write(pack(*LAYER))
    notes = result.annotations
    assert set(notes) == {KEY + "manifest-checksum", KEY + "manifest-position"} | {
        KEY + "tarsplit-position"
    }
    position = [int(number) for number in notes[KEY + "manifest-position"].split(":")]
    packed = blob[position[0] : position[0] + position[1]]
    assert result.toc_digest == notes[KEY + "manifest-checksum"]
    assert result.toc_digest == f"sha256:{hashlib.sha256(packed).hexdigest()}"
    split = [int(number) for number in notes[KEY + "tarsplit-position"].split(":")]
    packed_split = blob[split[0] : split[0] + split[1]]
    assert toc(result, blob)["tarSplitDigest"] == (
        f"sha256:{hashlib.sha256(packed_split).hexdigest()}"
    )
    assert blob[-72:-64] == struct.pack("<II", 0x184D2A50, 64)
    assert struct.unpack("<7Q", blob[-64:-8]) == (*position, *split)
    assert position[3] == 1
    assert blob[-8:] == b"GNUlInUx"


def test_the_tar_split_gives_the_stream_back() -> None:
    tar = pack(*LAYER)
    result, blob = write(tar)
    lines = [json.loads(line) for line in placed(result, blob, "tarsplit-position").splitlines()]
    contents = files(toc(result, blob), blob)
    found = b""
    headers = 0
    for number, line in enumerate(lines):
        assert line["position"] == number
        if line["type"] == 2:
            found += base64.b64decode(line["payload"])
            headers += 1
        else:
            found += contents.get(line["name"], b"")
    assert found == tar
    # containers/storage wants one segment for the headers of each entry, and one for the end
    assert headers == len(LAYER) + 1


def test_metadata_is_what_go_reads() -> None:
    result, blob = write(pack(*LAYER))
    entries = {e["name"]: e for e in toc(result, blob)["entries"] if e["type"] != "chunk"}
    first = entries["bin/"] if "bin/" in entries else entries["bin"]
    assert first["type"] == "dir"
    assert entries["set"]["mode"] == 0o4755
    assert entries["set"]["xattrs"] == {"security.capability": "AQD/"}
    assert entries["\xfcml\xe4ut"]["modtime"] == "2020-09-13T12:26:40.123456789Z"
    assert entries["bin/link"]["linkName"] == "bin/big"
    assert "userName" not in entries["set"]
    assert entries["sparse"]["digest"] == f"sha256:{hashlib.sha256(bytes(300_000)).hexdigest()}"
    assert "chunkType" not in entries["sparse"]  # one chunk: its digest says all


def test_a_hole_is_told_as_one() -> None:
    result, blob = write(pack(*LAYER))
    holes = [e for e in toc(result, blob)["entries"] if e.get("chunkType") == "zeros"]
    assert [(hole["chunkOffset"], hole["chunkSize"]) for hole in holes] == [(400_000, 100_000)]


def test_times_of_1970_and_of_access_are_told() -> None:
    zero = pack(tars.regular(b"zero", b"x", mtime_ns=0))
    result, blob = write(zero)
    assert toc(result, blob)["entries"][0]["modtime"] == "1970-01-01T00:00:00Z"
    payload = b"20 atime=1234567.25\n" + b"17 ctime=1234568\n"
    extended = tars._extension(b"x", b"PaxHeaders/zero", payload)
    result, blob = write(extended + zero)
    (entry,) = toc(result, blob)["entries"]
    assert entry["accesstime"] == "1970-01-15T06:56:07.25Z"
    assert entry["changetime"] == "1970-01-15T06:56:08Z"
    assert result.tar_split


def test_devices_are_told() -> None:
    result, blob = write(pack(tars.Member(b"null", tars.CHARACTER, device=(1, 3))))
    (entry,) = toc(result, blob)["entries"]
    assert (entry["type"], entry["devMajor"], entry["devMinor"]) == ("char", 1, 3)


def with_field(tar: bytes, start: int, value: bytes) -> bytes:
    """The tar with another value in a field of its first header."""
    header = bytearray(tar[:512])
    header[start : start + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + tar[512:]


CAPABLE = tars.regular(b"f", b"x", xattrs={b"security.capability": b"\1"})
PLAIN = pack(tars.regular(b"f", b"x"))


@pytest.mark.parametrize(
    "tar",
    [
        pack(tars.regular(b"\xff/raw", b"raw")),
        pack(tars.symlink(b"link", b"\xff")),
        with_field(PLAIN, 156, b"7"),
        with_field(PLAIN, 157, b"strange"),
        with_field(PLAIN, 329, b"0000001"),
        with_field(pack(tars.symlink(b"link", b"to")), 124, b"00000000001"),
        tars._extension(b"g", b"pax_global_header", b"13 comment=x\n") + PLAIN,
        pack(tars.Member(b"pipe", tars.FIFO)),
        pack(tars.Member(b"null", tars.CHARACTER, device=(1, 3))),
        pack(CAPABLE, tars.hard_link(b"link", CAPABLE)),
        pack(tars.directory(b"a"), tars.whiteout(b"a/f"), tars.regular(b"a/f", b"x")),
        pack(tars.regular(b"f", b"x"), tars.whiteout(b"f")),
        pack(tars.directory(b"a/"), tars.regular(b"a/b/f", b"x")),
        PLAIN + b"behind the end",
        PLAIN + bytes(100),
    ],
    ids=[
        "name",
        "link",
        "type",
        "linkname",
        "device",
        "size",
        "global",
        "pipe",
        "null",
        "capable",
        "whiteout",
        "whiteout-after",
        "parent",
        "trailer",
        "odd-end",
    ],
)
def test_what_containers_storage_would_refuse_gets_no_tar_split(tar: bytes) -> None:
    result, blob = write(tar)
    assert unpacked(blob) == tar
    assert not result.tar_split
    assert KEY + "tarsplit-position" not in result.annotations
    assert "tarSplitDigest" not in toc(result, blob)
    assert result.annotations["io.containers.estargz.uncompressed-size"] == str(len(tar))
    files(toc(result, blob), blob)


def test_a_name_that_is_no_utf8_is_told_exactly() -> None:
    result, blob = write(pack(tars.regular(b"\xff/raw", b"raw")))
    (entry,) = toc(result, blob)["entries"]
    assert (entry["name"], entry["nameRaw"]) == ("\ufffd/raw", "/y9yYXc=")


@pytest.mark.parametrize("options", OPTIONS)
def test_the_same_bytes_for_any_number_of_threads(options: ZstdChunkedOptions) -> None:
    members = [*LAYER, *(tars.regular(b"more%d" % n, NOISE[n : n + 50_000]) for n in range(60))]
    tar = pack(*members)
    assert len({write(tar, options, threads)[1] for threads in (1, 2, 5)}) == 1


def test_padding_that_is_not_zero_stays() -> None:
    tar = bytearray(PLAIN)
    tar[512 + 1 : 512 + 5] = b"junk"
    _, blob = write(bytes(tar))
    assert unpacked(blob) == tar


def test_an_empty_layer(tmp_path: Path) -> None:
    for empty in (b"", bytes(1024)):
        result, blob = write(empty)
        assert unpacked(blob) == empty
        assert toc(result, blob)["entries"] == []
        assert blob.startswith(b"\x28\xb5\x2f\xfd")


def test_the_same_path_twice_is_refused() -> None:
    with pytest.raises(InvalidLayer):
        write(pack(tars.regular(b"f", b"1"), tars.regular(b"./f", b"2")))


def test_progress_adds_up() -> None:
    steps: list[int] = []
    result = write_zstd_chunked(io.BytesIO(pack(*LAYER)), io.BytesIO(), progress=steps.append)
    assert sum(steps) == result.uncompressed_size


@pytest.mark.parametrize("end", [100, 700, 200_000])
def test_broken_input_is_refused(end: int) -> None:
    with pytest.raises(InvalidLayer):
        write(pack(*LAYER)[:end])


def test_a_toc_that_would_be_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TOC_BYTES", 1000)
    with pytest.raises(LimitExceeded):
        write(pack(*LAYER))


@pytest.mark.parametrize(("level", "chunk_size"), [(0, 65536), (20, 65536), (3, 1), (3, 1 << 30)])
def test_options_are_checked(level: int, chunk_size: int) -> None:
    with pytest.raises(UsageError):
        ZstdChunkedOptions(level, chunk_size)


def test_the_reference_decoder_reads_it(tmp_path: Path) -> None:
    tar = pack(*LAYER)
    path = tmp_path / "layer.tar.zst"
    path.write_bytes(write(tar)[1])
    done = subprocess.run(["zstd", "-dc", str(path)], capture_output=True, check=True)
    assert done.stdout == tar


# -- where files are cut ----------------------------------------------------------------


class Reader:
    """Gives contents in pieces of any length."""

    def __init__(self, data: bytes, most: int) -> None:
        self.stream = io.BytesIO(data)
        self.most = most

    def read(self, n: int) -> bytes:
        return self.stream.read(min(n, self.most))


def cut(data: bytes, size: int = 65536, most: int = 1 << 30) -> list[tuple[int, bool]]:
    chunks = list(Chunker(size).chunks(Reader(data, most).read, len(data)))
    assert b"".join(chunk for chunk, _ in chunks) == data
    assert all(not any(chunk) for chunk, hole in chunks if hole)
    return [(len(chunk), hole) for chunk, hole in chunks]


def test_chunks_have_about_the_size_asked_for() -> None:
    data = hashlib.shake_256(b"more").digest(8_000_000)
    for size in (4096, 65536, 262144):
        lengths = [length for length, _ in cut(data, size)]
        assert size / 2 < len(data) / len(lengths) < 2 * size
        assert min(lengths[:-1]) >= size // 4
        assert max(lengths) <= size * 8


def test_a_change_in_the_middle_leaves_the_other_chunks() -> None:
    def chunks(data: bytes) -> set[bytes]:
        found = Chunker(65536).chunks(io.BytesIO(data).read, len(data))
        return {hashlib.sha256(chunk).digest() for chunk, _ in found}

    before = chunks(NOISE * 3)
    after = chunks(NOISE + b"a line more" + NOISE + NOISE)
    assert len(after - before) <= 4


def test_holes_of_any_length_and_place() -> None:
    for gap in (HOLE_BYTES - 1, HOLE_BYTES, 700_000, 3_000_001, HOLE_PIECE_BYTES + 20_000):
        for lead in (0, 1, 70_000, 1_048_570):
            data = b"x" * lead + bytes(gap) + b"y" * 70_000
            holes = sum(length for length, hole in cut(data) if hole)
            assert holes == (gap if gap >= HOLE_BYTES else 0)
    assert cut(bytes(100_000)) == [(100_000, True)]


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from(["noise", "zeros", "same"]), st.integers(1, 60_000))),
    st.integers(1, 100_000),
)
def test_cuts_do_not_depend_on_how_the_bytes_come(parts: list[tuple[str, int]], most: int) -> None:
    data = b""
    for kind, size in parts:
        data += {"noise": NOISE[:size], "zeros": bytes(size), "same": b"a" * size}[kind]
    assert cut(data, 4096, most) == cut(data, 4096)


def test_contents_that_end_early() -> None:
    for size in (10, 100_000, 5_000_000):
        with pytest.raises(InvalidLayer):
            list(Chunker().chunks(io.BytesIO(os.urandom(size - 1)).read, size))
