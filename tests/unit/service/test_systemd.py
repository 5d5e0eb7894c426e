from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerstore.service.systemd import Notifier, received, without_ours


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(5)
        yield listening


def notifier(systemd: socket.socket, **more: str) -> Notifier:
    return Notifier.of({"NOTIFY_SOCKET": systemd.getsockname(), **more})


def test_without_systemd_nobody_is_told() -> None:
    silent = Notifier.of({"FDSTORE": "64"})
    assert not silent.stores
    assert silent.watchdog_seconds is None
    silent.ready()
    silent.keep("a", 0)


def test_what_it_is_told(systemd: socket.socket) -> None:
    told = notifier(systemd)
    told.ready()
    assert systemd.recv(4096) == b"READY=1\nMAINPID=%d" % os.getpid()
    told.reloading()
    assert systemd.recv(4096).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
    told.stopping()
    assert systemd.recv(4096) == b"STOPPING=1"
    told.alive()
    assert systemd.recv(4096) == b"WATCHDOG=1"


def test_a_name_space_of_its_own_is_understood(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0layerstore-{os.getpid()}")
        listening.settimeout(5)
        Notifier.of({"NOTIFY_SOCKET": f"@layerstore-{os.getpid()}"}).stopping()
        assert listening.recv(4096) == b"STOPPING=1"


def test_descriptors_go_with_their_name(systemd: socket.socket, tmp_path: Path) -> None:
    told = notifier(systemd, FDSTORE="64")
    assert told.stores
    (tmp_path / "file").write_text("kept")
    with (tmp_path / "file").open() as file:
        told.keep("one", file.fileno())
    data, (fd,), _, _ = socket.recv_fds(systemd, 4096, 4)
    assert data == b"FDSTORE=1\nFDNAME=one\nFDPOLL=0"
    with open(fd) as again:
        assert again.read() == "kept"
    told.forget("one")
    assert systemd.recv(4096) == b"FDSTOREREMOVE=1\nFDNAME=one"


@pytest.mark.parametrize("value", ["", "0", None])
def test_a_unit_without_a_store_keeps_nothing(systemd: socket.socket, value: str | None) -> None:
    told = notifier(systemd, **({} if value is None else {"FDSTORE": value}))
    assert not told.stores
    told.keep("one", 0)
    told.forget("one")
    told.stopping()
    assert systemd.recv(4096) == b"STOPPING=1"


@pytest.mark.parametrize(
    ("variables", "seconds"),
    [
        ({"WATCHDOG_USEC": "60000000"}, 30.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_ours_or_not(variables: dict[str, str], seconds: float | None) -> None:
    assert Notifier.of(variables).watchdog_seconds == seconds


def test_a_systemd_that_is_gone_does_no_harm(tmp_path: Path) -> None:
    Notifier.of({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).ready()


def test_descriptors_of_somebody_else_are_not_ours() -> None:
    variables = {"LISTEN_PID": "1", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b", "HOME": "/"}
    assert received(variables) == []
    assert variables == {"HOME": "/"}


def test_descriptors_come_by_number_and_name() -> None:
    variables = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "0", "LISTEN_FDNAMES": ""}
    assert received(variables) == []
    assert received({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "many"}) == []


def test_a_child_hears_nothing_of_systemd() -> None:
    assert without_ours({"NOTIFY_SOCKET": "/n", "FDSTORE": "1", "PATH": "/bin"}) == {"PATH": "/bin"}
