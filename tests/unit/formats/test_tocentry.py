"""What a TOC says about a tar entry."""

import base64
import io

import pytest

from lab import tars
from layerstore.errors import UnsupportedFormat
from layerstore.formats import TarReader, TocEntry
from layerstore.formats.tocentry import EntryNames, json_name, rfc3339, toc_entry


def told(member: tars.Member) -> TocEntry:
    out = io.BytesIO()
    tars.write_tar(out, [member])
    (entry,) = TarReader(io.BytesIO(out.getvalue()))
    return toc_entry(entry, EntryNames())


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, ""),
        (10**9, "1970-01-01T00:00:01Z"),
        (-(10**9), "1969-12-31T23:59:59Z"),
        (1, "1970-01-01T00:00:00.000000001Z"),
        (-1, "1969-12-31T23:59:59.999999999Z"),
        (1_700_000_000_500_000_000, "2023-11-14T22:13:20.5Z"),
        (253_402_300_799 * 10**9, "9999-12-31T23:59:59Z"),
        (253_402_300_800 * 10**9, ""),
        (-(10**30), ""),
    ],
)
def test_times(nanoseconds: int, text: str) -> None:
    assert rfc3339(nanoseconds) == text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"a\xffb", "a\ufffdb"),
        (b"\xe2\x82A", "\ufffd\ufffdA"),  # Go: one for each byte of a broken sequence
        (b"\xed\xa0\x80", "\ufffd" * 3),
        (b"\xf0\x9f\x98", "\ufffd" * 3),
        ("\ufffd".encode(), "\ufffd"),
    ],
)
def test_names_that_json_cannot_hold_keep_their_bytes(name: bytes, text: str) -> None:
    assert json_name(name) == (text, base64.b64encode(name).decode())


def test_other_names_need_no_second_form() -> None:
    assert json_name("ä\U0001f600".encode()) == ("ä\U0001f600", "")


def test_link_names_too() -> None:
    entry = told(tars.symlink(b"s", b"\xff"))
    assert (entry.type, entry.link_name, entry.link_name_raw) == ("symlink", "\ufffd", "/w==")


def test_attributes() -> None:
    entry = told(
        tars.regular(b"f", b"abc", mode=0o104755, uid=7, user=b"u", xattrs={b"user.a": b"\xff"})
    )
    assert (entry.mode, entry.uid, entry.size) == (0o4755, 7, 3)
    assert entry.xattrs == {"user.a": "/w=="}
    assert entry.user_name == "u"


def test_an_attribute_name_that_json_cannot_hold_is_refused() -> None:
    with pytest.raises(UnsupportedFormat):
        told(tars.regular(b"f", b"", xattrs={b"user.\xff": b""}))


def test_owner_names_are_told_once() -> None:
    names = EntryNames()
    said = [names.user(*pair) for pair in ((0, b"root"), (0, b"root"), (1, b"x"), (0, b"toor"))]
    assert said == ["root", "", "x", "toor"]
    assert names.group(0, b"") == ""
