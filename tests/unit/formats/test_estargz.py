"""Reading the TOC member."""

import gzip
import io
import tarfile
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerstore import limits
from layerstore.errors import ContentError, InvalidLayer, LimitExceeded
from layerstore.formats import read_toc

JSON = b'{"version":1,"entries":[]}'


def archive(payload: bytes = JSON, name: str = "stargz.index.json", **fields: object) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.size = len(payload)
        for key, value in fields.items():
            setattr(info, key, value)
        tar.addfile(info, io.BytesIO(payload))
    return out.getvalue()


def test_the_exact_bytes_of_the_json_come_back() -> None:
    assert read_toc(gzip.compress(archive(b" \n" + JSON + b"\n"))) == b" \n" + JSON + b"\n"


def test_a_memoryview_with_a_footer_behind_is_fine() -> None:
    assert read_toc(memoryview(gzip.compress(archive()) + b"footer")) == JSON


@pytest.mark.parametrize("size", [1, 511, 512, 513, 100_000])
def test_sizes_around_the_block_size(size: int) -> None:
    payload = b"x" * size
    assert read_toc(gzip.compress(archive(payload))) == payload


def test_an_empty_payload_is_empty() -> None:
    assert read_toc(gzip.compress(archive(b""))) == b""


@pytest.mark.parametrize("name", ["./stargz.index.json", "stargz.index.jso", "x", "a/" * 60 + "b"])
def test_the_first_entry_must_have_the_exact_name(name: str) -> None:
    with pytest.raises(InvalidLayer):
        read_toc(gzip.compress(archive(name=name)))


def test_the_first_entry_must_be_a_file() -> None:
    with pytest.raises(InvalidLayer):
        read_toc(gzip.compress(archive(b"", type=tarfile.DIRTYPE)))


def test_a_second_entry_of_that_name_does_not_count() -> None:
    first = archive(b"other", name="other")[:1024]
    with pytest.raises(InvalidLayer):
        read_toc(gzip.compress(first + archive()))


def test_a_wrong_header_checksum_is_refused() -> None:
    tar = bytearray(archive())
    tar[100] ^= 1
    with pytest.raises(InvalidLayer):
        read_toc(gzip.compress(bytes(tar)))


def test_truncation_is_noticed_everywhere() -> None:
    member = gzip.compress(archive())
    for length in range(len(member)):
        with pytest.raises(InvalidLayer):
            read_toc(member[:length])


def test_a_payload_that_ends_early_is_refused() -> None:
    with pytest.raises(InvalidLayer):
        read_toc(gzip.compress(archive(b"x" * 2000)[:1500]))


def test_damage_behind_the_payload_is_noticed() -> None:
    member = bytearray(gzip.compress(archive()))
    member[-6] ^= 1
    with pytest.raises(InvalidLayer):
        read_toc(bytes(member))


def test_an_announced_size_above_the_limit_is_refused_without_reading_it() -> None:
    info = tarfile.TarInfo("stargz.index.json")
    info.size = limits.TOC_BYTES + 1
    with pytest.raises(LimitExceeded):
        read_toc(gzip.compress(info.tobuf(tarfile.USTAR_FORMAT) + b"x" * 1000))


def test_a_bomb_behind_the_payload_is_cut_off() -> None:
    packer = zlib.compressobj(9, wbits=31)
    bomb = packer.compress(archive())
    bomb += b"".join(packer.compress(bytes(1 << 20)) for _ in range(32)) + packer.flush()
    with pytest.raises(InvalidLayer):
        read_toc(bomb)


@given(st.binary(max_size=600))
def test_arbitrary_archives_only_raise_content_errors(tar: bytes) -> None:
    with pytest.raises(ContentError):
        read_toc(gzip.compress(tar))
