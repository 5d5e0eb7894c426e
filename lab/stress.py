"""Several programs at once on one graph root: workers that do this and that, and note what came.

A worker is one row of processes of one kind (ours, Podman of either Debian, or the command line
tools of containers/storage and Skopeo), one after the other; several workers run at a time.  What
they do is chosen at random with a seed.  There are three families of images:

* *kept*: there from the beginning, and nobody removes their first name.  Whatever a worker does
  with them has to succeed, and a name that it gave to one stays until it takes it away.
* *ours*: pulled and removed by our processes only.  A name that a worker gave to one stays, too.
* *free*: pulled and removed by everybody.  Anything may fail because the image has just gone,
  also a name may go: Podman looks at an image's names before it takes the locks to delete it.

Errors are noted as failures unless they are among those that the situation explains; see
``_GONE`` and those below it.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from lab import images, processes, tars
from lab.oci import LayerSource, RunConfig, StoredImage
from lab.podman import PodmanEnv

Family = Literal["kept", "ours", "free"]
Kind = Literal["ours", "podman", "storage"]

Program = Literal["podman", "skopeo", "layerstore", "containers-storage"]
_PROGRAMS: Final[dict[Kind, Program]] = {
    "ours": "layerstore",
    "podman": "podman",
    "storage": "containers-storage",
}

COMMAND_SECONDS: Final = 120.0
"""More than any command needs: one that takes longer hangs."""

_DATA_BYTES: Final = 3 << 20

# What a command on an image may say that somebody removes at the same moment.
_GONE: Final = (
    # ours
    r"no such (image|object)",
    r"no such layer",
    r"the layer does not exist, or no more",
    r"a layer of the image is missing",
    r"others remove the image's layers again and again",
    r"storage is gone",
    r"is used by container",  # rmi
    # Podman, Skopeo and containers/storage
    r"image not known",
    r"layer not known",
    r"parent of layer not known",
    r"identifier is not (an image|a layer|a container)",
    r"does not resolve to an image ID",
    r"reference .* does not resolve",
    r"image (is )?(in )?use[d]? by",
    r"image is in use by a container",
    r"unable to find a match",
    r"locating image",
    r"(reading|creating|copying|writing|committing).*(no such file or directory|not known)",
)


@dataclass(frozen=True, slots=True)
class Target:
    """One image of a family: its name in the registry and what it prints when it runs."""

    family: Family
    key: str
    name: str
    prints: str


@dataclass(frozen=True, slots=True)
class Failure:
    """A command that should not have failed, or hung, or told something wrong."""

    worker: str
    command: str
    what: str

    def __str__(self) -> str:
        return f"{self.worker}: {self.command}\n    {self.what}"


@dataclass(slots=True)
class Board:
    """What all workers note."""

    failures: list[Failure] = field(default_factory=list)
    done: collections.Counter[str] = field(default_factory=collections.Counter)
    excused: collections.Counter[str] = field(default_factory=collections.Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)


def image(family: Family, member: str, directory: Path | None = None) -> StoredImage:
    """A runnable image of three layers; members of a family share the first two.

    *ours* and *free* share the first one as well.
    """
    base = "kept" if family == "kept" else "going"

    def build(_: Path) -> tuple[Sequence[LayerSource], RunConfig]:
        layers = (
            [*images.base_members(), tars.regular(b"etc/family", base.encode() + b"\n")],
            [
                tars.directory(b"./"),
                tars.directory(b"data/"),
                tars.regular(b"data/noise", images.noise(_DATA_BYTES, len(family))),
                tars.regular(b"data/family", family.encode() + b"\n"),
            ],
            [
                tars.directory(b"./"),
                tars.directory(b"data/"),
                tars.regular(b"data/member", f"{family} {member}\n".encode()),
                tars.regular(b"data/more", images.noise(200_000, sum(member.encode()))),
            ],
        )
        sources = [LayerSource(images.tar_bytes(layer)) for layer in layers]
        return sources, RunConfig(cmd=("/bin/cat", "/data/member"))

    recipe: dict[str, object] = {"stress": 1, "family": family, "member": member}
    return images.cached(directory, f"stress-{family}", recipe, build)


class Worker:
    """One row of commands of ``kind`` in ``env``, until ``run`` ends."""

    def __init__(
        self,
        name: str,
        kind: Kind,
        env: PodmanEnv,
        targets: Sequence[Target],
        board: Board,
        seed: int,
        *,
        pull_flags: Sequence[str] = (),
    ) -> None:
        self.name: Final = name
        self.kind: Final = kind
        self.env: Final = env
        self.kept: dict[str, Target] = {}
        """Names that this worker gave, and that have to be there."""
        self._targets: Final = tuple(targets)
        self._board: Final = board
        self._random: Final = random.Random(f"{seed} {name}")
        self._pull_flags: Final = tuple(pull_flags)
        self._number = 0
        self._environment: Final = {**env.environment(), "PYTHONFAULTHANDLER": "1"}

    def run(self, seconds: float) -> None:
        """Do one thing after the other for so long."""
        verbs = self._verbs()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            (verb,) = self._random.choices([verb for verb, _ in verbs], [n for _, n in verbs])
            try:
                verb()
            except Exception as error:  # the thread would end without a word
                self.fail(verb.__name__, f"{type(error).__name__}: {error}")

    def fail(self, command: str, what: str) -> None:
        """Note a failure."""
        with self._board.lock:
            self._board.failures.append(Failure(self.name, command, what))

    # -- what is done --------------------------------------------------------------

    def _verbs(self) -> list[tuple[Callable[[], None], int]]:
        if self.kind == "storage":
            return [
                (self._skopeo_pull, 6),
                (self._skopeo_export, 2),
                (self._storage_lists, 4),
                (self._storage_name, 3),
                (self._storage_delete, 4),
                (self._storage_container, 3),
            ]
        common = [
            (self._pull, 6),
            (self._remove, 5),
            (self._tag, 4),
            (self._untag, 3),
            (self._list, 2),
            (self._mount, 4),
            (self._inspect, 2),
        ]
        return [*common, (self._export if self.kind == "ours" else self._container, 2)]

    def _pull(self) -> None:
        target = self._target("free", "ours")
        flags = self._pull_flags
        self._command("pull", "-q", *flags, target.name, excuses=_GONE)

    def _remove(self) -> None:
        target = self._target("free", "ours")
        self._command("rmi", target.name, excuses=_GONE)

    def _tag(self) -> None:
        target = self._target("free", "ours", "kept")
        name = self._own_name(target)
        excuses = () if target.family == "kept" else _GONE
        if self._command("tag", target.name, name, excuses=excuses) is not None:
            self.kept |= {name: target} if target.family != "free" else {}

    def _untag(self) -> None:
        if not self.kept:
            return
        name = self._random.choice(list(self.kept))
        del self.kept[name]
        verb = self._random.choice(("untag", "rmi"))
        self._command(*(("untag", name, name) if verb == "untag" else ("rmi", name)))

    def _list(self) -> None:
        # Podman reads the images one after the other, and some may be gone by then
        flags: tuple[str, ...] = self._random.choice(((), ("-a", "--digests"), ("--json",)))
        if self.kind == "podman" and flags == ("--json",):
            flags = ("--format", "json")
        excuses = () if self.kind == "ours" else _GONE
        listed = self._command("images", *flags, excuses=excuses)
        for target in self._targets:
            if target.family == "kept" and listed is not None:
                shown = target.name.rpartition(":")[0]
                if shown not in listed:
                    self.fail("images", f"{target.name} is not listed:\n{listed}")

    def _inspect(self) -> None:
        if self.kept and self._random.random() < 0.7:
            name = self._random.choice(list(self.kept))
            self._command("inspect", name)
        else:
            target = self._target("free", "kept")
            self._command("inspect", target.name, excuses=self._excuses(target))

    def _mount(self) -> None:
        target = self._target("kept", "kept", "free", "ours")
        ours, theirs = ("mount", "umount"), ("image", "mount", "unmount")
        excuses = self._excuses(target)
        if self.kind == "ours":
            path = self._command(ours[0], target.name, excuses=excuses)
        else:
            path = self._command(*theirs[:2], target.name, excuses=excuses)
        if path is None:
            return
        member = Path(path.strip()) / "data/member"
        for _ in range(self._random.randrange(1, 4)):
            try:
                found = member.read_text()
            except OSError as error:
                found = str(error)
            if found != target.prints and target.family == "kept":
                self.fail(f"mount {target.name}", f"{member} says {found!r}")
            time.sleep(self._random.random() * 0.2)
        if self.kind == "ours" and self._random.random() < 0.7:
            self._command(ours[1], target.name, excuses=excuses)
        else:  # whose it is does not matter
            unmount = (theirs[0], theirs[2])
            self._command(*unmount, target.name, excuses=(*excuses, "not mounted"), tool="podman")

    def _export(self) -> None:
        target = self._target("kept", "kept", "free")
        archive = self.env.tmp / f"{self.name}.tar"
        excuses = (*self._excuses(target), *self._excuses(target, r"no such file", "changed"))
        self._command("save", "-q", "-o", str(archive), target.name, excuses=excuses)
        archive.unlink(missing_ok=True)

    def _container(self) -> None:
        target = self._target("kept", "kept", "free")
        excuses = self._excuses(target)
        self._number += 1
        name = f"{self.name}-{self._number}"
        pull = "--pull=never"
        if self._command("create", pull, "--name", name, target.name, excuses=excuses) is None:
            self._command("rm", "--ignore", "-f", name, excuses=excuses)
            return
        printed = self._command("start", "-a", name, excuses=excuses)
        if printed is not None and printed != target.prints:
            self.fail(f"start {name} of {target.name}", f"printed {printed!r}")
        self._command("rm", "-f", name)

    def _skopeo_pull(self) -> None:
        target = self._target("free")
        self._command(
            "copy", "-q", "--src-tls-verify=false",
            f"docker://{target.name}", f"containers-storage:{target.name}",
            excuses=_GONE, tool="skopeo",
        )  # fmt: skip

    def _skopeo_export(self) -> None:
        target = self._target("kept", "free")
        excuses = self._excuses(target)
        layout = self.env.tmp / f"{self.name}-export"
        source = f"containers-storage:{target.name}"
        self._command("copy", "-q", source, f"dir:{layout}", excuses=excuses, tool="skopeo")

    def _storage_lists(self) -> None:
        what = self._random.choice(("images", "layers", "containers"))
        self._command(what, "--json", excuses=_GONE)

    def _storage_name(self) -> None:
        target = self._target("kept", "free")
        excuses = self._excuses(target)
        name = self._own_name(target)
        if self._command("add-names", "--name", name, target.name, excuses=excuses) is None:
            return
        self.kept |= {name: target} if target.family != "free" else {}

    def _storage_delete(self) -> None:
        target = self._target("free")
        if self.kept and self._random.random() < 0.3:
            self._command("image", self._random.choice(list(self.kept)))
        # by its name, whatever others it has
        self._command("delete-image", target.name, excuses=_GONE)

    def _storage_container(self) -> None:
        target = self._target("kept", "kept", "free")
        excuses = self._excuses(target)
        self._number += 1
        name = f"{self.name}-{self._number}"
        if self._command("create-container", "--name", name, target.name, excuses=excuses) is None:
            return
        self._command("mount", name)
        self._command("unmount", name)
        self._command("delete-container", name)

    # -- how -----------------------------------------------------------------------

    def _target(self, *families: Family) -> Target:
        wanted = set(families) - ({"ours"} if self.kind != "ours" else set())
        family = self._random.choice([one for one in families if one in wanted])
        return self._random.choice([t for t in self._targets if t.family == family])

    def _own_name(self, target: Target) -> str:
        self._number += 1
        return f"localhost/{self.name}/{target.key}:{self._number}"

    def _excuses(self, target: Target, *more: str) -> tuple[str, ...]:
        return () if target.family == "kept" else (*_GONE, *more)

    def _command(
        self,
        *arguments: str,
        excuses: Iterable[str] = (),
        tool: Program | None = None,
    ) -> str | None:
        """What it printed; None if it failed, which is noted unless an excuse is found."""
        program = tool or _PROGRAMS[self.kind]
        command = [*self.env.command(program), *arguments]
        shown = f"{program} {' '.join(arguments)}"
        process = subprocess.Popen(
            command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        try:
            out, err = process.communicate(timeout=COMMAND_SECONDS)
        except subprocess.TimeoutExpired:
            self.fail(shown, f"hangs:\n{_end_hanging(process)}")
            return None
        verb = f"{program} {arguments[0]}"
        with self._board.lock:
            self._board.done[verb] += 1
        if "Traceback" in err or process.returncode < 0:
            self.fail(shown, f"ended with {process.returncode}: {err[-3000:]}")
            return None
        if process.returncode == 0:
            return out
        excuse = next((one for one in excuses if re.search(one, err, re.IGNORECASE)), None)
        if excuse is None:
            self.fail(shown, f"ended with {process.returncode}: {err[-3000:]}")
            return None
        with self._board.lock:
            self._board.excused[f"{verb}: {excuse}"] += 1
        return None


def _end_hanging(process: subprocess.Popen[str]) -> str:
    """End a process; what can be told about where it was, and who holds which lock."""
    told = [Path("/proc/locks").read_text(), *_lock_takers()]
    for task in Path(f"/proc/{process.pid}/task").glob("*"):
        with contextlib.suppress(OSError):
            told.append(f"{task.name} {(task / 'comm').read_text().strip()}")
            told.append((task / "wchan").read_text())
            told.append((task / "syscall").read_text())
    process.send_signal(signal.SIGABRT)  # Python prints its stacks
    try:
        _, err = process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        _, err = process.communicate()
    return "\n".join([*told, err[-6000:]])


def _lock_takers() -> list[str]:
    """The processes that may hold a lock."""
    return [
        f"{pid} {' '.join(command)[-200:]}"
        for pid, command in processes.command_lines()
        if any(Path(word).name in _PROGRAMS.values() for word in command[:3])
    ]


def run_all(workers: Sequence[Worker], seconds: float) -> None:
    """Let all of them work at the same time."""
    threads = [threading.Thread(target=worker.run, args=(seconds,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def held_locks(*directories: Path) -> list[str]:
    """The files below ``directories`` that some process holds a lock of, by /proc/locks."""
    known = {}
    for directory in directories:
        for top, _, files in os.walk(directory):
            for name in files:
                path = Path(top, name)
                with contextlib.suppress(OSError):
                    facts = path.lstat()
                    key = (os.major(facts.st_dev), os.minor(facts.st_dev), facts.st_ino)
                    known[key] = str(path)
    found = []
    for line in Path("/proc/locks").read_text().splitlines():
        match = re.search(r" ([0-9a-f]+):([0-9a-f]+):(\d+) ", line)
        if match is not None:
            key = (int(match[1], 16), int(match[2], 16), int(match[3]))
            if key in known:
                found.append(f"{known[key]}: {line}")
    return found


def mounts_below(*directories: Path) -> list[str]:
    """Mount points at or below ``directories``."""
    tops = [str(directory.resolve()) for directory in directories]
    points = [line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [p for p in points if any(p == top or p.startswith(f"{top}/") for top in tops)]
