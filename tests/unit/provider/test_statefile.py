"""A start succeeds whatever became of the state database, and never gives a slot to two layers."""

from __future__ import annotations

import os
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from layerstore.errors import StorageError
from layerstore.provider import check_state, open_state, schema

FILES = [{"a": b"a" * 900}, {"b": b"b" * 900}]
CHANCE = random.Random(int(os.environ.get("LAYERSTORE_SEED", "0")))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def no_database(path: Path) -> None:
    path.write_bytes(b"it was a database once" * 1000)


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def cut_off(path: Path) -> None:
    os.truncate(path, CHANCE.randrange(4096, path.stat().st_size - 4096))


def torn(path: Path) -> None:
    """Every other page never came to the disk."""
    with path.open("r+b") as file:
        for at in range(4096, path.stat().st_size, 8192):
            file.seek(at)
            file.write(bytes(4096))


def other_words(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("UPDATE layers SET form = 'eztargs'")
    database.close()


def no_table(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("DROP TABLE views")
    database.close()


DAMAGE = [empty, no_database, zeros, cut_off, torn, other_words, no_table]


@pytest.fixture
def stopped(asker, publisher, registry):
    image = publisher.push("app", "1", FILES)
    views = [asker.view(f"{registry.host}/app:1", one.toc_digest) for one in image.layers]
    asker.read(views[0], "a")
    asker.close()
    return image, views


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda one: one.__name__)
def test_the_copy_takes_the_place_of_a_damaged_database(
    asker, registry, stopped, caplog, damage: Callable[[Path], None]
):
    image, views = stopped
    damage(asker.root / "state.sqlite")
    fault = registry.fault("reset")
    asker.open()
    for view, one in zip(views, image.layers, strict=True):
        assert asker.view(view.reference, one.toc_digest) == view
    assert asker.read(views[0], "a") == FILES[0]["a"]
    assert fault.hits == 0
    assert "event=state-damaged" in caplog.text
    assert (asker.root / "state.sqlite.damaged").exists()


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda one: one.__name__)
def test_without_a_copy_layers_are_resolved_anew_in_other_slots(
    asker, stopped, damage: Callable[[Path], None]
):
    _, views = stopped
    damage(asker.root / "state.sqlite")
    (asker.root / "state.sqlite.copy").write_bytes(b"nor is this one")
    asker.open()
    again = [asker.view(view.reference, view.name) for view in views]
    assert {view.slot for view in again}.isdisjoint({view.slot for view in views})
    assert asker.read(again[1], "b") == FILES[1]["b"]


def test_a_slot_whose_row_was_lost_is_not_given_again(asker, publisher, registry, stopped):
    """The last writes may be lost where the directory of a layer is not."""
    (asker.root / "layers/9").mkdir()
    asker.open()
    image = publisher.push("new", "1", [{"c": b"c"}])
    assert asker.view(f"{registry.host}/new:1", image.layers[0].toc_digest).slot == 10


def test_a_disk_that_fails_is_no_damage(asker, stopped, monkeypatch):
    monkeypatch.setattr(sqlite3, "connect", _fails)
    with pytest.raises(StorageError, match="disk I/O error"):
        asker.open()
    monkeypatch.undo()
    assert not (asker.root / "state.sqlite.damaged").exists()
    asker.open()


def test_the_version_of_a_state_that_another_process_has_open_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_state(tmp_path)  # one that is not there yet is made
    state = open_state(tmp_path)  # a server has it open, and may have written to the log only
    assert (tmp_path / "state.sqlite-wal").exists()
    check_state(tmp_path)
    monkeypatch.setattr(schema, "VERSION", 4)  # a release that cannot bring 3 up
    with pytest.raises(StorageError, match="has version 3, this program knows 4"):
        check_state(tmp_path)
    monkeypatch.undo()
    state.close()
    with sqlite3.connect(tmp_path / "state.sqlite") as database:
        database.execute("PRAGMA user_version = 2")
    database.close()
    check_state(tmp_path)  # an older one is brought up
    for damage in (empty, no_database):  # and what is none is replaced
        damage(tmp_path / "state.sqlite")
        check_state(tmp_path)
    (tmp_path / "state.sqlite").unlink()
    (tmp_path / "state.sqlite").mkdir()
    with pytest.raises(StorageError, match="cannot open the state database: Is a directory"):
        check_state(tmp_path)


def _fails(*_: object, **__: object) -> None:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR
    raise error


def test_the_state_is_for_its_owner_alone(asker, publisher, registry):
    """Whoever made the root directory may have left it open to everybody."""
    asker.root.chmod(0o755)
    image = publisher.push("app", "1", FILES)
    asker.view(f"{registry.host}/app:1", image.layers[0].toc_digest)
    asker.close()
    modes = {path.name: path.stat().st_mode & 0o777 for path in asker.root.glob("state.sqlite*")}
    assert {"state.sqlite", "state.sqlite.copy"} <= modes.keys()
    assert set(modes.values()) == {0o600}


def test_a_file_in_the_place_of_the_layers_is_named(asker, stopped):
    (asker.root / "layers").rename(asker.root / "elsewhere")
    (asker.root / "layers").write_bytes(b"")
    with pytest.raises(StorageError, match="layers: cannot be read: Not a directory"):
        asker.open()
    (asker.root / "layers").unlink()
    (asker.root / "elsewhere").rename(asker.root / "layers")
    asker.open()
