"""Our program started by fork from a process that has loaded it: what a kill hits is its work.

A start of Python takes as long as a small pull.  Whoever kills the program at random points wants
them in what it does, not in what it imports; and tests with hundreds of commands want to end.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from lab.podman import CommandError

_ANSWER_SECONDS: Final = 120.0


class Zygote:
    """Runs `layerstore` commands, one after the other, and kills them when wanted.

    A context manager.  ``environment`` replaces os.environ; output goes to ``log``.
    """

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self.log: Final = log
        self._errors: Final = log.with_name(f"{log.name}.errors")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lab.zygote"],
            env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        *arguments: str,
        kill_after: float | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> tuple[int, float]:
        """Exit status (negative: the signal) and seconds; killed if it still runs by then.

        ``environment`` is another one than the zygote's, for this command.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([str(self.log), environment, *arguments]) + "\n")
        self._process.stdin.flush()
        pid = int(self._answer())
        start = time.monotonic()
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)  # it is not waited for before the next line
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        ended, status = self._answer().split()
        return int(status), float(ended) - start

    def command(
        self, *arguments: str, environment: Mapping[str, str], check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """As ``lab.podman.run`` runs a program; raises CommandError."""
        status, _ = self.run(*arguments, environment=environment)
        errors = self._errors.read_text(errors="replace")
        done = subprocess.CompletedProcess(
            ["layerstore", *arguments], status, self.output(), errors
        )
        if check and status:
            raise CommandError(done)
        return done

    def said(self) -> str:
        """What the last command printed."""
        return self.log.read_text(errors="replace") + self._errors.read_text(errors="replace")

    def output(self) -> str:
        """What the last command printed on standard output."""
        return self.log.read_text(errors="replace")

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the zygote ended: {self.said()}")
        return line

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _serve() -> None:
    # not for who only starts this
    for verb in ("check", "images", "layers", "mounts", "prune", "pull", "push", "save"):
        importlib.import_module(f"layerstore.cli.{verb}")

    for line in iter(sys.stdin.readline, ""):
        log, environment, *arguments = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(log, environment, arguments)
        print(pid, flush=True)
        status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        ended = time.monotonic()
        assert status is not None
        sys.stdin.readline()  # the pid stays valid until the killer is through
        _, code = os.waitpid(pid, 0)
        print(ended, os.waitstatus_to_exitcode(code), flush=True)


def _become(log: str, environment: Mapping[str, str] | None, arguments: Sequence[str]) -> None:
    from layerstore.cli import main  # noqa: PLC0415

    signal.alarm(int(_ANSWER_SECONDS))
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, log), (2, f"{log}.errors")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    status = 1
    try:
        main(arguments)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        with contextlib.suppress(BaseException):
            sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
