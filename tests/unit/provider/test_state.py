from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from layerstore.errors import DiskFull, StorageError
from layerstore.formats.announced import Form
from layerstore.image import Digest
from layerstore.provider import names
from layerstore.provider.dialect import Dialect
from layerstore.provider.state import Document, LayerRecord, State

A, B, C, D = (Digest("sha256:" + c * 64) for c in "abcd")
REF = "host.example/app:1"


def add(
    state: State,
    blob: Digest,
    toc: Digest | None,
    diff_id: Digest | None = D,
    *,
    size: int = 1,
    toc_offset: int = 1,
) -> LayerRecord:
    return state.add_layer(
        blob, toc, diff_id, size=size, toc_offset=toc_offset, form=Form.ZSTD_CHUNKED, notes="{}"
    )


def reopen(state: State, path: Path) -> State:
    state.close()
    return State(path)


def test_everything_survives_a_restart(tmp_path: Path):
    path = tmp_path / "state.sqlite"
    state = State(path)
    layer = add(state, A, B, size=1000, toc_offset=900)
    view = state.add_view(REF, B, Dialect.TOC, layer.slot, b'{"x":1}')
    document = Document(Digest.of(b"{}"), "application/json", b"{}")
    state.add_document(document)
    state.pin(REF, C)
    state.count_use(view.key, 1)
    state.count_use(view.key, 1)
    state.save_uses({view.key})
    state.set_complete(layer.slot)
    state = reopen(state, path)
    assert state.find_layer(A, B, D) == layer
    assert state.view(view.key) == view
    assert state.views_of(names.name_hash(REF)) == (view,)
    assert state.document(document.digest) == document
    assert state.pins(REF) == (C,)
    assert state.uses(view.key) == 2
    assert state.is_complete(layer.slot)
    state.close()


def test_a_slot_belongs_to_one_layer_for_ever(tmp_path: Path):
    state = State(tmp_path / "state.sqlite")
    first = add(state, A, B)
    assert add(state, A, B) == first
    assert add(state, A, C).slot != first.slot
    state.close()


def test_each_set_of_claims_is_a_layer_of_its_own(tmp_path: Path):
    path = tmp_path / "state.sqlite"
    state = State(path)
    slots = {add(state, *claims).slot for claims in ((A, B, C), (A, B, D), (A, None, D), (A, C, D))}
    assert len(slots) == 4
    state = reopen(state, path)
    assert {record.slot for record in state.layers_of_blob(A)} == slots
    assert state.find_layer(A, None, D) is not None
    assert state.find_layer(A, None, C) is None
    assert state.layers_of_blob(B) == ()
    state.close()


def test_verdicts_survive_a_restart(tmp_path: Path):
    path = tmp_path / "state.sqlite"
    state = State(path)
    good, bad = add(state, A, B), add(state, A, C)
    assert not good.verified
    state.set_verified(good.slot, 0)
    state.quarantine(bad.slot, "it lied")
    for _ in range(2):
        found = state.layer(good.slot), state.layer(bad.slot)
        assert found[0] is not None
        assert found[0].verified
        assert found[0].diff_size == 0
        assert found[1] is not None
        assert found[1].quarantine == "it lied"
        assert not found[1].verified
        state = reopen(state, path)
    state.close()


def test_a_database_of_version_1_is_brought_up(tmp_path: Path):
    path = tmp_path / "state.sqlite"
    old = sqlite3.connect(path)
    old.executescript(
        f"""
        CREATE TABLE documents (
            digest TEXT PRIMARY KEY, media_type TEXT NOT NULL, body BLOB NOT NULL
        ) WITHOUT ROWID;
        CREATE TABLE pins (
            id INTEGER PRIMARY KEY, reference TEXT NOT NULL, digest TEXT NOT NULL,
            UNIQUE (reference, digest)
        );
        CREATE TABLE layers (
            slot INTEGER PRIMARY KEY AUTOINCREMENT,
            blob_digest TEXT NOT NULL, toc_digest TEXT NOT NULL,
            size INTEGER NOT NULL, toc_offset INTEGER NOT NULL,
            complete INTEGER NOT NULL DEFAULT 0,
            UNIQUE (blob_digest, toc_digest)
        );
        CREATE TABLE views (
            key INTEGER PRIMARY KEY,
            reference TEXT NOT NULL, name TEXT NOT NULL, dialect TEXT NOT NULL,
            slot INTEGER NOT NULL REFERENCES layers (slot), number INTEGER NOT NULL,
            info BLOB NOT NULL, created REAL NOT NULL,
            UNIQUE (slot, number)
        );
        CREATE TABLE uses (key INTEGER PRIMARY KEY, count INTEGER NOT NULL);
        INSERT INTO layers VALUES (3, '{A}', '{B}', 100, 90, 1);
        INSERT INTO layers VALUES (4, '{B}', '{C}', 100, 90, 0);
        INSERT INTO layers VALUES (7, '{C}', '{A}', 100, 90, 0);
        INSERT INTO views VALUES ({names.name_hash(REF, A)}, '{REF}', '{A}', 'L', 3, 1,
            CAST('{{"diff-digest":"{D}"}}' AS BLOB), 1.0);
        INSERT INTO views VALUES ({names.name_hash(REF, C)}, '{REF}', '{C}', 'T', 4, 1,
            CAST('{{"flags":{{"expected-layer-diffid":"{D}"}}}}' AS BLOB), 1.0);
        PRAGMA user_version = 1;
        """
    )
    old.close()
    state = State(path)
    first = state.find_layer(A, B, D)
    assert first is not None
    assert (first.slot, first.size, first.form) == (3, 100, Form.ESTARGZ)
    assert state.is_complete(3)
    assert not first.verified
    second = state.find_layer(B, C, D)
    assert second is not None
    assert second.slot == 4
    third = state.find_layer(C, A, None)
    assert third is not None
    assert third.slot == 7
    assert add(state, D, D).slot == 8
    state = reopen(state, path)
    assert state.view(names.name_hash(REF, A)) is not None
    state.close()


def test_info_never_changes_once_shown(tmp_path: Path):
    state = State(tmp_path / "state.sqlite")
    layer = add(state, A, B)
    first = state.add_view(REF, A, Dialect.LAYER, layer.slot, b"first")
    assert state.add_view(REF, A, Dialect.LAYER, layer.slot, b"second") == first
    state.close()


def test_views_of_one_layer_have_numbers_of_their_own(tmp_path: Path):
    path = tmp_path / "state.sqlite"
    state = State(path)
    layer = add(state, A, B)
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


def test_what_a_full_disk_does_not_take_is_written_later(tmp_path: Path):
    path = tmp_path / "state.sqlite"
    state = State(path)
    layer = add(state, A, B)
    pages = state._db.execute("PRAGMA page_count").fetchone()[0]
    state._db.execute(f"PRAGMA max_page_count = {pages}")
    reason = "it is false " * 2000
    state.quarantine(layer.slot, reason)
    with pytest.raises(DiskFull):
        state.add_document(Document(Digest.of(b"x"), "application/json", b"x" * 20_000))
    now = state.layer(layer.slot)
    assert now is not None
    assert now.quarantine == reason
    state.save_layers()  # still no room
    state._db.execute("PRAGMA max_page_count = 1000000")
    state.save_layers()
    state = reopen(state, path)
    now = state.layer(layer.slot)
    assert now is not None
    assert now.quarantine == reason
    state.close()


def test_no_other_process_shares_the_state(tmp_path: Path):
    """What they would share is mapped, and ends the process on a full disk."""
    path = tmp_path / "state.sqlite"
    with contextlib.closing(State(path)) as state:
        add(state, A, B)
        assert not path.with_name("state.sqlite-shm").exists()
        with (
            contextlib.closing(sqlite3.connect(path, timeout=0)) as other,
            pytest.raises(sqlite3.OperationalError, match="locked"),
        ):
            other.execute("SELECT * FROM layers")
