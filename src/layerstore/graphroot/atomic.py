"""Files that are there as a whole or not at all: temporary file, sync, rename.

The temporary file is called ``.tmp-<name><random digits>`` and stands beside the file, as
containers/storage has it.  A process that is killed leaves it behind; whoever holds the lock of
the file knows that nobody is writing it, and may ``sweep``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from layerstore.errors import StorageError

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


@contextlib.contextmanager
def storage_errors(subject: Path) -> Iterator[None]:
    """Raise ``StorageError`` for what the operating system refuses, naming the file.

    ``subject`` is named where the system names none.
    """
    try:
        yield
    except OSError as error:
        named = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
        reason = error.strerror or str(error)
        raise StorageError(f"cannot be used: {reason}", subject=named or str(subject)) from error


def write_file(path: Path, data: bytes, *, sync: bool = True, mode: int = 0o600) -> os.stat_result:
    """Replace ``path`` by ``data``; what was there stays until the new file is complete.

    ``sync`` makes it survive a power failure.  Returns the facts of the new file.  Raises
    ``StorageError``, and then leaves nothing behind.
    """
    temporary = path.parent / f".tmp-{path.name}{secrets.randbelow(10**10)}"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, mode)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fchmod(descriptor, mode)
            if sync:
                os.fsync(descriptor)
            facts = os.fstat(descriptor)
            os.rename(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        finally:
            os.close(descriptor)
        if sync:
            sync_directory(path.parent)
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror}", subject=str(path)) from error
    return facts


def sync_directory(directory: Path) -> None:
    """Make renames in ``directory`` survive a power failure; raises ``OSError``."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> None:
    """Let two directory entries of one mount, whatever they are, change places in one step.

    Raises ``OSError``.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    names = (os.fsencode(one), os.fsencode(other))
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(other))


def sweep(directory: Path, name: str = "") -> None:
    """Remove temporary files of ``name`` (all without it) that dead processes left.

    The lock that protects the files must be held for writing.  Nothing is raised: what cannot be
    removed does no harm.
    """
    prefix = f".tmp-{name}"
    with contextlib.suppress(OSError):
        for entry in os.scandir(directory):
            ours = entry.name.startswith(prefix)
            if ours and (not name or entry.name[len(prefix) :].isdigit()):
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)


def read_file(path: Path, limit: int) -> tuple[bytes, os.stat_result]:
    """A whole file and its facts; raises ``OSError``, ``StorageError`` above ``limit`` bytes."""
    with open(path, "rb") as file:
        facts = os.fstat(file.fileno())
        data = file.read(limit + 1)
    if len(data) > limit:
        raise StorageError(f"is larger than {limit} bytes", subject=str(path))
    return data, facts
