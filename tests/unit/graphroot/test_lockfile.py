import errno
import fcntl
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from layerstore import limits
from layerstore.errors import StorageError
from layerstore.graphroot.lockfile import LockFile, writing_both

# Another process: what it does is in argv[2], and it says when it holds the lock.
OTHER = """
import fcntl, os, sys
path, kind = sys.argv[1:]
descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
flag = fcntl.LOCK_EX if "write" in kind else fcntl.LOCK_SH
try:
    fcntl.lockf(descriptor, flag | (fcntl.LOCK_NB if "try" in kind else 0))
except BlockingIOError:
    print("taken", flush=True)
else:
    print("held", flush=True)
    if "try" not in kind:
        sys.stdin.read()
"""


class Other:
    """A foreign process that locks the file as containers/storage does."""

    def __init__(self, path: Path, kind: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OTHER, path, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.communicate()


def other_can(path: Path, kind: str) -> bool:
    other = Other(path, f"try-{kind}")
    try:
        return other.answer() == "held"
    finally:
        other.end()


def until_waiting(lock: LockFile, threads: int) -> None:
    end = time.monotonic() + 10
    while f"{threads} waiting" not in repr(lock):
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "layers.lock"


def test_there_is_one_for_each_file(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    lock = LockFile.at(tmp_path / "real/a.lock")
    assert LockFile.at(tmp_path / "link/a.lock") is lock
    assert LockFile.at(tmp_path / "real/../real/a.lock") is lock
    assert LockFile.at(tmp_path / "real/b.lock") is not lock


def test_other_processes_see_the_lock(path: Path) -> None:
    lock = LockFile.at(path)
    with lock.reading():
        assert other_can(path, "read")
        assert not other_can(path, "write")
    with lock.writing():
        assert not other_can(path, "read")
    assert other_can(path, "write")
    assert path.stat().st_mode & 0o777 == 0o644


def test_we_wait_for_other_processes(path: Path) -> None:
    lock = LockFile.at(path)
    other = Other(path, "write")
    assert other.answer() == "held"
    with lock.try_writing() as taken:
        assert not taken
    done = threading.Event()

    def wait() -> None:
        with lock.reading():
            done.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not done.wait(0.2)
    other.end()
    assert done.wait(10)
    thread.join()


def test_nested_locks_of_one_thread(path: Path) -> None:
    lock = LockFile.at(path)
    with lock.writing(), lock.writing(), lock.reading():
        assert lock.held_for_writing
    assert not lock.held
    with lock.reading(), lock.reading():
        assert lock.held
        assert not lock.held_for_writing
        with pytest.raises(RuntimeError, match="for reading"), lock.writing():
            pass
    with lock.writing():
        with lock.reading():
            pass
        assert not other_can(path, "read")
    assert other_can(path, "write")


def test_a_nested_reader_does_not_wait_for_a_waiting_writer(path: Path) -> None:
    lock = LockFile.at(path)

    def write() -> None:
        with lock.writing():
            pass

    writer = threading.Thread(target=write)
    with lock.reading():
        writer.start()
        until_waiting(lock, 1)
        with lock.reading():
            pass
    writer.join(10)
    assert not writer.is_alive()


def test_threads_exclude_each_other(path: Path) -> None:
    lock = LockFile.at(path)
    counter = [0]

    def work() -> None:
        for _ in range(30):
            with lock.writing():
                seen = counter[0]
                time.sleep(0)
                counter[0] = seen + 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter[0] == 180


def test_threads_get_the_lock_in_the_order_in_which_they_came(path: Path) -> None:
    lock = LockFile.at(path)
    order: list[str] = []

    def work(name: str, write: bool) -> None:
        with lock.writing() if write else lock.reading():
            order.append(name)

    threads = []
    with lock.writing():
        for number, write in enumerate((True, False, True, True)):
            thread = threading.Thread(target=work, args=(str(number), write))
            thread.start()
            threads.append(thread)
            until_waiting(lock, number + 1)
    for thread in threads:
        thread.join()
    assert order == ["0", "1", "2", "3"]


def test_readers_read_together(path: Path) -> None:
    lock = LockFile.at(path)
    both = threading.Barrier(2, timeout=10)

    def read() -> None:
        with lock.reading():
            both.wait()

    thread = threading.Thread(target=read)
    thread.start()
    with lock.reading():
        both.wait()
    thread.join()


def test_readers_that_keep_coming_let_other_processes_write(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "LOCK_SHARE_SECONDS", 0.02)
    lock = LockFile.at(path)
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            with lock.reading():
                time.sleep(0.005)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    other = Other(path, "write")
    try:
        assert other.answer() == "held"
    finally:
        stop.set()
        other.end()
        for thread in threads:
            thread.join()


def test_two_locks_are_never_waited_for_one_with_the_other_in_hand(tmp_path: Path) -> None:
    storage, layers = (tmp_path / name for name in ("storage.lock", "layers.lock"))
    got = threading.Event()

    def both() -> None:
        with writing_both(LockFile.at(storage), LockFile.at(layers)):
            assert not other_can(storage, "write")
            assert not other_can(layers, "write")
            got.set()

    first = Other(layers, "write")
    assert first.answer() == "held"
    thread = threading.Thread(target=both)
    thread.start()
    until_waiting(LockFile.at(layers), 1)
    # as Podman 4.3.1, which holds the layers' lock, and wants the other one now
    assert not got.is_set()
    second = Other(storage, "write")
    assert second.answer() == "held"
    first.end()
    until_waiting(LockFile.at(storage), 1)
    assert other_can(layers, "write")
    assert not got.is_set()
    second.end()
    thread.join(10)
    assert got.is_set()


def test_an_error_inside_gives_the_lock_back(path: Path) -> None:
    lock = LockFile.at(path)
    with pytest.raises(ZeroDivisionError), lock.writing():
        raise ZeroDivisionError
    assert other_can(path, "write")


def test_the_token(path: Path) -> None:
    lock = LockFile.at(path)
    with lock.reading():
        assert lock.token() == b""
        with pytest.raises(RuntimeError):
            lock.renew()
    before = time.time_ns()
    with lock.writing():
        lock.renew()
        first = lock.token()
        lock.renew()
        second = lock.token()
    assert path.read_bytes() == second
    assert len(first) == len(second) == 64
    assert first != second
    nanoseconds, counter, process = struct.unpack_from("<QQI", first)
    assert before <= nanoseconds <= time.time_ns()
    assert struct.unpack_from("<Q", second, 8)[0] == counter + 1
    assert process == os.getpid()
    with pytest.raises(RuntimeError):
        lock.token()


def test_the_lock_belongs_to_the_thread_that_took_it(path: Path) -> None:
    lock = LockFile.at(path)
    found: list[bool] = []
    with lock.writing():
        thread = threading.Thread(target=lambda: found.append(lock.held))
        thread.start()
        thread.join()
        assert lock.held
    assert found == [False]


def test_missing_directories_are_made(tmp_path: Path) -> None:
    lock = LockFile.at(tmp_path / "overlay-layers/layers.lock")
    with lock.writing():
        pass
    assert (tmp_path / "overlay-layers").stat().st_mode & 0o777 == 0o700


def test_a_read_only_lock_cannot_write(path: Path) -> None:
    path.touch()
    lock = LockFile.at(path, read_only=True)
    with pytest.raises(StorageError, match="read-only"), lock.writing():
        pass
    with lock.reading():
        assert not other_can(path, "write")
    # until somebody in this process needs to
    assert LockFile.at(path) is lock
    with lock.writing():
        lock.renew()


def test_a_read_only_lock_need_not_exist(tmp_path: Path) -> None:
    lock = LockFile.at(tmp_path / "gone/layers.lock", read_only=True)
    with lock.reading():
        assert lock.token() == b""
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("number", ["EROFS", "EACCES"])
def test_a_read_only_lock_need_not_be_writable(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(getattr(errno, number), "no")

    monkeypatch.setattr(os, "open", refuse)
    with LockFile.at(path, read_only=True).reading():
        pass
    other = LockFile(path.with_name("other"))
    with pytest.raises(StorageError, match="opened"), other.reading():
        pass


def test_a_read_only_file_system_without_locks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    path.write_bytes(b"x" * 64)
    monkeypatch.setattr(fcntl, "lockf", refuse)
    descriptors = len(os.listdir("/proc/self/fd"))
    with LockFile.at(path, read_only=True).reading():
        pass
    with pytest.raises(StorageError, match="locked"), LockFile(path).reading():
        pass
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_supposed_deadlock_is_waited_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [OSError(errno.EDEADLK, "deadlock"), OSError(errno.EDEADLK, "deadlock"), None]

    def lockf(*_: object) -> None:
        answer = answers.pop(0)
        if answer is not None:
            raise answer

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with LockFile.at(path).writing():
        assert answers == []


def test_a_file_that_was_replaced_while_we_waited(path: Path) -> None:
    lock = LockFile.at(path)
    other = Other(path, "write")
    assert other.answer() == "held"
    inodes: list[int] = []

    def wait() -> None:
        with lock.writing():
            lock.renew()
            inodes.append(path.stat().st_ino)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    path.unlink()
    path.touch()
    other.end()
    thread.join()
    assert path.stat().st_ino == inodes[0]
    assert len(path.read_bytes()) == 64


def in_child(work: Callable[[], bool]) -> bool:
    child = os.fork()
    if child == 0:
        result = False
        try:
            result = work()
        finally:
            os._exit(0 if result else 1)
    return os.waitpid(child, 0)[1] == 0


def test_a_child_holds_nothing_and_takes_nothing_away(path: Path) -> None:
    lock = LockFile.at(path)
    with lock.writing():

        def child() -> bool:
            with lock.try_writing() as taken:
                return not taken and not lock.held and LockFile.at(path) is lock

        assert in_child(child)
        assert lock.held_for_writing
        assert not other_can(path, "read")

    def later_child() -> bool:
        with lock.writing():
            return lock.held_for_writing and not other_can(path, "read")

    assert in_child(later_child)
    assert other_can(path, "write")


def test_a_child_that_leaves_its_parents_block(path: Path) -> None:
    lock = LockFile.at(path)
    results = [False]
    child = -1
    try:
        with lock.reading():
            child = os.fork()
            if child == 0:
                with lock.reading():  # the child's own
                    results[0] = lock.held
        if child == 0:
            results[0] &= not lock.held
    finally:
        if child == 0:
            os._exit(0 if results[0] else 1)
    assert os.waitpid(child, 0)[1] == 0
