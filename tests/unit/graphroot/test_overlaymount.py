"""What the kernel is asked for, and that it does it: options, long lists, odd paths."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lab.podman import unmount_below
from layerstore import limits
from layerstore.errors import MountError
from layerstore.graphroot import overlaymount
from layerstore.graphroot.overlaymount import OverlayMount

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory on a file system that overlays can be made of."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="layerstore-mount-") as path:
        yield Path(path)
        unmount_below(Path(path))


def stack(home: Path, count: int, *, read_only: bool = True) -> OverlayMount:
    """Layers with one file each, named after their number; the topmost is 0."""
    lowers = []
    for number in range(count):
        lower = home / "l" / f"{number:026}"
        lower.mkdir(parents=True)
        (lower / f"f{number}").touch()
        (lower / "all").write_text(str(number))
        lowers.append(lower)
    for name in ("upper", "work", "merged"):
        (home / name).mkdir()
    upper, work = (None, None) if read_only else (home / "upper", home / "work")
    return OverlayMount(home, tuple(lowers), upper, work, home / "merged")


PLAIN = OverlayMount(
    Path("/g/overlay"),
    (Path("/g/overlay/l/A"), Path("/i/overlay/l/B")),
    Path("/g/overlay/x/diff"),
    Path("/g/overlay/x/work"),
    Path("/g/overlay/x/merged"),
    ("nodev", "rw", "metacopy=on", "userxattr"),
    "system_u:object_r:x:s0:c1,c2",
)


def test_the_text_is_the_one_that_podman_gives_to_the_kernel() -> None:
    assert PLAIN.data == (
        "lowerdir=/g/overlay/l/A:/i/overlay/l/B,upperdir=/g/overlay/x/diff,"
        "workdir=/g/overlay/x/work,metacopy=on,userxattr,"
        'context="system_u:object_r:x:s0:c1,c2"'
    )
    assert PLAIN.flags == 4
    assert PLAIN.fits


def test_relative_paths_are_those_below_the_overlay_directory() -> None:
    assert PLAIN.relative().data.startswith(
        "lowerdir=l/A:/i/overlay/l/B,upperdir=x/diff,workdir=x/work,"
    )


def test_a_page_is_the_limit() -> None:
    long = replace(PLAIN, lowers=tuple(Path(f"/g/overlay/l/{number}") for number in range(400)))
    assert not long.fits
    assert not replace(PLAIN, lowers=(Path("/g/a:b"),)).fits


def test_too_many_lowers_and_a_bad_label_are_refused(tmp_path: Path) -> None:
    many = replace(PLAIN, lowers=PLAIN.lowers * (limits.OVERLAY_LOWERS // 2 + 1))
    with pytest.raises(MountError, match="502 directories"):
        overlaymount.make(many)
    with pytest.raises(MountError, match="SELinux"):
        overlaymount.make(replace(PLAIN, label='a"b'))


@ROOT
def test_a_mount_for_reading_and_its_end(home: Path) -> None:
    wanted = replace(stack(home, 3), options=("ro", "nodev"))
    overlaymount.make(wanted)
    assert overlaymount.is_mounted(wanted.target)
    assert (wanted.target / "all").read_text() == "0"
    assert os.statvfs(wanted.target).f_flag & (os.ST_RDONLY | os.ST_NODEV) == 5
    overlaymount.detach(wanted.target)
    overlaymount.detach(wanted.target)
    assert not overlaymount.is_mounted(wanted.target)


@ROOT
@pytest.mark.parametrize("read_only", [True, False])
def test_as_many_lowers_as_the_kernel_takes(home: Path, read_only: bool) -> None:
    wanted = stack(home, limits.OVERLAY_LOWERS, read_only=read_only)
    words = ("ro", "noexec") if read_only else ("noatime",)
    overlaymount.make(replace(wanted, options=words))
    assert (wanted.target / f"f{limits.OVERLAY_LOWERS - 1}").exists()
    assert (wanted.target / "all").read_text() == "0"
    if read_only:
        assert os.statvfs(wanted.target).f_flag & os.ST_NOEXEC
    else:
        (wanted.target / "new").touch()
        assert (home / "upper/new").exists()


@ROOT
def test_an_older_kernel_gets_relative_paths(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> int:
        raise OSError(errno.ENOSYS, "not there")

    before = Path.cwd()
    monkeypatch.setattr(overlaymount, "_call", missing)
    wanted = stack(home, 100)
    assert not wanted.fits
    overlaymount.make(wanted)
    assert (wanted.target / "f99").exists()
    assert Path.cwd() == before


@ROOT
def test_paths_with_the_characters_of_option_lists(home: Path) -> None:
    odd = home / "a:b,c"
    odd.mkdir()
    wanted = stack(odd, 2, read_only=False)
    overlaymount.make(wanted)
    assert (wanted.target / "f1").exists()


@ROOT
def test_what_the_kernel_refuses_is_said(home: Path) -> None:
    wanted = replace(stack(home, 2), options=("nonsense=1",))
    with pytest.raises(MountError, match="kernel refused"):
        overlaymount.make(wanted)
    (home / "l" / f"{1:026}" / "all").unlink()


def test_a_mount_program_gets_the_same_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "fuse"
    program.write_text(f'#!/bin/sh\necho "$PWD $@" > {tmp_path}/heard; exit $STATUS\n')
    program.chmod(0o755)
    wanted = OverlayMount(
        tmp_path, (Path("/l/A"),), None, None, tmp_path / "merged", ("ro", "metacopy=on")
    )
    monkeypatch.setenv("STATUS", "0")
    overlaymount.make_with_program(str(program), wanted)
    heard = (tmp_path / "heard").read_text()
    assert heard == f"{tmp_path} -o lowerdir=/l/A,metacopy=on,ro {tmp_path}/merged\n"
    monkeypatch.setenv("STATUS", "3")
    with pytest.raises(MountError, match="failed"):
        overlaymount.make_with_program(str(program), wanted)
    with pytest.raises(MountError, match="cannot be run"):
        overlaymount.make_with_program(str(tmp_path / "none"), wanted)


@ROOT
def test_a_directory_as_a_mount_of_its_own(home: Path) -> None:
    overlaymount.bind_private(home)
    assert overlaymount.is_mounted(home)
    with (home / "held").open("w"):
        assert overlaymount.unbind(home) is False
    assert overlaymount.unbind(home) is True
    assert not overlaymount.is_mounted(home)
