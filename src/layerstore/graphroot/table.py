"""One JSON file of the graph root under its lock: all layers, all images or all containers.

Every tool rewrites the whole file.  So a change is: take the write lock, load (again, if the
token or the file is not the one loaded before), change, write a new token, then the file.  The
token goes first: a writer that dies in between only makes the others read again.

Layers and containers of which nothing need survive a power failure (``podman run --rm``) stand
in a twin, ``volatile-layers.json`` and ``volatile-containers.json``, which is written without
waiting for the disk.  Tools before containers/storage 1.45 do not know the twins.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Generic, Literal, TypeVar, cast

from layerstore import limits
from layerstore.errors import CorruptStorage, StorageError
from layerstore.graphroot import atomic
from layerstore.graphroot.lockfile import LockFile
from layerstore.graphroot.records import (
    ContainerRecord,
    ImageRecord,
    LayerRecord,
    dump_records,
    load_json,
)

TableName = Literal["layers", "images", "containers"]
R = TypeVar("R", LayerRecord, ImageRecord, ContainerRecord)

_Facts = tuple[int, int, int, int] | None  # device, inode, mtime in ns, size; None: no file


@dataclass(frozen=True, slots=True)
class _Loaded(Generic[R]):
    """What the files held, and how to tell whether they still do."""

    token: bytes
    facts: tuple[_Facts, ...]
    written: tuple[R, ...]  # as in the files
    records: tuple[R, ...]  # with names unique


class Table(Generic[R]):
    """The records of one kind.  Threads may share a table: what changes is under its lock."""

    def __init__(
        self,
        directory: Path,
        name: TableName,
        record_type: type[R],
        *,
        read_only: bool = False,
        volatile_directory: Path | None = None,
    ) -> None:
        """``volatile_directory`` is where the twin stands if not in ``directory``."""
        self.name: Final = name
        self.read_only: Final = read_only
        self.lock: Final = LockFile.at(directory / f"{name}.lock", read_only=read_only)
        self._type: Final[type[R]] = record_type
        self._files: Final = (directory / f"{name}.json",) + (
            ()
            if name == "images"
            else ((volatile_directory or directory) / f"volatile-{name}.json",)
        )
        self._loaded: _Loaded[R] | None = None
        self._mutex: Final = threading.Lock()  # one reader parses, the others take the result
        self._swept = False

    @property
    def paths(self) -> tuple[Path, ...]:
        """The JSON file and, for layers and containers, its volatile twin."""
        return self._files

    def snapshot(self) -> tuple[R, ...]:
        """The records at this moment; takes the read lock itself."""
        with self.lock.reading():
            return self.load()

    def load(self) -> tuple[R, ...]:
        """All records, the volatile ones last; the lock must be held.

        A name that several records have belongs to the last one, as for every other tool.
        Raises ``CorruptStorage`` for files that are no tables, ``StorageError``.
        """
        return self._current().records

    def load_as_written(self) -> tuple[R, ...]:
        """The same with names as the files have them, for those who look for faults."""
        return self._current().written

    def save(self, records: Sequence[R], *, volatile_too: bool = True) -> None:
        """Replace all records; the write lock must be held since ``load``.

        Files whose records did not change are left alone; ``volatile_too=False`` leaves the twin
        alone in any case.  Raises ``StorageError``, also if the files are not those loaded last:
        damaged ones must never be replaced by what was in them once.
        """
        if self.read_only:
            raise StorageError("belongs to a read-only store", subject=str(self._files[0]))
        if not self.lock.held_for_writing:
            raise RuntimeError(f"{self._files[0]}: saved without the write lock")
        before = self._loaded
        if before is None or not self._is_current(before):
            raise StorageError("changed since it was loaded", subject=str(self._files[0]))
        self._sweep()
        self.lock.renew()
        facts = list(before.facts)
        written: list[R] = []
        for number, path in enumerate(self._files):
            volatile = number == 1
            old = _stands_in(before.written, volatile)
            new = _stands_in(records, volatile)
            if volatile and not volatile_too:
                new = old
            if new != old or (facts[number] is None and not volatile):
                self._loaded = None  # a failure leaves it open what is in the files
                with atomic.storage_errors(path):
                    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                facts[number] = _facts(
                    atomic.write_file(path, _within_limit(new, path), sync=not volatile)
                )
            written += new
        kept = tuple(written)
        self._loaded = _Loaded(self.lock.token(), tuple(facts), kept, unique_names(kept))

    def _current(self) -> _Loaded[R]:
        if not self.lock.held:
            raise RuntimeError(f"{self._files[0]}: loaded without the lock")
        with self._mutex:
            loaded = self._loaded
            if loaded is None or not self._is_current(loaded):
                loaded = self._loaded = self._load()
            return loaded

    def _is_current(self, loaded: _Loaded[R]) -> bool:
        # The token is the protocol; the facts find what was changed without it.
        return loaded.token == self.lock.token() and tuple(map(_stat, self._files)) == loaded.facts

    def _load(self) -> _Loaded[R]:
        token = self.lock.token()
        facts: list[_Facts] = []
        written: list[R] = []
        for number, path in enumerate(self._files):
            try:
                data, stat = atomic.read_file(path, limits.RECORDS_BYTES)
            except FileNotFoundError:
                facts.append(None)
                continue
            except OSError as error:
                raise StorageError(
                    f"cannot be read: {error.strerror}", subject=str(path)
                ) from error
            facts.append(_facts(stat))
            written += self._parse(data, path, volatile=number == 1)
        return _Loaded(token, tuple(facts), tuple(written), unique_names(written))

    def _parse(self, data: bytes, path: Path, *, volatile: bool) -> list[R]:
        if not data:
            return []  # an empty store
        items = load_json(data, str(path))
        if items is None:
            return []
        if not isinstance(items, list):
            raise CorruptStorage("is no array of records", subject=str(path))
        # mypy does not follow a class through a constrained variable
        read = cast(Callable[[Any], R], self._type.from_json)
        records = []
        for item in items:
            try:
                records.append(read(item))
            except CorruptStorage as error:
                raise CorruptStorage(str(error), subject=str(path)) from error
        return [_into_twin(record) for record in records] if volatile else records

    def _sweep(self) -> None:
        if not self._swept:
            for path in self._files:
                atomic.sweep(path.parent, path.name)
            self._swept = True

    def __repr__(self) -> str:
        return f"Table({str(self._files[0])!r}{', read-only' if self.read_only else ''})"


def unique_names(records: Sequence[R]) -> tuple[R, ...]:
    """The records with each name left to the last one that has it."""
    owner = {name: number for number, record in enumerate(records) for name in record.names}
    result = []
    for number, record in enumerate(records):
        names = tuple(name for name in record.names if owner[name] == number)
        result.append(record if names == record.names else replace(record, names=names))
    return tuple(result)


def _within_limit(records: Sequence[R], path: Path) -> bytes:
    """The file; one that nobody could load again is never written."""
    data = dump_records(records)
    if len(data) > limits.RECORDS_BYTES:
        raise StorageError(f"would be larger than {limits.RECORDS_BYTES} bytes", subject=str(path))
    return data


def _into_twin(record: R) -> R:
    values: dict[str, Any] = {"volatile": True}  # images have no twin, and no such field
    return replace(record, **values)


def _stands_in(records: Sequence[R], volatile: bool) -> list[R]:
    return [record for record in records if getattr(record, "volatile", False) is volatile]


def _stat(path: Path) -> _Facts:
    try:
        return _facts(os.stat(path))
    except OSError:
        return None


def _facts(stat: os.stat_result) -> tuple[int, int, int, int]:
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size
