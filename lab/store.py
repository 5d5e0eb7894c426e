"""A running `layerstore serve`, as tests, demonstration and benchmarks use it."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from lab.fdstore import FdStore
from layerstore.service import request

START_SECONDS: Final = 20.0
STOP_SECONDS: Final = 20.0
_NO_REPAIR: Final = "[repair]\nenabled = false\n"


class ServiceStartError(RuntimeError):
    """The service ended or did not mount in time; the message carries its log."""


class LayerstoreService:
    """`layerstore serve` on ``directory/store`` with its state in ``directory/state``.

    ``environment`` replaces os.environ for it (registries.conf, auth.json ...);
    ``config`` is the text of its configuration file; ``fd_store`` starts it in systemd's place.  A context manager: stops the
    process (by pid) at the end and makes sure that nothing stays mounted.
    """

    def __init__(
        self,
        directory: Path,
        *,
        environment: Mapping[str, str] | None = None,
        config: str = "",
        fd_store: FdStore | None = None,
    ) -> None:
        self._fd_store = fd_store
        self.directory: Final = directory.absolute()
        self.mountpoint: Final = self.directory / "store"
        self.root: Final = self.directory / "state"
        self.log_file: Final = self.directory / "log"
        self._config: Final = self.directory / "config.toml"
        self._environment = dict(os.environ if environment is None else environment)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.configure(config)
        self._process: subprocess.Popen[bytes] | None = None

    def configure(self, config: str) -> None:
        """Write another configuration file, for the next start."""
        # the machine's own graph root is none of a test's business
        self._config.write_text(config if "[repair]" in config else f"{config}\n{_NO_REPAIR}")

    @property
    def keeper_pid(self) -> int:
        """Process id of the keeper, which was started here and takes signals."""
        assert self._process is not None
        return self._process.pid

    @property
    def pid(self) -> int:
        """Process id of the server that serves now."""
        return int(request(self.root, "status")["pid"])

    def launch(self) -> int:
        """Start it; where in its log file that begins."""
        with self.log_file.open("ab") as log:
            start = log.tell()
            command = [
                sys.executable, "-m", "layerstore.cli", "serve", str(self.mountpoint),
                "--root", str(self.root), "--config", str(self._config),
            ]  # fmt: skip
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            if self._fd_store is None:
                self._process = subprocess.Popen(command, env=self._environment, **streams)
            else:
                self._process = self._fd_store.start(command, self._environment, **streams)
        return start

    def start(self) -> None:
        """Start it and wait until it serves."""
        start = self.launch()
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            if "event=serving" in self._log_since(start):
                return
            time.sleep(0.02)
        self.stop()
        raise ServiceStartError(self.log())

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it with a signal, and once more where containers use it still; its exit status."""
        if self._process is None:
            return 0
        start = self.log_file.stat().st_size
        if self._process.poll() is None:
            self._process.send_signal(number)
        deadline = time.monotonic() + STOP_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            if "event=draining" in self._log_since(start):
                self._process.send_signal(number)
                break
            time.sleep(0.02)
        try:
            status = self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self._process = None
        return status

    def leave(self) -> subprocess.Popen[bytes]:
        """Have nothing to do with the running process any more: it is the caller's to end."""
        assert self._process is not None
        process, self._process = self._process, None
        return process

    def _log_since(self, start: int) -> str:
        with self.log_file.open("rb") as text:
            text.seek(start)
            return text.read().decode(errors="replace")

    def log(self) -> str:
        """Everything it logged."""
        return self.log_file.read_text(errors="replace")

    def status(self) -> dict[str, Any]:
        """`layerstore status --json`."""
        result = subprocess.run(
            [sys.executable, "-m", "layerstore.cli", "status", "--json", "--root", str(self.root)],
            env=self._environment,
            capture_output=True,
            check=True,
            text=True,
        )
        answer: dict[str, Any] = json.loads(result.stdout)
        return answer

    def wait_complete(self, seconds: float = 120.0) -> None:
        """Wait until every layer that a client took is complete."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            layers = self.status()["layers"]
            if layers and all(layer["complete"] for layer in layers if layer["references"]):
                return
            time.sleep(0.2)
        raise TimeoutError(f"layers were not completed in {seconds} s:\n{self.log()}")

    def cpu_seconds(self) -> float:
        """User and system time that it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_bytes(self) -> int:
        """Resident memory."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        subprocess.run(["umount", "-l", str(self.mountpoint)], capture_output=True, check=False)
