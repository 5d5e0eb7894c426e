"""A real systemd as process 1 of namespaces of its own: what a unit does can be tried for real.

It shares files and network with the machine; processes, mounts and control groups are its own.
It knows the units that it is given and nothing else, and no bus runs.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

SYSTEMD: Final = Path("/lib/systemd/systemd")
_START_SECONDS: Final = 20.0
_TARGET: Final = "[Unit]\nDefaultDependencies=no\n"
_BOOT: Final = """
set -e
echo $$ > {group}/cgroup.procs
exec unshare --pid --fork --mount --cgroup --ipc --uts sh -ec '
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd
cp -r {units} /run/systemd/system
umount --lazy --recursive /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
exec env -i container=lab PATH=/usr/sbin:/usr/bin:/sbin:/bin {systemd} --system --unit=lab.target \
    --log-target=console --show-status=no
'
"""


class NoSystemdError(RuntimeError):
    """It cannot run here; the message has its log."""


class PrivateSystemd:
    """A context manager: boots with ``units`` (file name: text), ends all of it at the end.

    Units should say ``DefaultDependencies=no``.
    """

    def __init__(self, directory: Path, units: Mapping[str, str]) -> None:
        self._directory = directory
        self._units = {"lab.target": _TARGET, **units}
        self._group = _cgroup2() / f"layerstore-lab-{os.getpid()}"
        self._pid = 0

    def __call__(self, *command: str, check: bool = True) -> str:
        """Run a program beside it; what it printed.  CalledProcessError."""
        done = subprocess.run(
            self._inside(command), capture_output=True, text=True, timeout=60, check=False
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{command} failed:\n{done.stdout}{done.stderr}\n{self.log()}")
        return done.stdout

    def popen(self, *command: str, **options: Any) -> subprocess.Popen[str]:
        """Start a program beside it; ``options`` are those of Popen."""
        return subprocess.Popen(self._inside(command), text=True, **options)

    def show(self, unit: str, key: str) -> str:
        """A property of a unit."""
        return self("systemctl", "show", "--value", "--property", key, unit).strip()

    def log(self) -> str:
        """What it and its units wrote."""
        return (self._directory / "systemd.log").read_text(errors="replace")

    def _inside(self, command: tuple[str, ...]) -> list[str]:
        return ["nsenter", "--target", str(self._pid), "--mount", "--pid", "--cgroup", *command]

    def __enter__(self) -> Self:
        units = self._directory / "units"
        units.mkdir(parents=True)
        for name, text in self._units.items():
            (units / name).write_text(text)
        self._group.mkdir()
        script = _BOOT.format(group=self._group, units=shlex.quote(str(units)), systemd=SYSTEMD)
        with (self._directory / "systemd.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["sh", "-c", script], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        end = time.monotonic() + _START_SECONDS
        while not self._runs():
            if time.monotonic() > end or self._process.poll() is not None:
                self.__exit__(None, None, None)
                raise NoSystemdError(self.log())
            time.sleep(0.05)
        return self

    def _runs(self) -> bool:
        parent = self._process.pid
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        self._pid = int(children[0]) if children else 0
        if not self._pid:
            return False
        command = Path(f"/proc/{self._pid}/cmdline").read_bytes()
        ask = self._inside(("systemctl", "is-active", "lab.target"))
        return command.startswith(os.fsencode(SYSTEMD)) and (
            subprocess.run(ask, capture_output=True, check=False).returncode == 0
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # the end of process 1 is the end of all processes of its namespace, and of its mounts
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid or self._process.pid, signal.SIGKILL)
        self._process.wait()
        groups = sorted(self._group.rglob("*/"), reverse=True)
        for group in (*groups, self._group):
            _removed(group)


def _removed(group: Path) -> None:
    end = time.monotonic() + 10
    while True:  # its processes are still ending
        try:
            group.rmdir()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
        else:
            return


def _cgroup2() -> Path:
    """Where the unified hierarchy is mounted.  NoSystemdError."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(place)
    raise NoSystemdError("there is no cgroup2 here")
