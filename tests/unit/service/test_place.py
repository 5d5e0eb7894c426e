"""One keeper for a root directory, and who may ask it what."""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerstore import service
from layerstore.errors import NoServiceError, ServiceError, StorageError
from layerstore.service import keepersocket, messages
from layerstore.service.control import ControlServer
from layerstore.service.place import Place
from layerstore.service.places import KEEPER_SOCKET


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    claimed = Place()
    assert claimed.claim(tmp_path) is None
    yield claimed
    if claimed.claimed:
        claimed.leave()


def answering(place: Place, answer: dict[str, object]) -> threading.Thread:
    """A keeper that gives everybody the same answer."""

    def serve() -> None:
        place.listener.setblocking(True)
        while True:
            link, _ = place.listener.accept()
            with link:
                if messages.receive(link) is not None:  # else somebody only looked
                    messages.send(link, answer)
                    return

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def test_there_is_one(place: Place, tmp_path: Path) -> None:
    assert keepersocket.is_alive(tmp_path)
    assert stat.S_IMODE((tmp_path / KEEPER_SOCKET).stat().st_mode) == 0o600
    thread = answering(place, {"error": "this service does not do that now"})
    second = Place()
    with pytest.raises(ServiceError, match="another layerstore service"):
        second.claim(tmp_path)
    assert not second.claimed
    thread.join()


def test_a_lock_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    (tmp_path / "keeper.lock").mkdir()
    place = Place()
    with pytest.raises(StorageError, match=r"keeper\.lock: cannot open: Is a directory"):
        place.claim(tmp_path)
    assert not place.claimed


def test_the_next_comes_when_it_left(place: Place, tmp_path: Path) -> None:
    place.leave()
    assert not keepersocket.is_alive(tmp_path)
    assert place.claim(tmp_path) is None
    assert keepersocket.is_alive(tmp_path)


def test_a_socket_that_a_dead_one_left_is_replaced(tmp_path: Path) -> None:
    messages.listen(tmp_path, KEEPER_SOCKET, socket.SOCK_SEQPACKET).close()
    assert not keepersocket.is_alive(tmp_path)
    place = Place()
    place.claim(tmp_path)
    assert keepersocket.is_alive(tmp_path)
    place.leave()


def test_without_a_keeper_there_is_nobody_to_ask(tmp_path: Path) -> None:
    with pytest.raises(NoServiceError, match="layerstore serve"):
        service.reload(tmp_path)


def test_a_reload_tells_what_the_keeper_says(place: Place, tmp_path: Path) -> None:
    thread = answering(place, {"pid": 7})
    assert service.reload(tmp_path) == {"pid": 7}
    thread.join()
    thread = answering(place, {"error": "config.toml: no"})
    with pytest.raises(ServiceError, match="toml: no"):
        service.reload(tmp_path)
    thread.join()


def test_a_keeper_that_ends_in_the_middle_is_an_error(place: Place, tmp_path: Path) -> None:
    with keepersocket.connect(tmp_path, 5) as link:
        place.leave()
        with pytest.raises(ServiceError):
            keepersocket.ask(link, "reload")


def test_a_verb_waits_for_the_next_server(place: Place, tmp_path: Path) -> None:
    """While a keeper is alive a control socket that nobody serves is a change of servers."""
    served: list[ControlServer] = []

    def serve() -> None:
        served.append(ControlServer(tmp_path, {"status": lambda _: {"x": 1}}))

    late = threading.Timer(0.3, serve)
    late.start()
    assert service.request(tmp_path, "status") == {"x": 1}
    late.join()
    served[0].close()


def test_a_root_directory_that_is_too_long_for_a_socket(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    place = Place()
    place.claim(deep)
    assert keepersocket.is_alive(deep)
    place.leave()
    assert not os.listdir(deep) or os.listdir(deep) == ["keeper.lock"]
