"""The list of changes of a layer; beside Podman's own in tests/compat/test_export.py."""

import io
import os
from pathlib import Path

import pytest

from lab import tars
from lab.images import tar_bytes
from layerstore.errors import StorageError
from layerstore.graphroot.changes import Change, all_changes, changes
from layerstore.graphroot.extract import apply_tar

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="whiteouts take root")

D = tars.directory
F = tars.regular


def made(place: Path, members: list[tars.Member]) -> Path:
    place.mkdir()
    apply_tar(io.BytesIO(tar_bytes(members)), place)
    return place


def listed(tmp_path: Path, upper: list[tars.Member], *lowers: list[tars.Member]) -> list[str]:
    diff = made(tmp_path / "upper", upper)
    below = [made(tmp_path / str(number), members) for number, members in enumerate(lowers)]
    return [str(change) for change in changes(diff, below)]


def test_added_changed_deleted(tmp_path: Path) -> None:
    lower = [D(b"a"), F(b"a/changed", b"1"), F(b"a/deleted"), D(b"same"), D(b"mode")]
    upper = [
        *(D(b"a"), F(b"a/changed", b"2"), tars.whiteout(b"a/deleted"), D(b"same")),
        *(D(b"mode", mode=0o700), D(b"new"), F(b"new/file")),
    ]
    assert listed(tmp_path, upper, lower) == [
        *("C /a/changed", "C /a", "D /a/deleted", "C /mode", "A /new", "A /new/file")
    ]


def test_directories_above_an_addition_are_changed(tmp_path: Path) -> None:
    lower = [D(b"a"), D(b"a/b"), D(b"a/b/c")]
    upper = [D(b"a"), D(b"a/b", mode=0o700), D(b"a/b/c"), F(b"a/b/c/new")]
    assert listed(tmp_path, upper, lower) == ["C /a/b", "C /a", "C /a/b/c", "A /a/b/c/new"]


def test_an_opaque_directory_is_a_deletion_where_it_hides_something(tmp_path: Path) -> None:
    lower = [F(b"old/x")]
    upper = [tars.opaque(b"old"), F(b"old/y"), tars.opaque(b"new")]
    assert listed(tmp_path, upper, lower) == ["A /new", "D /old", "A /old/y"]


def test_what_a_layer_between_deleted_is_added(tmp_path: Path) -> None:
    upper = [F(b"d/x", b"new"), F(b"y", b"new")]
    between = [tars.whiteout(b"d"), tars.whiteout(b"y")]
    base = [F(b"d/x", b"old"), F(b"y", b"old")]
    assert listed(tmp_path, upper, between, base) == ["A /d", "A /d/x", "A /y"]


def test_the_files_of_the_engine_are_left_out(tmp_path: Path) -> None:
    diff = made(tmp_path / "upper", [F(b"etc/hosts"), F(b"run/secrets"), F(b"run/mine")])
    assert [str(change) for change in changes(diff, [])] == ["A /etc", "A /run/mine"]
    assert Change("A", b"/etc/hosts") in all_changes(diff, [])


def test_a_link_of_a_layer_leads_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/f").touch()
    lower = [tars.symlink(b"d", os.fsencode(tmp_path / "outside"))]
    assert "A /d/f" in listed(tmp_path, [F(b"d/f")], lower)


def test_a_missing_diff_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        list(changes(tmp_path / "nothing", []))
