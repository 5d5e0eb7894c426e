"""The layers of a Debian image, made as an image build makes them: change a root, take what changed.

Packages are unpacked into one root directory with their owners and modes; the few things their
maintainer scripts would do (accounts, library cache, alternatives, compiled Python, capabilities)
are done here.  After each step the names that are new become a layer, sorted, each preceded by
its parent directories.  Needs root.
"""

import os
import stat
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from lab import debian, tars, xattrs
from lab.tars import Member

BASE: Final = (
    *("base-files", "base-passwd", "bash", "coreutils", "dash", "debianutils"),
    *("diffutils", "findutils", "grep", "gzip", "hostname", "init-system-helpers", "iputils-ping"),
    *("libc-bin", "login", "mount", "ncurses-base", "ncurses-bin", "passwd", "perl-base", "sed"),
    *("sysvinit-utils", "tar", "tzdata", "usr-is-merged", "util-linux"),
)
PYTHON: Final = ("python3",)
NUMERIC: Final = ("libopenblas0-pthread", "python3-pandas", "python3-scipy")

_MERGED: Final = ("bin", "lib", "lib64", "sbin")
_LIBRARIES: Final = "usr/lib/x86_64-linux-gnu"
_GREAT_ARCHIVE: Final = 10_000_000
_BLAS: Final = ("libblas.so.3", "liblapack.so.3", "libopenblas.so.0")
_HELLO: Final = b'''\
"""One line that needs NumPy and pandas to have been read."""

import numpy
import pandas

frame = pandas.DataFrame({"x": numpy.arange(1000) ** 2, "g": numpy.arange(1000) % 7})
means = frame.groupby("g")["x"].mean()
print(
    f"hello from pandas {pandas.__version__} numpy {numpy.__version__}: mean={means.mean():.3f}",
    flush=True,
)
'''
_REPORT: Final = b'''\
"""Uses more of the libraries: linear algebra and an integral."""

import numpy
import scipy.integrate
import scipy.linalg

matrix = numpy.random.default_rng(7).normal(size=(300, 300))
value, _ = scipy.integrate.quad(numpy.sin, 0, numpy.pi)
print(f"norm={scipy.linalg.norm(scipy.linalg.inv(matrix)):.6f} integral={value:.6f}", flush=True)
'''


def python_layers(scratch: Path) -> list[Path]:
    """The uncompressed tars of the layers, lowest first, written below `scratch`.

    Raises lab.debian.DebianError, CalledProcessError when a step in the root fails.
    """
    root = scratch / "root"
    sets = [BASE, (*BASE, *PYTHON), (*BASE, *PYTHON, *NUMERIC)]
    steps = [_base_step, _python_step, _numeric_step]
    seen: set[bytes] = set()
    unpacked: set[Path] = set()
    result: list[Path] = []
    # The clock of file systems lags behind the exact one by a tick.
    start = time.time_ns() - 10**9
    for number, (packages, step) in enumerate(zip(sets, steps, strict=True)):
        debs = [each for each in debian.download(packages) if each not in unpacked]
        unpacked.update(debs)
        _unpack(debs, root)
        step(root)
        tar = scratch / f"layer{number}.tar"
        with tar.open("wb") as file:
            tars.write_tar(file, _new_members(root, seen, start))
        result.append(tar)
    tar = scratch / "application.tar"
    with tar.open("wb") as file:
        tars.write_tar(file, _application(root))
    return [*result, tar]


def _unpack(debs: Iterable[Path], root: Path) -> None:
    """Unpack with owners, into a root with merged /usr."""
    for name in _MERGED:
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        if not (root / name).is_symlink():
            (root / name).symlink_to(f"usr/{name}")
    for deb in debs:
        with subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE
        ) as reader:
            subprocess.run(
                ["tar", "-xp", "--numeric-owner", "--keep-directory-symlink", "-C", str(root)],
                stdin=reader.stdout,
                check=True,
            )
        if reader.returncode:
            raise debian.DebianError(f"{deb.name} could not be read")


def _base_step(root: Path) -> None:
    for name in ("passwd", "group"):
        master = root / "usr/share/base-passwd" / f"{name}.master"
        (root / "etc" / name).write_bytes(master.read_bytes())
    for name in ("hosts", "hostname", "resolv.conf"):
        (root / "etc" / name).touch()
    if not (root / "usr/bin/sh").is_symlink():
        (root / "usr/bin/sh").symlink_to("dash")
    capability = xattrs.file_capability(xattrs.CAP_NET_RAW)
    os.setxattr(root / "usr/bin/ping", xattrs.CAPABILITY.decode(), capability)
    _in_root(root, "/sbin/ldconfig")


def _python_step(root: Path) -> None:
    _in_root(root, "/sbin/ldconfig")
    _compile(root, "/usr/lib/python3.11", "/usr/lib/python3")


def _numeric_step(root: Path) -> None:
    # As an image build would: nothing is linked statically here, and these are 80 MB.
    archives = list((root / "usr/lib").rglob("*.a"))
    for archive in archives:
        if not archive.is_symlink() and archive.stat().st_size > _GREAT_ARCHIVE:
            archive.unlink()
    for archive in archives:
        if archive.is_symlink() and not archive.exists():
            archive.unlink()
    provider = "openblas-pthread"
    for name in _BLAS:
        link = root / _LIBRARIES / name
        if not link.is_symlink():
            link.symlink_to(f"{provider}/{name}")
    _in_root(root, "/sbin/ldconfig")
    _compile(root, "/usr/lib/python3")


def _compile(root: Path, *directories: str) -> None:
    """Byte-compile with the image's own interpreter, as Debian's packages do when configured."""
    # Some packages ship files that are no Python 3: their failure is expected.
    _in_root(root, "/usr/bin/python3", "-m", "compileall", "-qq", *directories, check=False)


def _in_root(root: Path, *command: str, check: bool = True) -> None:
    subprocess.run(
        ["chroot", str(root), *command],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        check=check,
    )


def _new_members(root: Path, seen: set[bytes], start: int) -> list[Member]:
    """Members of all names below `root` that are not in `seen`, which then has them."""
    new: list[bytes] = []
    for directory, folders, files in os.walk(os.fsencode(root)):
        relative = os.path.relpath(directory, os.fsencode(root))
        prefix = b"" if relative == b"." else relative + b"/"
        new += [path for name in (*folders, *files) if (path := prefix + name) not in seen]
    seen.update(new)
    wanted = set(new)
    for path in new:
        parent = path.rpartition(b"/")[0]
        while parent and parent not in wanted:
            wanted.add(parent)
            parent = parent.rpartition(b"/")[0]
    members = [tars.directory(b"./", mtime_ns=tars.MTIME_NS)]
    links: dict[int, bytes] = {}
    for path in sorted(wanted, key=lambda name: name.split(b"/")):
        members.append(_member(os.path.join(os.fsencode(root), path), path, links, start))
    return members


def _member(full: bytes, name: bytes, links: dict[int, bytes], start: int) -> Member:
    """What stands at `full`, as an entry; times of this build become one fixed time."""
    status = os.lstat(full)
    common: dict[str, object] = {
        "uid": status.st_uid,
        "gid": status.st_gid,
        # Packages carry whole seconds.
        "mtime_ns": tars.MTIME_NS if status.st_mtime_ns >= start else status.st_mtime_ns,
    }
    mode = stat.S_IMODE(status.st_mode)
    if stat.S_ISDIR(status.st_mode):
        return tars.directory(name, mode, **common)
    if stat.S_ISLNK(status.st_mode):
        return tars.symlink(name, os.readlink(full), **common)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"a package holds a special file: {os.fsdecode(name)}")
    if status.st_ino in links:
        return tars.hard_link(name, links[status.st_ino], mode=mode, **common)
    if status.st_nlink > 1:
        links[status.st_ino] = name
    found = {
        os.fsencode(each): os.getxattr(full, each, follow_symlinks=False)
        for each in os.listxattr(full, follow_symlinks=False)
    }
    return tars.regular(name, Path(os.fsdecode(full)), mode, xattrs=found, **common)


def _application(root: Path) -> Sequence[Member]:
    """The top layer: two programs, hard links, an opaque directory, documentation deleted."""
    doc = root / "usr/share/doc"
    removed = sorted(os.fsencode(path.name) for path in doc.iterdir())
    return [
        tars.directory(b"./"),
        tars.directory(b"app/"),
        tars.regular(b"app/hello.py", _HELLO, mode=0o755),
        tars.directory(b"app/plugins/"),
        tars.hard_link(b"app/plugins/hello.py", b"app/hello.py", mode=0o755),
        tars.regular(b"app/report.py", _REPORT, mode=0o755),
        tars.directory(b"etc/"),
        tars.directory(b"etc/skel/"),
        tars.opaque(b"etc/skel/"),
        tars.regular(b"etc/skel/.profile", b"umask 022\n"),
        tars.directory(b"usr/"),
        tars.directory(b"usr/share/"),
        tars.directory(b"usr/share/doc/"),
        *(tars.whiteout(b"usr/share/doc/" + name) for name in removed),
        tars.whiteout(b"usr/share/man"),
    ]
