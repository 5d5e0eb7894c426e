"""Debian packages without installing them: resolve, download, verify, unpack.

A private apt (own lists, own cache, an empty status file, so that it takes nothing for installed)
resolves a set of packages with everything they depend on and downloads it; the machine's apt is
read for its sources and settings only.  Signatures and hashes are checked by apt as always.
Another suite than the machine's is reached through the machine's own sources with the code name
changed, so no address stands here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

# Where a link leads: checkouts that share a cache have to agree what its files are called.
CACHE: Final = (Path(__file__).resolve().parent.parent / ".cache").resolve()

_APT_ETC: Final = Path("/etc/apt")
_KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_TIMEOUT_SECONDS: Final = 900.0
_MERGED: Final = ("bin", "sbin", "lib", "lib64")


class DebianError(RuntimeError):
    """Packages that could not be had; the message carries apt's own words."""


def download(packages: Sequence[str], suite: str | None = None) -> list[Path]:
    """The .deb files of ``packages`` and all they depend on, from ``.cache/debs/SUITE``.

    ``suite`` is a code name ("trixie"), the machine's own by default.  Essential packages are
    included where something depends on them.  The answer is remembered: the second call asks
    nobody.  Safe to call from several processes at once.  Raises DebianError.
    """
    suite = suite or host_suite()
    place = CACHE / "debs" / suite
    (place / "partial").mkdir(parents=True, exist_ok=True)
    wanted = sorted(set(packages))
    key = hashlib.sha256("\n".join(wanted).encode()).hexdigest()[:16]
    remembered = place / f"set-{key}.json"
    with lock(place / "lock"):
        if remembered.exists():
            files = [place / name for name in json.loads(remembered.read_text())["files"]]
            if all(file.exists() for file in files):
                return files
        apt = _PrivateApt(suite, place)
        names = apt.resolve_and_download(wanted)
        content = json.dumps({"packages": wanted, "files": names}, indent=1)
        publish(remembered, content)
        return [place / name for name in names]


def unpack(debs: Iterable[Path], root: Path) -> None:
    """Unpack packages over each other into ``root``, whose /bin, /sbin and /lib are merged.

    No maintainer script runs.  Raises DebianError.
    """
    root.mkdir(parents=True, exist_ok=True)
    for name in _MERGED:
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        if not (root / name).is_symlink():
            (root / name).symlink_to(f"usr/{name}")
    for deb in debs:
        with subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE
        ) as reader:
            result = subprocess.run(
                # Files of other owners stay root's or the caller's: nobody runs this as a system.
                ["tar", "-xp", "--keep-directory-symlink", "--no-same-owner", "-C", str(root)],
                stdin=reader.stdout,
                capture_output=True,
                check=False,
            )
        if result.returncode or reader.returncode:
            raise DebianError(f"{deb.name} could not be unpacked: {result.stderr.decode()}")


def host_suite() -> str:
    """The code name of the machine's Debian.  Raises DebianError where it is none."""
    for line in Path("/etc/os-release").read_text().splitlines():
        key, _, value = line.partition("=")
        if key == "VERSION_CODENAME":
            return value.strip('"')
    raise DebianError("/etc/os-release names no code name: this is no Debian")


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file between processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def publish(path: Path, content: str) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = path.with_name(f"{path.name}.new")
    partial.write_text(content)
    partial.replace(path)


class _PrivateApt:
    """apt for one suite with its state below ``place``."""

    def __init__(self, suite: str, place: Path) -> None:
        self._suite = suite
        self._place = place
        self._state = place / "apt"
        for name in ("lists/partial", "etc", "cache"):
            (self._state / name).mkdir(parents=True, exist_ok=True)
        (self._state / "status").touch()
        self._sources = self._state / "etc" / "lab.sources"
        self._sources.write_text(sources_for(suite))
        self._options = [
            f"-oDir::State={self._state}",
            f"-oDir::State::lists={self._state}/lists",
            f"-oDir::State::status={self._state}/status",
            f"-oDir::Cache={self._state}/cache",
            f"-oDir::Cache::archives={place}",
            f"-oDir::Etc::sourcelist={self._sources}",
            "-oDir::Etc::sourceparts=/dev/null",
            "-oDir::Etc::preferencesparts=/dev/null",
            "-oAPT::Install-Recommends=false",
            "-oAcquire::Languages=none",
            "-oAcquire::Retries=3",
            # The cache may lie where the user _apt cannot write.
            f"-oAPT::Sandbox::User={'root' if os.geteuid() == 0 else ''}",
        ]

    def resolve_and_download(self, packages: Sequence[str]) -> list[str]:
        """Names of the files, in the order apt gives; they lie in the place afterwards."""
        install = ["-y", "--no-remove", "install", *packages]
        self._update()
        # Not --print-uris: it leaves out what is downloaded already.
        listed = self._run(["--simulate", "-qq", *install])
        names = [
            f"{match[1]}_{match[2].replace(':', '%3a')}_{match[3]}.deb"
            for match in re.finditer(r"^Inst (\S+) \((\S+) .*\[(\w+)\]\)", listed, re.MULTILINE)
        ]
        if not names:
            raise DebianError(f"apt names no package for {' '.join(packages)}: {listed[-500:]}")
        self._run(["--download-only", "-q", *install])
        missing = [name for name in names if not (self._place / name).exists()]
        if missing:
            raise DebianError(f"apt did not download {' '.join(missing)}")
        return names

    def _update(self) -> None:
        # Signatures are checked by apt; an unsigned or unreachable source is an error here.
        self._run(["-q", "-oAPT::Update::Error-Mode=any", "update"])

    def _run(self, arguments: Sequence[str]) -> str:
        result = subprocess.run(
            ["apt-get", *self._options, *arguments],
            env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
        if result.returncode:
            raise DebianError(f"apt-get {' '.join(arguments)}: {result.stderr.strip()}")
        return result.stdout


def sources_for(suite: str) -> str:
    """The machine's Debian sources with its code name replaced by ``suite``, in deb822 form.

    Only suites of Debian itself are taken (NAME, NAME-updates, NAME-security), signed by Debian's
    archive keyring.  Raises DebianError when the machine has none.
    """
    own = host_suite()
    ours = re.compile(rf"{re.escape(own)}(-updates|-security)?")
    stanzas: list[str] = []
    for path in sorted((_APT_ETC / "sources.list.d").glob("*.sources")):
        for stanza in re.split(r"\n\s*\n", path.read_text()):
            fields = _fields(stanza)
            suites = [name for name in fields.get("suites", "").split() if ours.fullmatch(name)]
            if suites and "deb" in fields.get("types", "").split():
                stanzas.append(_stanza(fields["uris"], suites, own, suite))
    classic = [_APT_ETC / "sources.list", *sorted((_APT_ETC / "sources.list.d").glob("*.list"))]
    for path in classic:
        text = path.read_text() if path.exists() else ""
        for match in re.finditer(r"^deb\s+(?:\[[^]]*\]\s+)?(\S+)\s+(\S+)\s", text, re.MULTILINE):
            if ours.fullmatch(match[2]):
                stanzas.append(_stanza(match[1], [match[2]], own, suite))
    if not stanzas:
        raise DebianError(f"this machine's apt has no source for {own}")
    return "\n".join(stanzas)


def _fields(stanza: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in stanza.splitlines():
        name, colon, value = line.partition(":")
        if colon and not line.startswith(("#", " ", "\t")):
            fields[name.lower()] = value.strip()
    return fields


def _stanza(uris: str, suites: Sequence[str], own: str, suite: str) -> str:
    renamed = " ".join(name.replace(own, suite, 1) for name in suites)
    return f"Types: deb\nURIs: {uris}\nSuites: {renamed}\nComponents: main\nSigned-By: {_KEYRING}\n"
