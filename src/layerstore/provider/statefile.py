"""The state database as a file that may be damaged: kept twice, replaced if need be.

A start must always succeed.  A database that cannot be read is put aside as
``state.sqlite.damaged``, and the copy ``state.sqlite.copy`` takes its place; where that is damaged,
too, an empty one.  Layers that are not known any more are resolved anew when a client asks for
them.  Their slots, which are part of the node ids that the kernel may still hold, are never given
to other layers, because a slot whose directory is there counts as used.
"""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import time
from pathlib import Path
from typing import Final

from layerstore import limits
from layerstore.errors import StorageError
from layerstore.provider import schema
from layerstore.provider.state import State

_log = logging.getLogger(__name__)

# Another cause than damage: the next start may find the same file readable.
_PASSING: Final = frozenset(
    (
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
    )
)
_PARTS: Final = ("", "-wal", "-shm")


def open_state(root: Path) -> State:
    """The state below ``root``, or what can be had instead of a damaged one.

    Raises StorageError where the disk fails, and for a database of another release.
    """
    path = root / "state.sqlite"
    replacements = [lambda: _put_aside(path), lambda: _remove(path)]
    while True:
        try:
            if path.exists() and not path.stat().st_size and replacements:
                raise ValueError("the file is empty")
            state = State(path)
            damage = "; ".join(state.problems())
        except StorageError as error:
            if not replacements or not _is_damage(error.__cause__):
                raise
            damage = str(error)
        except ValueError as error:  # a word in it that no release ever wrote
            if not replacements:
                raise StorageError(f"the state makes no sense: {error}", subject=str(path)) from (
                    error
                )
            damage = str(error)
        else:
            if not damage or not replacements:
                break
            state.close()
        _log.error("event=state-damaged path=%s error=%s", path, damage)
        try:
            replacements.pop(0)()
        except OSError as error:
            raise StorageError(f"cannot replace: {error.strerror}", subject=str(path)) from error
    try:
        state.reserve_slots(_last_slot(root / "layers"))
    except StorageError:
        state.close()
        raise
    return state


def _last_slot(layers: Path) -> int:
    try:
        names = os.listdir(layers)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror}", subject=str(layers)) from error
    return max((int(name) for name in names if name.isdigit()), default=0)


def check_state(root: Path) -> None:
    """Whether `open_state` of this release can be expected to succeed below ``root``.

    Nothing is changed, and another process may have it open.  Raises StorageError.
    """
    path = root / "state.sqlite"
    try:
        schema.check_header(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(
            f"cannot open the state database: {error.strerror}", subject=str(path)
        ) from error


def _is_damage(cause: BaseException | None) -> bool:
    if not isinstance(cause, sqlite3.DatabaseError):
        return False
    code = getattr(cause, "sqlite_errorcode", None)
    return code is not None and code & 0xFF not in _PASSING


def _put_aside(path: Path) -> None:
    for part in _PARTS:
        moved = path.with_name(f"{path.name}.damaged{part}")
        moved.unlink(missing_ok=True)
        if path.with_name(path.name + part).exists():
            path.with_name(path.name + part).rename(moved)
    backup = path.with_name("state.sqlite.copy")
    if backup.exists():
        shutil.copyfile(backup, path)


def _remove(path: Path) -> None:
    for part in _PARTS:
        path.with_name(path.name + part).unlink(missing_ok=True)


class Backup:
    """The copy of the state, renewed when something has changed."""

    def __init__(self, state: State, root: Path) -> None:
        self._state = state
        self._path = root / "state.sqlite.copy"
        self._changes = -1
        self._ended = False
        self._when = float("-inf")

    def renew(self, *, last: bool = False) -> None:
        """Copy the state, but not more often than needed, unless it is the ``last`` time."""
        if self._ended:
            return
        self._ended = last
        if not last and time.monotonic() - self._when < limits.STATE_BACKUP_SECONDS:
            return
        try:
            changes = self._state.changes
            if changes != self._changes:
                self._copy()
                self._changes, self._when = changes, time.monotonic()
        except (sqlite3.Error, OSError) as error:
            _log.warning("event=state-not-copied error=%s", error)

    def _copy(self) -> None:
        fresh = self._path.with_name(self._path.name + ".new")
        fresh.unlink(missing_ok=True)
        fresh.touch(mode=0o600)  # the directory may be one that everybody can read
        target = sqlite3.connect(fresh)
        try:
            self._state.copy_to(target)
            target.execute("PRAGMA journal_mode = DELETE")
        finally:
            target.close()
        fresh.replace(self._path)
