"""Comparing file trees: equal copies agree, and every kind of change is named."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.trees import Tree, compare, main, snapshot

HERE = Path(__file__).resolve()
MTIME_NS = 1_700_000_000_123_456_789

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make devices and owners")


def build(root: Path) -> Path:
    root.mkdir()
    (root / "dir" / "deep").mkdir(parents=True)
    (root / "dir" / "file").write_bytes(b"content" * 1000)
    (root / "dir" / "file").chmod(0o4755)
    os.link(root / "dir" / "file", root / "dir" / "deep" / "second")
    (root / "alone").write_bytes(b"content" * 1000)
    (root / "link").symlink_to("dir/nowhere")
    os.mkfifo(root / "fifo")
    (Path(os.fsdecode(os.fsencode(root) + b"/odd-\xff\xfe\n"))).write_bytes(b"x")
    for path in [*sorted(root.rglob("*"), reverse=True), root]:
        os.utime(path, ns=(MTIME_NS, MTIME_NS), follow_symlinks=False)
    return root


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return build(tmp_path / "a"), build(tmp_path / "b")


def differences(pair: tuple[Path, Path]) -> list[str]:
    return compare(snapshot(pair[0]), snapshot(pair[1]))


def touch_up(path: Path) -> None:
    os.utime(path, ns=(MTIME_NS, MTIME_NS), follow_symlinks=False)


def test_equal_trees_have_no_differences(pair: tuple[Path, Path]) -> None:
    assert differences(pair) == []
    assert b"odd-\xff\xfe\n" in snapshot(pair[0])


def add(root: Path) -> None:
    (root / "dir" / "new").write_bytes(b"")
    touch_up(root / "dir")


def remove(root: Path) -> None:
    (root / "fifo").unlink()
    touch_up(root)


def become_directory(root: Path) -> None:
    (root / "fifo").unlink()
    (root / "fifo").mkdir()
    touch_up(root)


def edit(root: Path) -> None:
    (root / "alone").write_bytes(b"kontent" * 1000)
    touch_up(root / "alone")


def grow(root: Path) -> None:
    with (root / "alone").open("ab") as file:
        file.write(b"!")
    touch_up(root / "alone")


def retarget(root: Path) -> None:
    (root / "link").unlink()
    (root / "link").symlink_to("dir/nowherE")
    touch_up(root / "link")
    touch_up(root)


def unlink_peer(root: Path) -> None:
    (root / "dir" / "deep" / "second").unlink()
    (root / "dir" / "deep" / "second").write_bytes(b"content" * 1000)
    (root / "dir" / "deep" / "second").chmod(0o4755)
    touch_up(root / "dir" / "deep" / "second")
    touch_up(root / "dir" / "deep")


def set_user_xattr(root: Path) -> None:
    os.setxattr(root / "alone", "user.note", b"\0\xff")


def nudge_directory(root: Path) -> None:
    os.utime(root / "dir", ns=(MTIME_NS, MTIME_NS + 1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (add, ["dir/new: only in the second tree"]),
        (remove, ["fifo: only in the first tree"]),
        (become_directory, ["fifo: type fifo became directory"]),
        (lambda root: (root / "alone").chmod(0o600), ["alone: mode 0644 became 0600"]),
        (lambda root: root.chmod(0o700), [".: mode 0755 became 0700"]),
        (retarget, ["link: target dir/nowhere became dir/nowherE"]),
        (set_user_xattr, ["alone: xattr user.note was added"]),
        (
            nudge_directory,
            [f"dir: mtime {MTIME_NS} ns became {MTIME_NS + 1} ns"],
        ),
    ],
)
def test_one_change_is_the_one_difference(
    pair: tuple[Path, Path], change: Callable[[Path], None], said: list[str]
) -> None:
    change(pair[1])
    found = differences(pair)
    assert [each for each in found if "fifo: mtime" not in each] == said


def test_content_of_equal_size_is_read(pair: tuple[Path, Path]) -> None:
    edit(pair[1])
    (found,) = differences(pair)
    assert found.startswith("alone: content ")
    assert compare(snapshot(pair[0], contents=False), snapshot(pair[1], contents=False)) == []


def test_size_and_content_both_count(pair: tuple[Path, Path]) -> None:
    grow(pair[1])
    assert [each.split()[1] for each in differences(pair)] == ["size", "content"]


def test_a_broken_hard_link_shows_on_both_names(pair: tuple[Path, Path]) -> None:
    unlink_peer(pair[1])
    assert differences(pair) == [
        "dir/deep/second: link count 2 became 1",
        "dir/deep/second: hard links b'dir/deep/second, dir/file' became b'dir/deep/second'",
        "dir/file: link count 2 became 1",
        "dir/file: hard links b'dir/deep/second, dir/file' became b'dir/file'",
    ]


def test_hard_links_grouped_otherwise_differ_at_equal_counts(tmp_path: Path) -> None:
    trees: list[Tree] = []
    for name, pairs in (("a", (("w", "x"), ("y", "z"))), ("b", (("w", "y"), ("x", "z")))):
        root = tmp_path / name
        root.mkdir()
        for first, second in pairs:
            (root / first).write_bytes(b"same")
            os.link(root / first, root / second)
            touch_up(root / first)
        touch_up(root)
        trees.append(snapshot(root))
    assert len(compare(*trees)) == 4


def test_xattr_values_are_compared(pair: tuple[Path, Path]) -> None:
    for root, value in zip(pair, (b"\0one", b"\0two"), strict=True):
        os.setxattr(root / "dir", "user.note", value)
    assert differences(pair) == ["dir: xattr user.note 006f6e65 became 0074776f"]
    ignoring = compare(snapshot(pair[0]), snapshot(pair[1]), ignore_xattrs=(b"user.no",))
    assert ignoring == []


@root_only
def test_owner_device_and_capability_differ(pair: tuple[Path, Path]) -> None:
    for root, number in zip(pair, (5, 6), strict=True):
        os.mknod(root / "node", 0o20600, os.makedev(1, number))
        touch_up(root / "node")
        touch_up(root)
    os.chown(pair[1] / "link", 7, 8, follow_symlinks=False)
    os.setxattr(
        pair[1] / "alone", "security.capability", bytes.fromhex("0000000200200000" + "00" * 12)
    )
    assert differences(pair) == [
        "alone: xattr security.capability was added",
        "link: owner 0:0 became 7:8",
        "node: device 0x105 became 0x106",
    ]


def test_format_files_are_ignored_in_the_root_only(pair: tuple[Path, Path]) -> None:
    for directory in (pair[1], pair[1] / "dir"):
        (directory / ".no.prefetch.landmark").write_bytes(b"\x0f")
        touch_up(directory)
    assert differences(pair) == ["dir/.no.prefetch.landmark: only in the second tree"]


def test_mtimes_can_count_by_seconds_or_not_at_all(pair: tuple[Path, Path]) -> None:
    os.utime(pair[1] / "alone", ns=(MTIME_NS, MTIME_NS + 1000))
    os.utime(pair[1] / "dir", ns=(MTIME_NS, MTIME_NS + 10**9))
    first, second = snapshot(pair[0]), snapshot(pair[1])
    assert len(compare(first, second)) == 2
    assert [each.split(":")[0] for each in compare(first, second, seconds=True)] == ["dir"]
    assert compare(first, second, seconds=True, any_mtime={b"dir"}) == []


def test_sockets_and_paths_beyond_path_max_are_read(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "s"))
    descriptor = os.open(root, os.O_RDONLY)
    for _ in range(20):
        os.mkdir(b"n" * 255, dir_fd=descriptor)
        below = os.open(b"n" * 255, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(descriptor)
    tree = snapshot(root)
    assert tree[b"s"].kind == "socket"
    assert b"/".join([b"n" * 255] * 20) in tree


def test_command_line_reports_and_sets_the_exit_code(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(root) for root in pair]
    assert main(arguments) == 0
    remove(pair[1])
    assert main(arguments) == 1
    assert "fifo: only in the first tree" in capsys.readouterr().out
    assert main([*arguments, "--ignore", "fifo"]) == 0
    done = subprocess.run(
        [sys.executable, "-m", "lab.trees", *arguments],
        cwd=HERE.parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "9 and 8 names, 1 differences")
