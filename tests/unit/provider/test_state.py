from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from layerstore.errors import StorageError
from layerstore.image import Digest
from layerstore.provider import names
from layerstore.provider.info import Dialect
from layerstore.provider.state import Document, State

A, B, C = (Digest("sha256:" + c * 64) for c in "abc")
REF = "host.example/app:1"


def reopen(state: State, path: Path) -> State:
    state.close()
    return State(path)


def test_everything_survives_a_restart(tmp_path: Path):
    path = tmp_path / "state.sqlite"
    state = State(path)
    layer = state.add_layer(A, B, 1000, 900)
    view = state.add_view(REF, B, Dialect.TOC, layer.slot, b'{"x":1}')
    state.add_document(Document(C, "application/json", b"{}"))
    state.pin(REF, C)
    state.count_use(view.key, 1)
    state.count_use(view.key, 1)
    state.save_uses({view.key})
    state.set_complete(layer.slot)
    state = reopen(state, path)
    assert state.find_layer(A, B) == layer
    assert state.view(view.key) == view
    assert state.views_of(names.name_hash(REF)) == (view,)
    assert state.document(C) == Document(C, "application/json", b"{}")
    assert state.pins(REF) == (C,)
    assert state.uses(view.key) == 2
    assert state.is_complete(layer.slot)
    state.close()


def test_a_slot_belongs_to_one_layer_for_ever(tmp_path: Path):
    state = State(tmp_path / "state.sqlite")
    first = state.add_layer(A, B, 1, 1)
    assert state.add_layer(A, B, 1, 1) == first
    assert state.add_layer(A, C, 1, 1).slot != first.slot
    state.close()


def test_info_never_changes_once_shown(tmp_path: Path):
    state = State(tmp_path / "state.sqlite")
    layer = state.add_layer(A, B, 1, 1)
    first = state.add_view(REF, A, Dialect.LAYER, layer.slot, b"first")
    assert state.add_view(REF, A, Dialect.LAYER, layer.slot, b"second") == first
    state.close()


def test_views_of_one_layer_have_numbers_of_their_own(tmp_path: Path):
    path = tmp_path / "state.sqlite"
    state = State(path)
    layer = state.add_layer(A, B, 1, 1)
    one = state.add_view("host.example/a:1", B, Dialect.TOC, layer.slot, b"")
    state = reopen(state, path)
    two = state.add_view("host.example/b:1", B, Dialect.TOC, layer.slot, b"")
    assert one.number != two.number
    state.close()


def test_pins_are_newest_first_and_counts_never_negative(tmp_path: Path):
    state = State(tmp_path / "state.sqlite")
    state.pin(REF, A)
    state.pin(REF, B)
    assert state.pins(REF) == (B, A)
    assert state.count_use(1, -1) == 0
    state.close()


def test_a_database_of_another_release_is_refused_and_untouched(tmp_path: Path):
    path = tmp_path / "state.sqlite"
    State(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StorageError, match="version 99"):
        State(path)
    path.write_bytes(b"not a database at all, but long enough" * 100)
    with pytest.raises(StorageError):
        State(path)
