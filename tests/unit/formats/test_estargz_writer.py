"""The eStargz writer: what it writes is a tar.gz, and every chunk can be taken alone."""

import gzip
import hashlib
import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import tars
from layerstore import limits
from layerstore.errors import InvalidLayer, LimitExceeded, UsageError
from layerstore.formats import (
    FOOTER_BYTES,
    EstargzOptions,
    EstargzResult,
    TarReader,
    TocEntry,
    build_footer,
    decompress_member,
    iter_toc,
    parse_footer,
    read_toc,
    write_estargz,
    write_estargz_external,
)
from layerstore.formats.footer import EXTERNAL_FOOTER

BIG = os.urandom(200_000) + bytes(300_000)
LAYER = (
    tars.directory(b"./"),
    tars.directory(b"bin"),
    tars.regular(b"bin/big", BIG, mode=0o4755, uid=5, xattrs={b"security.capability": b"\1\0\xff"}),
    tars.hard_link(b"bin/link", b"bin/big"),
    tars.symlink(b"sbin", b"bin"),
    tars.regular(b"empty"),
    tars.Member(b"null", tars.CHARACTER, device=(1, 3)),
    tars.Member(b"pipe", tars.FIFO),
    tars.regular(b"\xff/raw", b"raw", mtime_ns=1_600_000_000_123_456_789),
    tars.regular(b"block", b"b" * 512),
    tars.regular(b"long/" * 60 + b"n", b"pax"),
    tars.regular(b"gnu/" * 60 + b"n", b"gnu", form="gnu"),
    tars.whiteout(b"bin/gone"),
    tars.regular(b"last", b"z" * 100),
)


def pack(*members: tars.Member) -> io.BytesIO:
    out = io.BytesIO()
    tars.write_tar(out, members)
    return out


def write(
    tar: io.BytesIO, options: EstargzOptions | None = None, threads: int = 1
) -> tuple[EstargzResult, bytes]:
    out = io.BytesIO()
    result = write_estargz(tar, out, options, threads=threads)
    return result, out.getvalue()


def toc(blob: bytes) -> list[TocEntry]:
    footer = parse_footer(blob[-FOOTER_BYTES:], len(blob))
    return list(iter_toc(read_toc(memoryview(blob)[footer.toc_offset :])))


def files(blob: bytes) -> dict[str, bytes]:
    """Every regular file, put together chunk by chunk from the members as a lazy reader does."""
    entries = toc(blob)
    found: dict[str, bytes] = {}
    sizes = {entry.name: entry.size for entry in entries if entry.type == "reg"}
    for entry in entries:
        if entry.type not in ("reg", "chunk"):
            continue
        before = found.setdefault(entry.name, b"")
        size = entry.chunk_size or sizes[entry.name] - entry.chunk_offset
        if not size:
            continue
        assert entry.chunk_offset == len(before)
        member = decompress_member(memoryview(blob)[entry.offset :], limit=1 << 24)
        chunk = member[entry.inner_offset :][:size]
        assert entry.chunk_digest == f"sha256:{hashlib.sha256(chunk).hexdigest()}"
        found[entry.name] = before + chunk
    for entry in entries:
        if entry.type == "reg":
            assert entry.digest == f"sha256:{hashlib.sha256(found[entry.name]).hexdigest()}"
            assert len(found[entry.name]) == entry.size
    return found


OPTIONS = [
    EstargzOptions(),
    EstargzOptions(level=1, chunk_size=65536),
    EstargzOptions(level=3, chunk_size=100_000, min_chunk_size=20_000),
    EstargzOptions(level=9, min_chunk_size=1 << 20, prioritize=("last", "bin/link")),
    EstargzOptions(level=4, chunk_size=512, prioritize=("empty",)),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_files_come_back_from_single_members(options: EstargzOptions) -> None:
    _, blob = write(pack(*LAYER), options)
    found = files(blob)
    for member in LAYER:
        if member.kind == tars.REGULAR:
            assert found[member.name.decode("utf-8", "replace")] == member.content


@pytest.mark.parametrize("options", OPTIONS)
def test_the_result_tells_the_truth_and_the_blob_is_a_tar_gz(options: EstargzOptions) -> None:
    result, blob = write(pack(*LAYER), options)
    tar = gzip.decompress(blob)
    assert result.digest == f"sha256:{hashlib.sha256(blob).hexdigest()}"
    assert result.size == len(blob)
    assert result.diff_id == f"sha256:{hashlib.sha256(tar).hexdigest()}"
    assert result.uncompressed_size == len(tar)
    footer = parse_footer(blob[-FOOTER_BYTES:], len(blob))
    digest = hashlib.sha256(read_toc(blob[footer.toc_offset :])).hexdigest()
    assert result.toc_digest == f"sha256:{digest}"
    assert result.annotations == {
        "containerd.io/snapshot/stargz/toc.digest": f"sha256:{digest}",
        "io.containers.estargz.uncompressed-size": str(len(tar)),
    }


@pytest.mark.parametrize("options", OPTIONS)
def test_entries_keep_their_headers_and_contents(options: EstargzOptions) -> None:
    _, blob = write(pack(*LAYER), options)

    def parts(data: bytes) -> dict[bytes, tuple[bytes, bytes]]:
        stream = io.BytesIO(data)
        return {
            entry.name: (
                entry.headers,
                data[entry.payload_offset : entry.payload_offset + entry.size + entry.padding],
            )
            for entry in TarReader(stream)
        }

    before, after = parts(pack(*LAYER).getvalue()), parts(gzip.decompress(blob))
    assert before.items() <= after.items()
    assert len(after) == len(before) + 2


def test_real_tools_read_it(tmp_path: Path) -> None:
    _, blob = write(pack(*LAYER), EstargzOptions(chunk_size=65536))
    path = tmp_path / "layer.tar.gz"
    path.write_bytes(blob)
    with tarfile.open(path) as tar:
        assert tar.getnames()[-1] == "stargz.index.json"
        stored = tar.extractfile("bin/big")
        assert stored is not None
        assert stored.read() == BIG
    subprocess.run(["gzip", "-t", str(path)], check=True)


def test_metadata_is_told() -> None:
    _, blob = write(pack(*LAYER), EstargzOptions(chunk_size=200_000))
    entries = {(entry.name, entry.type): entry for entry in toc(blob)}
    big = entries["bin/big", "reg"]
    assert (big.mode, big.uid, big.size) == (0o4755, 5, len(BIG))
    assert big.xattrs == {"security.capability": "AQD/"}
    assert big.modtime == "2023-11-14T22:13:20Z"
    assert entries["\ufffd/raw", "reg"].modtime == "2020-09-13T12:26:40.123456789Z"
    assert entries["\ufffd/raw", "reg"].name_raw == "/y9yYXc="
    assert entries["bin/link", "hardlink"].link_name == "bin/big"
    assert entries["sbin", "symlink"].link_name == "bin"
    assert entries["null", "char"].dev_minor == 3
    assert entries["bin/.wh.gone", "reg"].size == 0
    chunks = [entry for entry in toc(blob) if entry.type == "chunk"]
    assert [(chunk.chunk_offset, chunk.chunk_size) for chunk in chunks] == [
        (200_000, 200_000),
        (400_000, 0),
    ]


def test_a_file_of_exactly_one_or_two_chunks() -> None:
    layer = pack(tars.regular(b"one", b"1" * 1024), tars.regular(b"two", b"2" * 2048))
    _, blob = write(layer, EstargzOptions(chunk_size=1024))
    assert [(e.name, e.chunk_offset, e.chunk_size) for e in toc(blob)[1:]] == [
        ("one", 0, 0),
        ("two", 0, 1024),
        ("two", 1024, 0),
    ]
    assert files(blob)["two"] == b"2" * 2048


def test_members_begin_at_payloads_only_unless_shared() -> None:
    _, blob = write(pack(*LAYER), EstargzOptions(chunk_size=65536))
    offsets = [entry.offset for entry in toc(blob) if entry.chunk_digest]
    assert len(set(offsets)) == len(offsets)
    assert offsets == sorted(offsets)
    assert all(entry.inner_offset == 0 for entry in toc(blob))
    first = decompress_member(blob, limit=1 << 20)
    assert first.startswith(b".no.prefetch")
    assert len(first) == 512


def test_shared_members_are_fewer_and_begin_with_a_payload() -> None:
    layer = pack(*(tars.regular(b"f%d" % n, b"x" * 100) for n in range(200)))
    plain, plain_blob = write(layer)
    shared, blob = write(layer, EstargzOptions(min_chunk_size=16_384))
    assert shared.size < plain.size // 2
    assert shared.diff_id != plain.diff_id  # the TOC is part of it
    entries = [entry for entry in toc(blob) if entry.chunk_digest]
    members: dict[int, list[int]] = {}
    for entry in entries:
        members.setdefault(entry.offset, []).append(entry.inner_offset)
    assert 5 < len(members) < 20
    assert all(inner[0] == 0 and inner == sorted(inner) for inner in members.values())
    assert files(blob) == files(plain_blob)


def test_landmarks() -> None:
    _, blob = write(pack(*LAYER))
    assert toc(blob)[0].name == ".no.prefetch.landmark"
    _, blob = write(pack(*LAYER), EstargzOptions(prioritize=("nowhere",)))
    assert toc(blob)[0].name == ".no.prefetch.landmark"
    options = EstargzOptions(prioritize=("last", "block"), min_chunk_size=1 << 20)
    result, blob = write(pack(*LAYER), options)
    assert result.prioritized == ("last", "block")
    entries = toc(blob)
    names = [entry.name for entry in entries]
    assert names[:4] == ["./", "last", "block", ".prefetch.landmark"]
    landmark = entries[3]
    assert files(blob)[".prefetch.landmark"] == b"\x0f"
    assert landmark.inner_offset == 0
    assert all(entry.offset >= landmark.offset for entry in entries[3:] if entry.chunk_digest)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_same_bytes_for_any_number_of_threads(options: EstargzOptions) -> None:
    members = [*LAYER, *(tars.regular(b"more%d" % n, BIG[n : n + 50_000]) for n in range(60))]
    blobs = {write(pack(*members), options, threads)[1] for threads in (1, 2, 5)}
    assert len(blobs) == 1


def test_rebuilding_an_estargz_blob_changes_nothing() -> None:
    first, blob = write(pack(*LAYER))
    second, _ = write(io.BytesIO(gzip.decompress(blob)))
    assert second == first


def test_an_empty_layer() -> None:
    for empty in (b"", bytes(1024)):
        _, blob = write(io.BytesIO(empty))
        assert [entry.name for entry in toc(blob)] == [".no.prefetch.landmark"]


def test_long_runs_of_headers_do_not_burden_a_payload() -> None:
    members = [tars.regular(b"f", b"x"), *(tars.symlink(b"s%d" % n, b"f") for n in range(5000))]
    _, blob = write(pack(*members))
    file = next(entry for entry in toc(blob) if entry.name == "f")
    assert len(decompress_member(memoryview(blob)[file.offset :], limit=1 << 24)) <= 1 << 21
    assert len(toc(blob)) == 5002


def test_progress_adds_up() -> None:
    steps: list[int] = []
    result = write_estargz(pack(*LAYER), io.BytesIO(), progress=steps.append)
    assert sum(steps) == result.uncompressed_size


def test_broken_input_is_refused() -> None:
    with pytest.raises(InvalidLayer):
        write(io.BytesIO(pack(*LAYER).getvalue()[:200_000]))


def test_a_toc_that_would_be_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TOC_BYTES", 1000)
    with pytest.raises(LimitExceeded):
        write(pack(*LAYER))


def test_what_a_failing_disk_raises_comes_through() -> None:
    class Full(io.BytesIO):
        def write(self, data: object, /) -> int:
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_estargz(pack(*LAYER), Full(), threads=2)


@pytest.mark.parametrize(
    ("level", "chunk_size", "min_chunk_size"),
    [(0, 512, 0), (10, 512, 0), (5, 1, 0), (5, 1 << 40, 0), (5, 512, -1)],
)
def test_options_are_checked(level: int, chunk_size: int, min_chunk_size: int) -> None:
    with pytest.raises(UsageError):
        EstargzOptions(level, chunk_size, min_chunk_size)


@settings(max_examples=40)
@given(
    st.dictionaries(st.sampled_from([b"a", b"b", b"c", b"d"]), st.binary(max_size=3000)),
    st.sampled_from([0, 700, 5000]),
    st.lists(st.sampled_from("abcd"), max_size=2),
)
def test_any_files_come_back(
    contents: dict[bytes, bytes], minimum: int, prioritize: list[str]
) -> None:
    layer = pack(*(tars.regular(name, content) for name, content in contents.items()))
    options = EstargzOptions(1, 1000, minimum, tuple(prioritize))
    found = files(write(layer, options)[1])
    assert {name.encode(): content for name, content in found.items() if len(name) == 1} == contents


# -- the TOC in a blob of its own --------------------------------------------------------


def write_external(
    tar: bytes, options: EstargzOptions | None = None, threads: int = 1
) -> tuple[EstargzResult, bytes, bytes]:
    out = io.BytesIO()
    result, toc_blob = write_estargz_external(io.BytesIO(tar), out, options, threads=threads)
    return result, out.getvalue(), toc_blob


EXTERNAL_OPTIONS = [options for options in OPTIONS if not options.prioritize]


@pytest.mark.parametrize("options", EXTERNAL_OPTIONS)
def test_with_an_external_toc_the_tar_stream_is_what_it_was(options: EstargzOptions) -> None:
    tar = bytearray(pack(*LAYER).getvalue() + bytes(3000))
    first_padding = tar.index(b"z" * 100) + 100
    tar[first_padding : first_padding + 4] = b"junk"
    result, blob, toc_blob = write_external(bytes(tar), options)
    assert gzip.decompress(blob) == tar
    assert result.diff_id == f"sha256:{hashlib.sha256(tar).hexdigest()}"
    assert result.digest == f"sha256:{hashlib.sha256(blob).hexdigest()}"
    assert (result.size, result.uncompressed_size) == (len(blob), len(tar))
    assert blob.endswith(EXTERNAL_FOOTER)
    assert parse_footer(blob[-FOOTER_BYTES:], len(blob)).external
    toc_json = read_toc(toc_blob)
    assert result.annotations == {
        "containerd.io/snapshot/stargz/toc.digest": (
            f"sha256:{hashlib.sha256(toc_json).hexdigest()}"
        ),
        "io.containers.estargz.uncompressed-size": str(len(tar)),
    }
    with tarfile.open(fileobj=io.BytesIO(toc_blob)) as archive:
        assert archive.getnames() == ["stargz.index.json"]
    # as if the TOC were in the blob, the chunks are found in it
    whole = blob[:-46] + toc_blob
    found = files(whole + build_footer(len(blob) - 46))
    for member in LAYER:
        if member.kind == tars.REGULAR:
            assert found[member.name.decode("utf-8", "replace")] == member.content
    assert len([entry for entry in iter_toc(toc_json) if entry.type != "chunk"]) == len(LAYER)


def test_an_external_toc_is_the_same_for_any_number_of_threads() -> None:
    members = [*LAYER, *(tars.regular(b"more%d" % n, BIG[n : n + 50_000]) for n in range(60))]
    tar = pack(*members).getvalue()
    assert len({write_external(tar, None, threads)[1:] for threads in (1, 2, 5)}) == 1


def test_an_estargz_blob_gets_an_external_toc_without_change() -> None:
    _, before = write(pack(*LAYER), EstargzOptions(prioritize=("last",)))
    tar = gzip.decompress(before)
    options = EstargzOptions(min_chunk_size=1 << 20)
    _, blob, toc_blob = write_external(tar, options)
    assert gzip.decompress(blob) == tar
    entries = list(iter_toc(read_toc(toc_blob)))
    assert "stargz.index.json" not in [entry.name for entry in entries]
    (landmark,) = [entry for entry in entries if entry.name == ".prefetch.landmark"]
    assert landmark.inner_offset == 0


def test_an_external_toc_does_not_go_with_another_order() -> None:
    with pytest.raises(UsageError):
        write_external(b"", EstargzOptions(prioritize=("last",)))


@pytest.mark.parametrize("end", [100, 700, 200_000])
def test_broken_input_gets_no_external_toc(end: int) -> None:
    with pytest.raises(InvalidLayer):
        write_external(pack(*LAYER).getvalue()[:end])
