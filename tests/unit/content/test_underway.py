"""Objects that are being written: nobody takes the half for the whole, or for damage."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerstore.content import ObjectStore, files, objects
from layerstore.errors import StorageError

DATA = os.urandom(5000)
DIGEST = hashlib.sha256(DATA).digest()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ObjectStore]:
    opened = ObjectStore(tmp_path / "content")
    opened.ledger.sync()  # from here on there are stamps
    yield opened
    opened.close()


class Halfway:
    """A writer of ``DATA`` that stops in the middle until it is let go on."""

    def __init__(self, store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self._half, self._go_on = threading.Event(), threading.Event()
        self._real = files.write_all
        monkeypatch.setattr(objects, "write_all", self._write)
        self._thread = threading.Thread(target=store.put, args=(DIGEST, DATA))
        self._thread.start()
        assert self._half.wait(10)

    def _write(self, fd: int, data: bytes, offset: int) -> None:
        self._real(fd, data[:2000], offset)
        self._half.set()
        assert self._go_on.wait(10)
        self._real(fd, data[2000:], 2000)

    def finish(self) -> None:
        self._go_on.set()
        self._thread.join()


def test_the_half_is_not_there_for_anybody(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = Halfway(store, monkeypatch)
    assert os.path.getsize(store.path(DIGEST)) == 2000
    assert not store.has(DIGEST)
    assert store.open(DIGEST) is None
    assert store.open(DIGEST, wait=False) is None
    assert store.intact(DIGEST)
    assert not store.put(DIGEST, DATA)  # somebody is at it
    writer.finish()
    assert store.has(DIGEST)
    opened = store.open(DIGEST, wait=False)
    assert opened is not None
    assert opened.read(0, 9000) == DATA
    assert "damaged" not in caplog.text


def test_what_the_check_read_too_early_is_read_again(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Halfway(store, monkeypatch)
    real = objects._sha256
    found: list[bytes] = []

    def late(fd: int) -> bytes:
        found.append(real(fd))
        writer.finish()
        return found[-1]

    monkeypatch.setattr(objects, "_sha256", late)
    assert store.intact(DIGEST)
    assert found[0] != found[1] == DIGEST
    assert store.ledger.trusts(store.path(DIGEST))


def test_a_disk_that_fails_leaves_no_half(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int, data: bytes, offset: int) -> None:
        os.pwrite(fd, data[:10], offset)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(objects, "write_all", fail)
    with pytest.raises(StorageError):
        store.put(DIGEST, DATA)
    assert not os.path.exists(store.path(DIGEST))


KILLED = """
import os, signal, sys
from pathlib import Path
from layerstore.content import ObjectStore, objects

store = ObjectStore(Path(sys.argv[1]))
store.put(bytes.fromhex(sys.argv[2]), b"whole")

def half(fd, data, offset):
    os.pwrite(fd, data[:3], offset)
    os.kill(os.getpid(), signal.SIGKILL)

objects.write_all = half
store.put(bytes.fromhex(sys.argv[3]), b"another")
"""


def test_the_next_process_removes_the_half_and_keeps_the_whole(tmp_path: Path) -> None:
    whole, half = (hashlib.sha256(data).digest() for data in (b"whole", b"another"))
    root = tmp_path / "content"
    command = [sys.executable, "-c", KILLED, str(root), whole.hex(), half.hex()]
    ended = subprocess.run(command, check=False)
    assert ended.returncode == -9
    path = root / "objects" / half.hex()[:2] / half.hex()[2:]
    assert path.read_bytes() == b"ano"
    store = ObjectStore(root)
    assert not path.exists()
    assert not store.has(half)
    found = store.open(whole)
    assert found is not None
    assert found.read(0, 10) == b"whole"
    store.close()
    assert ObjectStore(root)._underway.left == frozenset()
