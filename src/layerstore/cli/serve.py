"""``layerstore serve``."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from layerstore.service import DEFAULT_PATH, DEFAULT_ROOT
from layerstore.service.child import interpreter

_KEEPER = "layerstore.service.keeper"


def serve(
    mountpoint: Annotated[
        Path, Parameter(help="Directory that storage.conf names; created if missing.")
    ],
    /,
    *,
    root: Annotated[
        Path | None, Parameter(help=f"Private directory for state and cache [{DEFAULT_ROOT}].")
    ] = None,
    config: Annotated[Path | None, Parameter(help=f"Configuration file [{DEFAULT_PATH}].")] = None,
) -> None:
    """Serve the additional layer store on MOUNTPOINT.

    Runs in the foreground until SIGTERM or SIGINT, logs to stderr, and unmounts at its end. While
    containers still use the store it goes on for them; a second signal ends it at once.
    """
    arguments = [str(mountpoint.absolute())]
    if root is not None:
        arguments += ["--root", str(root.absolute())]
    if config is not None:
        arguments += ["--config", str(config.absolute())]
    if logging.getLogger("layerstore").level == logging.DEBUG:
        arguments.append("--debug")
    command = interpreter(_KEEPER, arguments)
    # the keeper is a small process: nothing of this program is needed any more
    os.execv(command[0], command)  # noqa: S606 - no shell is wanted
