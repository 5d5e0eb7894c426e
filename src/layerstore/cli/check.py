"""``layerstore check storage``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

from cyclopts import App
from rich.console import Console
from rich.progress import Progress

from layerstore.cli.common import STORAGE, Json, Quiet, StorageFlags, print_json, switch
from layerstore.graphroot.check import Advance, Finding, Report, check
from layerstore.graphroot.fsck import repair_storage

if TYPE_CHECKING:
    from collections.abc import Callable

app = App(name="check", help="Look for damage, and repair it.", help_format="plaintext")


@app.command
def storage(
    *,
    repair: Annotated[bool, switch("Repair what can be repaired.")] = False,
    full: Annotated[
        bool, switch("Read all layers and compare their files with the archives.")
    ] = False,
    storage: StorageFlags = STORAGE,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check the graph root: records, files and, with --full, contents against each other.

    Ends with status 1 if damage or leftovers remain.  Without --repair nothing is changed.
    """
    store = storage.open(read_only=not repair)
    work = repair_storage if repair else check
    report = _with_progress(
        lambda advance: work(store, full=full, advance=advance), shown=full and not quiet
    )
    if json:
        print_json(_document(report))
    else:
        _print(report, quiet=quiet)
    if report.remaining:
        sys.exit(1)


def _with_progress(work: Callable[[Advance | None], Report], *, shown: bool) -> Report:
    if not shown:
        return work(None)
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        return work(_plain_line)
    with Progress(console=console, transient=True) as bars:
        task = bars.add_task("reading layers", total=None)

        def advance(layer: str, number: int, count: int) -> None:
            bars.update(task, description=f"layer {layer[:12]}", completed=number - 1, total=count)

        return work(advance)


def _plain_line(layer: str, number: int, count: int) -> None:
    print(f"reading layer {layer} ({number} of {count})", file=sys.stderr, flush=True)


def _document(report: Report) -> dict[str, object]:
    return {
        "layers": report.layers,
        "images": report.images,
        "containers": report.containers,
        "findings": [
            {
                "kind": found.kind,
                "weight": found.weight,
                "subject": found.subject,
                "detail": found.detail,
                "users": found.users,
                "repaired": found.repaired,
            }
            for found in report.findings
        ],
        "clean": not report.remaining,
    }


def _line(found: Finding) -> str:
    done = f" [{found.repaired}]" if found.repaired else ""
    return f"{found.weight}: {found.kind}: {found.subject}: {found.detail}{done}"


def _print(report: Report, *, quiet: bool) -> None:
    for found in report.findings:
        print(_line(found))
    if quiet:
        return
    repaired = sum(bool(found.repaired) for found in report.findings)
    print(
        f"{report.layers} layers, {report.images} images, {report.containers} containers:"
        f" {len(report.remaining)} to repair, {repaired} repaired"
    )
