"""`python -m benchmarks.conversion`: our conversions beside those of other tools, in one run.

    python -m benchmarks.conversion [--repeat 2] [--json FILE]

One image of an OCI layout becomes eStargz and zstd:chunked: by `layerstore convert`, by
`ctr-remote` (in a private containerd into which the image was imported before; its zstd:chunked
is the older form) and by Debian 13's `skopeo`, each with its own defaults, in turns.  Seconds are
those of the whole command, CPU seconds those of ctr-remote with its containerd.  Needs root and
what tools/bootstrap installs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from benchmarks.measured import Use, cpu_seconds, measured
from lab import ctrremote, images, oci
from lab.fresh import fresh
from lab.oci import StoredImage
from lab.podman import PodmanEnv

_MIB: Final = 1 << 20
_SOURCE: Final = "lab.local/source"
_OURS: Final = "layerstore"


@dataclass(frozen=True, slots=True)
class Contender:
    """A tool that makes one form; ``run`` converts anew into an empty directory and measures."""

    form: str
    who: str
    run: Callable[[Path], Use]
    compressed: Callable[[Path], int]


@dataclass(frozen=True, slots=True)
class Result:
    """All samples of a contender; ``size`` is that of the layers it made."""

    form: str
    who: str
    uses: tuple[Use, ...]
    size: int

    @property
    def seconds(self) -> float:
        return statistics.median(use.seconds for use in self.uses)

    @property
    def cpu_seconds(self) -> float:
        return statistics.median(use.cpu_seconds for use in self.uses)

    @property
    def rss_bytes(self) -> int:
        return max(use.rss_bytes for use in self.uses)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; the exit status tells only whether it could be measured."""
    parser = argparse.ArgumentParser(prog="benchmarks.conversion", description=__doc__)
    parser.add_argument("--repeat", type=int, default=2, help="rounds")
    parser.add_argument("--json", type=Path, help="also write all samples here")
    options = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    image = images.python_image()
    work = fresh("layerstore-bench-")
    try:
        with PodmanEnv(work / "env", "debian13") as env, _containerd(image, work) as daemon:
            results = _measure(_contenders(image, env, daemon), work, options.repeat)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    console.print(_table(results, image.compressed_size))
    console.print(
        f"\nThe Python image: {len(image.layers)} layers,"
        f" {image.compressed_size / _MIB:.0f} MiB of tar.gz.  Linux {platform.release()},"
        f" {os.cpu_count()} cores; {options.repeat} rounds, medians, RSS the greatest."
        f"\nratio: seconds to those of {_OURS} for the same form."
    )
    if options.json:
        plain = {"source": image.compressed_size, "results": [asdict(each) for each in results]}
        options.json.write_text(json.dumps(plain, indent=1))
    return 0


def _measure(contenders: Sequence[Contender], work: Path, repeat: int) -> list[Result]:
    """Rounds over all, so that what the machine does meanwhile meets everybody."""
    uses: dict[int, list[Use]] = {number: [] for number in range(len(contenders))}
    sizes: dict[int, int] = {}
    for _ in range(repeat):
        for number, each in enumerate(contenders):
            place = fresh("out-", work)
            uses[number].append(each.run(place))
            sizes[number] = each.compressed(place)
            shutil.rmtree(place)
    return [
        Result(each.form, each.who, tuple(uses[number]), sizes[number])
        for number, each in enumerate(contenders)
    ]


def _contenders(image: StoredImage, env: PodmanEnv, daemon: _Containerd) -> list[Contender]:
    def layerstore(*options: str) -> Callable[[Path], Use]:
        def run(place: Path) -> Use:
            command = [*env.command("layerstore"), "convert", "--quiet", *options]
            command += [image.source, f"oci:{place}/out:latest"]
            return measured(command, env.environment())

        return run

    def skopeo(place: Path) -> Use:
        command = [*env.command("skopeo"), "copy", "--quiet"]
        command += ["--dest-compress-format", "zstd:chunked"]
        return measured([*command, image.source, f"oci:{place}/out:latest"], env.environment())

    def layout(place: Path) -> int:
        return oci.read_image(place / "out", "latest").compressed_size

    return [
        Contender("eStargz", _OURS, layerstore(), layout),
        Contender("eStargz", "ctr-remote", daemon.converter("--estargz"), daemon.size),
        Contender("eStargz", f"{_OURS} --external-toc", layerstore("--external-toc"), layout),
        Contender("zstd:chunked", _OURS, layerstore("--format", "zstd:chunked"), layout),
        Contender("zstd:chunked", "skopeo 1.18", skopeo, layout),
        Contender(
            "zstd:chunked", "ctr-remote (v0)", daemon.converter("--zstdchunked"), daemon.size
        ),
    ]


class _Containerd:
    """The private containerd with the image in it."""

    def __init__(self, daemon: ctrremote.Containerd, image: StoredImage) -> None:
        self._daemon = daemon
        self._source = f"{_SOURCE}:{image.tag}"
        self._count = 0

    def converter(self, flag: str) -> Callable[[Path], Use]:
        """Conversions with a flag; each begins without what the one before left."""

        def run(_: Path) -> Use:
            self._forget()
            self._count += 1
            before = cpu_seconds(self._daemon.pid)
            name = self._name
            command = ["ctr-remote", "--address", str(self._daemon.socket), "--namespace", "lab"]
            command += ["image", "convert", flag, "--oci", self._source, name]
            use = measured(command, os.environ)
            cpu = use.cpu_seconds + cpu_seconds(self._daemon.pid) - before
            return Use(use.seconds, cpu, use.rss_bytes)

        return run

    def size(self, place: Path) -> int:
        """What the layers of the last conversion have."""
        archive = place / "exported.tar"
        self._daemon.run("ctr", "image", "export", str(archive), self._name)
        with tarfile.open(archive) as exported:
            exported.extractall(place / "out", filter="data")
        index = json.loads((place / "out/index.json").read_bytes())
        blobs = place / "out/blobs"
        raw = (blobs / index["manifests"][0]["digest"].replace(":", "/")).read_bytes()
        return sum(layer["size"] for layer in json.loads(raw)["layers"])

    @property
    def _name(self) -> str:
        return f"lab.local/converted:{self._count}"

    def _forget(self) -> None:
        if self._count:
            self._daemon.run("ctr", "image", "rm", "--sync", self._name)


@contextlib.contextmanager
def _containerd(image: StoredImage, work: Path) -> Iterator[_Containerd]:
    scratch = work / "containerd"
    scratch.mkdir()
    source = scratch / "source.tar"
    with tarfile.open(source, "w") as archive:
        archive.add(image.layout, arcname=".")
    with ctrremote.containerd(scratch) as daemon:
        daemon.run("ctr", "image", "import", "--no-unpack", "--base-name", _SOURCE, str(source))
        source.unlink()
        yield _Containerd(daemon, image)


def _table(results: Sequence[Result], source: int) -> Table:
    table = Table(title="\nConversion", title_justify="left", box=None, pad_edge=False)
    table.add_column("to", no_wrap=True)
    table.add_column("by", no_wrap=True)
    for heading in ("seconds", "ratio", "CPU", "RSS", "size", "of tar.gz"):
        table.add_column(heading, justify="right", no_wrap=True)
    ours = {each.form: each.seconds for each in results if each.who == _OURS}
    for each in results:
        table.add_row(
            each.form,
            each.who,
            f"{each.seconds:.1f} s",
            f"{each.seconds / ours[each.form]:.2f}" if each.form in ours else "-",
            f"{each.cpu_seconds:.1f} s",
            f"{each.rss_bytes / _MIB:.0f} MiB",
            f"{each.size / _MIB:.1f} MiB",
            f"{each.size / source:.3f}",
        )
    return table


if __name__ == "__main__":
    started = time.monotonic()
    status = main()
    print(f"({time.monotonic() - started:.0f} s in all)", file=sys.stderr)
    sys.exit(status)
