"""Fresh archives of container layers, and exact ones with their files changed."""

import io
import os
import socket
from pathlib import Path

import pytest

from lab import tars, trees
from lab.images import tar_bytes
from layerstore.errors import CorruptStorage, StorageError, UnsupportedFormat
from layerstore.formats.tarstream import TarReader
from layerstore.graphroot.export import export_diff
from layerstore.graphroot.extract import apply_tar
from layerstore.graphroot.stage import stage_layer
from layerstore.graphroot.whiteouts import WhiteoutStyle

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="whiteouts and owners take root")

MEMBERS = [
    tars.directory(b"d", mode=0o2755, uid=1, gid=2),
    tars.regular(b"d/f", b"content", mode=0o4755, uid=3_000_000, xattrs={b"user.a": b"\0\n="}),
    tars.hard_link(b"e", b"d/f", uid=3_000_000, mode=0o4755),
    tars.regular(b"empty"),
    tars.whiteout(b"gone", uid=5),
    tars.Member(b"null", tars.CHARACTER, mode=0o666, device=(1, 3)),
    tars.Member(b"pipe", tars.FIFO, mode=0o600),
    tars.symlink(b"s" * 120, b"t" * 150),
    tars.regular(b"z/" + b"long/" * 60 + b"\xff", b"x" * 513),
]


def made(place: Path, members: list[tars.Member]) -> Path:
    place.mkdir()
    apply_tar(io.BytesIO(tar_bytes(members)), place)
    return place


def fresh(diff: Path, *lowers: Path) -> bytes:
    return b"".join(export_diff(diff, lowers, None))


def test_a_fresh_archive_makes_the_same_tree(tmp_path: Path) -> None:
    diff = made(tmp_path / "diff", MEMBERS)
    raw = fresh(diff)
    again = tmp_path / "again"
    again.mkdir()
    apply_tar(io.BytesIO(raw), again)
    implicit = {b".", b"gone", *(b"/".join([b"z", *[b"long"] * depth]) for depth in range(61))}
    differences = trees.compare(
        trees.snapshot(diff), trees.snapshot(again), any_mtime=implicit, seconds=True
    )
    assert differences == []
    names = [entry.name for entry in TarReader(io.BytesIO(raw))]
    # the order is that of the files on disk
    assert [name.replace(b".wh.", b"").rstrip(b"/") for name in names] == sorted(
        name.replace(b".wh.", b"").rstrip(b"/") for name in names
    )
    assert fresh(diff) == raw


def test_an_opaque_directory_is_told_only_where_it_hides_something(tmp_path: Path) -> None:
    lower = made(tmp_path / "lower", [tars.regular(b"both/old", b"x")])
    upper = made(
        tmp_path / "upper",
        [tars.opaque(b"both"), tars.opaque(b"only"), tars.regular(b"both/new", b"y")],
    )
    names = [entry.name for entry in TarReader(io.BytesIO(fresh(upper, lower)))]
    assert names == [b"both/", b"both/.wh..wh..opq", b"both/new", b"only/"]
    # a layer between deletes it
    between = made(tmp_path / "between", [tars.whiteout(b"both")])
    names = [entry.name for entry in TarReader(io.BytesIO(fresh(upper, between, lower)))]
    assert b"both/.wh..wh..opq" not in names


def test_sockets_are_left_out(tmp_path: Path) -> None:
    diff = made(tmp_path / "diff", [tars.regular(b"f")])
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(diff / "sock"))
    assert [entry.name for entry in TarReader(io.BytesIO(fresh(diff)))] == [b"f"]


@pytest.mark.parametrize("name", ["trusted.overlay.redirect", "trusted.overlay.metacopy"])
def test_what_only_the_kernel_can_read_is_refused(tmp_path: Path, name: str) -> None:
    diff = made(tmp_path / "diff", [tars.directory(b"d")])
    os.setxattr(diff / "d", name, b"/elsewhere")
    with pytest.raises(UnsupportedFormat, match="redirect_dir") as caught:
        fresh(diff)
    assert caught.value.subject == "d"


def test_a_missing_diff_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        fresh(tmp_path / "nothing")
    with pytest.raises(StorageError):
        b"".join(export_diff(tmp_path, (), tmp_path / "nothing.gz"))


# -- with a tar-split -------------------------------------------------------------------


@pytest.fixture
def staged(tmp_path: Path) -> tuple[Path, Path, bytes]:
    place = tmp_path / "staged"
    place.mkdir()
    tar = tar_bytes([tars.regular(b"etc/f", b"content"), tars.symlink(b"l", b"etc")])
    stage_layer(
        place,
        io.BytesIO(tar),
        blob_digest=None,
        blob_size=None,
        diff_id=None,
        whiteouts=WhiteoutStyle.OVERLAY,
    )
    return place / "diff", place / "tar-split.gz", tar


def test_a_file_may_lie_in_a_layer_below(staged: tuple[Path, Path, bytes], tmp_path: Path) -> None:
    diff, split, tar = staged
    lower = tmp_path / "lower"
    (lower / "etc").mkdir(parents=True)
    (diff / "etc/f").rename(lower / "etc/f")
    link = tmp_path / "L"
    link.symlink_to(lower)
    assert b"".join(export_diff(diff, [tmp_path, link], split)) == tar
    with pytest.raises(CorruptStorage) as caught:
        b"".join(export_diff(diff, [tmp_path], split))
    assert caught.value.subject == "etc/f"


def test_a_changed_file_is_named(staged: tuple[Path, Path, bytes]) -> None:
    diff, split, _ = staged
    (diff / "etc/f").write_bytes(b"CONTENT")
    with pytest.raises(CorruptStorage, match="integrity") as caught:
        b"".join(export_diff(diff, (), split))
    assert caught.value.subject == "etc/f"


def test_a_file_that_became_a_link_or_a_pipe_is_not_read(
    staged: tuple[Path, Path, bytes], tmp_path: Path
) -> None:
    diff, split, _ = staged
    secret = tmp_path / "secret"
    secret.write_bytes(b"content")
    (diff / "etc/f").unlink()
    (diff / "etc/f").symlink_to(secret)
    with pytest.raises(CorruptStorage):
        b"".join(export_diff(diff, (), split))
    (diff / "etc/f").unlink()
    os.mkfifo(diff / "etc/f")
    with pytest.raises(CorruptStorage):
        b"".join(export_diff(diff, (), split))
    # nor through a link above it
    (diff / "etc/f").unlink()
    (diff / "etc").rmdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/f").write_bytes(b"content")
    (diff / "etc").symlink_to(tmp_path / "outside")
    with pytest.raises(CorruptStorage):
        b"".join(export_diff(diff, (), split))
