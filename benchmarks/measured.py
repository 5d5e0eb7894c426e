"""One command: how long it takes, what it uses.

A small process of its own starts the command and waits for it.  The kernel counts what a process
had in memory before ``exec`` as part of its peak, so the benchmarks' own memory would be every
tool's floor.

    python -I -S measured.py FD COMMAND...      writes JSON to the descriptor FD
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

_SECONDS: Final = 900.0


@dataclass(frozen=True, slots=True)
class Use:
    """What a command and the processes that it waited for used; ``rss_bytes`` is the peak."""

    seconds: float
    cpu_seconds: float
    rss_bytes: int


def measured(command: Sequence[str], environment: Mapping[str, str]) -> Use:
    """Run a command to its end.  Raises RuntimeError with what it said when it fails."""
    reading, writing = os.pipe()
    with open(reading, "rb") as answer:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", __file__, str(writing), *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                pass_fds=[writing],
                timeout=_SECONDS,
                check=False,
            )
        finally:
            os.close(writing)
        if done.returncode:
            said = (done.stderr + done.stdout).decode(errors="replace")[-4000:]
            raise RuntimeError(f"{' '.join(command)}\nended with {done.returncode}\n{said}")
        return Use(**json.load(answer))


def cpu_seconds(pid: int) -> float:
    """What a running process has used so far."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _main(descriptor: int, command: list[str]) -> int:
    started = time.monotonic()
    child = os.fork()
    if not child:
        os.set_inheritable(descriptor, False)
        os.execvp(command[0], command)
    _, status, usage = os.wait4(child, 0)
    use = {
        "seconds": time.monotonic() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "rss_bytes": usage.ru_maxrss * 1024,
    }
    os.write(descriptor, json.dumps(use).encode())
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(_main(int(sys.argv[1]), sys.argv[2:]))
