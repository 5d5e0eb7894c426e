"""Malformed layers: valid ones of every form, broken at random, given to every parser.

    python -m lab.fuzz [--seconds 600] [--seed N] [--target NAME ...]

A `Target` is a parser with inputs that it accepts.  Whatever is made of them, a parser returns or
raises a LayerstoreError.  Digests are made right again where one is checked first, so that what was
broken gets past that.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Final

from lab import tars
from lab.breaking import Mutation, break_bytes, break_json, break_lines, break_tar
from layerstore.content import ObjectStore
from layerstore.errors import InvalidLayer, LayerstoreError
from layerstore.formats import (
    FOOTER_BYTES,
    EstargzOptions,
    LayerStream,
    TarEntry,
    TarReader,
    ZstdChunkedOptions,
    iter_toc,
    parse_footer,
    read_toc,
    write_estargz,
    write_estargz_external,
    write_zstd_chunked,
)
from layerstore.formats.announced import announced
from layerstore.formats.checkpoints import CheckpointReader, Checkpoints, write_checkpoints
from layerstore.formats.compression import Readable, zstd
from layerstore.formats.members import Packing, codec
from layerstore.formats.tartoc import FileRead, Piece, tar_entries
from layerstore.formats.zstdchunked import (
    parse_zstd_footer,
    read_zstd_toc,
    tar_length,
    tar_split_digest,
)
from layerstore.formats.zstdframes import FrameReader
from layerstore.image import Descriptor, Digest, Manifest, media_types, parse_manifest
from layerstore.layertree import LayerIndex, build_index
from layerstore.provider.agreement import check_agreement
from layerstore.provider.ordinary import ingest_layer

_BLOB: Final = 1 << 24  # where a layer is said to end whose TOC alone is broken
_NEEDED: Final = 3000  # bytes asked of a broken member
_SPACING: Final = 4096
_ENOUGH: Final = 1 << 26  # bytes of a stream that are looked at


@dataclass(frozen=True, slots=True)
class Target:
    """A parser: ``run`` returns or raises LayerstoreError, whatever it is given."""

    name: str
    seeds: tuple[bytes, ...]
    run: Callable[[bytes], None]
    mutate: Mutation

    def input(self, seed: int) -> bytes:
        """One broken input, the same for the same number."""
        chooser = random.Random(seed)
        data = chooser.choice(self.seeds)
        for _ in range(chooser.choice((1, 1, 1, 2, 3, 8))):
            data = self.mutate(chooser, data)
        return data

    def try_one(self, data: bytes) -> str:
        """Run it; "accepted", or the code of the LayerstoreError."""
        try:
            self.run(data)
        except LayerstoreError as error:
            return error.code
        return "accepted"


# -- what is broken ------------------------------------------------------------------


def _members() -> Iterable[tars.Member]:
    text = b"".join(b"line %d\n" % number for number in range(900))
    noise = random.Random(1).randbytes(20_000)
    first = tars.regular(b"usr/bin/tool", text, 0o4755, xattrs={b"user.a": b"\0\1"})
    return (
        tars.directory(b"usr"), tars.directory(b"usr/bin", 0o1777, uid=1 << 22, user=b"u"), first,
        tars.hard_link(b"usr/bin/link", first), tars.symlink(b"usr/sym", b"bin/tool"),
        tars.regular(b"etc/empty"), tars.regular(b"etc/caf\xe9", b"latin"),
        tars.regular(b"etc/" + b"long/" * 40 + b"name", b"deep", mtime_ns=tars.MTIME_NS + 5),
        tars.regular(b"var/large", noise + bytes(60_000) + text),
        tars.whiteout(b"usr/gone"), tars.opaque(b"etc"),
        tars.Member(b"dev/null", tars.CHARACTER, device=(1, 3)), tars.Member(b"pipe", tars.FIFO),
        tars.regular(b"gnu/" + b"n" * 200, b"g", form="gnu"),
    )  # fmt: skip


@cache
def _tar() -> bytes:
    out = io.BytesIO()
    tars.write_tar(out, _members())
    return out.getvalue()


@cache
def _gzip(level: int = 6) -> bytes:
    """Several members, the first of several blocks."""
    whole = _tar()
    return gzip.compress(whole[:50_000], level) + gzip.compress(whole[50_000:], 1)


@cache
def _zstd() -> bytes:
    whole = _tar()
    return b"".join(
        zstd.compress(whole[at : at + 30_000], 3) for at in range(0, len(whole), 30_000)
    )


@cache
def _estargz(min_chunk_size: int) -> bytes:
    out = io.BytesIO()
    options = EstargzOptions(
        chunk_size=8192, min_chunk_size=min_chunk_size, prioritize=("usr/bin/tool",)
    )
    write_estargz(io.BytesIO(_tar()), out, options)
    return out.getvalue()


@cache
def _external() -> tuple[bytes, bytes]:
    out = io.BytesIO()
    _, toc = write_estargz_external(io.BytesIO(_tar()), out, EstargzOptions(chunk_size=8192))
    return out.getvalue(), toc


@cache
def _chunked() -> tuple[bytes, Descriptor]:
    out = io.BytesIO()
    made = write_zstd_chunked(io.BytesIO(_plain_tar()), out, ZstdChunkedOptions(chunk_size=8192))
    described = Descriptor(
        media_type=media_types.OCI_LAYER_ZSTD,
        digest=made.digest,
        size=made.size,
        annotations=made.annotations,
    )
    return out.getvalue(), described


def _plain_tar() -> bytes:
    """Without what keeps the writer of zstd:chunked from adding a tar-split."""
    out = io.BytesIO()
    tops = [tars.directory(name) for name in (b"etc", b"var")]
    plain = (b"usr", b"etc/empty", b"var/")
    tars.write_tar(out, [*tops, *(one for one in _members() if one.name.startswith(plain))])
    return out.getvalue()


def _parts() -> tuple[bytes, bytes]:
    """TOC and tar-split of the zstd:chunked layer, unpacked."""
    blob, descriptor = _chunked()
    said = announced(descriptor)
    places = (said.toc, said.tar_split)
    toc, split = (
        zstd.decompress(blob[one.offset : one.offset + one.size])
        for one in places
        if one is not None
    )
    return toc, split


def _toc(blob: bytes) -> bytes:
    footer = parse_footer(blob[-FOOTER_BYTES:], len(blob))
    return read_toc(blob[footer.toc_offset :])


# -- the parsers ---------------------------------------------------------------------


def _look(index: LayerIndex) -> None:
    """Read all of an index, as the file system does."""
    for path, entry in index.walk():
        inode = index.inode(entry)
        index.mode(entry)
        list(index.xattrs(entry))
        content = index.content(entry)
        if content is not None:
            for number in index.chunks_between(entry, 0, min(inode.size, 1 << 40)):
                found = index.chunk(number)
                if not found.hole:
                    index.member(found.member)
        if path:
            assert index.entry_of_path(path) == entry


def _compile(toc: bytes, packing: Packing, blob_size: int = _BLOB) -> None:
    out = io.BytesIO()
    build_index(
        iter_toc(toc), out, blob_size=blob_size, toc_offset=blob_size - 100, packing=packing
    )
    with LayerIndex.from_bytes(out.getvalue()) as index:
        _look(index)


def _run_estargz(data: bytes) -> None:
    footer = parse_footer(data[-FOOTER_BYTES:], len(data))
    if footer.external:
        return
    toc = read_toc(data[footer.toc_offset : footer.toc_offset + footer.toc_size])
    _compile(toc, Packing.GZIP, len(data))


def _run_zstd_toc(data: bytes) -> None:
    packed = zstd.compress(data, 1)
    assert read_zstd_toc(packed, Digest.of(packed), compressed_digest=True) == data
    assert read_zstd_toc(packed, Digest.of(data), compressed_digest=False) == data
    tar_split_digest(data)
    _compile(data, Packing.ZSTD)


def _run_packed_toc(data: bytes) -> None:
    _compile(read_zstd_toc(data, Digest.of(data), compressed_digest=True), Packing.ZSTD)


def _run_zstd_footer(data: bytes) -> None:
    parse_zstd_footer(data, 1 << 30)


def _run_external(data: bytes) -> None:
    _compile(read_toc(data), Packing.GZIP)


def _run_tar_split(data: bytes) -> None:
    packed = zstd.compress(data, 1)
    tar_length(packed, Digest.of(packed))


def _run_packed_tar_split(data: bytes) -> None:
    tar_length(data, Digest.of(data))


def _run_descriptor(data: bytes) -> None:
    manifest = parse_manifest(data, media_types.OCI_MANIFEST)
    if isinstance(manifest, Manifest):
        for layer in manifest.layers:
            announced(layer)


def _run_tar(data: bytes) -> None:
    reader = TarReader(io.BytesIO(data))

    def read_file(entry: TarEntry) -> FileRead:
        left = entry.size
        while left:
            left -= len(reader.read(min(left, 1 << 20)))
        return FileRead(bytes(32), (Piece(entry.size, bytes(32), entry.payload_offset),))

    out = io.BytesIO()
    build_index(tar_entries(reader, read_file), out, blob_size=1 << 60, toc_offset=1 << 60)
    with LayerIndex.from_bytes(out.getvalue()) as index:
        _look(index)


def _drain(stream: Readable) -> None:
    given = 0
    while given < _ENOUGH and (data := stream.read(1 << 16)):
        given += len(data)


def _run_stream(data: bytes) -> None:
    _drain(LayerStream(io.BytesIO(data)))


def _run_checkpointed(data: bytes) -> None:
    _drain(CheckpointReader(io.BytesIO(data), _SPACING))


def _run_frames(data: bytes) -> None:
    _drain(FrameReader(io.BytesIO(data), _SPACING))


def _run_member(packing: Packing, data: bytes) -> None:
    taken = codec(packing).decompress(0, data, needed=_NEEDED)
    assert len(taken) >= _NEEDED
    _drain(codec(packing).stream(0, io.BytesIO(data)))


class _Spans:
    """A checkpointed stream, entered at each of its points."""

    def __init__(self) -> None:
        reader = CheckpointReader(io.BytesIO(_gzip(9)), _SPACING)
        _drain(reader)
        with tempfile.NamedTemporaryFile() as file:
            write_checkpoints(reader.points, Path(file.name))
            self.file = Path(file.name).read_bytes()
        ends = [point.plain_offset for point in reader.points[1:]] + [len(_tar())]
        self.spans = [
            (point.offset, end - point.plain_offset)
            for point, end in zip(reader.points, ends, strict=True)
        ]

    def offset(self, number: int) -> int:
        """Where a span begins in the blob."""
        return self.spans[number][0]

    def run_blob(self, data: bytes) -> None:
        kept = Checkpoints(self.file, self.offset)
        failure = None
        for number, (offset, size) in enumerate(self.spans):
            try:
                taken = kept.decompress(number, data[offset:], needed=size)
            except InvalidLayer as error:
                failure = error
            else:
                assert len(taken) == size
        if failure is not None:
            raise failure

    def run_file(self, data: bytes) -> None:
        Checkpoints(data, self.offset)


def _run_index(data: bytes) -> None:
    with LayerIndex.from_bytes(data) as index:
        _look(index)


@cache
def _index_of(blob: bytes) -> bytes:
    out = io.BytesIO()
    build_index(iter_toc(_toc(blob)), out, blob_size=len(blob), toc_offset=len(blob) - 100)
    return out.getvalue()


def _run_agreement(data: bytes) -> None:
    with LayerIndex.from_bytes(_index_of(_estargz(0))) as index:
        check_agreement(index, io.BytesIO(data))


class _Source:
    def __init__(self, data: bytes, start: int) -> None:
        self.start = start
        self._stream = io.BytesIO(data[start:])
        self.read = self._stream.read
        self.close = self._stream.close


class _Ingest:
    """Ordinary layers, taken into one store; it goes with the process."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="layerstore-fuzz-")
        self._root = Path(self._directory.name)
        self._objects = ObjectStore(self._root / "content")

    def run(self, data: bytes) -> None:
        with tempfile.TemporaryDirectory(dir=self._root) as name:
            ingest_layer(
                partial(_Source, data), Path(name), self._objects,
                digest=Digest.of(data), size=len(data), diff_id=None,
            )  # fmt: skip
            with LayerIndex.open(Path(name) / "index") as index:
                _look(index)


def _manifest(*descriptors: Descriptor) -> bytes:
    return json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": media_types.OCI_MANIFEST,
            "config": {
                "mediaType": media_types.OCI_CONFIG, "digest": "sha256:" + "1" * 64, "size": 2,
            },
            "layers": [
                {
                    "mediaType": one.media_type, "digest": one.digest, "size": one.size,
                    "annotations": dict(one.annotations),
                }
                for one in descriptors
            ],
        }
    ).encode()  # fmt: skip


@cache
def targets() -> tuple[Target, ...]:
    """All of them, by what is broken."""
    chunked, descriptor = _chunked()
    toc, split = _parts()
    blob, external = _external()
    estargz = _estargz(0), _estargz(20_000)
    spans, ingest = _Spans(), _Ingest()
    said = announced(descriptor).toc
    assert said is not None
    v0 = Descriptor(
        media_type=descriptor.media_type,
        digest=descriptor.digest,
        size=descriptor.size,
        annotations={
            "containerd.io/snapshot/stargz/toc.digest": Digest.of(toc),
            "io.containers.zstd-chunked.manifest-checksum": Digest.of(b"packed"),
            "io.containers.zstd-chunked.manifest-position": f"{said.offset}:{said.size}:{len(toc)}:1",
        },
    )
    packed, frames, tar = _gzip(), _zstd(), _tar()
    return (
        Target("estargz", (*estargz, blob), _run_estargz, break_bytes),
        Target(
            "estargz-toc", tuple(map(_toc, estargz)), partial(_compile, packing=Packing.GZIP), break_json
        ),
        Target("external-toc", (external,), _run_external, break_bytes),
        Target("zstd-toc", (toc,), _run_zstd_toc, break_json),
        Target("zstd-toc-packed", (zstd.compress(toc, 3),), _run_packed_toc, break_bytes),
        Target("zstd-footer", (chunked[-64:], chunked[-64:-32] + b"GnUlInUx"),
               _run_zstd_footer, break_bytes),
        Target("tar-split-packed", (zstd.compress(split, 3),), _run_packed_tar_split, break_bytes),
        Target("tar-split", (split,), _run_tar_split, break_lines),
        Target("manifest", (_manifest(descriptor, v0),), _run_descriptor, break_json),
        Target("tar", (tar,), _run_tar, break_tar),
        Target("stream", (packed, frames, chunked, blob), _run_stream, break_bytes),
        Target("gzip-checkpoints", (packed, _gzip(9)), _run_checkpointed, break_bytes),
        Target("zstd-frames", (frames, chunked), _run_frames, break_bytes),
        Target("gzip-member", (packed,), partial(_run_member, Packing.GZIP), break_bytes),
        Target("zstd-member", (frames,), partial(_run_member, Packing.ZSTD), break_bytes),
        Target("span", (_gzip(9),), spans.run_blob, break_bytes),
        Target("checkpoint-file", (spans.file,), spans.run_file, break_bytes),
        Target("index-file", (_index_of(estargz[0]),), _run_index, break_bytes),
        Target("agreement", estargz, _run_agreement, break_bytes),
        Target("agreement-tar", (tar,), _run_agreement, break_tar),
        Target("ordinary", (packed, frames, tar), ingest.run, break_bytes),
        Target("ordinary-tar", (tar,), ingest.run, break_tar),
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Take turns over the targets; print what went wrong, and what was seen."""
    parser = argparse.ArgumentParser(prog="lab.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long")
    parser.add_argument("--seed", type=int, default=None, help="of the first input")
    parser.add_argument("--target", action="append", choices=[one.name for one in targets()])
    options = parser.parse_args(arguments)
    chosen = [one for one in targets() if options.target is None or one.name in options.target]
    seed = time.time_ns() if options.seed is None else options.seed
    counts: dict[str, dict[str, int]] = {one.name: {} for one in chosen}
    slowest: dict[str, tuple[float, int]] = {one.name: (0.0, 0) for one in chosen}
    until, wrong = time.monotonic() + options.seconds, 0
    while time.monotonic() < until:
        for target in chosen:
            data = target.input(seed)
            began = time.process_time()
            try:
                result = target.try_one(data)
            except Exception as error:
                wrong += 1
                result = f"{type(error).__name__}: {error}"
                print(f"{target.name} --seed {seed}: {result}", file=sys.stderr)
            result = result[:60]
            counts[target.name][result] = counts[target.name].get(result, 0) + 1
            slowest[target.name] = max(slowest[target.name], (time.process_time() - began, seed))
        seed += 1
    for name, found in counts.items():
        seconds, number = slowest[name]
        print(f"{name}: {found}; slowest {seconds * 1000:.0f} ms (seed {number})")
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
