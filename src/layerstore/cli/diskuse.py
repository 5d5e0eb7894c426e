"""``layerstore df``, ``gc``, ``pin`` and ``unpin``: what the store takes on disk, and what stays."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from layerstore import service
from layerstore.cli.common import (
    Json,
    Quiet,
    human_age,
    human_size,
    print_json,
    print_table,
    short_id,
    switch,
)
from layerstore.cli.fetch import bring
from layerstore.errors import UsageError
from layerstore.image import Reference
from layerstore.service import DEFAULT_PATH, DEFAULT_ROOT, DiskReport

_Root = Annotated[Path | None, Parameter(help=f"Root directory of the service [{DEFAULT_ROOT}].")]
_Config = Annotated[Path | None, Parameter(help=f"Configuration file [{DEFAULT_PATH}].")]


def df(
    *,
    verbose: Annotated[bool, switch("Each layer and image, too.", "--verbose", "-v")] = False,
    root: _Root = None,
    config: _Config = None,
    json: Json = False,
) -> None:
    """Show what the service's store takes on disk, and what of it could go."""
    settings = service.load(config)
    with service.disk_control((root or Path(settings.root)).absolute(), settings) as disk:
        report = disk.df()
    if json:
        print_json(report)
        return
    _print_sums(report)
    if verbose:
        _print_layers(report)
        _print_images(report)


def _print_sums(report: DiskReport) -> None:
    active = [one for one in report.layers if one.standing in ("running", "pinned")]
    going = [one for one in report.layers if one.standing not in ("running", "pinned")]
    orphans = report.reclaimable - sum(one.blob + one.files for one in going)
    rows = [
        ("Layers", len(report.layers), len(active), report.blobs, sum(one.blob for one in going)),
        ("Files", report.file_count, None, report.files, orphans + sum(one.files for one in going)),
        ("Metadata", None, None, report.metadata + report.other, 0),
    ]
    print_table(
        ("TYPE", "TOTAL", "ACTIVE", "SIZE", "RECLAIMABLE"),
        [
            (
                kind,
                "-" if total is None else str(total),
                "-" if running is None else str(running),
                human_size(size, space=False),
                _share(reclaimable, size),
            )
            for kind, total, running, size, reclaimable in rows
        ],
    )
    bound = "no limit"
    if report.limit is not None and report.high is not None and report.low is not None:
        bound = (
            f"limit {human_size(report.limit)}"
            f" (evicts above {human_size(report.high)}, down to {human_size(report.low)})"
        )
    print(f"\nUsed {human_size(report.used)}, {bound}")
    stays = human_size(report.keep_free)
    print(f"File system: {human_size(report.free)} free, {stays} to stay free")


def _share(part: int, whole: int) -> str:
    return f"{human_size(part, space=False)} ({100 * part // whole if whole else 0}%)"


def _print_layers(report: DiskReport) -> None:
    print("\nLayers, those that would go first at the top:\n")
    print_table(
        ("LAYER", "STANDING", "LAST USED", "BLOB", "FILES", "STATE", "IMAGE"),
        [
            (
                short_id(layer.digest),
                layer.standing,
                human_age(_iso(layer.last_used)) if layer.last_used else "-",
                human_size(layer.blob, space=False),
                human_size(layer.files, space=False),
                "complete" if layer.complete else "lazy",
                layer.references[0] if layer.references else "-",
            )
            for layer in report.layers
        ],
    )


def _print_images(report: DiskReport) -> None:
    print("\nImages:\n")
    print_table(
        ("IMAGE", "LAYERS", "SIZE", "RECLAIMABLE", "PINNED"),
        [
            (
                image.reference,
                str(image.layers),
                human_size(image.size, space=False),
                _share(image.reclaimable, image.size),
                "yes" if image.pinned else "",
            )
            for image in report.images
        ],
    )


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def gc(
    *,
    dry_run: Annotated[bool, switch("Only show what would go.", "--dry-run")] = False,
    everything: Annotated[
        bool, switch("All but what is pinned or mounted.", "--all", "-a")
    ] = False,
    root: _Root = None,
    config: _Config = None,
    json: Json = False,
) -> None:
    """Remove contents of layers that no graph root refers to any more.

    Such layers, and those that --all takes, go on to work: what is read of them is fetched again.
    """
    settings = service.load(config)
    with service.disk_control((root or Path(settings.root)).absolute(), settings) as disk:
        report = disk.gc(dry_run=dry_run, everything=everything)
    if json:
        print_json(report)
        return
    rows = [
        (
            short_id(removal.digest) or "-",
            removal.standing,
            human_size(removal.size, space=False),
            removal.references[0] if removal.references else "-",
        )
        for removal in report.removed
    ]
    if rows:
        print_table(("LAYER", "REASON", "SIZE", "IMAGE"), rows)
    verb = "Would reclaim" if dry_run else "Reclaimed"
    print(f"{verb}: {human_size(report.size, space=False)}")


def pin(
    reference: Annotated[
        str | None, Parameter(help="Image to pin; none: list the pinned ones.")
    ] = None,
    /,
    *,
    platform: Annotated[
        list[str] | None,
        Parameter(negative="", help="Of this os/architecture[/variant]; may be repeated."),
    ] = None,
    all_platforms: Annotated[bool, switch("All images of an index.")] = False,
    root: _Root = None,
    config: _Config = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Bring all layers of an image to the service's store, and never evict them."""
    if reference is not None:
        bring(reference, platform, all_platforms, root, config, json=json, quiet=quiet, keep=True)
        return
    settings = service.load(config)
    with service.disk_control((root or Path(settings.root)).absolute(), settings) as disk:
        found = disk.pinned()
    if json:
        print_json(found)
        return
    print_table(
        ("IMAGE", "LAYERS", "STATE"),
        [
            (image.reference, str(image.layers), "complete" if image.complete else "incomplete")
            for image in found.images
        ],
    )


def unpin(
    *references: Annotated[str, Parameter(help="Images, as they were pinned.")],
    root: _Root = None,
    config: _Config = None,
    json: Json = False,
) -> None:
    """Let images be evicted again.  Nothing is removed by it."""
    if not references:
        raise UsageError("which image?", advice="layerstore pin lists them")
    names = [str(Reference.parse(one.removeprefix("docker://"))) for one in references]
    settings = service.load(config)
    with service.disk_control((root or Path(settings.root)).absolute(), settings) as disk:
        for name in names:
            disk.unpin(name)
    if json:
        print_json(names)
