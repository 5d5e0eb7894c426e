"""The tables of the state database, and how older ones are brought up to them.

Version 1 knew eStargz only, and a layer's diff ID only from the `info` that was shown;
version 2 neither eviction nor pinned images.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Final

from layerstore.errors import StorageError

VERSION: Final = 3
_MAGIC: Final = b"SQLite format 3\0"
_HEADER_BYTES: Final = 100
_VERSION_AT: Final = 60
_LAYERS: Final = """
CREATE TABLE {name} (
    slot INTEGER PRIMARY KEY AUTOINCREMENT,
    blob_digest TEXT NOT NULL, toc_digest TEXT NOT NULL, diff_id TEXT NOT NULL,
    size INTEGER NOT NULL, toc_offset INTEGER NOT NULL,
    form TEXT NOT NULL, notes TEXT NOT NULL, tar_length INTEGER,
    complete INTEGER NOT NULL DEFAULT 0, diff_size INTEGER NOT NULL DEFAULT -1,
    quarantine TEXT NOT NULL DEFAULT '',
    evicted REAL NOT NULL DEFAULT 0, used REAL NOT NULL DEFAULT 0,
    UNIQUE (blob_digest, toc_digest, diff_id)
);
"""
_KEPT: Final = """
CREATE TABLE kept_images (
    reference TEXT PRIMARY KEY, platforms TEXT NOT NULL, complete INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE kept_layers (
    reference TEXT NOT NULL, slot INTEGER NOT NULL, PRIMARY KEY (reference, slot)
) WITHOUT ROWID;
"""
_SCHEMA: Final = """
CREATE TABLE documents (
    digest TEXT PRIMARY KEY, media_type TEXT NOT NULL, body BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE pins (
    id INTEGER PRIMARY KEY, reference TEXT NOT NULL, digest TEXT NOT NULL,
    UNIQUE (reference, digest)
);
{layers}
CREATE TABLE views (
    key INTEGER PRIMARY KEY,
    reference TEXT NOT NULL, name TEXT NOT NULL, dialect TEXT NOT NULL,
    slot INTEGER NOT NULL REFERENCES layers (slot), number INTEGER NOT NULL,
    info BLOB NOT NULL, created REAL NOT NULL,
    UNIQUE (slot, number)
);
CREATE TABLE uses (key INTEGER PRIMARY KEY, count INTEGER NOT NULL);
{kept}
""".format(layers=_LAYERS.format(name="layers"), kept=_KEPT)
_FROM_1: Final = """
INSERT INTO layers_3
    (slot, blob_digest, toc_digest, diff_id, size, toc_offset, form, notes, complete)
    SELECT slot, blob_digest, toc_digest, coalesce((
        SELECT coalesce(
            json_extract(CAST(info AS TEXT), '$."diff-digest"'),
            json_extract(CAST(info AS TEXT), '$.flags."expected-layer-diffid"'))
        FROM views WHERE views.slot = layers.slot ORDER BY number LIMIT 1), ''),
        size, toc_offset, 'estargz', '', complete
    FROM layers;
DROP TABLE layers;
ALTER TABLE layers_3 RENAME TO layers;
"""
_FROM_2: Final = """
ALTER TABLE layers ADD COLUMN evicted REAL NOT NULL DEFAULT 0;
ALTER TABLE layers ADD COLUMN used REAL NOT NULL DEFAULT 0;
"""
_STEPS: Final = {
    0: _SCHEMA,
    1: _LAYERS.format(name="layers_3") + _FROM_1 + _KEPT,
    2: _FROM_2 + _KEPT,
}


def check_header(path: Path) -> None:
    """Whether `bring_up` will know what to do with a database that another process has open.

    Only its header is read, which tells the version (https://sqlite.org/fileformat2.html, 1.3), but
    it has to be writable.  No header is no reason.  Raises StorageError, OSError.
    """
    with path.open("r+b") as database:
        header = database.read(_HEADER_BYTES)
    if len(header) == _HEADER_BYTES and header.startswith(_MAGIC):
        _known(int.from_bytes(header[_VERSION_AT : _VERSION_AT + 4], "big"), path)


def bring_up(db: sqlite3.Connection, path: Path) -> None:
    """Make the tables, or bring those of an older version up, in one transaction.

    Raises StorageError for a database of a version that is not known.
    """
    version = db.execute("PRAGMA user_version").fetchone()[0]
    _known(version, path)
    if version == VERSION:
        return
    db.executescript(f"BEGIN; {_STEPS[version]} PRAGMA user_version = {VERSION}; COMMIT;")
    with contextlib.suppress(sqlite3.Error):  # the next release reads it in the header
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _known(version: int, path: Path) -> None:
    if version != VERSION and version not in _STEPS:
        raise StorageError(
            f"state database has version {version}, this program knows {VERSION}",
            subject=str(path),
            advice="use the layerstore release that wrote it",
        )
