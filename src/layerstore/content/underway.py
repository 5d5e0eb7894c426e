"""Which objects are being written at this moment.

Small objects are made under their final names: a name for the time of writing, and the change to
the final one, would cost as much as all the rest.  Until its stamp is on it, such a file looks like
one that a power failure spoilt, so readers ask here whether it is only not finished.  A process
that is killed leaves the digests in a file, of 32 bytes each, for the next one to remove the halves.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Final

from layerstore.content.files import OpenFile, open_to_fill

_DIGEST_BYTES: Final = 32
_NONE: Final = bytes(_DIGEST_BYTES)
_SLOTS: Final = 64  # more at once than threads write; what is above is left to the next reader


class Underway:
    """The SHA-256s of objects that are being written; ``path`` is its file.  Thread-safe.

    ``left`` are those that may have been under way when the last process ended.  A disk that takes
    nothing is no error: halves then wait for a reader, who finds them damaged.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._slots: dict[bytes, int | None] = {}
        self._free = list(range(_SLOTS))
        before = b""
        try:
            self._file = OpenFile(open_to_fill(path))
            before = self._file.read(0, _SLOTS * _DIGEST_BYTES)
            os.pwrite(self._file.fd, _NONE * _SLOTS, 0)
        except OSError:
            self._free.clear()
        found = (before[at : at + _DIGEST_BYTES] for at in range(0, len(before), _DIGEST_BYTES))
        self.left: Final = frozenset(found) - {_NONE}

    def begin(self, digest: bytes) -> bool:
        """The caller writes this object now; False if somebody does already."""
        with self._lock:
            if digest in self._slots:
                return False
            slot = self._slots[digest] = self._free.pop() if self._free else None
        if slot is not None:
            with contextlib.suppress(OSError):
                os.pwrite(self._file.fd, digest, slot * _DIGEST_BYTES)
        return True

    def end(self, digest: bytes) -> None:
        """It is complete, or gone."""
        slot = self._slots[digest]
        if slot is not None:
            with contextlib.suppress(OSError):
                os.pwrite(self._file.fd, _NONE, slot * _DIGEST_BYTES)
        with self._lock:
            del self._slots[digest]
            if slot is not None:
                self._free.append(slot)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._slots
