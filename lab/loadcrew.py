"""The loads of `lab.loads` as a crew of processes: started together, watched, ended, told of.

A load that waits longer than `HANG_SECONDS` for one operation hangs.  Then the report says what it
was doing and where its threads are in the kernel, and the connection of the file system is aborted:
nothing else ends a process that waits for a server which does not answer.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from lab.fusectl import FuseControl
from lab.loads import Board, Progress, Task

HANG_SECONDS: Final = 90.0
"""More than any operation needs, the restart of a server and of a registry in it included."""

_END_SECONDS: Final = 5.0


class LoadFailure(AssertionError):
    """A load got an error or wrong bytes, ended by itself, or hangs; the message says all of it."""


class Crew:
    """Processes with loads on the mount behind ``control``; boards and logs lie in ``directory``.

    A context manager: at its end no process of it is left, whatever happened.
    """

    def __init__(self, directory: Path, control: FuseControl) -> None:
        self._directory: Final = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._control: Final = control
        self._members: list[_Member] = []

    def add(self, *tasks: Task) -> None:
        """Start further loads; their boards and logs get names of the crew's."""
        for task in tasks:
            name = f"{task.kind}-{len(self._members)}"
            placed = replace(task, board=self._directory / f"{name}.board")
            self._members.append(_Member(name, placed, self._directory))

    def progress(self) -> dict[str, Progress]:
        """What each load has done so far, by its name."""
        return {member.name: member.board.progress() for member in self._members}

    def check(self) -> None:
        """Raise LoadFailure if anything is amiss."""
        said = [text for member in self._members if (text := member.amiss())]
        if said:
            raise LoadFailure("\n".join(said))

    def finish(self) -> dict[str, Progress]:
        """Let each load finish what it does, and end; what all of them did.  Raises LoadFailure."""
        for member in self._members:
            member.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + HANG_SECONDS
        while time.monotonic() < end and any(m.process.poll() is None for m in self._members):
            time.sleep(0.02)
        said = [text for member in self._members if (text := member.last_words())]
        if said:
            raise LoadFailure("\n".join(said))
        return self.progress()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for member in self._members:
            member.kill()
        if any(not member.ended(_END_SECONDS) for member in self._members):
            self._control.abort()
            for member in self._members:
                member.ended(_END_SECONDS)


class _Member:
    """One process of a crew."""

    def __init__(self, name: str, task: Task, directory: Path) -> None:
        self.name: Final = name
        self.board: Final = Board(task.board, create=True)
        self._log: Final = directory / f"{name}.log"
        description = directory / f"{name}.task"
        description.write_bytes(msgspec.msgpack.encode(task, enc_hook=str))
        with self._log.open("wb") as log:
            self.process: Final = subprocess.Popen(
                [sys.executable, "-m", "lab.loads", str(description)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def amiss(self) -> str:
        """What is wrong with it while it should be running; nothing if all is well."""
        if self.process.poll() is not None:
            return f"{self.name} ended with {self.process.returncode}{self._said()}"
        return self._hangs() or self._complaints()

    def last_words(self) -> str:
        """What is wrong with it when it should have ended."""
        if self.process.poll() is None:
            return self._where("did not end")
        if self.process.returncode:
            return f"{self.name} ended with {self.process.returncode}{self._said()}"
        return self._complaints()

    def kill(self) -> None:
        """End it and what it started, as far as that can be done."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def ended(self, seconds: float) -> bool:
        """Wait for its end, so long at most."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _complaints(self) -> str:
        done = self.board.progress()
        if done.errors or done.wrong:
            return f"{self.name}: {done.errors} errors, {done.wrong} wrong{self._said()}"
        return ""

    def _hangs(self) -> str:
        since = self.board.progress().since
        waited = time.monotonic() - since
        return self._where(f"waits {waited:.0f} s") if since and waited > HANG_SECONDS else ""

    def _where(self, what: str) -> str:
        return "\n    ".join(
            [
                f"{self.name} {what}: {self.board.progress().doing}",
                *_kernel_places(self.process.pid),
            ]
        )

    def _said(self) -> str:
        return "\n    ".join(["", *self._log.read_text(errors="replace").splitlines()[-20:]])


def _kernel_places(session: int) -> list[str]:
    """The threads of the processes of a session that are in the kernel, and where."""
    told = []
    for task in Path("/proc").glob("[0-9]*/task/[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                name = (task / "comm").read_text().strip()
                place = (task / "wchan").read_text()
                told.append(f"{task.name} {name}: {fields[0]} in {place}")
    return told
