"""What the operating system refuses: told as an error of ours, and no later command suffers."""

import contextlib
import dataclasses
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab import graphroot, tars
from layerstore import limits
from layerstore.errors import LayerstoreError, StorageError
from layerstore.graphroot import check, fsck, mounts
from layerstore.graphroot.check import Kind, Report
from layerstore.graphroot.overlay import Overlay
from layerstore.graphroot.records import INCOMPLETE, LayerRecord
from layerstore.graphroot.store import Store

OLD, KEPT, NEW, LATER = (f"localhost/{word}:1" for word in ("old", "kept", "new", "later"))
CALLS = ("mkdir", "rename", "symlink", "fsync", "unlink", "chmod", "fchmod", "rmdir", "pwrite")
WORK: dict[str, Callable[[Store], object]] = {
    "put": lambda store: put(store, NEW),
    "remove": lambda store: store.remove_image(OLD),
    "tag": lambda store: store.add_names(store.image(OLD).id, [NEW]),
}


def put(store: Store, name: str) -> str:
    content = name.encode()
    return graphroot.put_image(
        store, [graphroot.layer_tar(tars.regular(b"file", content))], name
    ).id


class Refusal:
    """Lets the call of one number fail."""

    def __init__(self, number: int) -> None:
        self.left = number

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def refusing(*args: Any, **named: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*args, **named)

        return refusing


@pytest.mark.parametrize("work", WORK)
def test_no_refusal_is_raw_or_stops_what_comes_later(
    work: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = -1
    while True:
        number += 2  # every second one: enough for a test that shall be quick
        store = graphroot.open_store(tmp_path / str(number))
        put(store, OLD)
        put(store, KEPT)
        refusal = Refusal(number)
        with monkeypatch.context() as patches:
            for name in CALLS:
                patches.setattr(os, name, refusal.around(getattr(os, name)))
            with contextlib.suppress(LayerstoreError):
                WORK[work](store)
        if refusal.left > 0:
            break
        put(store, LATER)
        names = {name for image in store.images() for name in image.names}
        assert {KEPT, LATER} <= names
        assert check.check(store).remaining == ()
    assert number > 4  # it did fail at several places


@pytest.mark.parametrize("at", ["manifest", "images.json"])
def test_a_full_disk_leaves_no_big_data_without_a_record(
    at: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, KEPT)
    rename = os.rename

    def full(source: Any, target: Any, **named: Any) -> None:
        if at in Path(target).name or (at == "manifest" and Path(target).name.startswith("=")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target, **named)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(StorageError):
        put(store, NEW)
    assert check.check(store).remaining == ()


def test_damaged_mount_counts_stop_no_change(store: Store) -> None:
    put(store, KEPT)
    with store.layer_area.editing() as edit:
        edit.put(LayerRecord(id="f" * 64, flags={INCOMPLETE: True}))
        edit.save()
    run = store.layer_area.run_directory
    run.mkdir(parents=True, exist_ok=True)
    (run / "mountpoints.json").write_bytes(b"[{\0\0")
    put(store, LATER)
    assert all(layer.id != "f" * 64 for layer in store.layers())


def test_a_table_that_nobody_could_load_is_not_written(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, KEPT)
    size = (store.image_area.directory / "images.json").stat().st_size
    monkeypatch.setattr(limits, "RECORDS_BYTES", size + 64)
    with pytest.raises(StorageError, match="would be larger"):
        store.add_names(store.image(KEPT).id, [f"localhost/{'long' * 30}:1"])
    assert [image.names for image in store.images()] == [(KEPT,)]


def test_a_layer_pulled_again_since_the_check_is_not_removed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, KEPT)
    (store.image(KEPT).layers()[0].diff_path / "file").write_bytes(b"changed")
    looked = check.check

    def overtaken(store: Store, *, full: bool = False, **named: Any) -> Report:
        report = looked(store, full=full, **named)
        if full:
            store.remove_image(KEPT)
            put(store, KEPT)
        return report

    monkeypatch.setattr(check, "check", overtaken)
    report = fsck.repair_storage(store, full=True)
    assert [found.kind for found in report.findings] == [Kind.LAYER_CHANGED]
    assert report.remaining == ()
    assert [image.names for image in store.images()] == [(KEPT,)]
    assert looked(store, full=True).remaining == ()


def test_a_layer_that_stays_changed_is_removed(store: Store) -> None:
    put(store, KEPT)
    (store.image(KEPT).layers()[0].diff_path / "file").write_bytes(b"changed")
    assert fsck.repair_storage(store, full=True).remaining == ()
    assert store.images() == []


def test_a_directory_that_cannot_be_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(StorageError, match="Permission denied"):
        Overlay(tmp_path).layers()


def test_a_read_only_storage_is_checked_without_making_files(tmp_path: Path) -> None:
    made = graphroot.open_store(tmp_path)
    put(made, KEPT)
    config = dataclasses.replace(made.config, run_root=tmp_path / "no-run")
    assert check.check(Store.open(config, read_only=True)).remaining == ()
    assert not config.run_root.exists()


def test_what_keeps_from_a_mount_or_an_image_store_is_named(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, KEPT)

    def refused(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refused)
    with pytest.raises(StorageError, match="Permission denied"):
        graphroot.open_store(tmp_path / "other", tmp_path / "images")
    monkeypatch.setattr(Path, "exists", refused)
    with pytest.raises(StorageError, match="Permission denied"):
        mounts.mount_image(store, store.image(KEPT))
