"""Private Podman environments: real podman, skopeo, buildah and containers-storage of two Debians.

Everything an environment writes lies below its own directory: graph root, run root, temporary
files, lock files and configuration.  It shares nothing with the machine's own containers nor with
other environments: the default lock manager of Podman is one shared memory segment for the whole
machine, so file locks are used; HOME is private, so policy.json and credentials come from there.

The engine settings are those that work as root where cgroups are mixed (v1 and v2), no systemd
runs and CAP_SYS_RESOURCE may be missing: runc (crun 1.8 refuses such cgroups), cgroupfs, events
in a file, explicit limits that are not above the present ones, no network unless asked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

import layerstore
from lab import processes, trixie
from lab.fresh import SCRATCH
from lab.waiting import until

Flavour = Literal["debian12", "debian13"]
FLAVOURS: Final[tuple[Flavour, ...]] = ("debian12", "debian13")

_MNT_DETACH: Final = 2
_RUN_ROOT_CHARS: Final = 50
_CLEANUP_SECONDS: Final = 60.0


class CommandError(RuntimeError):
    """A tool ended with another status than 0; the message carries what it printed."""

    def __init__(self, result: subprocess.CompletedProcess[str]) -> None:
        shown = " ".join(str(part) for part in result.args)
        super().__init__(
            f"{shown}\nended with {result.returncode}\n{result.stderr[-4000:]}{result.stdout[-2000:]}"
        )
        self.result: Final = result


@dataclass(frozen=True, slots=True)
class Tools:
    """The programs of one flavour."""

    podman: Path
    skopeo: Path
    buildah: Path
    containers_storage: Path
    conmon: Path
    runc: Path
    helpers: Path  # directory of netavark

    @classmethod
    def of(cls, flavour: Flavour) -> Tools:
        """The machine's own (Debian 12) or those unpacked by ``lab.trixie`` (Debian 13)."""
        if flavour == "debian13":
            unpacked = trixie.ensure()
            return cls(
                podman=unpacked.podman,
                skopeo=unpacked.skopeo,
                buildah=unpacked.buildah,
                containers_storage=unpacked.containers_storage,
                conmon=unpacked.conmon,
                runc=unpacked.runc,
                helpers=unpacked.netavark.parent,
            )
        return cls(
            podman=Path("/usr/bin/podman"),
            skopeo=Path("/usr/bin/skopeo"),
            buildah=Path("/usr/bin/buildah"),
            containers_storage=Path("/usr/bin/containers-storage"),
            conmon=Path("/usr/bin/conmon"),
            runc=Path("/usr/sbin/runc"),
            helpers=Path("/usr/lib/podman"),
        )


class PodmanEnv:
    """One private Podman environment below ``directory`` (on a real file system, not overlay).

    A context manager that cleans up at the end.  ``additional_layer_store`` is the directory of a
    store in the form with references (``PATH:ref``); ``registries`` ("host:port") are marked
    insecure.  The ``extra`` texts go into storage.conf (after the table ``storage.options``) and
    registries.conf (before its tables).

    With ``beside`` the graph root and the run root are those of that environment, which has to
    outlive this one.  Everything else stays private, Podman's database too: versions 4 and 5 keep
    different ones (bolt, SQLite), and each takes the containers of the other for "external" ones,
    as it does those of Buildah and CRI-O, with which it may share a storage.
    """

    def __init__(
        self,
        directory: Path,
        flavour: Flavour = "debian12",
        *,
        additional_layer_store: Path | None = None,
        additional_image_stores: Sequence[Path] = (),
        registries: Sequence[str] = (),
        storage_extra: str = "",
        registries_extra: str = "",
        beside: PodmanEnv | None = None,
    ) -> None:
        self.directory: Final = directory.absolute()
        self.flavour: Final = flavour
        self.tools: Final = Tools.of(flavour)
        self._beside: Final = beside
        self.graph_root: Final[Path] = beside.graph_root if beside else self.directory / "root"
        self._run_place: Final = _run_place(self.directory)
        self.run_root: Final[Path] = beside.run_root if beside else self._run_place / "run"
        self.tmp: Final = self.directory / "tmp"
        self.home: Final = self.directory / "home"
        self.conf: Final = self.directory / "conf"
        for place in (self.graph_root, self.run_root, self.tmp, self.home, self.conf):
            place.mkdir(parents=True, exist_ok=True)
        # who asks for the machine's Podman is to find this environment's
        self._programs: Final = self.conf / "programs"
        self._programs.mkdir(exist_ok=True)
        (self._programs / "podman").unlink(missing_ok=True)
        (self._programs / "podman").symlink_to(self.tools.podman)
        self.storage_conf: Final = self.conf / "storage.conf"
        self.registries_conf: Final = self.conf / "registries.conf"
        self.containers_conf: Final = self.conf / "containers.conf"
        self.auth_file: Final = self.conf / "auth.json"
        self.policy: Final = self.home / ".config/containers/policy.json"
        self.configure_storage(
            additional_layer_store=additional_layer_store,
            additional_image_stores=additional_image_stores,
            extra=storage_extra,
        )
        self.configure_registries(registries, extra=registries_extra)
        self.containers_conf.write_text(self._engine_settings())
        self.policy.parent.mkdir(parents=True, exist_ok=True)
        self.policy.write_text(json.dumps({"default": [{"type": "insecureAcceptAnything"}]}))
        self.auth_file.write_text("{}\n")

    def configure_storage(
        self,
        *,
        additional_layer_store: Path | None = None,
        additional_image_stores: Sequence[Path] = (),
        extra: str = "",
    ) -> None:
        """Write storage.conf; tests also call it to take a store away or add one."""
        lines = [
            "[storage]",
            'driver = "overlay"',
            f"graphroot = {_toml(self.graph_root)}",
            f"runroot = {_toml(self.run_root)}",
            "[storage.options]",
        ]
        if additional_layer_store is not None:
            lines.append(f"additionallayerstores = [{_toml(f'{additional_layer_store}:ref')}]")
        if additional_image_stores:
            stores = ", ".join(_toml(store) for store in additional_image_stores)
            lines.append(f"additionalimagestores = [{stores}]")
        self.storage_conf.write_text("\n".join([*lines, extra, ""]))

    def configure_registries(self, insecure: Iterable[str], *, extra: str = "") -> None:
        """Write registries.conf: ``extra`` first (top-level keys, such as the auth helper)."""
        lines = [extra]
        for host in insecure:
            lines += ["[[registry]]", f"location = {_toml(host)}", "insecure = true"]
        self.registries_conf.write_text("\n".join([*lines, ""]))

    def podman(
        self,
        *arguments: str | Path,
        check: bool = True,
        timeout: float = 300,
        stdin: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run podman.  Raises CommandError when ``check``, subprocess.TimeoutExpired."""
        return self._run(self.command("podman"), arguments, check, timeout, stdin)

    def skopeo(
        self,
        *arguments: str | Path,
        check: bool = True,
        timeout: float = 300,
        stdin: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        return self._run(self.command("skopeo"), arguments, check, timeout, stdin)

    def buildah(
        self,
        *arguments: str | Path,
        check: bool = True,
        timeout: float = 300,
        stdin: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        return self._run(self.command("buildah"), arguments, check, timeout, stdin)

    def containers_storage(
        self,
        *arguments: str | Path,
        check: bool = True,
        timeout: float = 300,
        stdin: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        return self._run(self.command("containers-storage"), arguments, check, timeout, stdin)

    def layerstore(
        self,
        *arguments: str | Path,
        check: bool = True,
        timeout: float = 300,
        stdin: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run our own program in the same environment: graph root, registries, policy."""
        return self._run(self.command("layerstore"), arguments, check, timeout, stdin)

    def command(
        self, tool: Literal["podman", "skopeo", "buildah", "containers-storage", "layerstore"]
    ) -> list[str]:
        """The start of a command line, to be run with ``environment()``."""
        match tool:
            case "podman":
                return [str(self.tools.podman)]
            case "skopeo":
                # 1.9.3 does not look at CONTAINERS_REGISTRIES_CONF.
                registries = str(self.registries_conf)
                return [
                    *(str(self.tools.skopeo), "--registries-conf", registries),
                    *("--policy", str(self.policy), "--tmpdir", str(self.tmp)),
                ]
            case "buildah":
                return [
                    *(str(self.tools.buildah), "--registries-conf", str(self.registries_conf)),
                ]
            case "containers-storage":
                return [str(self.tools.containers_storage)]
            case "layerstore":
                return [sys.executable, "-m", "layerstore.cli"]

    def environment(self) -> dict[str, str]:
        """The whole environment of the tools: nothing of the caller's gets through."""
        return {
            "PATH": f"{self._programs}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C.UTF-8",
            "HOME": str(self.home),
            "TMPDIR": str(self.tmp),
            "CONTAINERS_CONF": str(self.containers_conf),
            "CONTAINERS_STORAGE_CONF": str(self.storage_conf),
            "CONTAINERS_REGISTRIES_CONF": str(self.registries_conf),
            "REGISTRY_AUTH_FILE": str(self.auth_file),
            "BUILDAH_ISOLATION": "chroot",
            "PODMAN_IGNORE_CGROUPSV1_WARNING": "true",
            # our own program: the one that the caller imports, wherever it lies
            "PYTHONPATH": str(Path(layerstore.__file__).parents[1]),
        }

    def cleanup(self) -> None:
        """Remove containers and images, unmount what is left, remove the directory.

        Of an environment beside another only its own containers.
        """
        removals = [("rm", "--all", "--force", "--time=0"), ("rmi", "--all", "--force")]
        if not self.graph_root.exists():
            removals.clear()  # the other one has cleaned up
        for arguments in removals[:1] if self._beside else removals:
            with contextlib.suppress(subprocess.TimeoutExpired, OSError):
                self.podman(*arguments, check=False, timeout=_CLEANUP_SECONDS)
        if not self._beside:
            with contextlib.suppress(AssertionError):
                # what conmon started for a container that ended would make the run root anew
                until(lambda: not processes.naming(self.run_root), _CLEANUP_SECONDS)
        for place in (self.directory,) if self._beside else (self.directory, self._run_place):
            unmount_below(place)
            shutil.rmtree(place, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cleanup()

    def _run(
        self,
        command: Sequence[str],
        arguments: Sequence[str | Path],
        check: bool,
        timeout: float,
        stdin: str | None,
    ) -> subprocess.CompletedProcess[str]:
        return run([*command, *map(str, arguments)], self.environment(), check, timeout, stdin)

    def _engine_settings(self) -> str:
        # Below the run root, because the name of a socket has to be short.
        own = f"libpod-{self.directory.name}" if self._beside else "libpod"
        database = ""
        if self._beside:
            database = f"static_dir = {_toml(self.directory / 'libpod')}\n"
            if self.flavour == "debian13":
                database += 'database_backend = "sqlite"\n'
        return f"""\
[containers]
default_ulimits = [{_limit("nofile", resource.RLIMIT_NOFILE, 20000)}, \
{_limit("nproc", resource.RLIMIT_NPROC, 32768)}]
netns = "none"
log_driver = "k8s-file"

[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
tmp_dir = {_toml(self.run_root / own)}
{database}\
image_copy_tmp_dir = {_toml(self.tmp)}
conmon_path = [{_toml(self.tools.conmon)}]
helper_binaries_dir = [{_toml(self.tools.helpers)}]

[network]
network_backend = "netavark"
network_config_dir = {_toml(self.conf / "networks")}

[engine.runtimes]
runc = [{_toml(self.tools.runc)}]
"""


def run(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    check: bool = True,
    timeout: float = 300,
    stdin: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program, its output captured as text.  Raises CommandError, TimeoutExpired."""
    result = subprocess.run(
        command,
        env=environment,
        input=stdin if stdin is not None else "",
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        check=False,
    )
    if check and result.returncode:
        raise CommandError(result)
    return result


def unmount_below(directory: Path) -> None:
    """Detach every mount at or below ``directory``, the innermost first."""
    libc = ctypes.CDLL(None, use_errno=True)
    top = os.fsencode(directory.resolve())
    points = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        point = line.split(b" ")[4].decode("unicode_escape").encode("latin-1")
        if point == top or point.startswith(top + b"/"):
            points.append(point)
    for point in reversed(points):
        libc.umount2(point, _MNT_DETACH)


def _run_place(directory: Path) -> Path:
    """Where the run root lies: ``directory``, or one under a short name that belongs to it alone.

    Podman refuses ``--runroot`` above 50 characters. It passes that option to the clean-up that
    conmon starts when a container ends; where that fails, ``podman run`` waits 20 s for the exit
    code.
    """
    if len(str(directory / "run")) <= _RUN_ROOT_CHARS:
        return directory
    return SCRATCH / f"lab-run-{hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]}"


def _limit(name: str, kind: int, wanted: int) -> str:
    """A limit for containers that this process may set without CAP_SYS_RESOURCE."""
    hard = resource.getrlimit(kind)[1]
    value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    return f'"{name}={value}:{value}"'


def _toml(value: str | Path) -> str:
    """A TOML basic string: JSON's escapes are a subset of TOML's."""
    return json.dumps(str(value))
