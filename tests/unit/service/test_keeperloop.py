"""What the keeper decides when several things happen in one turn of its loop."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerstore.service import messages
from layerstore.service.child import Child, Stage
from layerstore.service.holding import Holding
from layerstore.service.keeperloop import Keeper
from layerstore.service.options import Options
from layerstore.service.signalpipe import SignalPipe
from layerstore.service.systemd import Notifier


class Signals(SignalPipe):
    """Signals that a test gives instead of the kernel."""

    def __init__(self, *numbers: int) -> None:
        self.fd, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        os.write(writing, bytes(numbers))
        os.close(writing)
        self._noted = []


class Unmounted(Holding):
    """Remembers whether the mounts were taken off."""

    times = 0

    def unmount(self) -> None:
        self.times += 1


@pytest.fixture
def server() -> Iterator[tuple[Child, socket.socket]]:
    """A process that was told to serve, and its end of the link."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    command = [sys.executable, "-c", "import signal; signal.pause()"]
    process = subprocess.Popen(command)
    with ours, theirs:
        yield Child(process.pid, ours, Stage.STARTING), theirs
    process.kill()
    process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_in_the_moment_in_which_the_first_server_serves_unmounts(
    tmp_path: Path,
    server: tuple[Child, socket.socket],
    number: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    child, link = server
    notifier = Notifier.of({})
    holding = Unmounted(notifier)
    signals = Signals(number)  # is there before what the server says
    messages.send(link, {"serving": True})

    def start(keeper: Keeper) -> None:
        keeper.server = child
        keeper._watch(child)

    monkeypatch.setattr(Keeper, "_start", start)
    keeper = Keeper(Options(tmp_path, tmp_path, None, False), notifier, holding, signals)
    assert keeper.run() == 0
    assert holding.times == 1
