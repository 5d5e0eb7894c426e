from __future__ import annotations

import json
import os
import socket
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from layerstore import limits, service
from layerstore.errors import NoServiceError, ServiceError, UnknownObject
from layerstore.service.control import ControlServer
from layerstore.service.places import CONTROL_SOCKET


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    deep = tmp_path / ("d" * 100) / ("e" * 100)  # longer than a socket address may be
    deep.mkdir(parents=True)

    def fail(_: Mapping[str, object]) -> dict[str, object]:
        raise RuntimeError("broken handler")

    def refuse(asked: Mapping[str, object]) -> dict[str, object]:
        raise UnknownObject("no such job", subject=str(asked["job"]))

    def status(_: Mapping[str, object]) -> dict[str, object]:
        return {"x": 1}

    def echo(asked: Mapping[str, object]) -> dict[str, object]:
        return dict(asked)

    def odd(_: Mapping[str, object]) -> dict[str, object]:
        return {
            "path": Path(os.fsdecode(b"/srv/\xff")),
            "more": [{os.fsdecode(b"\xfe"): 1}],
            "n": 2,
        }

    methods = {"status": status, "fail": fail, "echo": echo, "refuse": refuse, "odd": odd}
    server = ControlServer(deep, methods)
    yield deep
    server.close()


def raw(root: Path, data: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as client:
        directory = os.open(root, os.O_PATH)
        try:
            client.connect(f"/proc/self/fd/{directory}/{CONTROL_SOCKET}")
        finally:
            os.close(directory)
        client.settimeout(5)
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := client.recv(65536):
            answer += piece
        return answer


def test_names_that_are_no_utf8_are_told_as_well_as_they_can(root: Path):
    assert service.request(root, "odd") == {"path": "/srv/\ufffd", "more": [{"\ufffd": 1}], "n": 2}


def test_a_request_is_answered(root: Path):
    assert service.request(root, "status") == {"x": 1}


def test_parameters_reach_the_handler(root: Path):
    asked = service.request(root, "echo", job="7", platforms=None, names=["a"])
    assert asked == {"method": "echo", "job": "7", "platforms": None, "names": ["a"]}


def test_what_a_handler_refuses_is_told_in_one_line(root: Path, caplog: pytest.LogCaptureFixture):
    with pytest.raises(ServiceError, match=r"^7: no such job$"):
        service.request(root, "refuse", job="7")
    assert not caplog.records


def test_where_no_service_runs_the_error_says_so(tmp_path: Path):
    with pytest.raises(NoServiceError):
        service.request(tmp_path, "status")


def test_the_socket_is_private(root: Path):
    assert stat.S_IMODE((root / CONTROL_SOCKET).stat().st_mode) == 0o600


def test_other_users_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch):
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    os.chmod(root / CONTROL_SOCKET, 0o666)
    for parent in (root, *root.parents):
        if parent == Path(tempfile.gettempdir()):
            break
        parent.chmod(0o755)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            os.setuid(65534)
            os.write(writer, raw(root, b'{"method": "status"}\n'))
        except BaseException as error:
            os.write(writer, repr(error).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    assert b"only root and the owner" in said
    assert b'"x"' not in said


@pytest.mark.parametrize(
    "request_",
    [
        b"",
        b"\n",
        b"nonsense\n",
        b'{"method": "unknown"}\n',
        b'{"method": ["status"]}\n',
        b"[1]\n",
        b"x" * (limits.CONTROL_REQUEST_BYTES + 100_000),
    ],
)
def test_nonsense_gets_an_error_and_harms_nobody(root: Path, request_: bytes):
    try:
        answer = raw(root, request_)
    except (BrokenPipeError, ConnectionResetError):
        answer = b'{"error": "cut off"}'
    assert "error" in json.loads(answer)
    assert service.request(root, "status") == {"x": 1}


def test_a_broken_handler_is_an_error_at_the_client(root: Path):
    with pytest.raises(ServiceError, match="broken handler"):
        service.request(root, "fail")


def test_no_service_is_said_so(tmp_path: Path):
    with pytest.raises(ServiceError, match="no service answers"):
        service.request(tmp_path, "status")
    with pytest.raises(ServiceError, match="no service answers"):
        service.request(tmp_path / "missing", "status")
