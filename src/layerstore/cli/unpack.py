"""``layerstore unpack``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from layerstore.cli.common import (
    REGISTRY,
    Json,
    Quiet,
    RegistryFlags,
    option,
    print_json,
    switch,
)
from layerstore.copy.context import CopyContext
from layerstore.copy.progress import listener
from layerstore.copy.staticverify import VerifyResult
from layerstore.copy.staticverify import verify as verify_store
from layerstore.copy.unpack import UnpackOptions, UnpackResult
from layerstore.copy.unpack import unpack as unpack_image
from layerstore.errors import UsageError
from layerstore.image import Platform


def unpack(
    image: Annotated[str, Parameter(help="REF, or with --verify alone DIR.")],
    directory: Annotated[Path | None, Parameter(help="DIR.")] = None,
    /,
    *,
    ref: Annotated[bool, switch("Make names for stores configured with :ref.")] = False,
    platform: Annotated[
        tuple[str, ...],
        option("Only this os/architecture[/variant]; may be repeated.", "--platform"),
    ] = (),
    verify: Annotated[bool, switch("Check everything in DIR, then.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    registry: RegistryFlags = REGISTRY,
) -> None:
    """Extract the layers of the image REF into DIR.

    DIR becomes an additional layer store that needs no service, for read-only and shared file
    systems. REF is a reference or TRANSPORT:NAME. With --verify, REF may be left out.
    """
    if directory is None and (not verify or ref or platform):
        raise UsageError("REF and DIR are needed", advice="see `layerstore unpack --help`")
    store = directory or Path(image)
    with listener(quiet=quiet) as shown:
        unpacked = None
        if directory is not None:
            options = UnpackOptions(
                platforms=tuple(Platform.parse(text) for text in platform), with_reference=ref
            )
            settings = registry.settings()
            context = CopyContext(source_registry=settings, listener=shown)
            unpacked = unpack_image(image, directory, options, context)
        checked = verify_store(store, shown) if verify else None
    if json:
        print_json(_report(unpacked, checked))
    elif not quiet:
        _print(unpacked, checked)
    if checked is not None and checked.damage:
        for one in checked.damage if quiet else ():
            print(f"layerstore: {one.path}: {one.what}", file=sys.stderr)
        print(
            f"layerstore: {store}: {len(checked.damage)} damaged places; remove the layers"
            " and names that are named above and unpack their images again",
            file=sys.stderr,
        )
        sys.exit(1)


def _report(unpacked: UnpackResult | None, checked: VerifyResult | None) -> dict[str, Any]:
    report: dict[str, Any] = {}
    if unpacked is not None:
        report |= {
            "Reference": None if unpacked.reference is None else str(unpacked.reference),
            "Digest": unpacked.digest,
            "Images": [
                {
                    "Platform": str(image.platform),
                    "Digest": image.digest,
                    "Layers": [
                        {
                            "Digest": layer.digest,
                            "Size": layer.size,
                            "DiffID": layer.diff_id,
                            "TOCDigest": layer.toc_digest,
                            "NoTOC": layer.no_toc,
                            "Unpacked": layer.how == "unpacked",
                            "LeftOut": layer.how == "left out",
                        }
                        for layer in image.layers
                    ],
                }
                for image in unpacked.images
            ],
        }
    if checked is not None:
        report["Verified"] = {
            "Layers": checked.layers,
            "Names": checked.names,
            "Damage": [{"Path": one.path, "What": one.what} for one in checked.damage],
        }
    return report


def _print(unpacked: UnpackResult | None, checked: VerifyResult | None) -> None:
    for image in unpacked.images if unpacked is not None else ():
        new = sum(layer.how == "unpacked" for layer in image.layers)
        by_toc = sum(layer.toc_digest is not None for layer in image.layers)
        left_out = sum(layer.how == "left out" for layer in image.layers)
        print(
            f"{image.platform}: {image.digest}, {len(image.layers)} layers"
            f" ({new} new, {by_toc} also by TOC{f', {left_out} left out' if left_out else ''})"
        )
    if checked is not None:
        state = f"{len(checked.damage)} damaged places" if checked.damage else "all intact"
        print(f"{checked.layers} layers, {checked.names} names: {state}")
