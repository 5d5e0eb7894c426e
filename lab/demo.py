"""`make demo`: what layerstore does for a container start, shown with real parts.

A registry, an image of 240 MB made from Debian packages, Podman: first the ordinary way, then from
a store.  Everything happens below one temporary directory and on loopback; nothing of the
machine's own containers is touched, and nothing stays.  Needs root, /dev/fuse and the packages
that tools/bootstrap installs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Final

from rich.console import Console
from rich.table import Table

import layerstore
from lab import trees
from lab.debian import CACHE
from lab.delayproxy import DelayProxy
from lab.fresh import SCRATCH, fresh
from lab.images import python_image
from lab.opened import opened_files
from lab.podman import CommandError, PodmanEnv, run, unmount_below
from lab.registry import DebianRegistry
from lab.startup import Startup, drop_page_cache, start_container
from lab.store import LayerstoreService

_PROGRAM: Final = ("python3", "/app/hello.py")
_DISK_BYTES: Final = 4 << 30
_CONVERT_SECONDS: Final = 900.0
_LOG: Final = CACHE / "demo.log"
_MIB: Final = 1 << 20


class DemoError(RuntimeError):
    """The demonstration cannot go on; the message is one line for a newcomer."""


class Demo:
    """The story, step by step; ``step`` is the title of what goes on."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._number = 0
        self.step = "getting ready"

    def tell(self, work: Path) -> None:
        """All steps, with everything they write below ``work``."""
        self._console.print(
            "\n[bold]layerstore[/]: containers start before their images have arrived\n"
        )
        with contextlib.ExitStack() as stack:
            with self._step("An image with Python, NumPy, pandas, SciPy from Debian's packages"):
                image = python_image()
                self._say(
                    f"{len(image.layers)} layers, {image.compressed_size / _MIB:.0f} MiB;"
                    " with setuid programs, capabilities, hard links, whiteouts"
                )
            with self._step("Debian's docker-registry on a loopback port"):
                registry = stack.enter_context(DebianRegistry(work / "registry"))
                proxy = stack.enter_context(DelayProxy(registry.host))
                plain, lazy = (f"{proxy.host}/demo:{tag}" for tag in ("plain", "lazy"))
                env = stack.enter_context(self._podman(work / "podman-plain", proxy))
                self._shell(f"skopeo copy oci:... docker://{plain}")
                env.skopeo("copy", "--quiet", image.source, f"docker://{plain}")
            with self._step("The ordinary way: pull, then run"):
                before = self._start(env, plain, proxy)
            with self._step("Conversion to eStargz, the files that the program opens put first"):
                early = work / "early-files"
                early.write_text("".join(f"{n}\n" for n in opened_files(env, plain, *_PROGRAM)))
                self._convert(env, plain, lazy, early)
            with self._step("The store, and one line in storage.conf that names it"):
                service = LayerstoreService(work / "layerstore", environment=_environment(env))
                stack.enter_context(service)
                lazy_env = stack.enter_context(self._podman(work / "podman-lazy", proxy))
                lazy_env.configure_storage(additional_layer_store=service.mountpoint)
                self._shell(f"layerstore serve {service.mountpoint}")
                self._say(f'additionallayerstores = ["{service.mountpoint}:ref"]')
            with self._step("The same pull and run, from the store"):
                after = self._start(lazy_env, lazy, proxy)
            with self._step("Is it the same image? Every file is read and compared"):
                self._compare(env, plain, lazy_env, lazy)
            self._table(before, after)
            self.step = "cleaning up"

    @contextlib.contextmanager
    def _step(self, title: str) -> Iterator[None]:
        self._number += 1
        self.step = title
        self._console.print(f"[bold]{self._number}. {title}[/]")
        with self._console.status("") if self._console.is_terminal else contextlib.nullcontext():
            yield

    def _say(self, text: str) -> None:
        self._console.print(f"   {text}", markup=False)

    def _shell(self, text: str) -> None:
        self._console.print(f"   $ {text}", markup=False, style="dim")

    @staticmethod
    def _podman(directory: Path, proxy: DelayProxy) -> PodmanEnv:
        return PodmanEnv(directory, registries=[proxy.host])

    def _start(self, env: PodmanEnv, image: str, proxy: DelayProxy) -> Startup:
        # What Podman writes in an empty graph root, and warm caches, would count for one side.
        env.podman("info")
        drop_page_cache()
        self._shell(f"podman pull {image} && podman run --rm {image}")
        result = start_container(env, image, proxy)
        self._say(result.line)
        self._say(
            f"first output after {result.first_output_seconds:.1f} s"
            f" ({result.pull_seconds:.1f} s of it for the pull)"
        )
        return result

    def _convert(self, env: PodmanEnv, source: str, target: str, early: Path) -> None:
        arguments = ["convert", f"docker://{source}", f"docker://{target}"]
        self._shell(f"layerstore {' '.join(arguments)} --prioritize @early-files")
        started = time.monotonic()
        run(
            [
                sys.executable,
                "-m",
                "layerstore.cli",
                *arguments,
                "--quiet",
                "--prioritize",
                f"@{early}",
            ],
            _environment(env),
            timeout=_CONVERT_SECONDS,
        )
        self._say(
            f"{time.monotonic() - started:.0f} s, once for each image; any client can pull it"
        )

    def _compare(self, env: PodmanEnv, plain: str, lazy_env: PodmanEnv, lazy: str) -> None:
        found = []
        for each, image in ((env, plain), (lazy_env, lazy)):
            root = Path(each.podman("image", "mount", image).stdout.strip())
            found.append(trees.snapshot(root))
            each.podman("image", "unmount", image)
        # A plain extraction gives the root itself a mode of its own (containers/storage: 0555).
        differences = trees.compare(*found, ignore={*trees.FORMAT_FILES, b"."})
        if differences:
            raise DemoError(f"the images differ: {differences[0]}")
        self._say(
            f"{len(found[0])} files and directories: names, owners, modes, times, attributes,"
            " links and contents are equal"
        )

    def _table(self, plain: Startup, lazy: Startup) -> None:
        table = Table(box=None, pad_edge=False, padding=(0, 3))
        table.add_column("")
        for heading in ("plain pull", "layerstore", ""):
            table.add_column(heading, justify="right")
        sooner = plain.first_output_seconds / lazy.first_output_seconds
        less = plain.traffic.bytes / lazy.traffic.bytes
        table.add_row(
            "time to first output",
            f"{plain.first_output_seconds:.1f} s",
            f"{lazy.first_output_seconds:.1f} s",
            f"[bold]{sooner:.1f} times sooner[/]",
        )
        table.add_row(
            "fetched by then",
            f"{plain.traffic.bytes / _MIB:.0f} MiB",
            f"{lazy.traffic.bytes / _MIB:.0f} MiB",
            f"[bold]{less:.1f} times less[/]",
        )
        table.add_row("requests", str(plain.traffic.requests), str(lazy.traffic.requests), "")
        self._console.print()
        self._console.print(table)
        self._console.print(
            "\nThe registry is on this machine: the farther away it is, the more a plain pull"
            " waits.\n`make bench` measures that over a link of 100 Mbit/s.\n"
            "\nRead next: README.md for how to use it, docs/ for how it works,"
            " `make help` for the rest.",
            highlight=False,
        )


def main() -> int:
    """Run the demonstration; the exit status."""
    console = Console(highlight=False, soft_wrap=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    demo = Demo(console)
    try:
        _check_machine()
        with _workplace() as work:
            demo.tell(work)
    except KeyboardInterrupt:
        console.print("\ndemo: interrupted; everything is cleaned up")
        return 130
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        print(f"demo: {_one_line(demo.step, error)}", file=sys.stderr)
        return 1
    return 0


def _check_machine() -> None:
    if os.geteuid() != 0:
        raise DemoError("needs root, for mounts and for the image's owners (try: sudo make demo)")
    if not Path("/dev/fuse").exists():
        raise DemoError("there is no /dev/fuse here (in a container: --device=/dev/fuse)")


@contextlib.contextmanager
def _workplace() -> Iterator[Path]:
    """A temporary directory where overlay mounts can lie, with room; removed at the end."""
    for place in (SCRATCH, CACHE, Path("/tmp"), Path("/dev/shm")):
        if not place.is_dir():
            continue
        kind = run(["stat", "--file-system", "--format=%T", str(place)]).stdout.strip()
        if kind != "overlayfs" and shutil.disk_usage(place).free > _DISK_BYTES:
            break
    else:
        raise DemoError("needs 4 GiB free in /var/tmp, not on an overlay file system")
    work = fresh("layerstore-demo-", place)
    try:
        yield work
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        unmount_below(work)
        shutil.rmtree(work, ignore_errors=True)


def _environment(env: PodmanEnv) -> dict[str, str]:
    """What our own program runs with: Podman's settings, and this checkout's code."""
    return {**env.environment(), "PYTHONPATH": str(Path(layerstore.__file__).parents[1])}


def _interrupt(number: int, frame: FrameType | None) -> None:
    # Cleaning up takes a few seconds; a second Ctrl-C must not leave half of it.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def _one_line(step: str, error: Exception) -> str:
    """What failed and why, in one line; all of it goes to a file."""
    detail = str(error)
    if isinstance(error, CommandError):
        detail = error.result.stderr or error.result.stdout or detail
    elif isinstance(error, subprocess.CalledProcessError):
        detail = f"{error} {error.stderr or ''}"
    _LOG.parent.mkdir(parents=True, exist_ok=True)
    _LOG.write_text(f"{step}\n{type(error).__name__}: {error}\n{detail}\n")
    lines = [line.strip() for line in detail.splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    return f"failed at “{step}”: {last} (all of it: {_LOG})"


if __name__ == "__main__":
    sys.exit(main())
