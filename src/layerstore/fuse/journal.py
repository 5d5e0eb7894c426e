"""Which requests are open, for the next server: for kernels that cannot send them again.

A kernel before 6.9 never tells a server that takes over what the last one left unanswered, and
the callers would wait for ever.  So the session keeps the numbers of its requests in memory that
outlives it (a memfd, whose descriptor its keeper holds), and the next one answers EIO to them.

A number that was answered already is harmless there: the kernel knows it no more (ENOENT), and
never uses one twice.  So nothing is crossed out.  A number is overwritten when its place is the
one that has been free for longest, which keeps those whose answer is just being written.  Requests
are read into the same memory, because a server may die between read(2) and its next line of
Python: the number of the last one is always there.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from .session import Request

READ_BUFFER: Final = 64 * 1024  # nobody writes: xattr names and forget lists are the longest
PLACES: Final = 16 * 1024  # of open requests; what is above is lost when the server dies
_NUMBER: Final = struct.Struct("=Q")
_UNIQUE_OFFSET: Final = 8  # in a request's header
_BYTES: Final = READ_BUFFER + PLACES * _NUMBER.size


class Journal:
    """The journal in the memory of ``fd``, which `create` made.  The descriptor stays the caller's."""

    def __init__(self, fd: int) -> None:
        self._memory = memoryview(mmap.mmap(fd, _BYTES))
        self.buffer: Final = self._memory[:READ_BUFFER]
        self._places: Final = self._memory[READ_BUFFER:]

    @staticmethod
    def create() -> int:
        """Memory for a new mount: the descriptor (close on exec)."""
        fd = os.memfd_create("layerstore-journal", os.MFD_CLOEXEC)
        os.ftruncate(fd, _BYTES)
        return fd

    def left_open(self) -> Iterator[int]:
        """The numbers of all requests that may be without an answer."""
        last: int = _NUMBER.unpack_from(self.buffer, _UNIQUE_OFFSET)[0]
        numbers = {last, *(number for (number,) in _NUMBER.iter_unpack(self._places))}
        yield from sorted(numbers - {0})

    def reset(self) -> None:
        """Forget all numbers."""
        self._memory[:] = bytes(_BYTES)

    def open_requests(self) -> dict[int, Request]:
        """A table of requests by number, whose keys are in the journal, too."""
        return _Journaled(self._places)


class _Journaled(dict[int, "Request"]):
    """`clear` leaves the journal as it is: the next server has to know."""

    def __init__(self, places: memoryview) -> None:
        super().__init__()
        self._memory = places
        self._free = deque(range(0, len(places), _NUMBER.size))
        self._used: dict[int, int] = {}

    def __setitem__(self, unique: int, request: Request) -> None:
        if self._free:
            place = self._used[unique] = self._free.popleft()
            _NUMBER.pack_into(self._memory, place, unique)
        super().__setitem__(unique, request)

    def __delitem__(self, unique: int) -> None:
        super().__delitem__(unique)
        self._release(unique)

    def pop(self, unique: int, *default: Any) -> Any:
        found = super().pop(unique, *default)
        self._release(unique)
        return found

    def _release(self, unique: int) -> None:
        place = self._used.pop(unique, None)
        if place is not None:
            self._free.append(place)
