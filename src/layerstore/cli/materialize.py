"""``layerstore materialize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from layerstore import service
from layerstore.cli.common import Json, Quiet, finish, print_json, switch
from layerstore.cli.fetch import bring
from layerstore.copy.progress import PullListener, listener
from layerstore.errors import LayerstoreError, UnknownObject, UsageError
from layerstore.graphroot.layers import Layer
from layerstore.graphroot.localize import localize
from layerstore.image import Digest
from layerstore.service import DEFAULT_PATH, DEFAULT_ROOT, LazyImage


def materialize(
    reference: Annotated[
        str, Parameter(help="Image, as the graph root or the registry has it.")
    ] = "",
    /,
    *,
    all_images: Annotated[
        bool, switch("All images of the configured graph roots.", "--all", "-a")
    ] = False,
    root: Annotated[
        Path | None, Parameter(help=f"Root directory of the service [{DEFAULT_ROOT}].")
    ] = None,
    config: Annotated[Path | None, Parameter(help=f"Configuration file [{DEFAULT_PATH}].")] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Make lazy layers local ones, so that containers start without the service.

    An image that no configured graph root has is completed in the service's store.
    """
    if bool(reference) == all_images:
        raise UsageError("name an image, or --all")
    settings = service.load(config)
    try:
        images = list(service.lazy_images(settings, reference))
    except UnknownObject:
        bring(reference, None, False, root, config, json=json, quiet=quiet)
        return
    report: list[dict[str, object]] = []
    errors: list[LayerstoreError] = []
    with listener(quiet=quiet or json) as shown:
        for image in images:
            report += _localize(image, shown, errors)
            errors += image.errors
    if json:
        print_json(report)
    elif not quiet:
        print(f"{len(report)} layers are local now")
    finish(errors)


def _localize(
    image: LazyImage, shown: PullListener, errors: list[LayerstoreError]
) -> list[dict[str, object]]:
    done: list[dict[str, object]] = []
    for layer in image.layers:
        size = layer.record.compressed_size
        item = shown.copying("blob", _name(layer), size if size > 0 else None)
        try:
            localize(image.store, layer, item.advance)
        except LayerstoreError as error:
            item.failed()
            errors.append(error)
        else:
            item.done()
            done.append({"image": image.name, "layer": layer.id, "bytes": max(size, 0)})
    return done


def _name(layer: Layer) -> Digest:
    known = layer.blob_digest or layer.toc_digest or layer.diff_id
    return known if known is not None else Digest(f"sha256:{layer.id}")
