"""Names: cleaned as TOC readers clean them, kept byte for byte."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerstore.errors import InvalidLayer, LimitExceeded, UnsupportedFormat
from layerstore.layertree.names import check_component, check_symlink, clean_path, exact_bytes


@pytest.mark.parametrize(
    ("given_", "cleaned"),
    [
        (b"", b""),
        (b".", b""),
        (b"./", b""),
        (b"/", b""),
        (b"//", b""),
        (b"./.", b""),
        (b"etc/", b"etc"),
        (b"etc//", b"etc"),
        (b"./etc/passwd", b"etc/passwd"),
        (b"/etc//passwd", b"etc/passwd"),
        (b"etc/./passwd", b"etc/passwd"),
        (b"etc/passwd/.", b"etc/passwd"),
        (b"foo./bar.", b"foo./bar."),
        (b"...", b"..."),
        (b".hidden/..x", b".hidden/..x"),
        (b" /\xff", b" /\xff"),
    ],
)
def test_cleaning(given_: bytes, cleaned: bytes) -> None:
    assert clean_path(given_, "x") == cleaned


@pytest.mark.parametrize("path", [b"..", b"../a", b"a/..", b"a/../b", b"/..", b"./../", b"a/../"])
def test_nothing_leaves_the_layer(path: bytes) -> None:
    with pytest.raises(InvalidLayer, match=r"'\.\.'"):
        clean_path(path, "x")


def test_nul_is_refused() -> None:
    with pytest.raises(InvalidLayer, match="NUL"):
        clean_path(b"a\0b", "x")


def test_too_long_and_too_deep() -> None:
    with pytest.raises(LimitExceeded):
        clean_path(b"a" * 4097, "x")
    assert clean_path(b"a/" * 2048, "x").count(b"/") == 2047
    with pytest.raises(LimitExceeded):
        check_component(b"a" * 256, "x")
    check_component(b"a" * 255, "x")


@given(st.binary(max_size=40))
def test_a_clean_path_has_only_proper_components(path: bytes) -> None:
    try:
        cleaned = clean_path(path, "x")
    except InvalidLayer:
        assert b"\0" in path or b".." in path.split(b"/")
        return
    assert cleaned == b"/".join(part for part in path.split(b"/") if part not in (b"", b"."))
    assert clean_path(cleaned, "x") == cleaned


def test_raw_names_win() -> None:
    assert exact_bytes("caf\ufffd", "Y2Fm6Q==", "x") == b"caf\xe9"
    assert exact_bytes("café", "", "x") == "café".encode()


def test_lost_bytes_are_refused_and_explained() -> None:
    with pytest.raises(UnsupportedFormat, match="lost the bytes"):
        exact_bytes("caf\ufffd", "", "x")


@pytest.mark.parametrize("raw", ["Y2Fm6Q", "!!!!", "Y2Fm 6Q=="])
def test_malformed_raw_names(raw: str) -> None:
    with pytest.raises(InvalidLayer):
        exact_bytes("caf\ufffd", raw, "x")


def test_a_lone_surrogate_is_no_name() -> None:
    with pytest.raises(InvalidLayer):
        exact_bytes("\ud800", "", "x")


def test_symlink_targets() -> None:
    check_symlink(b"../" * 1365, "x")
    with pytest.raises(LimitExceeded):
        check_symlink(b"a" * 4096, "x")
    for target in (b"", b"a\0"):
        with pytest.raises(InvalidLayer):
            check_symlink(target, "x")
