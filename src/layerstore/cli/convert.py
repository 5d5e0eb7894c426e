"""``layerstore convert``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from cyclopts import Parameter
from rich.filesize import decimal

from layerstore.cli.common import named_auth_file, printable, switch
from layerstore.copy.convert import ConvertOptions, ConvertResult
from layerstore.copy.convert import Progress as Listener
from layerstore.copy.convert import convert as convert_image
from layerstore.copy.convertlayer import LayerProgress
from layerstore.copy.layerform import Estargz, ExternalToc, LayerForm, ZstdChunked
from layerstore.copy.progress import PullItem, PullListener, listener
from layerstore.errors import ConfigError, UsageError
from layerstore.formats import EstargzOptions, ZstdChunkedOptions
from layerstore.image import Platform
from layerstore.registry import RegistrySettings

_PHASES = {"fetch": "fetching", "write": "writing", "push": "storing", "kept": "keeping"}


def convert(
    src: str,
    dst: str,
    /,
    *,
    form: Annotated[
        Literal["estargz", "zstd:chunked"],
        Parameter(name="--format", help="zstd:chunked leaves config and diff IDs as they are."),
    ] = "estargz",
    external_toc: Annotated[
        bool,
        Parameter(
            negative="",
            show_default=False,
            help="eStargz with diff IDs as they are: tables of contents go to an image of their"
            " own, DST with -esgztoc behind its tag.",
        ),
    ] = False,
    level: Annotated[
        int | None,
        Parameter(
            help="Compression: for eStargz 1 (fast) to 9 (small), usually 5;"
            " for zstd:chunked 1 to 19, usually 6."
        ),
    ] = None,
    chunk_size: Annotated[
        int | None,
        Parameter(
            help="Bytes of one chunk of a large file: for eStargz exactly, usually 4 MiB;"
            " for zstd:chunked on average, usually 64 KiB."
        ),
    ] = None,
    min_chunk_size: Annotated[
        int,
        Parameter(help="Let small files share a gzip member of about so many bytes; 0: never."),
    ] = 0,
    prioritize: Annotated[
        list[str] | None,
        Parameter(
            negative="", help="A file to place first, or @LIST for a file of paths, one a line."
        ),
    ] = None,
    platform: Annotated[
        list[str] | None,
        Parameter(negative="", help="Only this os/architecture[/variant]; may be repeated."),
    ] = None,
    authfile: Annotated[
        Path | None, Parameter(help="Credentials, instead of the usual places.")
    ] = None,
    tls_verify: Annotated[
        bool | None, Parameter(help="Demand valid TLS certificates, or allow plain HTTP.")
    ] = None,
    force: Annotated[
        bool,
        Parameter(negative="", show_default=False, help="Rebuild layers that have the form, too."),
    ] = False,
    json: Annotated[
        bool, Parameter(negative="", show_default=False, help="Print one JSON object.")
    ] = False,
    quiet: Annotated[bool, switch("Show no progress.", "--quiet", "-q")] = False,
) -> None:
    """Convert the image SRC, so that it can be read lazily, and store it as DST.

    SRC and DST are docker://REFERENCE or oci:DIRECTORY[:TAG].
    """
    settings = RegistrySettings.from_system(
        auth_file=named_auth_file(authfile), tls_verify=tls_verify
    )
    options = ConvertOptions(
        form=_form(form, external_toc, level, chunk_size, min_chunk_size, _paths(prioritize or [])),
        platforms=tuple(Platform.parse(text) for text in platform or []),
        force=force,
        source_settings=settings,
        destination_settings=settings,
    )
    with listener(quiet=quiet) as shown:
        result = convert_image(src, dst, options, _teller(shown))
    layers = {layer.source: layer for image in result.images for layer in image.layers}
    for layer in layers.values():
        if layer.problem:
            kept = "stays as it is" if layer.kept else "was converted in vain"
            print(
                f"layerstore: layer {layer.source} {kept}, it cannot be read lazily:"
                f" {printable(layer.problem)}",
                file=sys.stderr,
            )
    for path in result.not_found:
        print(
            f"layerstore: no layer holds the file to place first: {printable(path)}",
            file=sys.stderr,
        )
    if json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(_report(result))) + b"\n")
    else:
        _print(result, dst)


def _form(
    name: str,
    external_toc: bool,
    level: int | None,
    chunk_size: int | None,
    min_chunk_size: int,
    prioritize: tuple[str, ...],
) -> LayerForm:
    given = {"level": level, "chunk_size": chunk_size}
    numbers = {key: value for key, value in given.items() if value is not None}
    if name == "zstd:chunked":
        if external_toc or min_chunk_size or prioritize:
            raise UsageError(
                "--external-toc, --min-chunk-size and --prioritize are for eStargz only"
            )
        return ZstdChunked(ZstdChunkedOptions(**numbers))
    options = EstargzOptions(**numbers, min_chunk_size=min_chunk_size, prioritize=prioritize)
    return ExternalToc(options) if external_toc else Estargz(options)


def _paths(given: list[str]) -> tuple[str, ...]:
    paths: list[str] = []
    for one in given:
        if not one.startswith("@"):
            paths.append(one)
            continue
        try:
            text = Path(one[1:]).read_text(encoding="utf-8", errors="surrogateescape")
        except OSError as error:
            raise ConfigError(error.strerror or str(error), subject=one[1:]) from error
        paths += [line for line in text.splitlines() if line.strip()]
    return tuple(paths)


def _teller(shown: PullListener) -> Listener:
    """Passes what a conversion tells on to the one that shows it."""
    items: dict[str, PullItem] = {}

    def tell(event: LayerProgress) -> None:
        item = items.get(event.layer)
        if item is None:
            item = items[event.layer] = shown.copying("blob", event.layer, event.total)
        if event.phase == "done":
            item.done()
        else:
            item.step(_PHASES[event.phase])
            item.at(event.done, event.total)

    return tell


def _report(result: ConvertResult) -> dict[str, Any]:
    return {
        "source": str(result.source),
        "digest": str(result.digest),
        "mediaType": result.media_type,
        "images": [
            {
                "platform": str(image.platform),
                "source": str(image.source),
                "digest": str(image.digest),
                "layers": [
                    {
                        "source": str(layer.source),
                        "sourceSize": layer.source_size,
                        "digest": str(layer.digest),
                        "size": layer.size,
                        "diffId": str(layer.diff_id),
                        "tocDigest": None if layer.toc_digest is None else str(layer.toc_digest),
                        "kept": layer.kept,
                        "problem": layer.problem,
                    }
                    for layer in image.layers
                ],
            }
            for image in result.images
        ],
        "notFound": [
            path.encode(errors="surrogateescape").decode(errors="replace")
            for path in result.not_found
        ],
    } | _toc_image(result)


def _toc_image(result: ConvertResult) -> dict[str, Any]:
    if result.toc_image is None:
        return {}
    return {"tocImage": result.toc_image, "tocImageDigest": str(result.toc_image_digest)}


def _print(result: ConvertResult, dst: str) -> None:
    for image in result.images:
        before = sum(layer.source_size for layer in image.layers)
        after = sum(layer.size for layer in image.layers)
        kept = sum(layer.kept for layer in image.layers)
        print(
            f"{image.platform}: {image.digest}, {len(image.layers)} layers ({kept} kept),"
            f" {decimal(before)} -> {decimal(after)}"
        )
    if result.toc_image is not None:
        print(f"{result.toc_image}@{result.toc_image_digest}")
    print(f"{dst}@{result.digest}")
