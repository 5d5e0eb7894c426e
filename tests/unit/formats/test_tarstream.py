"""The tar reader: exact header bytes, every dialect, and no surprise from hostile input."""

import contextlib
import io
import tarfile
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import tars
from layerstore import limits
from layerstore.errors import ContentError, InvalidLayer, LimitExceeded, UnsupportedFormat
from layerstore.formats import TarEntry, TarReader
from layerstore.formats.tarfields import number, pax_records, pax_time


def archive(*members: tars.Member) -> bytes:
    out = io.BytesIO()
    tars.write_tar(out, members)
    return out.getvalue()


def entries(data: bytes) -> list[TarEntry]:
    return list(TarReader(io.BytesIO(data)))


def only(data: bytes) -> TarEntry:
    (entry,) = entries(data)
    return entry


def contents(data: bytes) -> list[tuple[bytes, bytes]]:
    reader = TarReader(io.BytesIO(data))
    found = []
    for entry in reader:
        payload = b""
        while piece := reader.read(100):
            payload += piece
        found.append((entry.name, payload))
    return found


def pax(records: Iterable[tuple[bytes, bytes]], block: bytes) -> bytes:
    payload = b"".join(tars._record(key, value) for key, value in records)
    return tars._extension(b"x", b"pax", payload) + block


def header(**fields: object) -> bytes:
    """One header block of tarfile, with the given bytes poked in and a right checksum."""
    block = bytearray(tars._header(tars.regular(b"file"), b"0", 0))
    for place, value in fields.items():
        start = int(place[1:])
        assert isinstance(value, bytes)
        block[start : start + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


END = bytes(1024)


def test_headers_are_the_exact_bytes_and_offsets_lead_to_the_payload() -> None:
    long = b"d/" * 150 + b"name"
    data = archive(
        tars.regular(long, b"hello"), tars.regular(b"b", b"x" * 512), tars.symlink(b"c", b"b")
    )
    position = 0
    for entry, payload in zip(entries(data), (b"hello", b"x" * 512, b""), strict=True):
        assert entry.header_offset == position
        assert data[position:].startswith(entry.headers)
        assert data[entry.payload_offset :][: entry.size] == payload
        position = entry.payload_offset + entry.size + entry.padding
    assert len(entries(data)[0].headers) == 3 * 512


@pytest.mark.parametrize("form", ["pax", "gnu"])
def test_every_attribute_is_read(form: tars.Form) -> None:
    member = tars.regular(
        b"dir/" * 80 + b"file",
        b"data",
        mode=0o4755,
        uid=3_000_000,
        gid=2**31,
        user=b"me",
        group=b"us\xff",
        mtime_ns=-5 * 10**9,
        form=form,
    )
    entry = only(archive(member))
    assert (entry.name, entry.type, entry.size) == (member.name, b"0", 4)
    assert (entry.mode, entry.uid, entry.gid) == (0o4755, 3_000_000, 2**31)
    assert (entry.user_name, entry.group_name) == (b"me", b"us\xff")
    assert entry.mtime_ns == -5 * 10**9


def test_pax_fractions_extended_attributes_and_raw_names() -> None:
    attributes = {b"user.raw": b"\x00\xff\n=", b"user.empty": b""}
    member = tars.regular(b"\xff\xfe/" * 60, b"", mtime_ns=-1_500_000_001, xattrs=attributes)
    entry = only(archive(member))
    assert entry.name == b"\xff\xfe/" * 60
    assert entry.mtime_ns == -1_500_000_001
    assert entry.xattrs == attributes


def test_devices_and_links() -> None:
    data = archive(
        tars.Member(b"c", tars.CHARACTER, device=(5, 300_000)),
        tars.Member(b"b", tars.BLOCK, device=(8, 1)),
        tars.symlink(b"s", b"t" * 300),
        tars.hard_link(b"h", b"c"),
        tars.Member(b"p", tars.FIFO),
    )
    found = {entry.name: entry for entry in entries(data)}
    assert (found[b"c"].dev_major, found[b"c"].dev_minor) == (5, 300_000)
    assert (found[b"b"].dev_major, found[b"b"].dev_minor) == (8, 1)
    assert (found[b"s"].type, found[b"s"].link_name) == (b"2", b"t" * 300)
    assert (found[b"h"].type, found[b"h"].link_name) == (b"1", b"c")
    assert found[b"p"].type == b"6"


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_pythons_tarfile_writes(kind: int) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
        for name in ("short", "p/" * 60 + "q" * 90):
            info = tarfile.TarInfo(name)
            info.size = 700
            tar.addfile(info, io.BytesIO(b"z" * 700))
    assert contents(out.getvalue()) == [
        (b"short", b"z" * 700),
        (b"p/" * 60 + b"q" * 90, b"z" * 700),
    ]


def test_a_payload_that_is_not_read_is_skipped() -> None:
    data = archive(tars.regular(b"a", b"1" * 3_000_000), tars.regular(b"b", b"2"))
    assert [entry.name for entry in entries(data)] == [b"a", b"b"]


def test_v7_directories_are_known_by_their_slash() -> None:
    old = {"x156": b"\0", "x257": bytes(8)}
    assert only(header(x0=b"dir/", **old) + END).type == b"5"
    assert only(header(**old) + END).type == b"0"


def test_a_contiguous_file_is_a_file() -> None:
    assert only(header(x156=b"7") + END).type == b"0"


def test_links_and_directories_have_no_payload_whatever_they_announce() -> None:
    data = b"".join(header(x156=kind, x124=b"00000001000\0") for kind in (b"1", b"2", b"5"))
    assert [entry.size for entry in entries(data + END)] == [0, 0, 0]


def test_a_gnu_header_with_times_has_no_prefix_but_an_old_go_one_has() -> None:
    gnu = {"x257": b"ustar  \0"}
    assert only(header(x345=b"00000000001\0", **gnu) + END).name == b"file"
    assert only(header(x345=b"some/prefix", **gnu) + END).name == b"some/prefix/file"


def test_a_star_header_has_a_short_prefix() -> None:
    block = header(x345=b"p" * 131 + b"00000000001\0", x508=b"tar\0")
    assert only(block + END).name == b"p" * 131 + b"/file"


def test_global_headers_have_no_effect_but_stay_in_the_bytes() -> None:
    extra = tars._extension(b"g", b"pax", tars._record(b"uid", b"77"))
    entry = only(extra + header() + END)
    assert entry.uid == 0
    assert entry.headers.startswith(extra)


def test_pax_records_win_over_the_header_and_gnu_names_over_both() -> None:
    block = pax([(b"path", b"from-pax"), (b"uid", b"-1"), (b"size", b"0"), (b"gid", b"")], header())
    entry = only(block + END)
    assert (entry.name, entry.uid, entry.gid) == (b"from-pax", -1, 0)
    assert only(tars._extension(b"L", b"x", b"from-gnu\0") + block + END).name == b"from-gnu"


@pytest.mark.parametrize("tail", [b"", bytes(512), bytes(1024), bytes(1024) + b"rest", bytes(700)])
def test_ways_to_end(tail: bytes) -> None:
    assert only(header() + tail).name == b"file"


@pytest.mark.parametrize(
    "data",
    [
        b"\1",
        b"\0" * 511,
        header()[:-1],
        bytes(512) + header(),
        header() + b"x" * 512,
        header(x124=b"00000001000\0"),
        header(x124=b"00000001000\0") + bytes(511),
        header(x124=b"\xff" * 12),
        header(x124=b"9\0"),
        header(x100=b"zzz"),
        header(x108=b"0x7\0"),
        header(x136=b"\xc0" + bytes(11)),
        header()[:-1] + b"\1",
        pax([(b"path", b"x")], b""),
        pax([(b"path", b"a\0b")], header()),
        pax([(b"ke\0y", b"a")], header()),
        pax([(b"size", b"-1")], header()),
        pax([(b"size", b"1e3")], header()),
        pax([(b"uid", b"99999999999999999999")], header()),
        pax([(b"mtime", b"now")], header()),
        tars._extension(b"x", b"", b"no length\n") + header(),
        tars._extension(b"x", b"", b"999 a=b\n") + header(),
        tars._extension(b"x", b"", b"6 a=b\n\n") + header(),
        tars._extension(b"x", b"", b"5 ab\n") + header(),
        tars._extension(b"x", b"", b"5 =b\n") + header(),
        tars._extension(b"x", b"", b"0 a=b\n") + header(),
        tars._extension(b"g", b"", b"broken") + header(),
        tars._extension(b"L", b"", b"name\0"),
    ],
)
def test_broken_archives_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidLayer):
        entries(data)


@pytest.mark.parametrize(
    "data",
    [
        header(x156=b"S"),
        header(x156=b"V"),
        header(x156=b"?"),
        pax([(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")], header()),
        pax([(b"GNU.sparse.map", b"0,1")], header()),
    ],
)
def test_sparse_files_and_strange_types_are_refused_as_such(data: bytes) -> None:
    with pytest.raises(UnsupportedFormat):
        entries(data + END)


def test_extended_headers_are_bounded_alone_and_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TAR_EXTENDED_HEADER_BYTES", 10_000)
    with pytest.raises(LimitExceeded):
        entries(tars._extension(b"L", b"", b"a" * 10_000) + header())
    with pytest.raises(LimitExceeded):
        entries(tars._extension(b"x", b"", b"") * 20 + header())


def test_a_huge_announced_size_is_refused() -> None:
    with pytest.raises(LimitExceeded):
        entries(pax([(b"size", b"%d" % (limits.FILE_BYTES + 1))], header()))


def test_a_stream_of_small_reads_gives_the_same() -> None:
    class Dripping(io.BytesIO):
        def read(self, n: int | None = -1, /) -> bytes:
            return super().read(min(n or 0, 7))

    data = archive(tars.regular(b"n" * 200, b"payload" * 100), tars.directory(b"d"))
    assert list(TarReader(Dripping(data))) == entries(data)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"0", 0),
        (b"1.5", 1_500_000_000),
        (b"-1.5", -1_500_000_000),
        (b"-0.000000001", -1),
        (b"1.0000000019", 1_000_000_001),
        (b"12.", 12_000_000_000),
    ],
)
def test_pax_times(text: bytes, value: int) -> None:
    assert pax_time(text) == value


@given(st.integers(-(1 << 63), (1 << 63) - 1))
def test_base_256_numbers(value: int) -> None:
    field = bytearray((value % (1 << 95)).to_bytes(12, "big"))
    field[0] |= 0x80
    assert number(bytes(field), "number") == value


@given(st.lists(st.tuples(st.binary(min_size=1), st.binary())))
def test_pax_records_round_trip(records: list[tuple[bytes, bytes]]) -> None:
    records = [
        (k.replace(b"=", b"_").replace(b"\0", b"_"), v.replace(b"\0", b"_")) for k, v in records
    ]
    payload = b"".join(tars._record(key, value) for key, value in records)
    assert pax_records(payload) == dict(records)


NAMES = st.binary(min_size=1, max_size=300).map(lambda name: name.replace(b"\0", b"/"))


@settings(max_examples=60)
@given(
    st.lists(
        st.builds(
            tars.Member,
            name=NAMES,
            kind=st.just(b"0"),
            mode=st.integers(0, 0o7777),
            uid=st.integers(0, 2**32),
            mtime_ns=st.integers(-(10**18), 10**19),
            xattrs=st.dictionaries(
                st.binary(min_size=1, max_size=9).map(
                    lambda key: key.replace(b"=", b"_").replace(b"\0", b"_")
                ),
                st.binary(max_size=20),
                max_size=2,
            ),
            content=st.binary(max_size=1100),
        ),
        max_size=4,
    )
)
def test_what_the_lab_writes_is_read(members: list[tars.Member]) -> None:
    data = archive(*members)
    for entry, member in zip(entries(data), members, strict=True):
        assert (entry.name, entry.mode, entry.uid) == (member.name, member.mode, member.uid)
        assert (entry.mtime_ns, entry.xattrs) == (member.mtime_ns, member.xattrs)
    assert [payload for _, payload in contents(data)] == [member.content for member in members]


@settings(max_examples=150)
@given(st.data())
def test_damage_only_raises_content_errors(data: st.DataObject) -> None:
    raw = bytearray(
        archive(
            tars.regular(b"n" * 150, b"abc", xattrs={b"user.a": b"b"}),
            tars.regular(b"n" * 150, b"abc", form="gnu"),
        )
    )
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(raw) - 1))
        raw[start : start + 12] = data.draw(st.binary(max_size=12))
    block = bytearray(raw[:512].ljust(512, b"\0"))
    if data.draw(st.booleans()):
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        raw[:512] = block
    with contextlib.suppress(ContentError):
        contents(bytes(raw))


@given(st.binary(max_size=2000))
def test_noise_only_raises_content_errors(noise: bytes) -> None:
    with contextlib.suppress(ContentError):
        contents(noise)
