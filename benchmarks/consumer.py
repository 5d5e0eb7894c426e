"""`python -m benchmarks.consumer`: our pulls beside Podman's, from the same registry, in one run.

    python -m benchmarks.consumer [--repeat 3] [--json FILE]

Whole pulls of a plain image into empty graph roots, by Podman 4.3.1, Podman 5.4.2 and us, one
after the other in each round; and lazy pulls of an image of 20 layers from our own store, of
which the store has resolved all before, so that no registry but for manifest and config is in
the time.  Seconds are of the whole command, start of the interpreter included.  Needs root and
what tools/bootstrap installs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from lab import images, oci, tars
from lab.oci import LayerSource, RunConfig, StoredImage
from lab.podman import FLAVOURS, Flavour, PodmanEnv, unmount_below
from lab.registry import DebianRegistry
from lab.rig import Rig
from layerstore.copy import ConvertOptions, convert
from layerstore.formats import EstargzOptions

_LAYERS: Final = 20
_WHOLE: Final = "bench/plain:1"
_LAZY: Final = "bench/tall:1"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.consumer", description=__doc__)
    parser.add_argument("--repeat", type=int, default=3, help="rounds")
    parser.add_argument("--json", type=Path, help="also write all seconds here")
    options = parser.parse_args(arguments)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    work = Path(tempfile.mkdtemp(dir="/var/tmp", prefix="layerstore-bench-"))
    try:
        with DebianRegistry(work / "registry") as registry:
            _push(registry, work)
            whole = _whole_pulls(registry, work, options.repeat)
            lazy = _lazy_pulls(registry, work, options.repeat)
    finally:
        unmount_below(work)
        shutil.rmtree(work, ignore_errors=True)
    console.print(_table("Whole pulls of a plain image (Debian with Python and NumPy)", whole))
    console.print(_table(f"Lazy pulls of {_LAYERS} layers", lazy))
    if options.json:
        options.json.write_text(json.dumps({"whole": whole, "lazy": lazy}, indent=1))
    return 0


def _push(registry: DebianRegistry, work: Path) -> None:
    layout = work / "tall"
    convert(f"oci:{_tall(work).layout}:latest", f"oci:{layout}:latest", _FAST)
    with PodmanEnv(work / "push", registries=[registry.host]) as env:
        for image, name in (
            (images.python_image(), _WHOLE),
            (oci.read_image(layout, "latest"), _LAZY),
        ):
            target = f"docker://{registry.host}/{name}"
            env.skopeo("copy", "--quiet", "--preserve-digests", image.source, target)


_FAST: Final = ConvertOptions(estargz=EstargzOptions(level=1))


def _tall(work: Path) -> StoredImage:
    layers = [LayerSource(images.tar_bytes(images.base_members()))]
    for number in range(1, _LAYERS):
        name = b"layer%d/" % number
        files = [tars.regular(name + b"%03d" % file, b"%d" % file * 100) for file in range(50)]
        layers.append(LayerSource(images.tar_bytes([tars.directory(name), *files])))
    return oci.write_image(work / "source", "latest", layers, RunConfig())


def _whole_pulls(registry: DebianRegistry, work: Path, repeat: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {}
    for _ in range(repeat):
        for flavour in FLAVOURS:
            for tool in ("podman", "layerstore"):
                with PodmanEnv(work / "cold", flavour, registries=[registry.host]) as env:
                    who = "layerstore" if tool == "layerstore" else f"podman of {flavour}"
                    seconds.setdefault(who, []).append(
                        _pull(env, tool, f"{registry.host}/{_WHOLE}")
                    )
    return seconds


def _lazy_pulls(registry: DebianRegistry, work: Path, repeat: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {}
    flavour: Flavour = "debian13"
    with Rig(work / "rig", flavour, registry.host, config="background_fetch = false\n") as rig:
        image = rig.image(_LAZY)
        rig.env.podman("pull", "--quiet", image)
        for _ in range(repeat):
            for tool in ("podman", "layerstore"):
                rig.env.podman("rmi", "--all", "--force")
                seconds.setdefault(tool, []).append(_pull(rig.env, tool, image))
                assert (
                    len(json.loads(rig.env.podman("inspect", image).stdout)[0]["RootFS"]["Layers"])
                ) == 20
    return seconds


def _pull(env: PodmanEnv, tool: str, image: str) -> float:
    run = env.podman if tool == "podman" else env.layerstore
    begin = time.monotonic()
    run("pull", "--quiet", image)
    return time.monotonic() - begin


def _table(title: str, seconds: dict[str, list[float]]) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", box=None, pad_edge=False)
    for heading in ("who", "median", "range"):
        table.add_column(heading, no_wrap=True)
    for who, each in seconds.items():
        table.add_row(who, f"{statistics.median(each):.2f} s", f"{min(each):.2f}-{max(each):.2f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
