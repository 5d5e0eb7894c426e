"""The server process: prepares itself, waits for the keeper's word, serves, makes way.

``python -m layerstore.service.server``, started by the keeper only, which holds the other end of the
socket that is descriptor 3 here.  It never outlives its keeper: two servers at once would take
each other's requests.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import logging
import os
import signal
import socket
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any, Final

from layerstore import limits
from layerstore.errors import LayerstoreError, ServiceError, StorageError, exit_status
from layerstore.service import held, inforce, messages
from layerstore.service.child import LINK_FD, Leave
from layerstore.service.daemon import Service
from layerstore.service.opening import check_root
from layerstore.service.options import LOG_FORMAT
from layerstore.service.places import keep_apart
from layerstore.service.settings import Settings, load

_log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG: Final = 1


def main() -> None:
    """Serve as the keeper says; ends the process."""
    parser = argparse.ArgumentParser(prog="layerstore server")
    parser.add_argument("mountpoint", type=Path)
    parser.add_argument("--keeper", type=int, required=True)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--debug", action="store_true")
    given = parser.parse_args()
    gc.set_threshold(limits.GARBAGE_OBJECTS)
    _die_with(given.keeper)
    link = socket.socket(fileno=LINK_FD)
    link.set_inheritable(False)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=LOG_FORMAT)
    try:
        settings = load(given.config, inforce.given(os.environ))
        config = settings.config
        level = "DEBUG" if given.debug else config.log_level.upper()
        logging.getLogger().setLevel(level)
        root = (given.root or Path(config.root)).absolute()
        _prepare(given.mountpoint, root)
        facts = {"root": str(root), "log_level": level, "silent_seconds": config.silent_seconds}
        messages.send(link, {"prepared": {**facts, "signs": True}})
        status = _wait_and_serve(link, root, settings)
    except LayerstoreError as error:
        with contextlib.suppress(OSError):
            messages.send(link, {"failed": str(error), "status": exit_status(error)})
        status = exit_status(error)
    logging.shutdown()
    # threads that still wait for a network have nothing to finish any more
    os._exit(status)


def _prepare(mountpoint: Path, root: Path) -> None:
    """Find out what would keep us from serving, as far as another server may have the state."""
    keep_apart(mountpoint, root)
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot create: {error.strerror}", subject=str(root)) from error
    check_root(root)


def _wait_and_serve(link: socket.socket, root: Path, settings: Settings) -> int:
    received = messages.receive(link)
    while received is not None and "sign" in received[0]:
        _give_sign(link)
        received = messages.receive(link)
    if received is None or "serve" not in received[0]:
        return 0
    order: dict[str, Any] = received[0]["serve"]
    mounts = held.unpack(order["mounts"], received[1])
    left = len(mounts)
    service = Service(mounts, root, settings, order["keeper"])
    # it is listened to from here on: to open the state may take long
    threading.Thread(target=_listen, args=(link, service), name="keeper", daemon=True).start()
    with service:
        signal.signal(signal.SIGTERM, lambda *_: service.stop())
        messages.send(link, {"serving": True})
        while left:
            mount = service.next_end()
            if mount is None:
                break
            left -= 1
            service.leave_stand_ins()
            messages.send(link, {"ended": mount.name})
        service.leave_stand_ins()
    return 0


def _listen(link: socket.socket, service: Service) -> None:
    """Hear what the keeper says; end at once if it is gone."""
    while True:
        try:
            received = messages.receive(link)
        except ServiceError:
            continue
        if received is None:
            os._exit(1)
        if "stop" in received[0]:
            service.stop(Leave(received[0]["stop"]))
        elif "sign" in received[0]:
            with contextlib.suppress(OSError):  # it is ending
                service.sign_of_life(partial(_give_sign, link))
        else:
            service.keeper_says(received[0])


def _give_sign(link: socket.socket) -> None:
    with contextlib.suppress(OSError):
        messages.send(link, {"sign": True})


def _die_with(keeper: int) -> None:
    """Have the kernel kill this process when its keeper dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != keeper:
        os._exit(1)


if __name__ == "__main__":
    main()
