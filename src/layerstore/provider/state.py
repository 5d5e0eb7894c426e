"""What the provider must remember across restarts, in one SQLite database.

* ``documents``: manifests, indexes and configs, byte for byte, by digest;
* ``pins``: which documents a reference stood for, newest last: a tag moves, but a
  client goes on to use the layers of the image that it pulled;
* ``layers``: one row for each set of claims (blob digest, TOC digest, diff ID): who
  published one lie must not harm those who tell the truth about the same blob.  Its
  ``slot`` is part of every node id and never given to another layer;
* ``views``: a layer under one name: reference, digest in the path, and the
  ``info`` that was shown, which never changes again;
* ``uses``: how often clients said they use a view: a hint, see als-protocol;
* ``kept_images`` and ``kept_layers``: what the administrator pinned (the table ``pins`` is
  older, and about something else).

Everything is loaded at the start; later reads come from memory, writes go to
disk in the thread that makes them.
"""

from __future__ import annotations

import dataclasses
import logging
import sqlite3
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from layerstore.errors import DiskFull, StorageError
from layerstore.formats.announced import Form
from layerstore.image import Digest
from layerstore.provider import names, schema
from layerstore.provider.dialect import Dialect
from layerstore.provider.kept import KeptImages

_log = logging.getLogger(__name__)

_NOTHING_GOES = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY)


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """A manifest, index or config as the registry gave it."""

    digest: Digest
    media_type: str
    body: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class LayerRecord:
    """An indexed layer, as those claim who published it; sizes and offsets in bytes of the blob.

    ``toc_digest`` is None for an ordinary layer, ``diff_id`` where no claim is known.  ``notes``
    is a JSON object of those annotations of the descriptor that lead to the TOC; ``tar_length``
    is what a tar-split says of the tar stream, None if there is none.  ``diff_size``
    is the exact length of the tar stream once all claims were ``verified`` over the whole blob,
    else -1; ``quarantine`` says why one of them is false, else "".
    """

    slot: int
    blob_digest: Digest
    toc_digest: Digest | None
    diff_id: Digest | None
    size: int
    toc_offset: int
    form: Form
    notes: str = ""
    tar_length: int | None = None
    diff_size: int = -1
    quarantine: str = ""

    @property
    def verified(self) -> bool:
        """Whether blob digest, diff ID and the agreement of TOC and tar stream were checked."""
        return self.diff_size >= 0


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
    """The database ``path``, which no other process can open meanwhile.

    Raises StorageError when the disk fails.  Thread-safe.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()
        self._unsaved: set[int] = set()
        try:
            self._db = self._connected()
            path.chmod(0o600)
            schema.bring_up(self._db, path)
            self._load()
        except (sqlite3.Error, OSError) as error:
            raise StorageError(
                f"cannot open the state database: {error}", subject=str(path)
            ) from error

    def _connected(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
        try:
            # Alone, it needs no -shm file.  SQLite 3.40 maps that after writing one byte of each
            # page, and a full disk with smaller blocks then ends the process with SIGBUS.
            database.execute("PRAGMA locking_mode = EXCLUSIVE")
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            database.execute("SELECT 1 FROM sqlite_master").fetchone()
        except sqlite3.Error:
            database.close()
            raise
        return database

    def _load(self) -> None:
        self._layers: dict[int, LayerRecord] = {}
        self._complete: set[int] = set()
        self._evicted: dict[int, float] = {}
        self._used: dict[int, float] = {}
        self._slots: dict[tuple[str, str, str], int] = {}
        for (
            slot,
            blob,
            toc,
            diff_id,
            size,
            at,
            form,
            notes,
            tar,
            complete,
            evicted,
            used,
            *facts,
        ) in self._db.execute(
            "SELECT slot, blob_digest, toc_digest, diff_id, size, toc_offset, form, notes,"
            " tar_length, complete, evicted, used, diff_size, quarantine FROM layers"
        ):
            self._layers[slot] = LayerRecord(
                slot, Digest(blob), Digest(toc) if toc else None,
                Digest(diff_id) if diff_id else None, size, at, Form(form), notes, tar, *facts,
            )  # fmt: skip
            self._slots[blob, toc, diff_id] = slot
            self._used[slot] = used
            if complete:
                self._complete.add(slot)
            if evicted:
                self._evicted[slot] = evicted
        self._views: dict[int, View] = {}
        self._odd_views: list[int] = []
        self._by_reference: dict[int, list[View]] = {}
        self._numbers: dict[int, int] = {}
        for key, reference, name, dialect, slot, number, info, created in self._db.execute(
            "SELECT * FROM views"
        ):
            view = View(key, reference, Digest(name), Dialect(dialect), slot, number, info, created)
            if _makes_sense(view, self._layers.get(slot)):
                self._remember(view)
            else:
                self._odd_views.append(key)
                self._numbers[slot] = max(self._numbers.get(slot, 0), number)
        self._uses: dict[int, int] = dict(self._db.execute("SELECT key, count FROM uses"))
        self._pins: dict[str, list[Digest]] = {}
        for reference, digest in self._db.execute("SELECT reference, digest FROM pins ORDER BY id"):
            self._pins.setdefault(reference, []).append(Digest(digest))
        self.kept = KeptImages(self._db, self._lock, self._write)
        """The images that were pinned."""

    def _remember(self, view: View) -> None:
        self._views[view.key] = view
        self._by_reference.setdefault(names.name_hash(view.reference), []).append(view)
        self._numbers[view.slot] = max(self._numbers.get(view.slot, 0), view.number)

    def _write(self, sql: str, *values: object) -> sqlite3.Cursor:
        try:
            return self._db.execute(sql, values)
        except sqlite3.Error as error:
            primary = getattr(error, "sqlite_errorcode", 0) & 0xFF
            kind = DiskFull if primary in _NOTHING_GOES else StorageError
            raise kind(f"cannot write: {error}", subject=str(self._path)) from error

    def _save_layer(self, slot: int) -> None:
        """Write what was found out of a layer; what the disk does not take, another time."""
        record = self._layers[slot]
        try:
            self._write(
                "UPDATE layers SET complete = ?, diff_size = ?, quarantine = ?, evicted = ?"
                " WHERE slot = ?",
                slot in self._complete, record.diff_size, record.quarantine,
                self._evicted.get(slot, 0.0), slot,
            )  # fmt: skip
        except DiskFull as error:
            self._unsaved.add(slot)
            _log.error("event=layer-not-saved slot=%d error=%s", slot, error)
        else:
            self._unsaved.discard(slot)

    def save_layers(self) -> None:
        """Write what the disk did not take before."""
        with self._lock:
            for slot in tuple(self._unsaved):
                self._save_layer(slot)

    # -- documents and pins ------------------------------------------------------

    def document(self, digest: Digest) -> Document | None:
        """A stored document, verified; one that is damaged is forgotten."""
        with self._lock:
            row = self._db.execute(
                "SELECT media_type, body FROM documents WHERE digest = ?", (digest,)
            ).fetchone()
        if row is not None and Digest.of(row[1]) != digest:
            self.drop_document(digest)
            return None
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

    def problems(self) -> list[str]:
        """What the database finds wrong with itself."""
        with self._lock:
            try:
                found = [str(row[0]) for row in self._db.execute("PRAGMA quick_check")]
            except sqlite3.Error as error:
                return [str(error)]
        return [] if found == ["ok"] else found

    def wrong_documents(self) -> list[Digest]:
        """Documents whose bytes do not have their digests."""
        with self._lock:
            try:
                rows = self._db.execute("SELECT digest, body FROM documents").fetchall()
            except sqlite3.Error:
                return []  # `problems` tells
        return [Digest(digest) for digest, body in rows if Digest.of(body) != digest]

    def odd_views(self) -> tuple[int, ...]:
        """Keys of views that contradict themselves: nobody is shown them."""
        return tuple(self._odd_views)

    def drop_odd_view(self, key: int) -> None:
        """Forget one of them."""
        with self._lock:
            self._write("DELETE FROM views WHERE key = ?", key)
            self._odd_views.remove(key)

    def drop_document(self, digest: Digest) -> None:
        """Forget a document."""
        with self._lock:
            self._write("DELETE FROM documents WHERE digest = ?", digest)

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

    def find_layer(
        self, blob_digest: Digest, toc_digest: Digest | None, diff_id: Digest | None
    ) -> LayerRecord | None:
        """The record of the layer of which just this is claimed."""
        with self._lock:
            slot = self._slots.get((blob_digest, toc_digest or "", diff_id or ""))
            return None if slot is None else self._layers[slot]

    def layers_of_blob(self, blob_digest: Digest) -> tuple[LayerRecord, ...]:
        """All layers that are claimed to be in this blob."""
        with self._lock:
            return tuple(
                record for record in self._layers.values() if record.blob_digest == blob_digest
            )

    def layer(self, slot: int) -> LayerRecord | None:
        """The record of a slot."""
        return self._layers.get(slot)

    def layers(self) -> tuple[LayerRecord, ...]:
        """All known layers."""
        with self._lock:
            return tuple(self._layers.values())

    def add_layer(
        self,
        blob_digest: Digest,
        toc_digest: Digest | None,
        diff_id: Digest | None,
        *,
        size: int,
        toc_offset: int,
        form: Form,
        notes: str = "",
        tar_length: int | None = None,
    ) -> LayerRecord:
        """A record for the layer, with a slot of its own; a known one is returned as it is."""
        with self._lock:
            known = self.find_layer(blob_digest, toc_digest, diff_id)
            if known is not None:
                return known
            cursor = self._write(
                "INSERT INTO layers (blob_digest, toc_digest, diff_id, size, toc_offset, form,"
                " notes, tar_length, used) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                blob_digest, toc_digest or "", diff_id or "", size, toc_offset, form.value, notes,
                tar_length, time.time(),
            )  # fmt: skip
            slot = cursor.lastrowid or 0
            if slot >= names.SLOTS:
                self._write("DELETE FROM layers WHERE slot = ?", slot)
                raise StorageError("no layer slot is free any more", subject=str(self._path))
            record = LayerRecord(
                slot, blob_digest, toc_digest, diff_id, size, toc_offset, form, notes, tar_length
            )
            self._layers[slot] = record
            self._slots[blob_digest, toc_digest or "", diff_id or ""] = slot
            self._used[slot] = time.time()
            return record

    def set_verified(self, slot: int, diff_size: int) -> None:
        """Everything that is claimed of the layer is true; its tar stream has this length."""
        with self._lock:
            self._layers[slot] = dataclasses.replace(self._layers[slot], diff_size=diff_size)
            self._save_layer(slot)

    def quarantine(self, slot: int, why: str) -> None:
        """Something that is claimed of the layer is false: it is never shown again."""
        with self._lock:
            self._layers[slot] = dataclasses.replace(self._layers[slot], quarantine=why)
            self._save_layer(slot)

    def is_complete(self, slot: int) -> bool:
        """Whether the whole blob was stored and its digest checked."""
        return slot in self._complete

    def set_complete(self, slot: int, complete: bool = True) -> None:
        """Remember whether the whole blob is stored and its digest was checked."""
        with self._lock:
            (self._complete.add if complete else self._complete.discard)(slot)
            if complete:
                self._evicted.pop(slot, None)
            self._save_layer(slot)

    # -- what stays on the disk ----------------------------------------------------------

    def evicted(self, slot: int) -> float:
        """When contents of the layer were removed (seconds since 1970); 0 if it was completed since."""
        return self._evicted.get(slot, 0.0)

    def set_evicted(self, slot: int) -> None:
        """The contents of the layer are about to be removed."""
        with self._lock:
            self._complete.discard(slot)
            self._evicted[slot] = time.time()
            self._save_layer(slot)

    def used(self, slot: int) -> float:
        """When somebody last used the layer, in seconds since 1970; never waits."""
        return self._used.get(slot, 0.0)

    def set_used(self, when: Mapping[int, float]) -> None:
        """Remember when layers were last used."""
        with self._lock:
            for slot, seconds in when.items():
                self._write("UPDATE layers SET used = ? WHERE slot = ?", seconds, slot)
                self._used[slot] = seconds

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
        """The view of a layer under a name; one of it stays as it is, one of another gives way."""
        key = names.name_hash(reference, name)
        with self._lock:
            known = self._views.get(key)
            if known is not None and known.slot == slot:
                return known
            number = self._numbers.get(slot, 0) + 1
            if number >= names.VIEWS:
                raise StorageError(f"layer {name} has too many names")
            view = View(key, reference, name, dialect, slot, number, info, time.time())
            self._write(
                "INSERT OR REPLACE INTO views VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                key, reference, name, dialect.value, slot, number, info, view.created,
            )  # fmt: skip
            self._odd_views = [odd for odd in self._odd_views if odd != key]
            if known is not None:
                self._by_reference[names.name_hash(reference)].remove(known)
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

    # -- the database itself -----------------------------------------------------------

    @property
    def changes(self) -> int:
        """Grows with each change."""
        return self._db.total_changes

    def copy_to(self, target: sqlite3.Connection) -> None:
        """Make another database the same as this one.  Raises sqlite3.Error."""
        with self._lock:
            self._db.backup(target)

    def reserve_slots(self, highest: int) -> None:
        """Give no slot up to this one to a new layer."""
        with self._lock:
            row = self._db.execute(
                "SELECT seq FROM sqlite_sequence WHERE name = 'layers'"
            ).fetchone()
            if row is not None and row[0] >= highest:
                return
            self._write("DELETE FROM sqlite_sequence WHERE name = 'layers'")
            self._write("INSERT INTO sqlite_sequence VALUES ('layers', ?)", highest)

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()


def _makes_sense(view: View, record: LayerRecord | None) -> bool:
    """Whether a view can be what was written: its key, its name and its layer tell of each other."""
    return (
        record is not None
        and view.key == names.name_hash(view.reference, view.name)
        and view.name in (record.blob_digest, record.toc_digest)
    )
