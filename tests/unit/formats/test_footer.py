"""The footer parser: every field counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerstore import limits
from layerstore.errors import ContentError, InvalidLayer, LimitExceeded
from layerstore.formats import FOOTER_BYTES, Footer, build_footer, parse_footer
from layerstore.formats.footer import EXTERNAL_FOOTER

LEGACY = (
    bytes.fromhex("1f8b08040000000000ff1600") + b"%016xSTARGZ" % 100 + bytes.fromhex("010000ffff")
) + bytes(8)


def test_a_footer_reads_back_from_its_own_bytes() -> None:
    footer = build_footer(0xABCDEF)
    assert len(footer) == FOOTER_BYTES
    assert parse_footer(footer, 0xABCDEF + 1000 + 51) == Footer(0xABCDEF, 1000, 51)


def test_more_than_the_footer_may_be_given() -> None:
    assert parse_footer(b"x" * 400 + build_footer(100), 451) == Footer(100, 300, 51)


def test_the_legacy_footer_of_47_bytes_is_read_from_an_exact_or_a_longer_tail() -> None:
    assert len(LEGACY) == 47
    assert parse_footer(LEGACY, 347) == Footer(100, 200, 47)
    assert parse_footer(b"abcd" + LEGACY, 347) == Footer(100, 200, 47)


@pytest.mark.parametrize("position", range(51))
def test_every_byte_of_the_footer_is_checked(position: int) -> None:
    footer = bytearray(build_footer(100))
    footer[position] ^= 0x40
    with pytest.raises(InvalidLayer):
        parse_footer(bytes(footer), 300)


@pytest.mark.parametrize("position", range(47))
def test_every_byte_of_the_legacy_footer_is_checked(position: int) -> None:
    footer = bytearray(LEGACY)
    footer[position] ^= 0x40
    with pytest.raises(InvalidLayer):
        parse_footer(bytes(footer), 300)


@pytest.mark.parametrize("size", [0, 46, 50, 51, 100, 151])
def test_an_offset_outside_the_blob_is_refused(size: int) -> None:
    with pytest.raises(InvalidLayer):
        parse_footer(build_footer(100), size)


def test_a_huge_compressed_toc_is_refused_before_it_is_fetched() -> None:
    with pytest.raises(LimitExceeded):
        parse_footer(build_footer(0), limits.TOC_BYTES + 52)


def test_an_external_toc_is_told_by_the_footer_of_46_bytes() -> None:
    external = bytes.fromhex("1f8b08040000000000ff1500") + b"SG\x11\0STARGZEXTERNALTOC"
    external += bytes.fromhex("010000ffff") + bytes(8)
    assert len(external) == 46
    assert external == EXTERNAL_FOOTER
    found = parse_footer(b"12345" + external, 1000)
    assert found == Footer(toc_offset=954, toc_size=0, footer_size=46, external=True)
    assert not parse_footer(build_footer(100), 300).external


@pytest.mark.parametrize("position", range(46))
def test_every_byte_of_the_external_footer_is_checked(position: int) -> None:
    footer = bytearray(EXTERNAL_FOOTER)
    footer[position] ^= 0x40
    with pytest.raises(InvalidLayer):
        parse_footer(b"12345" + bytes(footer), 300)


def test_an_external_footer_larger_than_the_blob_is_refused() -> None:
    with pytest.raises(InvalidLayer):
        parse_footer(EXTERNAL_FOOTER, 45)


@given(st.binary(max_size=60), st.integers(0, 1 << 70))
def test_arbitrary_bytes_only_raise_content_errors(tail: bytes, size: int) -> None:
    with pytest.raises(ContentError):
        parse_footer(tail, size)
