"""What the provider must remember across restarts, in one SQLite database.

* ``documents``: manifests, indexes and configs, byte for byte, by digest;
* ``pins``: which documents a reference stood for, newest last: a tag moves, but a
  client goes on to use the layers of the image that it pulled;
* ``layers``: one row a (blob digest, TOC digest) pair; its ``slot`` is part of
  every node id and never given to another layer;
* ``views``: a layer under one name: reference, digest in the path, and the
  ``info`` that was shown, which never changes again;
* ``uses``: how often clients said they use a view: a hint, see als-protocol.

Everything is loaded at the start; later reads come from memory, writes go to
disk in the thread that makes them.
"""

from __future__ import annotations

import dataclasses
import sqlite3
import threading
import time
from pathlib import Path

from layerstore.errors import StorageError
from layerstore.image import Digest
from layerstore.provider import names
from layerstore.provider.info import Dialect

_VERSION = 1
_SCHEMA = """
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
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """A manifest, index or config as the registry gave it."""

    digest: Digest
    media_type: str
    body: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class LayerRecord:
    """A layer whose TOC was verified and indexed; sizes and offsets in bytes of the blob."""

    slot: int
    blob_digest: Digest
    toc_digest: Digest
    size: int
    toc_offset: int


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """A layer under the name that a client uses for it.

    ``reference`` is empty for stores configured without ``:ref``.
    """

    key: int
    reference: str
    name: Digest
    dialect: Dialect
    slot: int
    number: int
    info: bytes
    created: float


class State:
    """The database ``path``.  Raises StorageError when the disk fails.  Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            path.chmod(0o600)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._create()
            self._load()
        except (sqlite3.Error, OSError) as error:
            raise StorageError(
                f"cannot open the state database: {error}", subject=str(path)
            ) from error

    def _create(self) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            self._db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
        elif version != _VERSION:
            raise StorageError(
                f"state database has version {version}, this program knows {_VERSION}",
                subject=str(self._path),
                advice="use the layerstore release that wrote it",
            )

    def _load(self) -> None:
        self._layers: dict[int, LayerRecord] = {}
        self._complete: set[int] = set()
        self._slots: dict[tuple[Digest, Digest], int] = {}
        for slot, blob, toc, size, toc_offset, complete in self._db.execute("SELECT * FROM layers"):
            record = LayerRecord(slot, Digest(blob), Digest(toc), size, toc_offset)
            self._layers[slot] = record
            self._slots[record.blob_digest, record.toc_digest] = slot
            if complete:
                self._complete.add(slot)
        self._views: dict[int, View] = {}
        self._by_reference: dict[int, list[View]] = {}
        self._numbers: dict[int, int] = {}
        for key, reference, name, dialect, slot, number, info, created in self._db.execute(
            "SELECT * FROM views"
        ):
            self._remember(
                View(key, reference, Digest(name), Dialect(dialect), slot, number, info, created)
            )
        self._uses: dict[int, int] = dict(self._db.execute("SELECT key, count FROM uses"))
        self._pins: dict[str, list[Digest]] = {}
        for reference, digest in self._db.execute("SELECT reference, digest FROM pins ORDER BY id"):
            self._pins.setdefault(reference, []).append(Digest(digest))

    def _remember(self, view: View) -> None:
        self._views[view.key] = view
        self._by_reference.setdefault(names.name_hash(view.reference), []).append(view)
        self._numbers[view.slot] = max(self._numbers.get(view.slot, 0), view.number)

    def _write(self, sql: str, *values: object) -> sqlite3.Cursor:
        try:
            return self._db.execute(sql, values)
        except sqlite3.Error as error:
            raise StorageError(f"cannot write: {error}", subject=str(self._path)) from error

    # -- documents and pins ------------------------------------------------------

    def document(self, digest: Digest) -> Document | None:
        """A stored document; its bytes were verified when they were stored."""
        with self._lock:
            row = self._db.execute(
                "SELECT media_type, body FROM documents WHERE digest = ?", (digest,)
            ).fetchone()
        return None if row is None else Document(digest, *row)

    def add_document(self, document: Document) -> None:
        """Store a verified document."""
        with self._lock:
            self._write(
                "INSERT OR IGNORE INTO documents VALUES (?, ?, ?)",
                document.digest,
                document.media_type,
                document.body,
            )

    def pins(self, reference: str) -> tuple[Digest, ...]:
        """The documents that a reference stood for, newest first."""
        with self._lock:
            return tuple(reversed(self._pins.get(reference, ())))

    def pin(self, reference: str, digest: Digest) -> None:
        """The reference stands for this document now."""
        with self._lock:
            pinned = self._pins.setdefault(reference, [])
            if digest in pinned:
                return
            self._write("INSERT INTO pins (reference, digest) VALUES (?, ?)", reference, digest)
            pinned.append(digest)

    def references(self) -> tuple[str, ...]:
        """All references that were ever resolved."""
        with self._lock:
            return tuple(self._pins)

    # -- layers --------------------------------------------------------------------

    def find_layer(self, blob_digest: Digest, toc_digest: Digest) -> LayerRecord | None:
        """The record of a known layer."""
        with self._lock:
            slot = self._slots.get((blob_digest, toc_digest))
            return None if slot is None else self._layers[slot]

    def layer(self, slot: int) -> LayerRecord | None:
        """The record of a slot."""
        return self._layers.get(slot)

    def layers(self) -> tuple[LayerRecord, ...]:
        """All known layers."""
        with self._lock:
            return tuple(self._layers.values())

    def add_layer(
        self, blob_digest: Digest, toc_digest: Digest, size: int, toc_offset: int
    ) -> LayerRecord:
        """A record for the layer, with a slot of its own."""
        with self._lock:
            known = self.find_layer(blob_digest, toc_digest)
            if known is not None:
                return known
            cursor = self._write(
                "INSERT INTO layers (blob_digest, toc_digest, size, toc_offset) VALUES (?, ?, ?, ?)",
                blob_digest,
                toc_digest,
                size,
                toc_offset,
            )
            slot = cursor.lastrowid or 0
            if slot >= names.SLOTS:
                self._write("DELETE FROM layers WHERE slot = ?", slot)
                raise StorageError("no layer slot is free any more", subject=str(self._path))
            record = LayerRecord(slot, blob_digest, toc_digest, size, toc_offset)
            self._layers[slot] = record
            self._slots[blob_digest, toc_digest] = slot
            return record

    def is_complete(self, slot: int) -> bool:
        """Whether the whole blob was stored and its digest checked."""
        return slot in self._complete

    def set_complete(self, slot: int, complete: bool = True) -> None:
        """Remember whether the whole blob is stored and its digest was checked."""
        with self._lock:
            self._write("UPDATE layers SET complete = ? WHERE slot = ?", complete, slot)
            if complete:
                self._complete.add(slot)
            else:
                self._complete.discard(slot)

    # -- views ---------------------------------------------------------------------

    def view(self, key: int) -> View | None:
        """The view with this name hash.  Never waits."""
        return self._views.get(key)

    def views_of(self, key: int) -> tuple[View, ...]:
        """The views of the reference with this name hash.  Never waits."""
        return tuple(self._by_reference.get(key, ()))

    def views(self) -> tuple[View, ...]:
        """All views.  Never waits."""
        return tuple(self._views.copy().values())

    def add_view(
        self, reference: str, name: Digest, dialect: Dialect, slot: int, info: bytes
    ) -> View:
        """The view of a layer under a name; an existing one is returned as it is."""
        key = names.name_hash(reference, name)
        with self._lock:
            known = self._views.get(key)
            if known is not None:
                return known
            number = self._numbers.get(slot, 0) + 1
            if number >= names.VIEWS:
                raise StorageError(f"layer {name} has too many names")
            view = View(key, reference, name, dialect, slot, number, info, time.time())
            self._write(
                "INSERT INTO views VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                key, reference, name, dialect.value, slot, number, info, view.created,
            )  # fmt: skip
            self._remember(view)
            return view

    # -- uses ------------------------------------------------------------------------

    def uses(self, key: int) -> int:
        """How many clients say they use a view.  Never waits."""
        return self._uses.get(key, 0)

    def count_use(self, key: int, change: int) -> int:
        """Change the use count in memory; save_uses() writes it.  Never below zero."""
        count = max(0, self._uses.get(key, 0) + change)
        self._uses[key] = count
        return count

    def save_uses(self, keys: set[int]) -> None:
        """Write the counts of these views to disk."""
        with self._lock:
            for key in keys:
                self._write(
                    "INSERT INTO uses VALUES (?, ?) "
                    "ON CONFLICT (key) DO UPDATE SET count = excluded.count",
                    key,
                    self._uses.get(key, 0),
                )

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()
