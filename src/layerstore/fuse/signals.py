"""Has the caller of a request been killed?

The kernel sends INTERRUPT for any signal, once per request.  A read that then fails with
EINTR breaks programs that get harmless signals all the time (Go preempts its threads with
SIGURG), yet a killed process cannot die before its request is answered.  ``/proc`` tells
the two apart: a deadly signal is pending as SIGKILL for every thread of the group, or,
where it would dump core, as itself without anyone to catch it (proc_pid_status(5)).
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc")


def _bit(number: int) -> int:
    return 1 << (number - 1)


_KILL: Final = _bit(signal.SIGKILL)
_HARMLESS: Final = sum(
    _bit(number)
    for number in (
        signal.SIGCHLD,
        signal.SIGCONT,
        signal.SIGURG,
        signal.SIGWINCH,
        signal.SIGSTOP,
        signal.SIGTSTP,
        signal.SIGTTIN,
        signal.SIGTTOU,
    )
)


def is_deadly(status: bytes) -> bool:
    """Whether the text of ``/proc/<tid>/status`` shows a pending signal that ends the process.

    A traced process counts as killed by SIGKILL only: its debugger may swallow the rest.
    """
    fields: dict[bytes, int] = {}
    for line in status.split(b"\n"):
        key, _, value = line.partition(b":")
        try:
            if key.startswith((b"Sig", b"Shd")) and key != b"SigQ":
                fields[key] = int(value, 16)
            elif key == b"TracerPid":
                fields[key] = int(value)
        except ValueError:
            continue
    pending = fields.get(b"SigPnd", 0) | fields.get(b"ShdPnd", 0)
    if pending & _KILL:
        return True
    if fields.get(b"TracerPid", 0):
        return False
    kept = fields.get(b"SigBlk", 0) | fields.get(b"SigIgn", 0) | fields.get(b"SigCgt", 0)
    return bool(pending & ~(kept | _HARMLESS))


def is_dying(tid: int, proc: Path = _PROC) -> bool:
    """Whether thread ``tid`` has a deadly signal pending or is gone.

    Thread 0 is one in a foreign pid namespace: nothing is known, so False.
    """
    if tid <= 0:
        return False
    try:
        status = (proc / str(tid) / "status").read_bytes()
    except OSError:
        return not _exists(tid)
    return is_deadly(status)


def _exists(tid: int) -> bool:
    """/proc may hide other users' processes (hidepid); kill(2) with signal 0 does not."""
    try:
        os.kill(tid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
