"""``layerstore reload``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from layerstore import service
from layerstore.cli.common import Json, Quiet, print_json
from layerstore.service import DEFAULT_PATH, DEFAULT_ROOT


def reload(
    *,
    root: Annotated[
        Path | None, Parameter(help=f"Root directory of the service [{DEFAULT_ROOT}].")
    ] = None,
    config: Annotated[Path | None, Parameter(help=f"Configuration file [{DEFAULT_PATH}].")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Have the running service take up new code and configuration, under running containers.

    If the new code or configuration cannot be used the old server goes on, and the reason is
    printed.
    """
    where = (root or Path(service.load(config).root)).absolute()
    answer = service.reload(where)
    if json:
        print_json(answer)
    elif not quiet:
        print(f"a new server serves, pid {answer['pid']}")
