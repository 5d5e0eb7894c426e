"""Directories of layers as the overlay driver of containers/storage makes them."""

import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest

from layerstore.errors import CorruptStorage, StorageError
from layerstore.graphroot.overlay import Overlay, RootAttributes
from layerstore.graphroot.staging import StagingLost, TempDirectory

USER, GROUP = os.geteuid(), os.getegid()
PLAIN = RootAttributes(0o755, USER, GROUP)


@pytest.fixture
def overlay(tmp_path: Path) -> Overlay:
    (tmp_path / "root").mkdir()
    made = Overlay(tmp_path / "root")
    made.prepare()
    return made


def create(overlay: Overlay, layer: str, parent: str = "", **options: Any) -> Path:
    attributes = overlay.root_attributes(parent) if parent else PLAIN
    with TempDirectory(overlay.tempdirs) as bin_:
        overlay.create(layer, parent, attributes, bin_, **options)
    return overlay.directory(layer)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_a_base_layer(overlay: Overlay) -> None:
    directory = create(overlay, "base")
    assert sorted(os.listdir(directory)) == ["diff", "empty", "link", "merged", "work"]
    assert [mode(directory / name) for name in ("", "work", "merged", "empty")] == [0o700] * 4
    name = (directory / "link").read_text()
    assert re.fullmatch("[A-Z2-7]{26}", name)
    assert mode(directory / "link") == 0o644
    assert os.readlink(overlay.home / "l" / name) == "../base/diff"


def test_a_base_layer_is_not_writable_by_anyone(overlay: Overlay) -> None:
    assert overlay.root_attributes("") == RootAttributes(0o555, 0, 0)


def test_a_chain_of_layers(overlay: Overlay) -> None:
    for layer, parent in (("base", ""), ("middle", "base"), ("top", "middle")):
        create(overlay, layer, parent)
    below = [overlay.link("middle"), overlay.link("base")]
    text = (overlay.home / "top/lower").read_text()
    assert text == f"l/{below[0]}:l/{below[1]}"
    assert overlay.lower_dirs("top") == tuple(overlay.home / "l" / name for name in below)
    assert overlay.lower("base") == ()
    assert not (overlay.home / "top/empty").exists()


def test_a_child_inherits_the_mode_of_its_parent(overlay: Overlay) -> None:
    (create(overlay, "base") / "diff").chmod(0o1750)
    assert mode(create(overlay, "child", "base") / "diff") == 0o750


def test_staged_content_becomes_the_diff(overlay: Overlay) -> None:
    with TempDirectory(overlay.tempdirs) as staging:
        content = staging.new()
        (content / "file").write_text("x")
        directory = create(overlay, "base", content=content)
        assert not content.exists()
    assert (directory / "diff/file").read_text() == "x"
    assert mode(directory / "diff") == 0o755


def test_staged_content_may_have_its_own_mode(overlay: Overlay) -> None:
    with TempDirectory(overlay.tempdirs) as staging:
        content = staging.new()
        content.chmod(0o711)
        directory = create(overlay, "base", content=content, own_attributes=True)
    assert mode(directory / "diff") == 0o711


def test_staged_content_that_was_collected(overlay: Overlay, tmp_path: Path) -> None:
    with pytest.raises(StagingLost):
        create(overlay, "base", content=tmp_path / "gone")
    assert overlay.layers() == []
    assert os.listdir(overlay.home / "l") == []


def test_a_layer_of_a_layer_store(overlay: Overlay, tmp_path: Path) -> None:
    found = tmp_path / f"store/sha256:{'ab' * 32}"
    (found / "diff").mkdir(parents=True, mode=0o755)
    directory = create(overlay, "lazy", additional=found)
    assert (directory / "additionallayer").read_text() == str(found)
    assert os.readlink(directory / "diff") == str(found / "diff")
    assert overlay.additional_layer("lazy") == found
    assert overlay.root_attributes("lazy") == PLAIN
    create(overlay, "child", "lazy")
    assert overlay.additional_layer("child") is None


@pytest.mark.parametrize("text", ["relative/path", "", "/store/../etc"])
def test_a_damaged_pointer_into_a_layer_store(overlay: Overlay, text: str) -> None:
    (create(overlay, "lazy") / "additionallayer").write_text(text)
    with pytest.raises(CorruptStorage):
        overlay.additional_layer("lazy")


def test_what_a_crash_left_is_replaced(overlay: Overlay) -> None:
    (create(overlay, "base") / "diff/half").write_text("x")
    directory = create(overlay, "base")
    assert os.listdir(directory / "diff") == []
    assert os.listdir(overlay.home / "l") == [overlay.link("base")]
    assert not overlay.tempdirs.exists()


def test_what_stands_on_a_layer_without_a_record_still_finds_it_made_anew(
    overlay: Overlay,
) -> None:
    create(overlay, "base")
    create(overlay, "child", "base")
    directory = create(overlay, "base")
    (directory / "diff/new").write_text("x")
    (path,) = overlay.lower_dirs("child")
    assert os.listdir(path) == ["new"]


def test_a_left_over_short_name_that_another_layer_has_is_not_taken(overlay: Overlay) -> None:
    (create(overlay, "base") / "link").write_text(overlay.link((create(overlay, "other")).name))
    create(overlay, "base")
    assert overlay.link("base") != overlay.link("other")
    assert os.readlink(overlay.home / "l" / overlay.link("other")) == "../other/diff"


@pytest.mark.parametrize("text", ["l/AAAAAAAAAAAAAAAAAAAAAAAAAA", "nonsense", ""])
def test_a_lower_is_mended(overlay: Overlay, text: str) -> None:
    create(overlay, "base")
    path = create(overlay, "child", "base") / "lower"
    right = path.read_text()
    assert not overlay.mend_lower("child", "base")
    path.write_text(text)
    assert overlay.mend_lower("child", "base")
    assert path.read_text() == right
    (overlay.directory("base") / "lower").write_text(right)
    assert overlay.mend_lower("base", "")
    assert overlay.lower("base") == ()


def test_a_detached_layer_leaves_nothing(overlay: Overlay) -> None:
    create(overlay, "base")
    create(overlay, "child", "base")
    with TempDirectory(overlay.tempdirs) as bin_:
        overlay.detach("child", bin_)
        overlay.detach("child", bin_)
        assert overlay.layers() == ["base"]
        assert os.listdir(overlay.home / "l") == [overlay.link("base")]


def test_a_foreign_link_of_the_same_name_stays(overlay: Overlay) -> None:
    directory = create(overlay, "base")
    create(overlay, "other")
    (directory / "link").write_text(overlay.link("other"))
    with TempDirectory(overlay.tempdirs) as bin_:
        overlay.detach("base", bin_)
    assert (overlay.home / "l" / overlay.link("other")).is_symlink()


def test_lost_links_come_back(overlay: Overlay) -> None:
    create(overlay, "base")
    create(overlay, "child", "base")
    name = overlay.link("base")
    (overlay.home / "l" / name).unlink()
    assert overlay.lower_dirs("child") == (overlay.home / "l" / name,)
    assert os.readlink(overlay.home / "l" / name) == "../base/diff"


def test_a_lost_link_file_comes_back(overlay: Overlay) -> None:
    name = (create(overlay, "base") / "link").read_text()
    (overlay.home / "base/link").unlink()
    assert overlay.link("base") == name
    assert (overlay.home / "base/link").read_text() == name


def test_what_is_no_link_to_a_layer_is_replaced(overlay: Overlay) -> None:
    create(overlay, "base")
    create(overlay, "child", "base")
    name = overlay.link("base")
    (overlay.home / "l" / name).unlink()
    (overlay.home / "l" / name).symlink_to("/etc")
    (overlay.home / "l/WEIRD").symlink_to("/etc")
    overlay.recreate_links()
    assert os.readlink(overlay.home / "l" / name) == "../base/diff"
    assert not (overlay.home / "l/WEIRD").is_symlink()


def test_a_lower_that_nobody_knows(overlay: Overlay) -> None:
    create(overlay, "base")
    create(overlay, "child", "base")
    (overlay.home / "child/lower").write_text("l/AAAAAAAAAAAAAAAAAAAAAAAAAA")
    with pytest.raises(CorruptStorage, match="does not exist"):
        overlay.lower_dirs("child")


@pytest.mark.parametrize("text", ["", "l/../../etc", "base", "l/A:/etc", "l/A B"])
def test_a_damaged_lower(overlay: Overlay, text: str) -> None:
    (create(overlay, "base") / "lower").write_text(text)
    with pytest.raises(CorruptStorage, match="lower names"):
        overlay.lower("base")


@pytest.mark.parametrize("layer", ["", ".", "..", "a/b", "a\0b"])
def test_ids_that_are_no_names(overlay: Overlay, layer: str) -> None:
    with pytest.raises(CorruptStorage):
        overlay.directory(layer)


def test_a_parent_without_a_directory(overlay: Overlay) -> None:
    with pytest.raises(StorageError):
        overlay.root_attributes("gone")
    with TempDirectory(overlay.tempdirs) as bin_, pytest.raises(CorruptStorage):
        overlay.create("child", "gone", PLAIN, bin_)
    assert overlay.layers() == []


def test_layers_of_an_image_store(overlay: Overlay, tmp_path: Path) -> None:
    create(overlay, "base")
    create(overlay, "middle", "base")
    (tmp_path / "mine").mkdir()
    mine = Overlay(tmp_path / "mine", [overlay])
    mine.prepare()
    create(mine, "top", "middle")
    assert mine.lower("top") == (f"l/{overlay.link('middle')}", f"l/{overlay.link('base')}")
    assert {path.parent for path in mine.lower_dirs("top")} == {overlay.home / "l"}
    assert mine.diff_path("middle") == overlay.home / "middle/diff"
    assert mine.layers() == ["top"]


def test_the_mark_of_a_mount_program(overlay: Overlay) -> None:
    assert not overlay.has_mount_program
    overlay.prepare(mount_program=True)
    assert overlay.has_mount_program
    assert (overlay.home / ".has-mount-program").read_bytes() == b"true"
    assert mode(overlay.home / ".has-mount-program") == 0o600
    overlay.prepare()
    assert overlay.has_mount_program
    assert overlay.layers() == []
