"""`python -m benchmarks.entries`: layers of a million entries, what it takes to index and check them.

    python -m benchmarks.entries [--entries 1000000] [--json FILE]

One layer in every form: one entry in seven is a small file, the others are links, empty files and
directories of a thousand, so that the TOC stays below its limit.  For each form, in a process of its own: what a lookup does with the TOC,
from the bytes of the registry to the index on disk; of an ordinary layer, taking in all of it; then
the check that TOC and tar stream agree.  ``base`` is the memory of the process before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from lab import tars
from lab.fresh import fresh
from layerstore.content import ObjectStore
from layerstore.formats import (
    FOOTER_BYTES,
    EstargzOptions,
    ZstdChunkedOptions,
    iter_toc,
    parse_footer,
    read_toc,
    write_estargz,
    write_estargz_external,
    write_zstd_chunked,
)
from layerstore.formats.announced import Place
from layerstore.formats.members import Packing
from layerstore.formats.zstdchunked import read_zstd_toc, tar_length, tar_split_digest
from layerstore.image import Digest
from layerstore.image.annotations import ZSTD_TARSPLIT_POSITION, ZSTD_TOC_POSITION
from layerstore.layertree import LayerIndex, build_index
from layerstore.provider.agreement import check_agreement
from layerstore.provider.ordinary import ingest_layer

_MIB: Final = 1 << 20
_IN_DIRECTORY: Final = 1000


@dataclass(frozen=True, slots=True)
class Result:
    """``toc`` is its size as JSON, of an ordinary layer that of the tar stream; all in bytes."""

    form: str
    step: str
    seconds: float
    base: int
    peak: int
    toc: int
    index: int


def _members(entries: int) -> Iterator[tars.Member]:
    yield from (tars.directory(b"usr"), tars.directory(b"usr/share"))
    for number in range(entries - 2):
        inside = number % _IN_DIRECTORY
        directory = b"usr/share/%04d/" % (number // _IN_DIRECTORY)
        name = directory + b"entry-%03d" % inside
        if not inside:
            yield tars.directory(directory)
        elif inside % 20 in (1, 2, 3):
            yield tars.regular(name, b"%d" % number)
        elif inside % 20 == 4:
            yield tars.regular(name)
        elif inside % 20 == 5:
            yield tars.hard_link(name, directory + b"entry-001")
        else:
            yield tars.symlink(name, b"entry-001")


# -- in a process for each form ------------------------------------------------------------


class _Measure:
    """What a step takes of this process."""

    def __init__(self, form: str) -> None:
        self._form = form
        self._base = _memory("VmRSS")
        self.results: list[Result] = []

    def __call__(self, step: str, run: Callable[[], tuple[int, Path]]) -> None:
        _forget()
        began = time.monotonic()
        toc, index = run()
        seconds, size = time.monotonic() - began, index.stat().st_size
        self.results.append(
            Result(self._form, step, seconds, self._base, _memory("VmHWM"), toc, size)
        )


def _memory(field: str) -> int:
    """``VmRSS``, what this process has in memory now, or ``VmHWM``, the most since `_forget`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _forget() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # else what was here before exec counts


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _estargz_toc(blob: Path) -> bytes:
    size = blob.stat().st_size
    footer = parse_footer(_read(blob, size - FOOTER_BYTES, FOOTER_BYTES), size)
    if footer.external:
        return read_toc(blob.with_suffix(".toc").read_bytes())
    return read_toc(_read(blob, footer.toc_offset, footer.toc_size))


def _zstd_toc(blob: Path) -> bytes:
    said = json.loads(blob.with_suffix(".json").read_text())
    places = {key: Place(*map(int, text.split(":")[:3])) for key, text in said.items()}
    toc, split = places[ZSTD_TOC_POSITION], places.get(ZSTD_TARSPLIT_POSITION)
    packed = _read(blob, toc.offset, toc.size)
    document = read_zstd_toc(packed, Digest.of(packed), compressed_digest=True)
    expected = tar_split_digest(document)
    if split is not None and expected is not None:  # a very long one is left out by its writer
        tar_length(_read(blob, split.offset, split.size), expected)
    return document


def _index_lazy(blob: Path, toc: Callable[[Path], bytes], packing: Packing) -> tuple[int, Path]:
    document = toc(blob)
    index, size = blob.with_suffix(".index"), blob.stat().st_size
    build_index(iter_toc(document), index, blob_size=size, toc_offset=size - 51, packing=packing)
    return len(document), index


class _Source:
    def __init__(self, blob: Path, start: int) -> None:
        self.start = start
        self._file = blob.open("rb")
        self._file.seek(start)
        self.read = self._file.read
        self.close = self._file.close


def _take_in(blob: Path) -> tuple[int, Path]:
    directory = blob.with_suffix(".taken")
    directory.mkdir()
    with blob.open("rb") as file:
        digest = Digest(f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}")
    found = ingest_layer(
        partial(_Source, blob), directory, ObjectStore(directory / "content"),
        digest=digest, size=blob.stat().st_size, diff_id=None,
    )  # fmt: skip
    return found.diff_size, directory / "index"


def _check(blob: Path, index: Path) -> tuple[int, Path]:
    with blob.open("rb") as file, LayerIndex.open(index) as opened:
        return check_agreement(opened, file).diff_size, index


_LAZY: Final = {
    "eStargz": (_estargz_toc, Packing.GZIP),
    "eStargz, external TOC": (_estargz_toc, Packing.GZIP),
    "zstd:chunked": (_zstd_toc, Packing.ZSTD),
}
_ORDINARY: Final = ("tar.gz", "tar.zst")


def _measure_one(form: str, blob: Path) -> None:
    measure = _Measure(form)
    if form in _LAZY:
        measure("index", partial(_index_lazy, blob, *_LAZY[form]))
        index = blob.with_suffix(".index")
    else:
        measure("take in", partial(_take_in, blob))
        index = blob.with_suffix(".taken") / "index"
    measure("check", partial(_check, blob, index))
    print(json.dumps([asdict(one) for one in measure.results]))


# -- the whole -------------------------------------------------------------------------------


def _write(form: str, tar: Path, blob: Path) -> None:
    with tar.open("rb") as source, blob.open("w+b") as out:
        if form == "eStargz":
            write_estargz(source, out, EstargzOptions(level=1))
        elif form == "eStargz, external TOC":
            _, toc = write_estargz_external(source, out, EstargzOptions(level=1))
            blob.with_suffix(".toc").write_bytes(toc)
        elif form == "zstd:chunked":
            said = write_zstd_chunked(source, out, ZstdChunkedOptions(level=1)).annotations
            keys = {ZSTD_TOC_POSITION, ZSTD_TARSPLIT_POSITION} & said.keys()
            places = {key: said[key] for key in keys}
            blob.with_suffix(".json").write_text(json.dumps(places))
        else:
            program = ["gzip", "-1"] if form == "tar.gz" else ["zstd", "-q", "-1"]
            subprocess.run(program, stdin=source, stdout=out, check=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; the exit status tells only whether it could be measured."""
    parser = argparse.ArgumentParser(prog="benchmarks.entries", description=__doc__)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--one", nargs=2, metavar=("FORM", "BLOB"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        _measure_one(options.one[0], Path(options.one[1]))
        return 0
    work = fresh("layerstore-bench-")
    results: list[Result] = []
    try:
        tar = work / "layer.tar"
        with tar.open("wb") as out:
            tars.write_tar(out, _members(options.entries))
        for number, form in enumerate((*_LAZY, *_ORDINARY)):
            blob = work / str(number)
            _write(form, tar, blob)
            command = [sys.executable, "-m", "benchmarks.entries", "--one", form, str(blob)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results += [Result(**one) for one in json.loads(done.stdout)]
    finally:
        shutil.rmtree(work, ignore_errors=True)
    Console(highlight=False, soft_wrap=True, width=120).print(_table(results))
    print(f"\n{options.entries} entries.  Linux {platform.release()}, {os.cpu_count()} cores.")
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in results], indent=1))
    return 0


def _table(results: Sequence[Result]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("form", no_wrap=True)
    table.add_column("step", no_wrap=True)
    for heading in ("seconds", "peak memory", "of it before", "TOC or tar", "index"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in results:
        sizes = (f"{size / _MIB:.0f} MiB" for size in (one.peak, one.base, one.toc, one.index))
        table.add_row(one.form, one.step, f"{one.seconds:.1f} s", *sizes)
    return table


if __name__ == "__main__":
    sys.exit(main())
