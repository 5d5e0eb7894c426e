"""A load must notice what is wrong: it is what holds that nothing is."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from lab import trees
from lab.loads import Board, Kind, Load, Place, Task, load_tree, save_tree


@pytest.fixture
def place(tmp_path: Path) -> Place:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub/file").write_bytes(os.urandom(200_000))
    (root / "link").symlink_to("sub/file")
    tree = tmp_path / "tree"
    save_tree(trees.snapshot(root), tree)
    return Place(root, tree)


def load(place: Place, kind: Kind) -> Load:
    board = place.tree.with_name("board")
    Board(board, create=True)
    return Load(Task(kind, board, "seed", (place,)))


def test_a_tree_survives_its_file(place: Place) -> None:
    assert load_tree(place.tree) == trees.snapshot(place.root)


@pytest.mark.parametrize("kind", ["read", "mmap", "walk"])
def test_what_is_right_is_counted(place: Place, kind: Kind) -> None:
    loading = load(place, kind)
    loading.step()
    done = Board(loading.task.board).progress()
    assert done.operations > 0
    assert (done.errors, done.wrong, done.since) == (0, 0, 0.0)
    assert done.bytes == (0 if kind == "walk" else 200_000)
    assert str(place.root) in done.doing


@pytest.mark.parametrize("kind", ["read", "mmap"])
def test_one_bit_is_noticed(place: Place, kind: Kind, capfd: pytest.CaptureFixture[str]) -> None:
    file = place.root / "sub/file"
    data = bytearray(file.read_bytes())
    data[123_456] ^= 1
    file.write_bytes(data)
    loading = load(place, kind)
    loading.step()
    assert loading.board.progress().wrong == 1
    assert "sub/file: other bytes" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["read", "mmap", "walk"])
def test_an_error_is_noticed(place: Place, kind: Kind, capfd: pytest.CaptureFixture[str]) -> None:
    place.root.rename(place.root.with_name("elsewhere"))
    loading = load(place, kind)
    loading.step()
    assert loading.board.progress().errors > 0
    assert "No such file" in capfd.readouterr().err


@pytest.mark.parametrize("change", ["mode", "target", "name", "attribute"])
def test_a_walk_notices_names(place: Place, change: str) -> None:
    tree = load_tree(place.tree)
    if change == "mode":
        tree[b"sub/file"] = replace(tree[b"sub/file"], mode=0o100600)
    elif change == "target":
        tree[b"link"] = replace(tree[b"link"], target=b"sub")
    elif change == "name":
        tree[b"more"] = tree[b"link"]
    else:
        tree[b"sub"] = replace(tree[b"sub"], xattrs={b"user.note": b"1"})
    save_tree(tree, place.tree)
    loading = load(place, "walk")
    loading.step()
    assert loading.board.progress().wrong > 0
