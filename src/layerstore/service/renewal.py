"""The keeper in new code: it executes itself anew, with descriptors, server and process id kept.

First the new code is tried in a process of its own: a keeper that cannot be loaded would take the
mount along.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from layerstore import limits
from layerstore.errors import LayerstoreError, ServiceError
from layerstore.service import held
from layerstore.service.child import Child, Stage, interpreter
from layerstore.service.held import HeldMount
from layerstore.service.inforce import InForce
from layerstore.service.place import Place
from layerstore.service.signalpipe import SignalPipe

MODULE: Final = "layerstore.service.keeper"
VERSION: Final = "1"  # of what `State` writes; a keeper of another version is not given it


@dataclass(frozen=True, slots=True)
class State:
    """What a keeper goes on with."""

    mounts: list[HeldMount]
    server: Child | None
    place: Place
    in_force: InForce
    restarts: int
    last_cause: str


def renew(state: State, arguments: Sequence[str], signals: SignalPipe) -> str:
    """Become a new keeper.  Returns only if that cannot be: why."""
    server, listener = state.server, state.place.listener
    if server is None:
        return "no server runs"
    why = _tried()
    if why:
        return why
    facts, fds = held.pack(state.mounts)
    kept = [*fds, state.place.lock, listener.fileno(), server.link.fileno(), state.in_force.fd]
    memory = os.memfd_create("layerstore-keeper")
    written = {
        "mounts": facts,
        "fds": fds,
        "lock": state.place.lock,
        "listener": listener.fileno(),
        "in_force": state.in_force.fd,
        "server": {
            "pid": server.pid,
            "link": server.link.fileno(),
            "served_since": server.served_since,
            "silent_seconds": server.silent_seconds,
        },
        "restarts": state.restarts,
        "last_cause": state.last_cause,
    }
    os.write(memory, json.dumps(written).encode())
    for fd in (*kept, memory):
        os.set_inheritable(fd, True)
    # until the new keeper listens to them, the default of these would end it
    signals.block()
    try:
        if signals.pending():
            raise InterruptedError("a signal came meanwhile")
        command = interpreter(MODULE, ["--resume", str(memory), *arguments])
        os.execv(command[0], command)  # noqa: S606 - no shell is wanted
    except OSError as error:
        signals.unblock()
        for fd in kept:
            os.set_inheritable(fd, False)
        os.close(memory)
        return str(error)


def _tried() -> str:
    """Why the new keeper cannot be loaded, or nothing."""
    try:
        done = subprocess.run(
            interpreter(MODULE, ["--trial"]),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limits.KEEPER_TRIAL_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    if done.returncode != 0:
        return f"its new code cannot be loaded: {done.stderr.strip()[-200:]}"
    return "" if done.stdout.strip() == VERSION else "its new code keeps other things"


def read(memory: int, root: Path | None) -> State:
    """What `renew` wrote; ``root`` is the root directory.  ServiceError."""
    try:
        written: dict[str, Any] = json.loads(os.pread(memory, limits.KEEPER_MESSAGE_BYTES, 0))
        os.close(memory)
        facts = written["server"]
        # a keeper of an older release had none
        in_force = InForce(written["in_force"]) if "in_force" in written else InForce.empty()
        server = Child(
            facts["pid"],
            socket.socket(fileno=facts["link"]),
            Stage.SERVING,
            in_force=in_force,
            served_since=facts["served_since"],
            silent_seconds=facts["silent_seconds"],
            signs=True,
        )
        server.gave_sign()
        server.link.setblocking(False)
        place = Place(root, written["lock"], socket.socket(fileno=written["listener"]))
        state = State(
            held.unpack(written["mounts"], written["fds"]),
            server,
            place,
            in_force,
            written["restarts"],
            written["last_cause"],
        )
        for fd in (
            *written["fds"],
            written["lock"],
            written["listener"],
            facts["link"],
            in_force.fd,
        ):
            os.set_inheritable(fd, False)
    except (OSError, ValueError, KeyError, TypeError, LayerstoreError) as error:
        raise ServiceError(f"the keeper cannot go on with what it was: {error}") from error
    return state
