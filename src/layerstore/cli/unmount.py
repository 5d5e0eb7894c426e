"""``layerstore unmount``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from layerstore import service
from layerstore.cli.common import Json, Quiet, print_json
from layerstore.service import DEFAULT_PATH, DEFAULT_ROOT


def unmount(
    mountpoint: Annotated[Path, Parameter(help="Directory that the service was mounted on.")],
    /,
    *,
    root: Annotated[
        Path | None, Parameter(help=f"Root directory of the service [{DEFAULT_ROOT}].")
    ] = None,
    config: Annotated[Path | None, Parameter(help=f"Configuration file [{DEFAULT_PATH}].")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Leave a plain directory where a service that is gone left its mount.

    A service that runs does that by itself when it is stopped.
    """
    where = (root or Path(service.load(config).root)).absolute()
    there = service.unmount(mountpoint.absolute(), where)
    if json:
        print_json({"mountpoint": str(mountpoint), "unmounted": there})
    elif not quiet:
        print(f"{mountpoint} is unmounted" if there else f"{mountpoint} was not mounted")
