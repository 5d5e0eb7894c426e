import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import layerstore
from layerstore.errors import MountError
from layerstore.fuse import (
    find_mount,
    mount,
    mount_direct,
    mount_fusermount,
    set_read_ahead,
    unmount,
)

pytestmark = pytest.mark.usefixtures("fuse_device")


def test_what_is_mounted_is_found_and_taken_away(serve: Callable[..., Any], small_fs: Any) -> None:
    served = serve(small_fs())
    there = find_mount(served.mountpoint)
    assert there is not None
    assert (there.filesystem, there.source) == ("fuse.layerstore", "layerstore")
    options = next(
        line.split(" ")[5]
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if f" {there.mountpoint} " in line
    )
    assert options.startswith("rw")
    assert "nosuid" not in options
    assert "nodev" not in options
    assert set_read_ahead(served.mountpoint, 512)
    assert Path(f"/sys/class/bdi/0:{there.minor}/read_ahead_kb").read_text().strip() == "512"
    assert unmount(served.mountpoint)
    assert find_mount(served.mountpoint) is None
    assert not unmount(served.mountpoint)
    assert not set_read_ahead(served.mountpoint)


def test_a_mount_point_may_be_a_symlink_with_odd_names(tmp_path: Path) -> None:
    real = tmp_path / "with space\tand \\ and ,"
    real.mkdir()
    link = tmp_path / "link"
    link.symlink_to(real.name)
    os.close(mount(link))
    try:
        there = find_mount(link)
        assert there is not None
        assert there == find_mount(real)
        assert there.mountpoint == str(real)
    finally:
        assert unmount(link)
    assert find_mount(real) is None


def test_a_dead_mount_is_replaced(mountpoint: Path) -> None:
    os.close(mount_direct(mountpoint))
    with pytest.raises(OSError, match="not connected"):
        os.stat(mountpoint)
    fd = mount(mountpoint)
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        assert len([line for line in lines if f" {mountpoint} " in line]) == 1
        unmount(mountpoint)
    finally:
        os.close(fd)


def test_a_live_mount_is_not_mounted_over(serve: Callable[..., Any], small_fs: Any) -> None:
    served = serve(small_fs())
    with pytest.raises(MountError, match="already mounted"):
        mount(served.mountpoint)
    assert served.ask("print(open(root + '/hello').read())") == "hello, world"


def test_a_mount_that_nobody_serves_but_somebody_keeps_is_alive(mountpoint: Path) -> None:
    fd = mount_direct(mountpoint)
    try:
        with pytest.raises(MountError, match="already mounted"):
            mount(mountpoint)
    finally:
        unmount(mountpoint)
        os.close(fd)


def test_a_foreign_mount_is_left_alone(mountpoint: Path) -> None:
    done = subprocess.run(["mount", "-t", "tmpfs", "none", mountpoint], check=False)
    if done.returncode:
        pytest.skip("tmpfs cannot be mounted")
    with pytest.raises(MountError, match="tmpfs"):
        mount(mountpoint)
    there = find_mount(mountpoint)
    assert there is not None
    assert there.filesystem == "tmpfs"


def test_what_cannot_be_a_mount_point(tmp_path: Path) -> None:
    with pytest.raises(MountError, match="no such directory"):
        mount(tmp_path / "none")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(MountError, match="no such directory"):
        mount(tmp_path / "file")
    with pytest.raises(MountError, match="mount failed"):
        mount_direct(tmp_path / "file")
    with pytest.raises(MountError, match="mount option"):
        mount_fusermount(tmp_path, "a,allow_root")
    assert not unmount(tmp_path)


SERVE = """
import os, subprocess, sys, threading
from layerstore.fuse import *
how, root = sys.argv[1:]
fd = {"direct": mount_direct, "fusermount": mount_fusermount, "auto": mount}[how](root)
class Ops(Operations):
    def getattr(self, request, nodeid):
        return attr_reply(Attr(nodeid, 0o40755 if nodeid == 1 else 0o100644, size=5 * (nodeid - 1)))
    def lookup(self, request, parent, name):
        return entry_reply(2, Attr(2, 0o100644, size=5)) if name == b"f" else negative_entry()
    def read(self, request, nodeid, offset, size):
        return b"hello"[offset:]
assert not os.get_inheritable(fd)
session = Session(fd, Ops())
session.handshake()
thread = threading.Thread(target=session.run, daemon=True)
thread.start()
try:
    print(subprocess.run(["cat", root + "/f"], capture_output=True, text=True, timeout=10).stdout)
    print(find_mount(root).filesystem)
finally:
    unmount(root)
    thread.join(5)
    os.close(fd)
"""


def _serve(prefix: list[str], how: str, root: Path, **options: Any) -> list[str]:
    source = str(Path(layerstore.__file__).parent.parent)
    done = subprocess.run(
        [*prefix, sys.executable, "-c", SERVE, how, str(root)],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        **options,
    )
    return done.stdout.split() if done.returncode == 0 else [done.stderr]


def test_mounting_through_fusermount3(mountpoint: Path) -> None:
    assert _serve([], "fusermount", mountpoint) == ["hello", "fuse.layerstore"]
    assert find_mount(mountpoint) is None


def test_fusermount3_is_used_where_mounting_is_not_permitted(
    mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, *_: Any, **__: Any) -> int:
        raise MountError("mount failed", subject=path) from PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(sys.modules[mount.__module__], "mount_direct", refuse)
    fd = mount(mountpoint)
    try:
        there = find_mount(mountpoint)
        assert there is not None
        assert there.filesystem == "fuse.layerstore"
        assert not os.get_inheritable(fd)
    finally:
        unmount(mountpoint)
        os.close(fd)


def test_other_refusals_are_not_retried(mountpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, *_: Any, **__: Any) -> int:
        raise MountError("mount failed", subject=path) from OSError(errno.ENOMEM, "no")

    monkeypatch.setattr(sys.modules[mount.__module__], "mount_direct", refuse)
    with pytest.raises(MountError, match="mount failed"):
        mount(mountpoint)


@pytest.mark.parametrize("how", ["direct", "auto"])
def test_mounting_inside_a_user_namespace(mountpoint: Path, how: str) -> None:
    unshare = ["unshare", "-Urm"]
    if subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("no user namespaces here")
    assert _serve(unshare, how, mountpoint) == ["hello", "fuse.layerstore"]


def test_a_failing_helper_says_why(mountpoint: Path) -> None:
    with pytest.raises(MountError, match=r"fusermount3 failed: .*No such file"):
        mount_fusermount(mountpoint / "none")
