"""Half an hour of everything at once: does the service get fatter?

    python -m benchmarks.soak --minutes 30

The loads of `lab.loads` run all the time: reads, mappings, walks, container starts, pulls of new
references, removals.  The disk limit is below what they need, so that layers are evicted and fetched
again all the time.  In the first third of the time the server is killed now and then and a reload
comes in between; after that it is left alone, so that one life is long enough to be judged.  Every
few seconds the memory, descriptors and threads of keeper and server are noted.

The end status is 1 if a load failed or if something grows.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from lab.loads import Progress, forget_names
from lab.serverkills import ServerKiller
from lab.store import LayerstoreService
from lab.workbench import Workbench
from layerstore import service

_MIB: Final = 1 << 20
_SAMPLES: Final = 180  # in all
_DISTURBED: Final = 1 / 3  # of the time
_DISTURBANCES: Final = 8
_LIMIT: Final = '[disk]\nlimit = "48 MiB"\n'
_WARM: Final = 0.2  # of the last life is left out: caches fill up to their limits
_FORGET_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class Use:
    """What one process uses."""

    pid: int
    rss_bytes: int
    descriptors: int
    threads: int


@dataclass(frozen=True, slots=True)
class Sample:
    """Keeper and server so many ``seconds`` after the start."""

    seconds: float
    keeper: Use
    server: Use


@dataclass(frozen=True, slots=True)
class Trend:
    """One figure: medians at the start, in the middle and at the end, and how much that is in an hour."""

    name: str
    start: float
    middle: float
    end: float
    per_hour: float
    allowance: float

    @property
    def steady(self) -> bool:
        """Whether the end is not above the start by more than the figure swings anyway."""
        return self.end - self.start <= self.allowance


def use_of(pid: int) -> Use:
    """What the process uses now.  OSError if it is gone."""
    status = dict(
        line.partition(":")[::2] for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return Use(
        pid,
        int(status["VmRSS"].split()[0]) * 1024,
        len(list(Path(f"/proc/{pid}/fd").iterdir())),
        int(status["Threads"]),
    )


def run(bench: Workbench, seconds: float, choice: random.Random) -> Iterator[Sample]:
    """Load the store for so long; samples as they come.  Raises lab.loadcrew.LoadFailure."""
    store = bench.rig.service
    begun = time.monotonic()
    disturbances = _times(seconds * _DISTURBED, _DISTURBANCES)
    forget = 0.0
    with bench.crew(str(choice.random())) as crew:
        killer = ServerKiller(store, bench.control, crew, choice)
        for due in _times(seconds, _SAMPLES):
            while (now := time.monotonic() - begun) < due:
                if now >= forget:
                    forget_names()
                    forget = now + _FORGET_SECONDS
                time.sleep(min(1.0, due - now))
            if disturbances and now >= disturbances[0]:
                disturbances.pop(0)
                if len(disturbances) % 4 == 0:
                    service.reload(store.root)
                else:
                    killer.kill()
            crew.check()
            killer.serving()
            yield Sample(now, use_of(store.keeper_pid), use_of(store.pid))
        _tell(crew.finish())


def _times(seconds: float, count: int) -> list[float]:
    """So many points in time, evenly."""
    return [seconds * (number + 1) / count for number in range(count)]


def trends(samples: Sequence[Sample]) -> list[Trend]:
    """Of the keeper over all the time, of the server over its last life, warm-up left out."""
    last = [sample for sample in samples if sample.server.pid == samples[-1].server.pid]
    found = []
    for who, lived in (("keeper", samples), ("server", last)):
        kept = lived[int(len(lived) * _WARM) :]
        for what, unit, least in (
            ("rss_bytes", _MIB, 2.0), ("descriptors", 1, 4.0), ("threads", 1, 4.0),
        ):  # fmt: skip
            values = [getattr(getattr(sample, who), what) / unit for sample in kept]
            third = max(1, len(values) // 3)
            start, middle, end = (
                statistics.median(values[place * third : (place + 1) * third] or values[-third:])
                for place in range(3)
            )
            swing = max(values[:third]) - min(values[:third])
            hours = (kept[-third // 2 - 1].seconds - kept[third // 2].seconds) / 3600
            slope = (end - start) / hours
            found.append(
                Trend(f"{who} {what}", start, middle, end, slope, max(least, swing, start * 0.05))
            )
    return found


def _tell(done: dict[str, Progress]) -> None:
    for name, progress in done.items():
        print(
            f"{name:14} {progress.operations:8} operations, {progress.bytes / _MIB:8.0f} MiB,"
            f" {progress.errors} errors, {progress.wrong} wrong,"
            f" the longest took {progress.longest_seconds:.1f} s"
        )


def _table(found: Sequence[Trend], lives: int, minutes: float) -> Table:
    table = Table(title=f"{minutes:.0f} minutes, {lives} servers; the last one, and the keeper")
    table.add_column("figure")
    for heading in ("start", "middle", "end", "an hour", ""):
        table.add_column(heading, justify="right")
    for each in found:
        what = each.name.replace("rss_bytes", "memory, MiB")
        table.add_row(
            what,
            *(f"{value:.1f}" for value in (each.start, each.middle, each.end)),
            f"{each.per_hour:+.1f}",
            "steady" if each.steady else "GROWS",
        )
    return table


def _soak(store: LayerstoreService, samples: Sequence[Sample], minutes: float) -> bool:
    found = trends(samples)
    Console(width=100).print(_table(found, len({sample.server.pid for sample in samples}), minutes))
    evicted = store.log().count("event=evicted")
    print(f"reads that failed: {store.status()['read_errors']}; layers evicted: {evicted}")
    return all(each.steady for each in found)


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(prog="benchmarks.soak", description="load for a long time")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--json", type=Path, help="write all samples there")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with (
        tempfile.TemporaryDirectory(
            prefix="layerstore-soak-", dir="/var/tmp", ignore_cleanup_errors=True
        ) as scratch,
        Workbench(Path(scratch), config=_LIMIT) as bench,
    ):
        samples: list[Sample] = []
        for sample in run(bench, options.minutes * 60, random.Random(options.seed)):
            samples.append(sample)
            if options.json is not None:
                options.json.write_text(json.dumps([asdict(each) for each in samples]))
        steady = _soak(bench.rig.service, samples, options.minutes)
    return 0 if steady else 1


if __name__ == "__main__":
    sys.exit(main())
