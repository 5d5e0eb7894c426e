"""The control socket: one JSON line as request, one JSON line as answer.

The socket lies in the store's private root directory (0700), is itself 0600, and
only root and the user who runs the service are answered (SO_PEERCRED).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from layerstore import limits
from layerstore.errors import LayerstoreError, NoServiceError, ServiceError
from layerstore.service import keepersocket, messages
from layerstore.service.places import CONTROL_SOCKET

_log = logging.getLogger(__name__)

_RETRY_SECONDS: Final = 0.05

Handler = Callable[[Mapping[str, Any]], Mapping[str, object]]


class ControlServer:
    """Answers requests by method name, which a handler gets whole, each connection in a thread of its own."""

    def __init__(self, root: Path, handlers: Mapping[str, Handler]) -> None:
        self._path = root / CONTROL_SOCKET
        self._handlers = handlers
        self._slots = threading.Semaphore(limits.CONTROL_CONNECTIONS)
        try:
            self._socket = messages.listen(root, CONTROL_SOCKET, socket.SOCK_STREAM)
        except OSError as error:
            raise ServiceError(
                f"cannot listen: {error.strerror}", subject=str(self._path)
            ) from error
        self._thread = threading.Thread(target=self._accept, name="control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and remove the socket."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        with contextlib.suppress(OSError):
            self._path.unlink()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            if not self._slots.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                connection.settimeout(limits.CONTROL_SECONDS)
                connection.sendall(_encoded(self._answer(connection)) + b"\n")
        except OSError as error:
            _log.debug("control connection broke: %s", error)
        finally:
            self._slots.release()

    def _answer(self, connection: socket.socket) -> Mapping[str, object]:
        line = _read_line(connection)  # before any answer: unread bytes would reset the connection
        if not messages.peer_may_ask(connection):
            return {"error": "only root and the owner of the service may ask"}
        try:
            request = msgspec.json.decode(line, type=dict[str, Any])
            handler = self._handlers[request["method"]]
        except (msgspec.MsgspecError, KeyError, TypeError):
            return {"error": "the service knows no such request (is it of another version?)"}
        try:
            return handler(request)
        except LayerstoreError as error:
            return {"error": str(error)}
        except Exception as error:
            _log.exception("control request failed")
            return {"error": f"the request failed: {error}"}


def _encoded(answer: Mapping[str, object]) -> bytes:
    try:
        return msgspec.json.encode(answer, enc_hook=str)
    except UnicodeEncodeError:  # the name of a file or directory that is no UTF-8
        return msgspec.json.encode(_readable(msgspec.to_builtins(answer, enc_hook=str)))


def _readable(value: Any) -> Any:
    if isinstance(value, str):
        return os.fsencode(value).decode(errors="replace")
    if isinstance(value, dict):
        return {_readable(key): _readable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_readable(one) for one in value]
    return value


def request(
    root: Path, method: str, *, seconds: float = limits.CONTROL_SECONDS, **parameters: object
) -> dict[str, Any]:
    """Ask the service whose root directory is ``root``; the answer may take so many seconds.

    While its keeper is alive but no server answers, a new one is on its way: it is waited for, for
    ``HANDOVER_SECONDS``, or less if servers come to nothing.  Raises NoServiceError if no service
    runs there, or no server of it, ServiceError if it does not answer or refuses.
    """
    path = root / CONTROL_SOCKET
    line = msgspec.json.encode({"method": method, **parameters}) + b"\n"
    began = time.monotonic()
    while True:
        try:
            raw = _exchanged(root, line, seconds)
            break
        except PermissionError as error:
            raise ServiceError(
                "permission denied", subject=str(path), advice="run it as the service's user"
            ) from error
        except OSError as error:
            if not keepersocket.is_alive(root):
                raise NoServiceError(
                    "no service answers here",
                    subject=str(path),
                    advice="start one with `layerstore serve`, or name its --root",
                ) from error
            _keep_waiting(root, time.monotonic() - began, error)
        time.sleep(_RETRY_SECONDS)
    try:
        answer = msgspec.json.decode(raw, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise ServiceError("the service's answer makes no sense", subject=str(path)) from error
    if "error" in answer:
        raise ServiceError(str(answer["error"]))  # it says itself what it is about
    return answer


def _keep_waiting(root: Path, waited: float, error: OSError) -> None:
    """Raise NoServiceError once it is in vain: there is a keeper, but no server."""
    why = keepersocket.trouble(root) if waited > limits.TROUBLE_SECONDS else ""
    if why or waited > limits.HANDOVER_SECONDS:
        raise NoServiceError(
            f"the service is there, but none of its servers serves ({why or error})",
            subject=str(root),
            advice="it starts one again and again, and who reads waits: see its log",
        ) from error


def _exchanged(root: Path, line: bytes, seconds: float) -> bytes:
    """The answer to a request.  OSError, also if the server ended before it gave one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(seconds)
        with messages.address(root, CONTROL_SOCKET) as address:
            connection.connect(address)
        connection.sendall(line)
        raw = _read_line(connection, limits.CONTROL_ANSWER_BYTES)
    if not raw:
        raise ConnectionResetError("the server ended")
    return raw


def _read_line(connection: socket.socket, most: int = limits.CONTROL_REQUEST_BYTES) -> bytes:
    data = bytearray()
    while not data.endswith(b"\n"):
        piece = connection.recv(65536)
        if not piece or len(data) > most:
            break
        data += piece
    return bytes(data)
