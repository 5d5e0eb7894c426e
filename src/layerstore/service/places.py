"""Where things lie: the default places, and the files of a root directory that processes share."""

from __future__ import annotations

from pathlib import Path
from typing import Final

DEFAULT_PATH: Final = Path("/etc/layerstore/config.toml")
DEFAULT_ROOT: Final = Path("/var/lib/layerstore")

CONTROL_SOCKET: Final = "control.sock"  # the server's
SERVER_LOCK: Final = "lock"  # held by whoever uses the state: the server, `layerstore fetch`
KEEPER_SOCKET: Final = "keeper.sock"
KEEPER_LOCK: Final = "keeper.lock"
STAND_INS: Final = "stand-ins.json"
