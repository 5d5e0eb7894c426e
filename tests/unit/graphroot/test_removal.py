"""Trees are removed whatever is in them, and nothing outside is touched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from layerstore.errors import StorageError
from layerstore.graphroot.removal import remove_tree


def test_a_tree_goes(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "a/b/c").mkdir(parents=True)
    (tree / "a/file").write_text("x")
    (tree / "a/b/c/file").write_text("x")
    os.mkfifo(tree / "a/fifo")
    (tree / "a").chmod(0o500)
    remove_tree(tree)
    assert os.listdir(tmp_path) == []


def test_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    remove_tree(tmp_path / "nothing")


def test_a_file_goes_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    remove_tree(tmp_path / "file")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["inside", "moved-up"])
def test_links_are_not_followed(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep/kept").write_text("x")
    tree = tmp_path / "tree"
    (tree / "d" / name).mkdir(parents=True)
    (tree / "link").symlink_to(outside)
    (tree / "d/link").symlink_to(outside / "deep")
    (tree / "d" / name / "link").symlink_to("../../../outside")
    remove_tree(tree)
    assert (outside / "deep/kept").read_text() == "x"
    assert not tree.exists()


def test_the_link_itself_goes_when_it_is_the_path(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to("kept")
    remove_tree(tmp_path / "link")
    assert os.listdir(tmp_path) == ["kept"]


def test_a_tree_deeper_than_any_recursion_or_path(tmp_path: Path) -> None:
    depth = 3 * sys.getrecursionlimit()
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("directory", dir_fd=here)
        below = os.open("directory", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    remove_tree(tmp_path / "directory")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_mount_below_stays_and_the_rest_goes(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("x")
    point = tmp_path / "tree/a/point"
    point.mkdir(parents=True)
    (tmp_path / "tree/a/other").write_text("x")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "none", point], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounts are not possible here")
    try:
        (point / "file").write_text("x")
        with pytest.raises(StorageError, match="busy"):
            remove_tree(tmp_path / "tree")
        assert (point / "file").read_text() == "x"
        assert not (tmp_path / "tree/a/other").exists()
    finally:
        subprocess.run(["umount", point], check=True)
    remove_tree(tmp_path / "tree")
    assert not (tmp_path / "tree").exists()
