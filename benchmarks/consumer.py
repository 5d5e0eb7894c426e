"""`python -m benchmarks.consumer`: our pulls beside Podman's, of one registry, in one run.

    python -m benchmarks.consumer [--repeat 3] [--link unlimited|shaped] [--json FILE]

Whole pulls of plain images into empty graph roots by Podman 4.3.1, Podman 5.4.2 and us, in turns,
and beside them what the provider does with the same layers (`layerstore fetch`, asking a running
service, whose CPU seconds count: objects and index);
and pulls of an image of 20 layers all of which a layer store has: the running service, and a
static store.  Seconds are those of the whole command, its start included.  The graph roots lie on
an ext4 of their own, with a journal, so that what else the machine's file system has seen counts
for nobody.  Needs root and what tools/bootstrap installs.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

from rich.console import Console
from rich.table import Table

from benchmarks import consumer_images
from benchmarks.measured import Use, cpu_seconds, measured
from benchmarks.startup import shaped
from lab import images
from lab.fresh import fresh
from lab.podman import FLAVOURS, PodmanEnv, unmount_below
from lab.registry import DebianRegistry
from lab.rig import Rig
from lab.store import LayerstoreService

Program = Literal["podman", "layerstore"]
_MIB: Final = 1 << 20
_DISK_BYTES: Final = 16 << 30
_LAZY: Final = "lazy"
_FETCH: Final = "layerstore fetch"
_ACCEPT: Final = "application/vnd.oci.image.manifest.v1+json"
_NAMES: Final = {"debian12": "Podman 4.3.1", "debian13": "Podman 5.4.2"}


@dataclass(frozen=True, slots=True)
class Result:
    """All samples of one tool on one image; ``registry_seconds`` is what of them the requests take."""

    case: str
    who: str
    uses: tuple[Use, ...]
    registry_seconds: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(use.seconds for use in self.uses)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; the exit status tells only whether it could be measured."""
    parser = argparse.ArgumentParser(prog="benchmarks.consumer", description=__doc__)
    parser.add_argument("--repeat", type=int, default=3, help="rounds")
    parser.add_argument("--link", choices=_LINKS, action="append", help="only this link")
    parser.add_argument("--json", type=Path, help="also write all samples here")
    options = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    results: dict[str, list[Result]] = {}
    with _disk() as work, DebianRegistry(work / "registry") as registry:
        console.print("Building, converting and pushing the images ...")
        _push(registry, work)
        for name in options.link or _LINKS:
            with _LINKS[name](registry.host) as host:
                found = results[f"Whole pulls, {name} link"] = _whole_pulls(
                    host, work, options.repeat
                )
            console.print(_table(f"Whole pulls, {name} link", found))
        lazy = _lazy_pulls(registry, work, max(5, options.repeat))
        title = f"Pulls of {consumer_images.TALL_LAYERS} layers that a layer store has"
        results[title] = lazy
        console.print(_table(title, lazy))
    console.print(
        f"\nLinux {platform.release()}, {os.cpu_count()} CPUs; medians of {options.repeat} rounds."
        "\nless registry: the median less what the same requests take when nothing else is done."
    )
    if options.json:
        plain = {title: [asdict(one) for one in each] for title, each in results.items()}
        options.json.write_text(json.dumps(plain, indent=1))
    return 0


@contextlib.contextmanager
def _direct(registry: str) -> Iterator[str]:
    yield registry


@contextlib.contextmanager
def _shaped(registry: str) -> Iterator[str]:
    with shaped(registry) as link:
        yield link.proxy.host


_LINKS: Final[dict[str, Callable[[str], AbstractContextManager[str]]]] = {
    "unlimited": _direct,
    "shaped": _shaped,
}


@contextlib.contextmanager
def _disk() -> Iterator[Path]:
    """A directory on a fresh ext4."""
    home = fresh("layerstore-bench-")
    image, place = home / "disk", home / "mnt"
    place.mkdir()
    try:
        with image.open("wb") as file:
            file.truncate(_DISK_BYTES)
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        subprocess.run(["mount", "-o", "loop", image, place], check=True)
        yield place
    finally:
        unmount_below(home)
        shutil.rmtree(home, ignore_errors=True)


def _push(registry: DebianRegistry, work: Path) -> None:
    pushed = {f"bench/{name}:1": make() for name, make in consumer_images.PLAIN.items()}
    pushed[f"bench/{_LAZY}:1"] = images.lazy(consumer_images.tall(), work / "tall")
    with PodmanEnv(work / "push", registries=[registry.host]) as env:
        for name, image in pushed.items():
            target = f"docker://{registry.host}/{name}"
            env.skopeo("copy", "--quiet", "--preserve-digests", image.source, target)
    # A cache of its own: else skopeo knows of the same layers packed otherwise, and takes those.
    with PodmanEnv(work / "zstd", registries=[registry.host]) as env:
        target = f"docker://{registry.host}/bench/{consumer_images.ZSTD}:1"
        source = consumer_images.python().source
        env.skopeo("copy", "--quiet", "--dest-compress-format", "zstd", source, target)


# -- whole pulls ---------------------------------------------------------------------------


def _whole_pulls(host: str, work: Path, repeat: int) -> list[Result]:
    """Rounds over all, so that what the machine does meanwhile meets everybody."""
    samples: dict[tuple[str, str], list[Use]] = {}
    for _ in range(repeat):
        for name in (*consumer_images.PLAIN, consumer_images.ZSTD):
            for who, flavour, program in (
                *((_NAMES[flavour], flavour, "podman") for flavour in FLAVOURS),
                ("layerstore", FLAVOURS[-1], "layerstore"),
                (_FETCH, FLAVOURS[-1], "fetch"),
            ):
                with PodmanEnv(work / "cold", flavour, registries=[host]) as env:
                    env.podman("info")  # what a fresh graph root needs is nobody's to blame
                    use = _pull(env, program, host, name)
                samples.setdefault((name, who), []).append(use)
                os.sync()
    return [Result(case, who, tuple(uses)) for (case, who), uses in sorted(samples.items())]


def _pull(env: PodmanEnv, program: str, host: str, name: str) -> Use:
    os.sync()
    if program == "fetch":
        return _fetch(env, f"{host}/bench/{name}:1")
    command = [
        *env.command("podman" if program == "podman" else "layerstore"),
        "pull",
        "--quiet",
        f"{host}/bench/{name}:1",
    ]
    return measured(command, env.environment())


def _fetch(env: PodmanEnv, image: str) -> Use:
    with LayerstoreService(env.tmp / "service", environment=env.environment()) as service:
        pid = service.pid
        before = cpu_seconds(pid)
        command = [*env.command("layerstore"), "fetch", "--quiet", "--root", str(service.root)]
        use = measured([*command, image], env.environment())
        spent = cpu_seconds(pid) - before
        status = Path(f"/proc/{pid}/status").read_text()
        peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return Use(use.seconds, use.cpu_seconds + spent, max(use.rss_bytes, int(peak) * 1024))


# -- lazy pulls ----------------------------------------------------------------------------


def _lazy_pulls(registry: DebianRegistry, work: Path, repeat: int) -> list[Result]:
    found: list[Result] = []
    config = "background_fetch = false\n"
    with Rig(work / "rig", FLAVOURS[-1], registry.host, config=config) as rig:
        # the store resolves all layers
        rig.env.podman("pull", "--quiet", rig.image(f"bench/{_LAZY}:1"))
        found += _lazily("running service", rig.env, rig.client.host, repeat)
    store = work / "static"
    with PodmanEnv(
        work / "other", FLAVOURS[-1], registries=[registry.host], additional_layer_store=store
    ) as env:
        env.layerstore("unpack", f"{registry.host}/bench/{_LAZY}:1", str(store), "--ref")
        found += _lazily("static store", env, registry.host, repeat)
    return found


def _lazily(case: str, env: PodmanEnv, host: str, repeat: int) -> list[Result]:
    samples: dict[Program, list[Use]] = {"podman": [], "layerstore": []}
    requests: list[float] = []
    for _ in range(repeat):
        for program, uses in samples.items():
            env.podman("rmi", "--all", "--force")
            uses.append(_pull(env, program, host, _LAZY))
            chain = json.loads(env.layerstore("inspect", f"{host}/bench/{_LAZY}:1").stdout)
            assert len(chain[0]["RootFS"]["Layers"]) == consumer_images.TALL_LAYERS
        requests.append(_request_seconds(host))
    return [
        Result(
            case,
            _NAMES[FLAVOURS[-1]] if program == "podman" else "layerstore",
            tuple(uses),
            statistics.median(requests),
        )
        for program, uses in samples.items()
    ]


def _request_seconds(host: str) -> float:
    """What the requests of a pull take whose layers all come from elsewhere."""
    path = f"/v2/bench/{_LAZY}"
    begin = time.monotonic()
    connection = http.client.HTTPConnection(host)

    def get(what: str) -> bytes:
        connection.request("GET", what, headers={"Accept": _ACCEPT})
        return connection.getresponse().read()

    get("/v2/")
    config = json.loads(get(f"{path}/manifests/1"))["config"]["digest"]
    get(f"{path}/blobs/{config}")
    connection.close()
    return time.monotonic() - begin


# -- the tables ----------------------------------------------------------------------------


def _table(title: str, results: Sequence[Result]) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", box=None, pad_edge=False)
    table.add_column("image", no_wrap=True)
    table.add_column("who", no_wrap=True)
    lazy = any(result.registry_seconds for result in results)
    headings = (
        "median",
        *(("less registry",) if lazy else ()),
        "range",
        "to layerstore",
        "CPU",
        "RSS",
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    ours = {result.case: result.median for result in results if result.who == "layerstore"}
    for result in results:
        seconds = [use.seconds for use in result.uses]
        requests = result.registry_seconds
        table.add_row(
            result.case,
            result.who,
            f"{result.median:.2f} s",
            *((f"{(result.median - requests) * 1000:.0f} ms",) if lazy else ()),
            f"{min(seconds):.2f}-{max(seconds):.2f}",
            f"{result.median / ours[result.case]:.2f} x",
            f"{statistics.median(use.cpu_seconds for use in result.uses):.2f} s",
            f"{max(use.rss_bytes for use in result.uses) / _MIB:.0f} MiB",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
