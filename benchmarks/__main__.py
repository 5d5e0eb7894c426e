"""`make bench`: starts of a real image, side by side in one run, as tables.

    python -m benchmarks [--repeat 3] [--link unlimited|shaped] [--skip-full-read] [--json FILE]

LAYERSTORE_BENCH_PEER=/path/to/stargz-store adds a peer on the same eStargz images.  Needs root,
and what tools/bootstrap installs.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from benchmarks import images
from benchmarks.contenders import PEER_VARIABLE, Contender, Layerstore, Peer, PlainPull
from benchmarks.startup import READ_EVERYTHING, Link, Sample, measure, shaped, unlimited
from lab.fresh import fresh
from lab.podman import PodmanEnv, unmount_below
from lab.registry import DebianRegistry

_MIB: Final = 1 << 20
LINKS: Final[dict[str, Callable[[str], AbstractContextManager[Link]]]] = {
    "unlimited": unlimited,
    "shaped": shaped,
}


@dataclass(frozen=True, slots=True)
class Case:
    """A contender on one form of the image."""

    contender: Contender
    image: str
    form: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """The samples of a case; ``full_read_seconds`` from pull to the last byte of every file."""

    case: Case
    samples: Sequence[Sample]
    full_read_seconds: float | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; the exit status tells only whether it could be measured."""
    options = _options(arguments)
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)
    work = fresh("layerstore-bench-")
    results: dict[str, list[Outcome]] = {}
    try:
        with DebianRegistry(work / "registry") as registry:
            console.print("Building, converting and pushing the image ...")
            with PodmanEnv(work / "push", registries=[registry.host]) as env:
                pushed = images.push(env, registry.host, work)
            cases = _cases()
            for name in options.link:
                with LINKS[name](registry.host) as link:
                    outcomes = _run(cases, link, work, options.repeat, not options.skip_full_read)
                results[link.name] = outcomes
                console.print(_table(link.name, outcomes, pushed))
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    finally:
        unmount_below(work)
        shutil.rmtree(work, ignore_errors=True)
    console.print(
        f"\nPodman of Debian 12, Linux {platform.release()}; {options.repeat} cold runs each, medians."
        "\nfirst output: seconds from `podman pull` to the program's first line, the pull included."
        "\nfetched, requests, CPU and RSS (of the daemon): up to the first output."
        "\nall read: seconds from `podman pull` until every file has been read, one run.",
    )
    if Peer.given() is None:
        console.print(f"{PEER_VARIABLE}=/path/to/stargz-store adds a peer to the tables.")
    if options.json:
        options.json.write_text(json.dumps(_plain(results), indent=1))
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--repeat", type=int, default=3, help="cold runs of each case")
    parser.add_argument("--link", choices=LINKS, action="append", help="only this link")
    parser.add_argument("--skip-full-read", action="store_true", help="starts only")
    parser.add_argument("--json", type=Path, help="also write all samples here")
    options = parser.parse_args(arguments)
    options.link = options.link or list(LINKS)
    return options


def _cases() -> list[Case]:
    peer = Peer.given()
    lazy: list[Contender] = [Layerstore(), *([peer] if peer else [])]
    return [
        # What one would pull without a store, and the very image that the others get.
        Case(PlainPull(), images.PLAIN, "as built, no eStargz"),
        Case(PlainPull(), images.EARLY, "early ones first"),
        *(Case(each, images.EARLY, "early ones first") for each in lazy),
        *(Case(each, images.LAZY, "as they come") for each in lazy),
    ]


def _run(
    cases: Sequence[Case], link: Link, work: Path, repeat: int, full_read: bool
) -> list[Outcome]:
    """Rounds over all cases, so that what the machine does meanwhile meets everybody."""
    samples: dict[int, list[Sample]] = {number: [] for number in range(len(cases))}
    for _ in range(repeat):
        for number, case in enumerate(cases):
            samples[number].append(measure(case.contender, link, case.image, work))
    outcomes = []
    for number, case in enumerate(cases):
        seconds = None
        if full_read:
            sample = measure(case.contender, link, case.image, work, READ_EVERYTHING)
            seconds = sample.startup.first_output_seconds
        outcomes.append(Outcome(case, samples[number], seconds))
    return outcomes


def _table(link: str, outcomes: Sequence[Outcome], pushed: images.Pushed) -> Table:
    table = Table(title=f"\nLink: {link}", title_justify="left", box=None, pad_edge=False)
    table.add_column("who", no_wrap=True)
    table.add_column("files", no_wrap=True)
    for heading in (
        *("first output", "range", "pull", "fetched", "of image", "requests"),
        *("CPU", "RSS", "all read"),
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for outcome in outcomes:
        starts = [sample.startup for sample in outcome.samples]
        seconds = [start.first_output_seconds for start in starts]
        fetched = statistics.median(start.traffic.bytes for start in starts)
        cpu = statistics.median(sample.load.cpu_seconds for sample in outcome.samples)
        rss = max(sample.load.rss_bytes for sample in outcome.samples)
        full = outcome.full_read_seconds
        table.add_row(
            outcome.case.contender.name,
            outcome.case.form,
            f"{statistics.median(seconds):.1f} s",
            f"{min(seconds):.1f}-{max(seconds):.1f}",
            f"{statistics.median(start.pull_seconds for start in starts):.1f} s",
            f"{fetched / _MIB:.1f} MiB",
            f"{fetched / pushed.size(outcome.case.image):.0%}",
            f"{statistics.median(start.traffic.requests for start in starts):.0f}",
            *((f"{cpu:.1f} s", f"{rss / _MIB:.0f} MiB") if rss else ("", "")),
            "" if full is None else f"{full:.1f} s",
        )
    return table


def _plain(results: dict[str, list[Outcome]]) -> dict[str, list[dict[str, object]]]:
    return {
        link: [
            {
                "who": outcome.case.contender.name,
                "image": outcome.case.image,
                "full_read_seconds": outcome.full_read_seconds,
                "samples": [asdict(sample) for sample in outcome.samples],
            }
            for outcome in outcomes
        ]
        for link, outcomes in results.items()
    }


if __name__ == "__main__":
    sys.exit(main())
