"""What the keeper decides when several things happen in one turn of its loop."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from layerstore import limits
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


Keep = Callable[[Child, Signals], Keeper]


@pytest.fixture
def keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Keep:
    """``keep(child, signals)``: a keeper whose first server is ``child``."""

    def make(child: Child, signals: Signals) -> Keeper:
        def start(keeper: Keeper) -> None:
            keeper.server = child
            keeper._watch(child)

        monkeypatch.setattr(Keeper, "_start", start)
        notifier = Notifier.of({})
        options = Options(tmp_path, tmp_path, None, False)
        return Keeper(options, notifier, Unmounted(notifier), signals)

    return make


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_in_the_moment_in_which_the_first_server_serves_unmounts(
    keep: Keep, server: tuple[Child, socket.socket], number: int
) -> None:
    child, link = server
    keeper = keep(child, Signals(number))  # it is there before what the server says
    messages.send(link, {"serving": True})
    assert keeper.run() == 0
    assert isinstance(keeper.holding, Unmounted)
    assert keeper.holding.times == 1


@pytest.mark.parametrize("answers", [True, False])
def test_only_a_server_that_gives_no_sign_of_life_is_killed(
    keep: Keep,
    server: tuple[Child, socket.socket],
    answers: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    child, link = server
    child.silent_seconds = 0.6
    keeper = keep(child, Signals())
    messages.send(link, {"serving": True})
    asked = []

    def answer() -> None:
        while (received := messages.receive(link)) is not None and "sign" in received[0]:
            asked.append(received[0])
            if answers:
                messages.send(link, {"sign": True})
            if len(asked) == 6:
                keeper._finish(3)
                return

    died = []

    def end(keeper: Keeper, *how: object) -> None:
        died.append(how)
        keeper._finish(4)

    monkeypatch.setattr(Keeper, "_died", end)
    thread = threading.Thread(target=answer)
    thread.start()
    status = keeper.run()
    if not answers:
        assert (status, asked) == (4, [{"sign": True}])
        assert died == [(child, "SIGKILL")]
        assert child.failure == "no sign of life for 0.6 s"
        link.shutdown(socket.SHUT_RD)
    thread.join(10)
    if answers:
        assert (status, len(asked), died) == (3, 6, [])


@pytest.mark.parametrize("signs", [True, False])
def test_one_that_was_told_to_serve_is_asked_for_signs_if_it_knows_them(
    server: tuple[Child, socket.socket], signs: bool
) -> None:
    child, link = server
    child.is_prepared({"silent_seconds": 3.0} | ({"signs": True} if signs else {}))
    child.serve({}, ())
    assert messages.receive(link) == ({"serve": {}}, [])
    now = time.monotonic()
    assert not child.overdue(now + 1.1)
    assert child.overdue(now + 4.2) is signs
    assert child.overdue(now + limits.SERVER_START_SECONDS + 1)  # in any case
    child.served()
    assert not child.overdue(now + 0.9)
    assert max(child.due) < now + 2
