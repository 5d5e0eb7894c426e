"""``layerstore fetch``."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter

from layerstore import service
from layerstore.copy.progress import PullItem, PullListener, listener
from layerstore.errors import LayerstoreError, ServiceError, UsageError
from layerstore.image import Digest, Platform, Reference
from layerstore.service import DEFAULT_PATH, DEFAULT_ROOT, FetchedLayer, FetchStatus

_POLL_SECONDS = 0.05


def fetch(
    reference: str,
    /,
    *,
    platform: Annotated[
        list[str] | None,
        Parameter(negative="", help="Of this os/architecture[/variant]; may be repeated."),
    ] = None,
    all_platforms: Annotated[
        bool, Parameter(negative="", show_default=False, help="All images of an index.")
    ] = False,
    root: Annotated[
        Path | None, Parameter(help=f"Root directory of the service [{DEFAULT_ROOT}].")
    ] = None,
    config: Annotated[Path | None, Parameter(help=f"Configuration file [{DEFAULT_PATH}].")] = None,
    json: Annotated[
        bool, Parameter(negative="", show_default=False, help="Print one JSON object.")
    ] = False,
    quiet: Annotated[
        bool,
        Parameter(name=["--quiet", "-q"], negative="", show_default=False, help="No progress."),
    ] = False,
) -> None:
    """Bring all layers of the image REFERENCE to the service's store ahead of time.

    They are complete and verified then, and need no registry any more.  Where no service runs
    on the root directory, it is done without one.
    """
    bring(reference, platform, all_platforms, root, config, json=json, quiet=quiet)


def bring(
    reference: str,
    platform: list[str] | None,
    all_platforms: bool,
    root: Path | None,
    config: Path | None,
    *,
    json: bool,
    quiet: bool,
    keep: bool = False,
) -> None:
    """Fetch an image, and pin it if it is to be kept; shows what comes of it."""
    if platform and all_platforms:
        raise UsageError("--platform and --all-platforms exclude each other")
    for one in platform or ():
        Platform.parse(one)  # the service would find it out as well, but not as a usage error
    settings = service.load(config)
    where = (root or Path(settings.root)).absolute()
    name = str(Reference.parse(reference.removeprefix("docker://")))
    with service.fetcher(where, settings) as fetcher, listener(quiet=quiet or json) as shown:
        job = fetcher.start(name, None if all_platforms else tuple(platform or ()), keep=keep)
        try:
            status = _follow(fetcher, job, shown)
        except BaseException:
            with contextlib.suppress(LayerstoreError):
                fetcher.cancel(job)
            raise
    if json:
        sys.stdout.buffer.write(
            msgspec.json.format(msgspec.json.encode(status, enc_hook=str)) + b"\n"
        )
    refused = [layer for layer in status.layers if layer.state == "refused"]
    if status.failure is not None:
        raise ServiceError(status.failure)
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        first = refused[0]
        raise ServiceError(
            f"not fetched: {first.reason}: {first.detail}{more}", subject=f"layer {first.digest}"
        )
    if not json and not quiet:
        size = sum(layer.size for layer in status.layers)
        pinned = ", and pinned" if keep else ""
        print(f"{name}: {len(status.layers)} layers, {size} bytes, all here and verified{pinned}")


def _follow(fetcher: service.Fetcher, job: str, shown: PullListener) -> FetchStatus:
    items: dict[int, PullItem] = {}
    ended: set[int] = set()
    while True:
        status = fetcher.status(job)
        for number, layer in enumerate(status.layers):
            if number not in ended and layer.state != "waiting":
                _show(number, layer, items, ended, shown)
        if status.done:
            return status
        time.sleep(_POLL_SECONDS)


def _show(
    number: int,
    layer: FetchedLayer,
    items: dict[int, PullItem],
    ended: set[int],
    shown: PullListener,
) -> None:
    item = items.get(number)
    if item is None:
        item = items[number] = shown.copying("blob", Digest(layer.digest), layer.size)
    if layer.state == "complete":
        item.at(layer.size, layer.size)
        item.done()
    elif layer.state == "refused":
        item.failed()
    else:
        if layer.state == "verifying":
            item.step(layer.state)
        item.at(layer.fetched, layer.size)
        return
    ended.add(number)
