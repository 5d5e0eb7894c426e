"""The tar writer, read back by the standard library; layouts of images are reproducible."""

import hashlib
import io
import os
import struct
import tarfile
from pathlib import Path

import pytest

from lab import oci, tars, xattrs
from lab.images import tar_bytes
from lab.tars import Member, Zeros


def read(*members: Member) -> list[tarfile.TarInfo]:
    with tarfile.open(
        fileobj=io.BytesIO(tar_bytes(members)), encoding="utf-8", errors="surrogateescape"
    ) as archive:
        return archive.getmembers()


def raw(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


@pytest.mark.parametrize("form", ["pax", "gnu"])
@pytest.mark.parametrize(
    "name",
    [
        b"short",
        b"d" * 100,
        b"d" * 101,
        b"p" * 155 + b"/" + b"n" * 100,
        b"p" * 156 + b"/" + b"n" * 100,
        b"x" * 5000,
        b"raw-\xff\xfe",
        b"a/" * 60 + b"\xe9" * 200,
    ],
)
def test_names_and_targets_of_all_lengths(name: bytes, form: tars.Form) -> None:
    file, link = read(tars.regular(name, b"x", form=form), tars.symlink(b"link", name, form=form))
    assert (raw(file.name), file.size) == (name, 1)
    assert raw(link.linkname) == name


def test_a_prefix_needs_no_extension() -> None:
    data = tar_bytes([tars.regular(b"p" * 155 + b"/" + b"n" * 100)])
    assert len(data) == 512 + 1024
    assert data[345:500] == b"p" * 155


@pytest.mark.parametrize("length", [*range(80, 110), *range(980, 1010)])
def test_pax_records_count_their_own_digits(length: int) -> None:
    value = bytes(range(256)) * 4
    (file,) = read(tars.regular(b"f", xattrs={b"user.x": value[:length]}))
    assert raw(file.pax_headers["SCHILY.xattr.user.x"]) == value[:length]


@pytest.mark.parametrize("form", ["pax", "gnu"])
def test_great_numbers(form: tars.Form) -> None:
    (file,) = read(
        tars.regular(b"f", uid=3_000_000_000, gid=2097152, mtime_ns=-86400 * 10**9, form=form)
    )
    assert (file.uid, file.gid, file.mtime) == (3_000_000_000, 2097152, -86400)


def test_fractions_of_seconds() -> None:
    files = read(*(tars.regular(b"f", mtime_ns=ns) for ns in (1_500_000_000, -1_500_000_000)))
    assert [file.mtime for file in files] == [1.5, -1.5]


def test_sizes_beyond_octal_are_in_a_record() -> None:
    pieces = tars.encode(tars.regular(b"f", Zeros(8**11)))
    header = b"".join(next(pieces) for _ in range(2))
    assert b"size=8589934592\n" in header


def test_kinds_and_devices() -> None:
    found = read(
        tars.directory(b"d"),
        Member(b"c", tars.CHARACTER, device=(4095, 1048575)),
        Member(b"b", tars.BLOCK, device=(7, 1)),
        Member(b"p", tars.FIFO),
        tars.whiteout(b"d/gone"),
        tars.whiteout(b"gone"),
        tars.opaque(b"d/"),
    )
    assert [(each.type, each.name) for each in found] == [
        *((b"5", "d"), (b"3", "c"), (b"4", "b"), (b"6", "p")),
        *((b"0", "d/.wh.gone"), (b"0", ".wh.gone"), (b"0", "d/.wh..wh..opq")),
    ]
    assert (found[1].devmajor, found[1].devminor) == (4095, 1048575)


def test_a_hard_link_repeats_what_its_target_says() -> None:
    first = tars.regular(b"a", b"x", mode=0o4755, uid=7, gid=8, mtime_ns=9 * 10**9)
    _, link = read(first, tars.hard_link(b"b", first))
    assert (link.type, link.linkname, link.size) == (b"1", "a", 0)
    assert (link.mode, link.uid, link.gid, link.mtime) == (0o4755, 7, 8, 9)


def test_content_comes_from_files_and_zeros(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"content" * 1000)
    data = tar_bytes([tars.regular(b"f", tmp_path / "f"), tars.regular(b"z", Zeros(3 << 20))])
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        contents = [archive.extractfile(each) for each in archive]
        assert [each.read() for each in contents if each] == [b"content" * 1000, bytes(3 << 20)]
    out = io.BytesIO()
    assert tars.write_tar(out, [tars.regular(b"f", b"x")]) == len(out.getvalue()) == 2048


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to set a capability")
def test_the_kernel_takes_capabilities_and_acls(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.touch(mode=0o600)
    value = xattrs.file_capability(xattrs.CAP_NET_RAW, 39)
    os.setxattr(path, xattrs.CAPABILITY.decode(), value)
    assert os.getxattr(path, xattrs.CAPABILITY.decode()) == value
    assert struct.unpack("<5I", value)[1::2] == (1 << 13, 1 << 7)
    acl = xattrs.posix_acl(owner=6, users={1000: 4}, group=4, mask=6, other=0)
    os.setxattr(path, xattrs.ACL_ACCESS.decode(), acl)
    assert os.getxattr(path, xattrs.ACL_ACCESS.decode()) == acl
    assert path.stat().st_mode & 0o777 == 0o660


def test_a_layout_is_the_same_every_time_and_can_be_read_back(tmp_path: Path) -> None:
    tar = tar_bytes([tars.regular(b"f", b"content")])
    (tmp_path / "tar").write_bytes(tar)
    sources = [oci.LayerSource(tar), oci.LayerSource(tmp_path / "tar", compression="none")]
    config = oci.RunConfig(cmd=("/f",), architecture="arm64", variant="v8")
    first = oci.write_image(tmp_path / "a", "t", sources, config)
    second = oci.write_image(tmp_path / "b", "t", sources, config)
    assert first.digest == second.digest
    assert oci.read_image(tmp_path / "a", "t") == first
    assert {layer.diff_id for layer in first.layers} == {
        f"sha256:{hashlib.sha256(tar).hexdigest()}"
    }
    assert first.layers[1].digest == first.layers[1].diff_id
    assert first.compressed_size == sum(
        first.blob(layer.digest).stat().st_size for layer in first.layers
    )
    index = oci.write_index(tmp_path / "a", "all", [first])
    assert oci.read_image(tmp_path / "a", "all") == index
    assert oci.read_image(tmp_path / "a", "t") == first
    with pytest.raises(KeyError):
        oci.read_image(tmp_path / "a", "other")
