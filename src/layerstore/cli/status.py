"""``layerstore status``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from cyclopts import Parameter
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from layerstore import service
from layerstore.service import DEFAULT_PATH, DEFAULT_ROOT


def status(
    *,
    root: Annotated[
        Path | None, Parameter(help=f"Root directory of the service [{DEFAULT_ROOT}].")
    ] = None,
    config: Annotated[Path | None, Parameter(help=f"Configuration file [{DEFAULT_PATH}].")] = None,
    json: Annotated[
        bool, Parameter(negative="", show_default=False, help="Print one JSON object.")
    ] = False,
) -> None:
    """Show the running service: lookups, layers, bytes needed and fetched."""
    where = root or Path(service.load(config).root)
    report = service.request(where.absolute(), "status")
    if json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
        return
    _print(report)


def _print(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    console.print(
        f"layerstore {report['version']}, pid {report['pid']},"
        f" up {report['uptime_seconds']:.0f} s, serving {report['mountpoint']}"
    )
    lookups = ", ".join(f"{name} {count}" for name, count in sorted(report["lookups"].items()))
    console.print(f"lookups: {lookups or 'none yet'}")
    fetched = sum(report["content"]["fetched_bytes"].values())
    console.print(
        f"contents: {decimal(report['content']['needed_bytes'])} needed by reads,"
        f" {decimal(fetched)} fetched; reads failed: {report['read_errors']}"
    )
    if report["disk"]["full"]:
        console.print(
            f"disk: takes nothing ({report['disk']['reason']}); contents are served from memory"
        )
    if not report["layers"]:
        return
    table = Table(box=None, pad_edge=False)
    numeric = ("NEEDED", "FETCHED", "TOTAL", "USES")
    for heading in ("LAYER", *numeric, "STATE", "IMAGE"):
        justify: Literal["left", "right"] = "right" if heading in numeric else "left"
        table.add_column(heading, justify=justify, no_wrap=heading != "IMAGE", overflow="fold")
    for layer in report["layers"]:
        references = layer["references"]
        more = f" (+{len(references) - 1})" if len(references) > 1 else ""
        table.add_row(
            layer["digest"].removeprefix("sha256:")[:12],
            decimal(layer["needed_bytes"]),
            decimal(layer["fetched_bytes"]),
            decimal(layer["total_bytes"]),
            str(layer["uses"]),
            "complete" if layer["complete"] else "lazy",
            (references[0] + more) if references else "-",
        )
    console.print(table)
