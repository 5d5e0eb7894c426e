"""``layerstore save-index`` and ``layerstore load-index``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from layerstore import limits, service
from layerstore.cli.common import Json, option, print_json, switch
from layerstore.errors import UnknownObject, UsageError
from layerstore.formats.announced import announced
from layerstore.image import Digest, Platform, Reference
from layerstore.provider import GivenLayer
from layerstore.service import DEFAULT_PATH, DEFAULT_ROOT, Config

Root = Annotated[Path | None, Parameter(help=f"Root directory of the service [{DEFAULT_ROOT}].")]
ConfigFile = Annotated[Path | None, Parameter(help=f"Configuration file [{DEFAULT_PATH}].")]


def save_index(
    reference: str,
    /,
    *,
    output: Annotated[Path, option("Where to write.", "--output", "-o")],
    platform: Annotated[
        list[str] | None,
        Parameter(negative="", help="Of this os/architecture[/variant]; may be repeated."),
    ] = None,
    all_platforms: Annotated[bool, switch("All images of an index.")] = False,
    root: Root = None,
    config: ConfigFile = None,
    json: Json = False,
) -> None:
    """Write the indexes of the ordinary layers of the image REFERENCE to a file for other nodes.

    The layers must be complete here (`layerstore fetch`).  Layers with a TOC need no such file.
    """
    if platform and all_platforms:
        raise UsageError("--platform and --all-platforms exclude each other")
    settings = service.load(config)
    parsed = Reference.parse(reference.removeprefix("docker://"))
    wanted = tuple(map(Platform.parse, platform or ())) or (Platform.host(),)
    layers = _ordinary(parsed, None if all_platforms else wanted, settings)
    if not layers:
        raise UnknownObject(
            "all layers have a TOC, and need no index: nothing is saved", subject=str(parsed)
        )
    with service.index_keeper((root or Path(settings.root)).absolute(), settings) as keeper:
        _tell(keeper.save(layers, output.absolute()), "saved", json=json)


def load_index(
    file: Path, /, *, root: Root = None, config: ConfigFile = None, json: Json = False
) -> None:
    """Take over the indexes in FILE, as save-index wrote it on another node.

    Their layers are served lazily then, and checked when all of them is here.
    """
    settings = service.load(config)
    with service.index_keeper((root or Path(settings.root)).absolute(), settings) as keeper:
        _tell(keeper.load(file.absolute()), "loaded", json=json)


def _ordinary(
    reference: Reference, platforms: tuple[Platform, ...] | None, settings: Config
) -> list[tuple[Digest, Digest]]:
    """Blob digests and diff IDs of the image's layers that have no TOC, each once."""
    deadline = time.monotonic() + limits.RESOLVE_SECONDS
    with service.passing_store(settings) as store:
        found = [
            (descriptor.digest, diff_id)
            for manifest, diff_ids in store.chosen(reference, platforms, deadline)
            for descriptor, diff_id in zip(manifest.layers, diff_ids, strict=True)
            if not announced(descriptor).form.lazy
        ]
    return list(dict.fromkeys(found))


def _tell(layers: Sequence[GivenLayer], done: str, *, json: bool) -> None:
    if json:
        print_json(layers)
        return
    for layer in layers:
        print(f"{done} {layer.blob_digest} {layer.form} {layer.size} bytes")
