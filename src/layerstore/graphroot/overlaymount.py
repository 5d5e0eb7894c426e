"""Asking the kernel for an overlay mount.

mount(2) takes all options as one text that must fit into one page, and a path in a list of
lower directories must not have ``:`` or ``,``.  Where the text does not fit, the newer calls
(fsopen, fsconfig, fsmount: one ``lowerdir+`` for each lower, Linux 6.8) have no such limits;
older kernels get paths relative to the overlay directory instead, as containers/storage does
("mountOverlayFrom").  The working directory for that is changed in a thread of its own,
which gives up sharing it with the others (``unshare(CLONE_FS)``).

Source: containers/storage, drivers/overlay/overlay.go ("get"); Linux,
Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from layerstore import limits
from layerstore.errors import MountError
from layerstore.graphroot.mountpoints import detach_mount

_CLONE_FS: Final = 0x200
_UMOUNT_NOFOLLOW: Final = 8
_MS_BIND, _MS_PRIVATE = 4096, 1 << 18
_FSOPEN, _FSCONFIG, _FSMOUNT, _MOVE_MOUNT = 430, 431, 432, 429  # on every architecture
_SET_FLAG, _SET_STRING, _CREATE = 0, 1, 6
_CLOEXEC: Final = 1
_F_EMPTY_PATH: Final = 4
_AT_FDCWD: Final = -100
# Option: its bit for mount(2), its bit for fsmount; what is not here is the file system's own.
_FLAGS: Final = {
    "ro": (1, 1),
    "nosuid": (2, 2),
    "nodev": (4, 4),
    "noexec": (8, 8),
    "noatime": (1024, 0x10),
    "nodiratime": (2048, 0x80),
    "relatime": (1 << 21, 0),
    "strictatime": (1 << 24, 0x20),
    "sync": (16, 0),
    "dirsync": (128, 0),
}
_NO_EFFECT: Final = frozenset(("", "rw", "suid", "dev", "exec", "defaults", "async", "atime"))
_UNFIT: Final = frozenset(',:\\"')

_LIBC: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class OverlayMount:
    """One mount to make: absolute paths, the topmost lower first.

    ``upper`` and ``work`` are None for a mount that is only read.  ``options`` are the words
    behind ``-o``; ``label`` is an SELinux context for all files.
    """

    home: Path
    lowers: tuple[Path, ...]
    upper: Path | None
    work: Path | None
    target: Path
    options: tuple[str, ...] = ()
    label: str = ""

    @property
    def flags(self) -> int:
        """The bits for mount(2)."""
        return sum({_FLAGS[word][0] for word in self.options if word in _FLAGS})

    @property
    def own_options(self) -> tuple[str, ...]:
        """The options for the file system itself."""
        return tuple(word for word in self.options if word not in _FLAGS and word not in _NO_EFFECT)

    @property
    def data(self) -> str:
        """The text for mount(2)."""
        words = [f"lowerdir={':'.join(map(str, self.lowers))}"]
        if self.upper is not None:
            words += [f"upperdir={self.upper}", f"workdir={self.work}"]
        words += self.own_options
        if self.label:
            words.append(f'context="{self.label}"')
        return ",".join(words)

    @property
    def fits(self) -> bool:
        """Whether mount(2) can take ``data``."""
        paths = [*self.lowers, *(path for path in (self.upper, self.work) if path is not None)]
        unfit = any(_UNFIT.intersection(str(path)) for path in paths)
        return not unfit and len(os.fsencode(self.data)) < mmap.PAGESIZE

    def relative(self) -> OverlayMount:
        """The same for a process whose working directory is ``home``."""
        return replace(
            self,
            lowers=tuple(map(self._relative, self.lowers)),
            upper=None if self.upper is None else self._relative(self.upper),
            work=None if self.work is None else self._relative(self.work),
        )

    def _relative(self, path: Path) -> Path:
        return path.relative_to(self.home) if path.is_relative_to(self.home) else path


def make(wanted: OverlayMount) -> None:
    """Mount; raises ``MountError``."""
    if len(wanted.lowers) > limits.OVERLAY_LOWERS:
        raise MountError(
            f"{len(wanted.lowers)} directories on top of each other are more than the"
            f" {limits.OVERLAY_LOWERS} that the kernel can mount",
            subject=str(wanted.target),
        )
    if any(char in wanted.label for char in '"\0\n'):
        raise MountError(f"not an SELinux context: {wanted.label[:160]!r}")
    try:
        if wanted.fits:
            _mount("overlay", wanted.target, "overlay", wanted.flags, wanted.data)
        else:
            _in_directory(wanted.home, lambda: _beyond_a_page(wanted.relative()))
    except OSError as error:
        raise _refused(wanted.target, error) from error


def make_with_program(program: str, wanted: OverlayMount) -> None:
    """Mount through fuse-overlayfs or its like; raises ``MountError``."""
    options = ",".join((wanted.data, *(word for word in wanted.options if word in _FLAGS)))
    try:
        done = subprocess.run(
            [program, "-o", options, str(wanted.target)],
            cwd=wanted.home,
            capture_output=True,
            timeout=limits.MOUNT_PROGRAM_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MountError(f"{program} cannot be run: {error}", subject=str(wanted.target)) from error
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "replace").strip()[:300]
        raise MountError(f"{program} failed: {said}", subject=str(wanted.target))


def detach(path: Path, *, by_program: bool = False) -> None:
    """Unmount ``path``, which disappears at once and ends with its last user.

    A path where nothing is mounted is no error.  Raises ``MountError``.
    """
    if not (by_program and _unmounted_by_helper(path)):
        detach_mount(path)


def is_mounted(path: Path) -> bool:
    """Whether something is mounted exactly at ``path``."""
    wanted = os.fsencode(os.path.join(os.path.realpath(path.parent), path.name))
    with open("/proc/self/mountinfo", "rb") as lines:
        return any(_unescaped(line.split(b" ")[4]) == wanted for line in lines)


def bind_private(directory: Path) -> None:
    """Make ``directory`` a mount of its own, whose mounts others do not see."""
    try:
        _mount(str(directory), directory, "none", _MS_BIND, "")
        _mount("none", directory, "none", _MS_PRIVATE, "")
    except OSError as error:
        raise _refused(directory, error) from error


def unbind(directory: Path) -> bool:
    """Undo ``bind_private`` unless somebody is using it; whether it is undone."""
    result: int = _LIBC.umount2(os.fsencode(directory), _UMOUNT_NOFOLLOW)
    return result == 0


# -- the kernel -------------------------------------------------------------------------


def _mount(source: str, target: Path, kind: str, flags: int, data: str) -> None:
    result = _LIBC.mount(
        os.fsencode(source),
        os.fsencode(target),
        kind.encode(),
        ctypes.c_ulong(flags),
        os.fsencode(data),
    )
    if result != 0:
        raise _last_error()


def _beyond_a_page(wanted: OverlayMount) -> None:
    try:
        _new_calls(wanted)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EINVAL) or not wanted.fits:
            raise
        # A kernel that does not know `lowerdir+`.
        _mount("overlay", wanted.target, "overlay", wanted.flags, wanted.data)


def _new_calls(wanted: OverlayMount) -> None:
    context = _call(_FSOPEN, b"overlay", _CLOEXEC)
    try:
        _configure(context, "source", "overlay")
        for lower in wanted.lowers:
            _configure(context, "lowerdir+", str(lower))
        if wanted.upper is not None:
            _configure(context, "upperdir", str(wanted.upper))
            _configure(context, "workdir", str(wanted.work))
        for option in wanted.own_options:
            key, given, value = option.partition("=")
            _configure(context, key, value if given else None)
        if wanted.label:
            _configure(context, "context", wanted.label)
        for word in ("ro", "sync", "dirsync"):
            if word in wanted.options:
                _configure(context, word, None)
        _call(_FSCONFIG, context, _CREATE, None, None, 0)
        attributes = sum({_FLAGS[word][1] for word in wanted.options if word in _FLAGS})
        mount = _call(_FSMOUNT, context, _CLOEXEC, attributes)
        try:
            target = os.fsencode(wanted.target)
            _call(_MOVE_MOUNT, mount, b"", _AT_FDCWD, target, _F_EMPTY_PATH)
        finally:
            os.close(mount)
    finally:
        os.close(context)


def _configure(context: int, key: str, value: str | None) -> None:
    kind = _SET_FLAG if value is None else _SET_STRING
    _call(_FSCONFIG, context, kind, key.encode(), None if value is None else os.fsencode(value), 0)


def _call(number: int, *arguments: int | bytes | None) -> int:
    """One system call by its number."""
    given = [
        ctypes.c_long(value) if isinstance(value, int) else ctypes.c_char_p(value)
        for value in arguments
    ]
    result: int = _LIBC.syscall(ctypes.c_long(number), *given)
    if result < 0:
        raise _last_error()
    return result


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def _in_directory(directory: Path, work: Callable[[], None]) -> None:
    """Do ``work`` in a thread whose working directory is ``directory``."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            if _LIBC.unshare(_CLONE_FS) != 0:
                raise _last_error()
            os.chdir(directory)
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="mount")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def _unmounted_by_helper(path: Path) -> bool:
    for helper in ("fusermount3", "fusermount"):
        try:
            done = subprocess.run(
                [helper, "-u", str(path)],
                capture_output=True,
                timeout=limits.MOUNT_PROGRAM_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            return True
    return False


def _unescaped(field: bytes) -> bytes:
    for code in (b"040", b"011", b"012", b"134"):
        field = field.replace(b"\\" + code, bytes([int(code, 8)]))
    return field


def _refused(target: Path, error: OSError) -> MountError:
    advice = ""
    if error.errno == errno.EPERM:
        advice = "mounting takes root, or a shell inside `podman unshare`"
    return MountError(
        f"the kernel refused the mount: {error.strerror}", subject=str(target), advice=advice
    )
