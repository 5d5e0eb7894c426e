"""The keeper's socket in the root directory: who may ask what of it, and how verbs ask.

Only the keeper of a root directory listens there, so it also tells whether one is alive.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from layerstore.errors import NoServiceError, ServiceError
from layerstore.service import messages
from layerstore.service.places import KEEPER_SOCKET


def connect(root: Path, seconds: float | None) -> socket.socket:
    """A connection to the keeper of ``root``.  NoServiceError if none is alive, ServiceError."""
    path = root / KEEPER_SOCKET
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link.settimeout(seconds)
    try:
        with messages.address(root, KEEPER_SOCKET) as where:
            link.connect(where)
    except PermissionError as error:
        link.close()
        raise ServiceError(
            "permission denied", subject=str(path), advice="run it as the service's user"
        ) from error
    except OSError as error:
        link.close()
        raise NoServiceError(
            "no service answers here",
            subject=str(path),
            advice="start one with `layerstore serve`, or name its --root",
        ) from error
    return link


def is_alive(root: Path) -> bool:
    """Whether a keeper has this root directory."""
    try:
        connect(root, 1.0).close()
    except NoServiceError:
        return False
    except ServiceError:
        return True
    return True


def trouble(root: Path) -> str:
    """Why no server answers, as the keeper knows it; empty if it is well, or does not say."""
    try:
        with connect(root, 1.0) as link:
            word, _ = ask(link, "word")
    except ServiceError:
        return ""
    return str(word.get("trouble", ""))


def ask(link: socket.socket, method: str, **parameters: object) -> tuple[dict[str, Any], list[int]]:
    """Send one request and wait for the answer.  ServiceError if it is a refusal or none comes."""
    try:
        messages.send(link, {"method": method, **parameters})
        answer = messages.receive(link)
    except OSError as error:
        raise ServiceError(f"the keeper does not answer: {error}") from error
    if answer is None:
        raise ServiceError("the keeper ended before it answered")
    if "error" in answer[0]:
        raise ServiceError(str(answer[0]["error"]))
    return answer
