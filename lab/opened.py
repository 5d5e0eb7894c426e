"""Which files does a program open, in which order?  What `layerstore convert` may put first.

The program runs under strace in a mounted image, by chroot.  `strace -y` shows what a descriptor
became, so the names are those of the files themselves, whichever symbolic links led there.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lab.podman import PodmanEnv

# openat(AT_FDCWD</>, "name", O_RDONLY) = 3</the/real/name>
# or, of a thread that was interrupted: <... openat resumed>) = 3</the/real/name>
_OPENED: Final = re.compile(r"\bopen(?:at)?(?:\(| resumed>).* = \d+<(/[^>]*)>$")
_RUN: Final = re.compile(r'\bexecve\("([^"]*)".* = 0$')
# What the kernel and the container runtime read without the program's doing.
_ALWAYS: Final = ("/lib64/ld-linux-x86-64.so.2", "/etc/passwd", "/etc/group")
_SECONDS: Final = 300.0


def opened_files(env: PodmanEnv, image: str, *command: str) -> list[str]:
    """Regular files of ``image``, relative to its root, that ``command`` opens.

    The image must be in the environment's storage.  Raises lab.podman.CommandError, RuntimeError
    when the program fails.
    """
    root = Path(env.podman("image", "mount", image).stdout.strip())
    try:
        return _trace(root, command)
    finally:
        env.podman("image", "unmount", image)


def _trace(root: Path, command: Sequence[str]) -> list[str]:
    with tempfile.NamedTemporaryFile("r", errors="surrogateescape") as record:
        result = subprocess.run(
            ["strace", "-f", "-y", "-qq", "-s", "4096", "-e", "trace=execve,open,openat",
             "-o", record.name, "chroot", str(root), *command],
            env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                 "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )  # fmt: skip
        if result.returncode:
            raise RuntimeError(f"the program failed under strace: {result.stderr[-2000:]}")
        lines = record.read().splitlines()
    base = root.resolve()
    # What strace shows of opened files are the machine's names; programs are named as asked for.
    opened = (match[1] for line in lines if (match := _OPENED.search(line)))
    inside = [name.removeprefix(str(base)) for name in opened if name.startswith(f"{base}/")]
    run = [match[1] for line in lines if (match := _RUN.search(line))]
    found: dict[str, None] = {}
    for name in (*_ALWAYS, *run[1:], *inside):  # the first was chroot, outside
        path = _resolve(base, name)
        if path is not None and path.is_file():
            found[str(path.relative_to(base))] = None
    return list(found)


def _resolve(base: Path, name: str) -> Path | None:
    """The file that ``name`` means inside ``base``: absolute links start there again."""
    path = base
    pending = list(reversed([part for part in name.split("/") if part]))
    for _ in range(1000):
        if not pending:
            return path
        part = pending.pop()
        if part in (".", ""):
            continue
        if part == "..":
            path = path.parent if path != base else base
            continue
        step = path / part
        if step.is_symlink():
            target = str(step.readlink())
            if target.startswith("/"):
                path = base
            pending += reversed(target.split("/"))
        else:
            path = step
    return None
