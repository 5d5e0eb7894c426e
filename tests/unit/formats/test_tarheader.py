"""Headers we write, read by our reader and by Python's."""

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerstore.formats import tarstream
from layerstore.formats.tarheader import tar_header
from layerstore.formats.tarstream import TarReader

NAMES = st.binary(min_size=1, max_size=300).filter(lambda name: b"\0" not in name)


@given(
    name=NAMES,
    link=NAMES,
    mode=st.integers(0, 0o7777),
    uid=st.integers(0, 2**32 - 2),
    gid=st.integers(0, 2**32 - 2),
    mtime=st.integers(-(2**40), 2**40),
    xattrs=st.dictionaries(
        st.sampled_from([b"user.a", b"security.capability", b"user." + b"n" * 200]),
        st.binary(max_size=300),
    ),
)
def test_what_is_written_is_read(
    name: bytes, link: bytes, mode: int, uid: int, gid: int, mtime: int, xattrs: dict[bytes, bytes]
) -> None:
    raw = tar_header(
        name,
        tarstream.SYMLINK,
        mode=mode,
        uid=uid,
        gid=gid,
        mtime=mtime,
        link_name=link,
        xattrs=xattrs,
    )
    assert len(raw) % tarstream.BLOCK == 0
    (entry,) = TarReader(io.BytesIO(raw + bytes(1024)))
    assert (entry.name, entry.link_name, entry.mode) == (name, link, mode)
    assert (entry.uid, entry.gid, entry.mtime_ns, entry.xattrs) == (uid, gid, mtime * 10**9, xattrs)


@pytest.mark.parametrize("size", [0, 8**11 - 1, 8**11, 1 << 50])
def test_sizes(size: int) -> None:
    raw = tar_header(b"f", tarstream.REGULAR, mode=0o644, size=size)
    entry = TarReader(io.BytesIO(raw)).next()
    assert entry is not None
    assert entry.size == size


def test_devices() -> None:
    raw = tar_header(b"c", tarstream.CHARACTER, mode=0o600, device=(4095, 1048575))
    (entry,) = TarReader(io.BytesIO(raw + bytes(1024)))
    assert (entry.dev_major, entry.dev_minor) == (4095, 1048575)


def test_python_reads_it_too() -> None:
    name = "d/" * 90 + "long-é"
    raw = tar_header(name.encode(), tarstream.REGULAR, mode=0o755, uid=3_000_000)
    with tarfile.open(fileobj=io.BytesIO(raw + bytes(1024))) as archive:
        (info,) = archive
    assert (info.name, info.uid, info.mode) == (name, 3_000_000, 0o755)
