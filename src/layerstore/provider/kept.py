"""Images that the administrator pinned: complete here, and never evicted."""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Callable
from contextlib import AbstractContextManager


@dataclasses.dataclass(frozen=True, slots=True)
class KeptImage:
    """A pinned image: ``slots`` are its layers as far as they are known.

    ``platforms`` is the JSON of those to keep of an index: a list, or null for all.
    ``complete`` says that all of its layers were once here.
    """

    reference: str
    platforms: str
    slots: frozenset[int]
    complete: bool


class KeptImages:
    """The tables ``kept_images`` and ``kept_layers`` of the state database.  Thread-safe.

    ``write`` executes SQL with values, and raises StorageError.
    """

    def __init__(
        self,
        db: sqlite3.Connection,
        lock: AbstractContextManager[bool],
        write: Callable[..., object],
    ) -> None:
        self._lock = lock
        self._write = write
        self._images: dict[str, KeptImage] = {
            reference: KeptImage(reference, platforms, frozenset(), bool(complete))
            for reference, platforms, complete in db.execute("SELECT * FROM kept_images")
        }
        for reference, slot in db.execute("SELECT reference, slot FROM kept_layers"):
            self._add(reference, slot)

    def images(self) -> tuple[KeptImage, ...]:
        """All of them."""
        with self._lock:
            return tuple(self._images.values())

    def keep(self, reference: str, platforms: str) -> None:
        """Pin an image; one that is pinned already keeps its layers."""
        with self._lock:
            known = self._images.get(reference)
            self._write("INSERT OR REPLACE INTO kept_images VALUES (?, ?, 0)", reference, platforms)
            slots = frozenset[int]() if known is None else known.slots
            self._images[reference] = KeptImage(reference, platforms, slots, False)

    def keep_layer(self, reference: str, slot: int) -> None:
        """A layer of a pinned image; nothing if the image is not pinned any more."""
        with self._lock:
            if reference in self._images:
                self._write("INSERT OR IGNORE INTO kept_layers VALUES (?, ?)", reference, slot)
                self._add(reference, slot)

    def _add(self, reference: str, slot: int) -> None:
        known = self._images[reference]
        self._images[reference] = dataclasses.replace(known, slots=known.slots | {slot})

    def set_complete(self, reference: str) -> None:
        """All layers of a pinned image are complete."""
        with self._lock:
            known = self._images.get(reference)
            if known is not None:
                self._write("UPDATE kept_images SET complete = 1 WHERE reference = ?", reference)
                self._images[reference] = dataclasses.replace(known, complete=True)

    def let_go(self, reference: str) -> bool:
        """Unpin an image; False if it was not pinned."""
        with self._lock:
            if self._images.pop(reference, None) is None:
                return False
            self._write("DELETE FROM kept_layers WHERE reference = ?", reference)
            self._write("DELETE FROM kept_images WHERE reference = ?", reference)
            return True
