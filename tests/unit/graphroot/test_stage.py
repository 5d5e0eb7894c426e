"""One pass from blob to staged layer: what is computed, what is checked, what is left behind."""

import gzip
import hashlib
import io
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from isal import igzip

from lab import sparse, tars
from lab.images import noise, tar_bytes
from layerstore import limits
from layerstore.errors import (
    InvalidLayer,
    LimitExceeded,
    NetworkError,
    StorageError,
    VerificationError,
)
from layerstore.formats import Compression
from layerstore.formats.compression import Readable
from layerstore.formats.tarstream import BLOCK
from layerstore.graphroot.export import export_diff
from layerstore.graphroot.stage import stage_layer
from layerstore.graphroot.staged import StagedLayer
from layerstore.graphroot.whiteouts import WhiteoutStyle
from layerstore.image import Digest

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners take root")

TAR = tar_bytes(
    [
        tars.directory(b"./"),
        tars.directory(b"d/", uid=5, gid=6),
        tars.regular(b"d/small", b"small\n", uid=7),
        tars.regular(b"d/big", noise(3 * limits.STAGE_PIECE_BYTES + 17)),
        tars.whiteout(b"gone", uid=99),
        tars.hard_link(b"linked", b"d/small", uid=7),
        tars.symlink(b"link", b"d"),
        tars.regular(b"n" * 150, b"long name"),
    ]
)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    path = tmp_path / "staging"
    path.mkdir()
    return path


def run(place: Path, blob: bytes | Readable, **more: Any) -> StagedLayer:
    given: dict[str, Any] = {"blob_digest": None, "blob_size": None, "diff_id": None, **more}
    source = io.BytesIO(blob) if isinstance(blob, bytes) else blob
    return stage_layer(place, source, whiteouts=WhiteoutStyle.OVERLAY, **given)


@pytest.mark.parametrize(
    ("compression", "blob"),
    [
        (Compression.NONE, TAR),
        (Compression.GZIP, gzip.compress(TAR[:4000]) + igzip.compress(TAR[4000:])),
        (Compression.ZSTD, zstd.compress(TAR[:4000]) + zstd.compress(TAR[4000:])),
    ],
)
def test_a_layer_is_staged(place: Path, compression: Compression, blob: bytes) -> None:
    seen: list[int] = []
    staged = run(
        place,
        blob,
        blob_digest=Digest.of(blob),
        blob_size=len(blob),
        diff_id=Digest.of(TAR),
        progress=seen.append,
    )
    assert staged == StagedLayer(
        directory=place,
        diff_id=Digest.of(TAR),
        diff_size=len(TAR),
        blob_digest=Digest.of(blob),
        blob_size=len(blob),
        compression=compression,
        uids=(0, 5, 7),
        gids=(0, 6),
        root_entry=False,
    )
    assert sum(seen) == len(blob)
    assert (place / "diff/link/small").read_bytes() == b"small\n"
    assert sorted(path.name for path in place.iterdir()) == ["diff", "tar-split.gz"]
    assert (place / "tar-split.gz").stat().st_mode & 0o777 == 0o600
    assert b"".join(export_diff(place / "diff", (), place / "tar-split.gz")) == TAR


@pytest.mark.parametrize(
    "odd",
    [
        TAR + bytes(10240),  # padded to a record, as tar does
        TAR[: -2 * BLOCK],  # no end of archive
        TAR + b"what follows the end" * 1000,
        TAR.replace(b"small\n\0\0", b"small\n\x01\x02"),  # padding that is not zero
        bytes(2 * BLOCK),
        b"",
    ],
)
def test_odd_archives_come_back_too(place: Path, odd: bytes) -> None:
    staged = run(place, odd)
    assert (staged.diff_id, staged.diff_size) == (Digest.of(odd), len(odd))
    assert b"".join(export_diff(place / "diff", (), place / "tar-split.gz")) == odd


@pytest.mark.parametrize("version", sparse.VERSIONS)
def test_archives_with_sparse_files_come_back_too(
    tmp_path: Path, place: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerstore.graphroot.extract._PIECE", 3000)
    tar = sparse.sparse_tar(tmp_path, version)
    staged = run(place, gzip.compress(tar), diff_id=Digest.of(tar))
    assert staged.diff_size == len(tar)
    assert {name: (place / "diff" / name).read_bytes() for name in sparse.FILES} == sparse.FILES
    assert b"".join(export_diff(place / "diff", (), place / "tar-split.gz")) == tar


def test_sha512_is_checked_where_it_is_announced(place: Path) -> None:
    digest = Digest.parse(f"sha512:{hashlib.sha512(TAR).hexdigest()}")
    assert run(place, TAR, blob_digest=digest, diff_id=digest).blob_digest == digest


BLOB = gzip.compress(TAR, 1)
WRONG = Digest.of(b"something else")


@pytest.mark.parametrize(
    ("blob", "given", "error"),
    [
        (BLOB, {"blob_digest": WRONG}, VerificationError),
        (BLOB, {"blob_size": len(BLOB) - 1}, VerificationError),
        (BLOB, {"blob_size": len(BLOB) + 1}, VerificationError),
        (BLOB, {"diff_id": WRONG}, VerificationError),
        (BLOB[:-100], {}, InvalidLayer),
        (BLOB[:5000] + b"damage" + BLOB[5006:], {}, InvalidLayer),
        (gzip.compress(TAR[: len(TAR) // 2]), {}, InvalidLayer),
        (tar_bytes([tars.regular(b"a"), tars.regular(b"./a")]), {}, InvalidLayer),
        (tar_bytes([tars.regular(b"../a")]), {}, InvalidLayer),
        (b"x" * 4096, {}, InvalidLayer),
        (TAR + bytes(limits.TAR_TRAILER_BYTES + limits.MIB), {}, LimitExceeded),
    ],
)
def test_what_is_wrong_is_told_and_nothing_stays(
    place: Path, blob: bytes, given: dict[str, object], error: type[Exception]
) -> None:
    threads = threading.active_count()
    with pytest.raises(error):
        run(place, blob, **given)
    assert list(place.iterdir()) == []
    assert threading.active_count() == threads


class Failing:
    def __init__(self, head: bytes, error: Exception) -> None:
        self._head = io.BytesIO(head)
        self._error = error

    def read(self, n: int, /) -> bytes:
        data = self._head.read(n)
        if not data:
            raise self._error
        return data


def test_what_the_source_raises_comes_through(place: Path) -> None:
    with pytest.raises(NetworkError, match="reset"):
        run(place, Failing(BLOB[:200_000], NetworkError("connection reset")))
    assert list(place.iterdir()) == []


class Hanging:
    """Gives a hostile entry, then nothing until it is closed."""

    def __init__(self, head: bytes) -> None:
        self._head = io.BytesIO(head)
        self._closed = threading.Event()

    def read(self, n: int, /) -> bytes:
        data = self._head.read(n)
        if data:
            return data
        self._closed.wait(30)
        raise NetworkError("closed")

    def close(self) -> None:
        self._closed.set()


def test_a_refusal_does_not_wait_for_the_network(place: Path) -> None:
    hostile = tar_bytes([tars.regular(b"../a"), tars.regular(b"b", noise(2 << 20))])[:-1024]
    begun = time.monotonic()
    with pytest.raises(InvalidLayer):
        run(place, Hanging(hostile))
    assert time.monotonic() - begun < 10


class Endless:
    def read(self, n: int, /) -> bytes:
        return bytes(n)


def test_an_endless_blob_ends_at_its_announced_size(place: Path) -> None:
    with pytest.raises(VerificationError, match="larger"):
        run(place, Endless(), blob_size=10 << 20)


def test_an_endless_archive_ends_at_the_limit(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LimitExceeded):
        run(place, Endless())  # zeros: the end of the archive, and what follows it
    monkeypatch.setattr(limits, "LAYER_BYTES", 2 << 20)
    with pytest.raises(LimitExceeded):
        run(place, TAR)
    assert list(place.iterdir()) == []


def test_a_full_disk_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match="No space left"):
        run(place, BLOB)
    assert list(place.iterdir()) == []


def test_a_place_that_is_gone_is_told(place: Path) -> None:
    place.rmdir()
    with pytest.raises(StorageError):
        run(place, BLOB)


def test_an_interrupt_leaves_nothing(place: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(place, BLOB, progress=interrupt)
    assert list(place.iterdir()) == []


def test_a_layer_that_waits_for_its_source_holds_up_no_other(tmp_path: Path) -> None:
    """Those who make files take turns, but not while they wait."""

    class Waiting(io.BytesIO):
        asked, go_on = threading.Event(), threading.Event()

        def read(self, n: int | None = -1, /) -> bytes:
            if self.tell() >= 2048:
                self.asked.set()
                assert self.go_on.wait(20)
            return super().read(min(n or 512, 512))

    places = [tmp_path / "slow", tmp_path / "fast"]
    for path in places:
        path.mkdir()
    staged: list[StagedLayer] = []
    slow = Waiting(TAR)
    thread = threading.Thread(target=lambda: staged.append(run(places[0], slow)))
    thread.start()
    assert Waiting.asked.wait(20)
    fast = run(places[1], TAR)
    assert thread.is_alive()
    Waiting.go_on.set()
    thread.join()
    assert [layer.diff_id for layer in staged] == [fast.diff_id]
