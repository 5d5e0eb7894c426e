"""The list of changes of a layer; beside Podman's own in tests/compat/test_export.py."""

import io
import os
from pathlib import Path

import pytest

from lab import tars
from lab.images import tar_bytes
from layerstore.errors import StorageError
from layerstore.graphroot.changes import Change, all_changes, changes
from layerstore.graphroot.extract import ExtractOptions, apply_tar
from layerstore.graphroot.whiteouts import WhiteoutStyle

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


# -- where fuse-overlayfs makes the mounts: what Podman 4 and 5 print with it -------------------


def by_program(tmp_path: Path, upper: list[tars.Member], *lowers: list[tars.Member]) -> list[str]:
    """The archives are extracted as they are."""
    places = []
    for number, members in enumerate((upper, *lowers)):
        places.append(tmp_path / f"program{number}")
        places[-1].mkdir()
        options = ExtractOptions(WhiteoutStyle.AUFS)
        apply_tar(io.BytesIO(tar_bytes(members)), places[-1], options)
    return [str(change) for change in changes(places[0], places[1:], by_program=True)]


LOWER = [
    *(D(b"a"), F(b"a/x", b"1"), F(b"a/y", b"2"), D(b"b/c/d"), F(b"b/c/d/e", b"3"), F(b"f")),
    *(D(b"g"), F(b"g/h"), D(b"o"), F(b"o/old"), D(b"w"), F(b"w/i"), F(b"same", b"s")),
    *(tars.symlink(b"l", b"f"), F(b"xa", xattrs={b"user.k": b"v"}), D(b"uid"), F(b"z/deep/file")),
]
UPPER = [
    *(D(b"a", 0o700), tars.whiteout(b"a/x"), F(b"a/new"), D(b"b/c"), F(b"b/c/n")),
    *(tars.whiteout(b"f"), F(b"g", b"file now"), D(b"o"), tars.opaque(b"o"), F(b"o/new")),
    *(tars.whiteout(b"w"), D(b"w"), F(b"w/j"), F(b"same", b"s"), tars.symlink(b"l", b"g")),
    *(F(b"xa", xattrs={b"user.k": b"w"}), D(b"uid", uid=5), D(b"fresh"), F(b"fresh/1")),
    *(tars.whiteout(b"never/was"), F(b"same2", mtime_ns=0)),
]


def test_with_a_program_the_merged_trees_are_compared(tmp_path: Path) -> None:
    found = by_program(tmp_path, UPPER, [F(b"same2", mtime_ns=1)], LOWER)
    assert found == [
        *("C /a", "A /a/new", "D /a/x", "C /b", "C /b/c", "A /b/c/n", "D /f", "A /fresh"),
        *("A /fresh/1", "C /g", "C /l", "A /never", "C /o", "A /o/new", "D /o/old", "C /uid"),
        *("D /w", "C /xa"),
    ]


def test_with_a_program_the_marks_of_layer_stores_count_too(tmp_path: Path) -> None:
    """Their layers are as the kernel's overlay wants them, and only links in the graph root."""
    upper = made(tmp_path / "store", [tars.opaque(b"opt"), F(b"opt/new"), tars.whiteout(b"gone")])
    (tmp_path / "upper").symlink_to(upper)
    base = made(tmp_path / "base", [F(b"opt/old/deep"), F(b"opt/x"), F(b"gone")])
    found = changes(tmp_path / "upper", [base], by_program=True)
    assert [str(change) for change in found] == [
        *("D /gone", "C /opt", "A /opt/new", "D /opt/old", "D /opt/x"),
    ]


def test_with_a_program_the_layers_between_are_merged(tmp_path: Path) -> None:
    upper = [F(b"d/x"), F(b"e/x"), tars.whiteout(b"e/y"), F(b"t/1"), F(b"o/q")]
    between = [tars.whiteout(b"d"), F(b"e/y"), F(b"t"), tars.opaque(b"o"), F(b"o/p")]
    base = [F(b"d/x"), F(b"e/x", b"old"), F(b"e/y"), F(b"t/1"), F(b"o/q")]
    assert by_program(tmp_path, upper, between, base) == [
        *("A /d", "A /d/x", "C /e", "C /e/x", "D /e/y", "C /o", "A /o/q", "C /t", "A /t/1"),
    ]


def test_with_a_program_a_new_directory_of_a_container_is_only_added(tmp_path: Path) -> None:
    """fuse-overlayfs marks each new directory."""
    upper = [D(b"new"), tars.opaque(b"new"), F(b"new/f"), D(b"etc"), F(b"etc/hosts")]
    assert by_program(tmp_path, upper, [D(b"etc")]) == ["C /etc", "A /new", "A /new/f"]


def test_with_a_program_the_lowest_layer_adds_everything(tmp_path: Path) -> None:
    assert by_program(tmp_path, [D(b"a"), F(b"a/b")]) == ["A /a", "A /a/b"]
