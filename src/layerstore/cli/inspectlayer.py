"""``layerstore inspect-layer``."""

from __future__ import annotations

import datetime
import stat
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter

from layerstore import limits, service
from layerstore.cli.common import printable
from layerstore.errors import NotFound
from layerstore.formats.announced import announced_name
from layerstore.image import Descriptor, Digest, Platform, Reference
from layerstore.layertree import LayerIndex
from layerstore.provider import Layer, Store
from layerstore.service import DEFAULT_PATH

_SECOND = 1_000_000_000


def inspect_layer(
    reference: str,
    digest: str,
    /,
    *,
    platform: Annotated[
        list[str] | None,
        Parameter(negative="", help="Look at this os/architecture[/variant] only."),
    ] = None,
    chunks: Annotated[
        bool, Parameter(negative="", show_default=False, help="List the chunks of each file.")
    ] = False,
    config: Annotated[Path | None, Parameter(help=f"Configuration file [{DEFAULT_PATH}].")] = None,
    json: Annotated[
        bool, Parameter(negative="", show_default=False, help="Print one JSON object a line.")
    ] = False,
) -> None:
    """List what the layer DIGEST (of its blob or its TOC) of the image REFERENCE consists of.

    Only the TOC is fetched; of a layer without one, all of it.  The first line is about the
    layer, the others about one entry each.
    """
    parsed = Reference.parse(reference.removeprefix("docker://"))
    name = Digest.parse(digest)
    platforms = None if not platform else tuple(map(Platform.parse, platform))
    with service.passing_store(service.load(config)) as store:
        descriptor, diff_id = _find(store, parsed, name, platforms)
        layer = store.inspected(parsed, descriptor, diff_id)
        lines = _json_lines(layer, chunks) if json else _lines(layer, chunks)
        for line in lines:
            sys.stdout.write(line + "\n")


def _find(
    store: Store, reference: Reference, name: Digest, platforms: tuple[Platform, ...] | None
) -> tuple[Descriptor, Digest]:
    deadline = time.monotonic() + limits.RESOLVE_SECONDS
    for manifest, diff_ids in store.chosen(reference, platforms, deadline):
        for descriptor, diff_id in zip(manifest.layers, diff_ids, strict=True):
            if name in (descriptor.digest, announced_name(descriptor)):
                return descriptor, diff_id
    raise NotFound(f"no layer {name} in the image", subject=str(reference))


def _head(layer: Layer) -> dict[str, Any]:
    record, index = layer.record, layer.index
    return {
        "digest": record.blob_digest,
        "toc_digest": record.toc_digest,
        "diff_id": record.diff_id,
        "form": record.form.value,
        "size": record.size,
        "toc_offset": record.toc_offset if record.form.lazy else None,
        "packing": index.packing.name.lower(),
        "entries": index.entries,
        "files": index.files,
        "chunks": index.chunks,
        "members": index.members,
        "content_bytes": index.content_bytes,
        "prefetch_end": index.landmark,
    }


def _entries(index: LayerIndex, chunks: bool) -> Iterator[dict[str, Any]]:
    for path, entry in index.walk():
        inode = index.inode(entry)
        found: dict[str, Any] = {
            "path": "/" + path.decode(errors="backslashreplace"),
            "mode": f"{inode.mode:o}",
            "type": stat.filemode(inode.mode)[0],
            "uid": inode.uid,
            "gid": inode.gid,
            "size": inode.size,
            "mtime": inode.mtime_ns / _SECOND,
            "links": inode.nlink,
        }
        if stat.S_ISLNK(inode.mode):
            found["target"] = index.symlink(entry).decode(errors="backslashreplace")
        if stat.S_ISCHR(inode.mode) or stat.S_ISBLK(inode.mode):
            found["device"] = [inode.major, inode.minor]
            found["whiteout"] = stat.S_ISCHR(inode.mode) and not inode.major and not inode.minor
        if inode.has_xattrs:
            found["xattrs"] = {
                name.decode(errors="backslashreplace"): b64encode(value).decode()
                for name, value in index.xattrs(entry)
            }
        content = index.content(entry)
        if content is not None and content.digest is not None:
            found["digest"] = f"sha256:{content.digest.hex()}"
        if chunks and content is not None:
            found["chunks"] = [
                _chunk(index, number)
                for number in range(content.first_chunk, content.first_chunk + content.chunk_count)
            ]
        yield found


def _chunk(index: LayerIndex, number: int) -> dict[str, Any]:
    chunk = index.chunk(number)
    if chunk.hole:
        return {"offset": chunk.file_offset, "size": chunk.size, "zeros": True}
    member = index.member(chunk.member)
    return {
        "offset": chunk.file_offset,
        "size": chunk.size,
        "digest": f"sha256:{chunk.digest.hex()}",
        "blob_offset": member.offset,
        "blob_end": member.end,
        "inner_offset": chunk.inner_offset,
    }


def _json_lines(layer: Layer, chunks: bool) -> Iterator[str]:
    yield msgspec.json.encode(_head(layer), enc_hook=str).decode()
    for one in _entries(layer.index, chunks):
        yield msgspec.json.encode(one).decode()


def _lines(layer: Layer, chunks: bool) -> Iterator[str]:
    head = _head(layer)
    yield ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in head.items() if value)
    for one in _entries(layer.index, chunks):
        when = datetime.datetime.fromtimestamp(int(one["mtime"]), datetime.UTC)
        size = ",".join(map(str, one["device"])) if "device" in one else str(one["size"])
        target = f" -> {printable(one['target'])}" if "target" in one else ""
        note = " (whiteout)" if one.get("whiteout") else ""
        mode = stat.filemode(int(one["mode"], 8))
        yield (
            f"{mode} {one['links']:>3} {one['uid']}:{one['gid']} {size:>12}"
            f" {when:%Y-%m-%d %H:%M} {printable(one['path'])}{target}{note}"
        )
        for key, value in one.get("xattrs", {}).items():
            yield f"    {printable(key)}={value}"
        for chunk in one.get("chunks", ()):
            where = (
                "zeros"
                if "zeros" in chunk
                else f"{chunk['blob_offset']}-{chunk['blob_end']}+{chunk['inner_offset']}"
                f" {chunk['digest']}"
            )
            yield f"    chunk {chunk['offset']}+{chunk['size']}: {where}"
