"""``layerstore check storage`` and ``layerstore check cache``."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
from cyclopts import App, Parameter
from rich.console import Console
from rich.progress import DownloadColumn, Progress

from layerstore import service
from layerstore.cli.common import STORAGE, Json, Quiet, StorageFlags, print_json, switch
from layerstore.errors import LayerstoreError, ServiceError
from layerstore.graphroot.check import Advance, Finding, Report, check
from layerstore.graphroot.fsck import repair_storage
from layerstore.service import DEFAULT_PATH, DEFAULT_ROOT, CheckStatus

if TYPE_CHECKING:
    from collections.abc import Callable

_POLL_SECONDS = 0.1

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


@app.command
def cache(
    *,
    repair: Annotated[bool, switch("Repair what can be repaired.")] = False,
    root: Annotated[
        Path | None, Parameter(help=f"Root directory of the service [{DEFAULT_ROOT}].")
    ] = None,
    config: Annotated[Path | None, Parameter(help=f"Configuration file [{DEFAULT_PATH}].")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read through all that the service keeps: contents, blobs, indexes, state.

    Ends with status 1 if damage or leftovers remain.  What is found damaged is not used any more,
    with or without --repair.  The service that runs on the root directory does the work; where
    none runs, it is done without one.
    """
    settings = service.load(config)
    where = (root or Path(settings.root)).absolute()
    with service.checker(where, settings) as checker:
        job = checker.start(repair=repair)
        try:
            status = _follow(checker, job, shown=not (quiet or json))
        except BaseException:
            with contextlib.suppress(LayerstoreError):
                checker.cancel(job)
            raise
    if status.error:
        raise ServiceError(f"the check ended early: {status.error}", subject=str(where))
    if json:
        print_json({**msgspec.structs.asdict(status), "clean": not status.remaining})
    else:
        _print_cache(status, quiet=quiet)
    if status.remaining:
        sys.exit(1)


def _follow(checker: service.Checker, job: str, *, shown: bool) -> CheckStatus:
    console = Console(stderr=True, highlight=False)
    with Progress(
        *Progress.get_default_columns(), DownloadColumn(), console=console, transient=True,
        disable=not (shown and console.is_terminal),
    ) as bars:  # fmt: skip
        task = bars.add_task("reading the cache", total=None)
        while True:
            status = checker.status(job)
            bars.update(task, completed=status.checked_bytes, total=status.total_bytes or None)
            if status.done:
                return status
            time.sleep(_POLL_SECONDS)


def _print_cache(status: CheckStatus, *, quiet: bool) -> None:
    for found in status.findings:
        done = f" [{found.repaired}]" if found.repaired else ""
        print(f"{found.kind}: {found.subject}: {found.detail}{done}")
    if status.more_findings:
        print(f"and {status.more_findings} more")
    if not quiet:
        repaired = sum(bool(found.repaired) for found in status.findings)
        print(
            f"{status.layers} layers, {status.objects} objects, {status.checked_bytes} bytes:"
            f" {status.remaining} to repair, {repaired} repaired"
        )


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
