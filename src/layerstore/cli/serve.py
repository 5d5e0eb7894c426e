"""``layerstore serve``."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from layerstore import service
from layerstore.service import DEFAULT_PATH, DEFAULT_ROOT


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

    Runs in the foreground until SIGTERM or SIGINT, logs to stderr, and unmounts at
    its end.
    """
    settings = service.load(config)
    logging.basicConfig(
        stream=sys.stderr,
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    where = root or Path(settings.root)
    service.serve(mountpoint.absolute(), where.absolute(), settings)
