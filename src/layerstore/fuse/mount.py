"""Mounting and unmounting, directly or through the setuid helper fusermount3.

Directly (mount(2), for root and inside a user namespace that has CAP_SYS_ADMIN) a mount
keeps setuid programs and device nodes; fusermount3 forces nosuid and nodev.  The mount is
not read only: the additional layer store protocol signals with CREATE and RMDIR, and a
read-only mount would not let them through.

Nothing here touches the mounted tree from the calling thread, because the caller may be
the one who should answer.  What is mounted where comes from /proc/self/mountinfo.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import socket
import stat
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from layerstore.errors import MountError

from .negotiation import MAX_REQUEST_PAGES
from .wire import PAGE_BYTES

FILESYSTEM: Final = "fuse.layerstore"
MAX_READ: Final = MAX_REQUEST_PAGES * PAGE_BYTES
DEVICE: Final = "/dev/fuse"
HELPER: Final = "fusermount3"
HELPER_SECONDS: Final = 10.0
PROBE_SECONDS: Final = 2.0
_STACKED: Final = 16  # dead mounts on top of each other that are cleared away

_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8
_MOUNTINFO: Final = "/proc/self/mountinfo"
_CONNECTIONS: Final = Path("/sys/fs/fuse/connections")

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_LIBC.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
)
_LIBC.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


@dataclass(frozen=True, slots=True)
class MountInfo:
    """One line of mountinfo: device number, mount point, file system type and source."""

    major: int
    minor: int
    mountpoint: str
    filesystem: str
    source: str


def _unescape(field: bytes) -> str:
    for code in (b"040", b"011", b"012", b"134"):
        field = field.replace(b"\\" + code, bytes([int(code, 8)]))
    return os.fsdecode(field)


def _resolve(mountpoint: str | os.PathLike[str]) -> str:
    """The absolute path without symlinks, without looking at what is mounted there."""
    path = os.path.abspath(mountpoint)
    for _ in range(40):
        path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        try:
            target = os.readlink(path)  # answered by the kernel alone, also on a mount root
        except OSError:
            break
        path = os.path.normpath(os.path.join(os.path.dirname(path), target))
    return path


def find_mount(mountpoint: str | os.PathLike[str]) -> MountInfo | None:
    """What is mounted, topmost, exactly at ``mountpoint``; None if nothing is."""
    wanted = _resolve(mountpoint)
    found = None
    with open(_MOUNTINFO, "rb") as lines:
        for line in lines:
            fields = line.split(b" ")
            tail = fields[fields.index(b"-", 6) + 1 :]
            if _unescape(fields[4]) == wanted:
                major, minor = fields[2].split(b":")
                found = MountInfo(
                    int(major), int(minor), wanted, _unescape(tail[0]), _unescape(tail[1])
                )
    return found


def _is_dead(mountpoint: str) -> bool:
    """Whether the server behind the mount is gone for good (ENOTCONN).

    Asked in a thread of its own: a mount whose descriptor is kept but not served hangs.
    """
    result: list[int] = []

    def probe() -> None:
        try:
            # attributes of the root may be cached and say nothing
            os.statvfs(mountpoint)
            result.append(0)
        except OSError as exc:
            result.append(exc.errno or 0)

    thread = threading.Thread(target=probe, name="mount-probe", daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return result == [errno.ENOTCONN]


def _clear(mountpoint: str) -> None:
    """Make sure that nothing is mounted here, taking dead mounts of ours away."""
    for _ in range(_STACKED):
        there = find_mount(mountpoint)
        if there is None:
            return
        if there.filesystem != FILESYSTEM:
            raise MountError(
                f"a {there.filesystem} file system is mounted here",
                subject=mountpoint,
                advice="unmount it or choose another directory",
            )
        if not _is_dead(mountpoint):
            raise MountError(
                "a layer store is already mounted here",
                subject=mountpoint,
                advice="stop its service first",
            )
        unmount(mountpoint)
    raise MountError("dead mounts could not be cleared away", subject=mountpoint)


def _options(pairs: dict[str, str | None]) -> str:
    for value in pairs.values():
        if value is not None and any(c in value for c in ',"\\\n\0'):
            raise MountError(f"a mount option cannot hold {value!r}")
    return ",".join(key if value is None else f"{key}={value}" for key, value in pairs.items())


def _context(context: str | None) -> str:
    """The SELinux label for all files; quoted, because categories hold commas."""
    if context is None:
        return ""
    if '"' in context or "\0" in context:
        raise MountError(f"not an SELinux context: {context!r}")
    return f',context="{context}"'


def mount_direct(
    mountpoint: str | os.PathLike[str],
    fsname: str = "layerstore",
    *,
    allow_other: bool = True,
    default_permissions: bool = True,
    max_read: int = MAX_READ,
    context: str | None = None,
) -> int:
    """Mount with mount(2) and return the FUSE descriptor (close on exec).

    Needs /dev/fuse and CAP_SYS_ADMIN in the mount namespace's user namespace.  MountError,
    with the OSError as its cause, if the kernel refuses.
    """
    path = os.fspath(mountpoint)
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise MountError(
            f"{DEVICE} cannot be opened: {exc.strerror}", subject=path, advice="modprobe fuse"
        ) from exc
    try:
        pairs: dict[str, str | None] = {
            "fd": str(fd),
            "rootmode": format(stat.S_IFDIR, "o"),
            "user_id": str(os.geteuid()),
            "group_id": str(os.getegid()),
            "max_read": str(max_read),
        }
        if default_permissions:
            pairs["default_permissions"] = None
        if allow_other:
            pairs["allow_other"] = None
        data = _options(pairs) + _context(context)
        result = _LIBC.mount(
            os.fsencode(fsname),
            os.fsencode(path),
            FILESYSTEM.encode(),
            0,
            os.fsencode(data),
        )
        if result != 0:
            number = ctypes.get_errno()
            cause = OSError(number, os.strerror(number), path)
            raise MountError(f"mount failed: {cause.strerror}", subject=path) from cause
    except BaseException:
        os.close(fd)
        raise
    return fd


def mount_fusermount(
    mountpoint: str | os.PathLike[str],
    fsname: str = "layerstore",
    *,
    allow_other: bool = True,
    default_permissions: bool = True,
    max_read: int = MAX_READ,
    context: str | None = None,
) -> int:
    """Mount through fusermount3 and return the FUSE descriptor it sends (close on exec).

    ``allow_other`` needs ``user_allow_other`` in /etc/fuse.conf, except for root.
    """
    path = os.fspath(mountpoint)
    helper = shutil.which(HELPER)
    if helper is None:
        raise MountError(f"there is no {HELPER}", subject=path, advice="install fuse3")
    pairs: dict[str, str | None] = {
        "fsname": fsname,
        "subtype": FILESYSTEM.partition(".")[2],
        "max_read": str(max_read),
    }
    if default_permissions:
        pairs["default_permissions"] = None
    if allow_other:
        pairs["allow_other"] = None
    options = _options(pairs) + _context(context)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        with theirs:
            process = subprocess.Popen(
                [helper, "-o", options, "--", path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno()), "LC_ALL": "C"},
            )
        ours.settimeout(HELPER_SECONDS)
        try:
            _, fds, _, _ = socket.recv_fds(ours, 1, 1)
        except TimeoutError:
            fds = []
        said = _finish(process)
    if not fds:
        raise MountError(f"{HELPER} failed: {said or 'no descriptor came back'}", subject=path)
    os.set_inheritable(fds[0], False)
    return fds[0]


def _finish(process: subprocess.Popen[bytes]) -> str:
    """What the helper wrote to stderr; it is killed if it does not end."""
    try:
        _, said = process.communicate(timeout=HELPER_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        _, said = process.communicate()
    return said.decode("utf-8", "replace").strip()


def mount(
    mountpoint: str | os.PathLike[str],
    fsname: str = "layerstore",
    *,
    allow_other: bool = True,
    default_permissions: bool = True,
    max_read: int = MAX_READ,
    context: str | None = None,
) -> int:
    """Mount by whichever way is permitted and return the FUSE descriptor.

    A dead mount of ours at ``mountpoint`` is taken away first.  MountError if the directory
    is not there, something alive is mounted on it, or neither way works.
    """
    path = _resolve(mountpoint)
    _clear(path)
    if not os.path.isdir(path):
        raise MountError("there is no such directory", subject=path)
    try:
        return mount_direct(
            path,
            fsname,
            allow_other=allow_other,
            default_permissions=default_permissions,
            max_read=max_read,
            context=context,
        )
    except MountError as exc:
        refused = isinstance(exc.__cause__, OSError) and exc.__cause__.errno in (
            errno.EPERM,
            errno.EACCES,
        )
        if not refused or shutil.which(HELPER) is None:
            raise
    return mount_fusermount(
        path,
        fsname,
        allow_other=allow_other,
        default_permissions=default_permissions,
        max_read=max_read,
        context=context,
    )


def unmount(mountpoint: str | os.PathLike[str], lazy: bool = True) -> bool:
    """Take the topmost mount off ``mountpoint``; False if there is none.

    ``lazy``: at once, whoever still uses it; the file system ends when the last user is
    gone.  MountError if it is busy (not lazy) or not ours to unmount.
    """
    path = _resolve(mountpoint)
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)
    if _LIBC.umount2(os.fsencode(path), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOENT):
        return False
    helper = shutil.which(HELPER)
    if number == errno.EPERM and find_mount(path) is None:
        return False
    if number == errno.EPERM and helper is not None:
        said = _finish(
            subprocess.Popen(
                [helper, "-u", *(["-z"] if lazy else []), "--", path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        )
        if not said:
            return True
        raise MountError(f"{HELPER} failed: {said}", subject=path)
    raise MountError(f"unmounting failed: {os.strerror(number)}", subject=path)


def abort_connection(minor: int) -> bool:
    """Fail all requests of the mount whose device is 0:``minor``, for ever; last resort.

    False if the control file system is not there or the connection is gone.
    """
    try:
        (_CONNECTIONS / str(minor) / "abort").write_text("1")
    except OSError:
        return False
    return True


def set_read_ahead(mountpoint: str | os.PathLike[str], kib: int = 1024) -> bool:
    """Let the kernel read ``kib`` KiB ahead on the mount, and so send reads of that size.

    False if that is not permitted or nothing is mounted.
    """
    there = find_mount(mountpoint)
    if there is None:
        return False
    control = Path(f"/sys/class/bdi/{there.major}:{there.minor}/read_ahead_kb")
    try:
        control.write_text(str(kib))
    except OSError:
        return False
    return True
