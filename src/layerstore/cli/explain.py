"""``layerstore explain``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from layerstore import service
from layerstore.errors import ServiceError, UsageError
from layerstore.image import Platform, Reference
from layerstore.provider import ExplainedImage, Verdict
from layerstore.provider.explain import explain as judge
from layerstore.service import DEFAULT_PATH, DEFAULT_ROOT

_WIDTH = 120  # of the table, wherever it goes: a reason that is cut off is none
_WORDS = {"lazy": "lazily", "once-complete": "once complete", "never": "no"}


def explain(
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
) -> None:
    """Say for each layer of the image REFERENCE whether it would be served, and if not, why.

    L are clients that ask by the digest of the blob (Podman < 5.1), T those that ask by the
    digest of the TOC (Podman >= 5.1).  What a running service has of a layer is told, too.
    """
    if platform and all_platforms:
        raise UsageError("--platform and --all-platforms exclude each other")
    settings = service.load(config)
    parsed = Reference.parse(reference.removeprefix("docker://"))
    wanted = tuple(Platform.parse(one) for one in platform or ()) or (Platform.host(),)
    with service.passing_store(settings) as store:
        policy = settings.policy.ordinary_for(parsed)
        images = judge(store, parsed, None if all_platforms else wanted, policy)
    report = [_report(image) for image in images]
    _add_known(report, (root or Path(settings.root)).absolute())
    if json:
        sys.stdout.buffer.write(
            msgspec.json.format(msgspec.json.encode(report, enc_hook=str)) + b"\n"
        )
    else:
        _print(report)


def _report(image: ExplainedImage) -> dict[str, Any]:
    return {
        "layers": [
            {
                "digest": layer.digest,
                "diff_id": layer.diff_id,
                "media_type": layer.media_type,
                "form": layer.form,
                "size": layer.size,
                "toc_digest": layer.toc_digest,
                "dialects": {"L": _verdict(layer.dialect_l), "T": _verdict(layer.dialect_t)},
                "here": "unknown",
            }
            for layer in image.layers
        ]
    }


def _verdict(verdict: Verdict) -> dict[str, str]:
    return {"served": verdict.served, "reason": verdict.reason, "detail": verdict.detail}


def _add_known(report: list[dict[str, Any]], root: Path) -> None:
    """What the service has: ``no``, ``lazy``, ``complete``, ``verified`` or ``quarantined``."""
    try:
        status = service.request(root, "status")
    except (ServiceError, OSError):
        return  # none runs, or not for us
    known: dict[tuple[str, str | None, str | None], str] = {}  # by all that is claimed of a blob
    for layer in status["layers"]:
        state = "complete" if layer["complete"] else "lazy"
        state = "verified" if layer["verified"] else state
        state = "quarantined" if layer["quarantine"] else state
        known[layer["digest"], layer["toc_digest"], layer["diff_id"]] = state
    for image in report:
        for layer in image["layers"]:
            digest, diff_id = layer["digest"], layer["diff_id"]
            claims = ((digest, layer["toc_digest"], diff_id), (digest, None, diff_id))
            layer["here"] = next((known[one] for one in claims if one in known), "no")


def _print(report: list[dict[str, Any]]) -> None:
    console = Console(highlight=False)
    console.width = max(console.width, _WIDTH)
    reasons: dict[str, str] = {}
    for image in report:
        table = Table(box=None, pad_edge=False)
        for heading in ("LAYER", "FORM", "SIZE", "L", "T", "HERE"):
            table.add_column(
                heading, no_wrap=True, justify="right" if heading == "SIZE" else "left"
            )
        for layer in image["layers"]:
            cells = []
            for verdict in layer["dialects"].values():
                reason = verdict["reason"]
                cells.append(_WORDS[verdict["served"]] + (f" ({reason})" if reason else ""))
                if reason:
                    reasons.setdefault(reason, verdict["detail"])
            table.add_row(
                layer["digest"].removeprefix("sha256:")[:12],
                layer["form"], decimal(layer["size"]), *cells, layer["here"],
            )  # fmt: skip
        console.print(table)
    for reason, detail in reasons.items():
        console.print(f"{reason}: {detail}", soft_wrap=True)
