import os
import stat
import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerstore.fuse import wire
from layerstore.fuse.wire import Attr, WireError


def test_the_structures_have_the_kernels_sizes() -> None:
    attr = Attr(7, stat.S_IFREG | 0o644)
    assert wire.IN_HEADER.size == 40
    assert len(wire.entry_reply(7, attr)) == 128
    assert len(wire.negative_entry()) == 128
    assert len(wire.attr_reply(attr)) == 104
    assert len(wire.open_reply()) == 16
    assert len(wire.statfs_reply()) == 80
    assert wire.INIT_OUT.size == 64


def test_an_attr_is_packed_in_the_kernels_order() -> None:
    attr = Attr(
        ino=1,
        mode=stat.S_IFCHR | 0o600,
        size=2,
        blocks=3,
        atime_ns=4_000_000_005,
        mtime_ns=6_000_000_007,
        ctime_ns=-1,
        nlink=8,
        uid=9,
        gid=10,
        rdev=os.makedev(10, 229),
        blksize=512,
    )
    fields = struct.unpack("<QQQQQqIIIIIIIIII", wire.pack_attr(attr))
    assert fields == (
        *(1, 2, 3, 4, 6, -1, 5, 7, 999_999_999),
        *(stat.S_IFCHR | 0o600, 8, 9, 10, wire.encode_dev(10, 229), 512, 0),
    )


@given(major=st.integers(0, 4095), minor=st.integers(0, (1 << 20) - 1))
def test_device_numbers_of_makedev_are_the_kernels(major: int, minor: int) -> None:
    assert wire.encode_dev(major, minor) == os.makedev(major, minor)


@given(st.binary(min_size=1, max_size=300))
def test_directory_records_are_padded_to_eight_bytes(name: bytes) -> None:
    plain = wire.pack_dirent(5, 6, 8, name)
    plus = wire.pack_direntplus(wire.negative_entry(), 5, 6, 8, name)
    assert len(plain) % 8 == 0
    assert plus == wire.negative_entry() + plain
    assert struct.unpack_from("<QQII", plain) == (5, 6, len(name), 8)
    assert plain[24 : 24 + len(name)] == name


@given(sizes=st.lists(st.integers(1, 50), max_size=20), room=st.integers(0, 400))
def test_fill_takes_whole_leading_records_only(sizes: list[int], room: int) -> None:
    records = [bytes([n]) * size for n, size in enumerate(sizes)]
    filled = wire.fill(records, room)
    taken = next(n for n in range(len(records) + 1) if b"".join(records[:n]) == filled)
    assert len(filled) <= room
    assert taken == len(records) or len(filled) + sizes[taken] > room


def _request(body: bytes) -> bytes:
    return wire.IN_HEADER.pack(40 + len(body), 1, 2, 1, 0, 0, 0, 0, 0) + body


def test_requests_are_taken_apart() -> None:
    def parsed(parser: Callable[[bytes, int], object], body: bytes) -> object:
        request = _request(body)
        return parser(request, len(request))

    assert parsed(wire.parse_name, b"etc\0") == b"etc"
    read = struct.pack("<QQIIQII", 3, 4096, 131072, 0, 0, 0, 0)
    assert parsed(wire.parse_read, read) == (3, 4096, 131072)
    assert parsed(wire.parse_getxattr, struct.pack("<II", 64, 0) + b"user.a\0") == (64, b"user.a")
    assert parsed(wire.parse_listxattr, struct.pack("<II", 64, 0)) == 64
    create = struct.pack("<IIII", os.O_RDWR, 0o644, 0o22, 0) + b"use\0"
    assert parsed(wire.parse_create, create) == (os.O_RDWR, 0o644, b"use")
    assert parsed(wire.parse_interrupt, struct.pack("<Q", 1 << 63 | 4)) == 1 << 63 | 4
    assert parsed(wire.parse_forget, struct.pack("<Q", 2)) == 2
    forgets = struct.pack("<IIQQQQ", 2, 0, 5, 1, 6, 2)
    assert parsed(wire.parse_batch_forget, forgets) == [(5, 1), (6, 2)]
    init = struct.pack("<IIIII", 7, 45, 65536, wire.INIT_EXT | 1, 1 << 7)
    assert parsed(wire.parse_init, init) == (7, 45, 65536, wire.INIT_EXT | 1 | wire.HAS_RESEND)


@pytest.mark.parametrize("body", [b"", b"\0", b"name", b"a\0b\0"])
def test_a_name_must_be_one_and_terminated(body: bytes) -> None:
    with pytest.raises(WireError):
        wire.parse_name(_request(body), 40 + len(body))


def test_a_forget_list_must_hold_as_many_as_it_says() -> None:
    request = _request(struct.pack("<IIQQ", 2, 0, 5, 1))
    with pytest.raises(WireError):
        wire.parse_batch_forget(request, len(request))


@given(data=st.binary(max_size=200), more=st.integers(-3, 3))
def test_nothing_but_wire_errors_leaves_a_parser(data: bytes, more: int) -> None:
    size = max(0, len(data) + min(0, more))
    for parser in (
        wire.parse_name,
        wire.parse_init,
        wire.parse_read,
        wire.parse_getxattr,
        wire.parse_listxattr,
        wire.parse_create,
        wire.parse_open,
        wire.parse_release,
        wire.parse_interrupt,
        wire.parse_forget,
        wire.parse_batch_forget,
    ):
        try:
            parser(data, size)
        except WireError:
            continue
