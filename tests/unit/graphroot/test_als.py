"""The client of additional layer stores, against plain directories and stores that misbehave."""

from __future__ import annotations

import base64
import errno
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.waiting import until
from layerstore import limits
from layerstore.errors import StorageError
from layerstore.graphroot.als import (
    AlsLayer,
    LayerStores,
    StoreFiles,
    open_blob,
    release_path,
    use_path,
)
from layerstore.graphroot.alsinfo import LayerFacts, parse_info
from layerstore.graphroot.storageconf import LayerStoreSpec
from layerstore.image import Digest, Reference

REFERENCE = Reference.parse("registry.example/app:1")
TOC = Digest.of(b"toc")
BLOB = Digest.of(b"blob")
DIFF = Digest.of(b"diff")
T_INFO = {
    "compressed-size": 4,
    "diff-size": -1,
    "compression": 2,
    "toc-digest": TOC,
    "flags": {"expected-layer-diffid": DIFF},
}
L_INFO = {"compressed-size": 4, "diff-digest": DIFF, "diff-size": 2048, "compression": 2}


class Counting(StoreFiles):
    """Answers signals as a counting store does, and keeps the counts."""

    def __init__(self) -> None:
        self.uses: Counter[Path] = Counter()
        self.calls: list[tuple[str, Path]] = []

    def use(self, layer: Path) -> None:
        self.calls.append(("use", layer))
        self.uses[layer] += 1

    def release(self, layer: Path) -> None:
        self.calls.append(("release", layer))
        self.uses[layer] -= 1


def put(store: Path, digest: Digest, info: Any, *, reference: Reference | None = REFERENCE) -> Path:
    """A layer of a store; ``info`` may be bytes."""
    path = store
    if reference is not None:
        path /= base64.b64encode(str(reference).encode()).decode()
    path /= digest
    (path / "diff").mkdir(parents=True)
    (path / "diff/file").write_text("content")
    (path / "info").write_bytes(info if isinstance(info, bytes) else json.dumps(info).encode())
    (path / "blob").write_bytes(b"blob")
    return path


def stores(
    *paths: Path, files: StoreFiles | None = None, seconds: float = 20.0, reference: bool = True
) -> LayerStores:
    specs = [LayerStoreSpec(path, reference) for path in paths]
    return LayerStores(specs, lookup_seconds=seconds, files=files)


def reasons(of: LayerStores) -> list[str]:
    return [miss.reason for miss in of.misses]


# -- finding -----------------------------------------------------------------------


def test_a_layer_is_found_by_its_toc(tmp_path: Path) -> None:
    path = put(tmp_path, TOC, T_INFO)
    found = stores(tmp_path).find_by_toc(REFERENCE, TOC)
    assert found is not None
    assert (found.path, found.dialect) == (path, "T")
    assert found.facts == LayerFacts(
        compressed_size=4, diff_size=-1, compression=2, toc_digest=TOC, expected_diff_id=DIFF
    )


def test_a_layer_is_found_by_its_blob(tmp_path: Path) -> None:
    path = put(tmp_path, BLOB, L_INFO | {"compressed-diff-digest": BLOB})
    found = stores(tmp_path).find_by_blob(REFERENCE, BLOB)
    assert found is not None
    assert (found.path, found.dialect) == (path, "L")
    assert found.facts == LayerFacts(
        compressed_diff_digest=BLOB,
        compressed_size=4,
        diff_digest=DIFF,
        diff_size=2048,
        compression=2,
    )


def test_a_store_without_reference_level_is_asked_without_one(tmp_path: Path) -> None:
    put(tmp_path, TOC, T_INFO, reference=None)
    plain = stores(tmp_path, reference=False)
    assert plain.find_by_toc(REFERENCE, TOC) is not None
    assert plain.find_by_toc(None, TOC) is not None
    assert stores(tmp_path).find_by_toc(REFERENCE, TOC) is None


def test_a_store_with_reference_level_is_passed_over_without_a_reference(tmp_path: Path) -> None:
    put(tmp_path, TOC, T_INFO)
    of = stores(tmp_path)
    assert of.find_by_toc(None, TOC) is None
    assert of.misses == ()


def test_a_miss_in_one_store_asks_the_next(tmp_path: Path) -> None:
    path = put(tmp_path / "third", TOC, T_INFO)
    put(tmp_path / "second", TOC, b"{")
    (tmp_path / "first").mkdir()
    of = stores(*(tmp_path / name for name in ("missing", "first", "second", "third")))
    found = of.find_by_toc(REFERENCE, TOC)
    assert found is not None
    assert found.path == path
    assert reasons(of)[:2] == ["not there", "not there"]
    assert "info cannot be used" in reasons(of)[2]


def test_the_first_store_that_has_the_layer_gives_it(tmp_path: Path) -> None:
    first = put(tmp_path / "first", TOC, T_INFO)
    put(tmp_path / "second", TOC, T_INFO)
    found = stores(tmp_path / "first", tmp_path / "second").find_by_toc(REFERENCE, TOC)
    assert found is not None
    assert found.path == first


@pytest.mark.parametrize("lost", ["info", "blob"])
def test_a_layer_without_all_parts_is_none(tmp_path: Path, lost: str) -> None:
    (put(tmp_path, TOC, T_INFO) / lost).unlink()
    files = Counting()
    of = stores(tmp_path, files=files)
    assert of.find_by_toc(REFERENCE, TOC) is None
    assert reasons(of) == ["not there"]
    assert files.calls == []


def test_a_diff_that_is_no_directory_is_none(tmp_path: Path) -> None:
    path = put(tmp_path, TOC, T_INFO)
    (path / "diff").rename(path / "elsewhere")
    (path / "diff").write_text("")
    assert stores(tmp_path).find_by_toc(REFERENCE, TOC) is None


# -- believing ---------------------------------------------------------------------


def test_only_known_keys_of_info_are_taken(tmp_path: Path) -> None:
    injected = T_INFO | {
        "id": "f" * 64,
        "parent": "e" * 64,
        "names": ["docker.io/library/stolen:latest"],
        "metadata": "x",
        "mountlabel": "x",
        "uidmap": [{"container_id": 0, "host_id": 0, "size": 1}],
        "gidmap": 7,
        "uidset": [0],
        "gidset": "all",
        "big-data-names": ["key"],
        "flags": {"expected-layer-diffid": DIFF, "incomplete": True, "other": {"deep": []}},
    }
    put(tmp_path, TOC, injected)
    found = stores(tmp_path).find_by_toc(REFERENCE, TOC)
    assert found is not None
    assert found.facts == parse_info(json.dumps(T_INFO).encode())


def test_a_layer_found_by_its_toc_never_answers_for_a_blob_or_a_tar_stream(tmp_path: Path) -> None:
    """Else an attacker's TOC beside a popular blob digest would replace that blob everywhere."""
    put(tmp_path, TOC, T_INFO | {"compressed-diff-digest": BLOB, "diff-digest": DIFF})
    found = stores(tmp_path).find_by_toc(REFERENCE, TOC)
    assert found is not None
    assert found.facts.compressed_diff_digest is None
    assert found.facts.diff_digest is None


def test_a_layer_found_by_its_blob_never_answers_for_a_toc(tmp_path: Path) -> None:
    put(tmp_path, BLOB, L_INFO | {"toc-digest": TOC, "flags": {"expected-layer-diffid": DIFF}})
    found = stores(tmp_path).find_by_blob(REFERENCE, BLOB)
    assert found is not None
    assert (found.facts.toc_digest, found.facts.expected_diff_id) == (None, None)


@pytest.mark.parametrize("stated", [None, BLOB, "", "sha256:0"])
def test_another_toc_than_the_one_asked_for_is_a_miss(tmp_path: Path, stated: str | None) -> None:
    info = {key: value for key, value in T_INFO.items() if key != "toc-digest"}
    put(tmp_path, TOC, info if stated is None else info | {"toc-digest": stated})
    files = Counting()
    of = stores(tmp_path, files=files)
    assert of.find_by_toc(REFERENCE, TOC) is None
    assert len(of.misses) == 1
    assert set(files.uses.values()) == {0}


@pytest.mark.parametrize(
    "change",
    [
        {"compressed-diff-digest": TOC},
        {"diff-digest": None},
        {"diff-digest": ""},
        {"diff-size": -1},
        {"diff-size": 0},
    ],
)
def test_a_blob_without_true_and_complete_facts_is_a_miss(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    put(tmp_path, BLOB, L_INFO | change)
    files = Counting()
    of = stores(tmp_path, files=files)
    assert of.find_by_blob(REFERENCE, BLOB) is None
    assert len(of.misses) == 1
    assert set(files.uses.values()) == {0}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff{}",
        b'{"toc-digest": 5}',
        b'{"diff-size": "1"}',
        b'{"diff-size": 1.5}',
        b'{"diff-size": -2}',
        b'{"diff-size": 9223372036854775808}',
        b'{"compression": 5}',
        b'{"compression": true}',
        b'{"compressed-size": []}',
        b'{"compressed-diff-digest": "md5:0"}',
        b'{"diff-digest": ["sha256"]}',
        b'{"flags": []}',
        b'{"flags": {"expected-layer-diffid": 1}}',
        b'{"flags": {"expected-layer-diffid": "x"}}',
        b'{"x":' * 100_000,
        b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_broken_info_is_a_miss(tmp_path: Path, raw: bytes) -> None:
    put(tmp_path, TOC, raw)
    files = Counting()
    of = stores(tmp_path, files=files)
    assert of.find_by_toc(REFERENCE, TOC) is None
    assert "info cannot be used" in reasons(of)[0]
    assert set(files.uses.values()) == {0}
    with pytest.raises(StorageError):
        parse_info(raw)


def test_info_that_is_too_large_is_a_miss(tmp_path: Path) -> None:
    put(tmp_path, TOC, T_INFO | {"metadata": "x" * limits.LAYER_INFO_BYTES})
    of = stores(tmp_path)
    assert of.find_by_toc(REFERENCE, TOC) is None
    assert "more than" in reasons(of)[0]


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.dictionaries(
            st.sampled_from([*T_INFO, *L_INFO, "names"]), inner, max_size=4
        ),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode())
)
def test_info_is_read_or_refused(raw: bytes) -> None:
    try:
        facts = parse_info(raw)
    except StorageError:
        return
    assert facts.diff_size == -1 or facts.diff_size > 0
    assert facts.compressed_size >= 0


# -- counting ----------------------------------------------------------------------


def test_a_committed_layer_costs_two_uses_and_one_release(tmp_path: Path) -> None:
    path = put(tmp_path, TOC, T_INFO)
    files = Counting()
    of = stores(tmp_path, files=files)
    found = of.find_by_toc(REFERENCE, TOC)
    assert found is not None
    found.use()
    of.close()
    assert files.calls == [("use", path), ("use", path), ("release", path)]
    release_path(path, files=files)  # the record is deleted
    assert files.uses[path] == 0


def test_a_layer_that_is_not_committed_costs_one_use_and_one_release(tmp_path: Path) -> None:
    path = put(tmp_path, TOC, T_INFO)
    files = Counting()
    of = stores(tmp_path, files=files)
    assert of.find_by_toc(REFERENCE, TOC) is not None
    of.close()
    of.close()
    assert files.calls == [("use", path), ("release", path)]


def test_a_layer_is_released_once_whoever_does_it(tmp_path: Path) -> None:
    path = put(tmp_path, TOC, T_INFO)
    files = Counting()
    of = stores(tmp_path, files=files)
    found = of.find_by_toc(REFERENCE, TOC)
    assert found is not None
    threads = [threading.Thread(target=found.release) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    of.close()
    assert files.calls == [("use", path), ("release", path)]


def test_each_lookup_of_the_same_layer_is_released(tmp_path: Path) -> None:
    path = put(tmp_path, TOC, T_INFO)
    files = Counting()
    of = stores(tmp_path, files=files)
    found = [of.find_by_toc(REFERENCE, TOC) for _ in range(3)]
    assert all(found)
    assert files.uses[path] == 3
    of.close()
    assert files.uses[path] == 0


def test_a_plain_directory_gets_no_file_and_stays(tmp_path: Path) -> None:
    path = put(tmp_path, TOC, T_INFO)
    of = stores(tmp_path)
    found = of.find_by_toc(REFERENCE, TOC)
    assert found is not None
    found.use()
    of.close()
    release_path(path)
    assert sorted(os.listdir(path)) == ["blob", "diff", "info"]


def test_a_use_file_that_is_a_link_destroys_nothing(tmp_path: Path) -> None:
    path = put(tmp_path, TOC, T_INFO)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (path / "use").symlink_to(victim)
    assert stores(tmp_path).find_by_toc(REFERENCE, TOC) is not None
    assert victim.read_text() == "precious"


def test_signals_for_what_is_gone_are_no_error(tmp_path: Path) -> None:
    use_path(tmp_path / "gone")
    release_path(tmp_path / "gone")
    (tmp_path / "file").write_text("")
    release_path(tmp_path / "file")
    use_path(tmp_path / "file")


@pytest.mark.parametrize("number", [errno.ENOTCONN, errno.EIO, errno.EROFS])
def test_a_dead_store_is_a_miss(tmp_path: Path, number: int) -> None:
    class Dead(Counting):
        def check(self, layer: Path) -> None:
            raise OSError(number, os.strerror(number), str(layer))

    files = Dead()
    of = stores(tmp_path, files=files)
    assert of.find_by_toc(REFERENCE, TOC) is None
    assert reasons(of) == [os.strerror(number)]
    assert files.calls == []


def test_a_store_that_dies_behind_the_use_is_released(tmp_path: Path) -> None:
    class Dying(Counting):
        def info(self, layer: Path) -> bytes:
            raise OSError(errno.ENOTCONN, "gone", str(layer))

    path = put(tmp_path, TOC, T_INFO)
    files = Dying()
    assert stores(tmp_path, files=files).find_by_toc(REFERENCE, TOC) is None
    assert files.calls == [("use", path), ("release", path)]


# -- hanging -----------------------------------------------------------------------


class Hanging(Counting):
    """Stands still in one call until it is let go."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.go = threading.Event()
        self.entered = 0

    def _stand(self, where: str) -> None:
        if where == self.where:
            self.entered += 1
            self.go.wait(30)

    def check(self, layer: Path) -> None:
        self._stand("check")
        super().check(layer)

    def use(self, layer: Path) -> None:
        self._stand("use")
        super().use(layer)

    def info(self, layer: Path) -> bytes:
        self._stand("info")
        return super().info(layer)

    def release(self, layer: Path) -> None:
        self._stand("release")
        super().release(layer)


@pytest.fixture
def hanging(request: pytest.FixtureRequest) -> Iterator[Hanging]:
    files = Hanging(request.param)
    yield files
    files.go.set()


@pytest.mark.parametrize("hanging", ["check", "use", "info"], indirect=True)
def test_a_hanging_store_is_a_miss_and_given_back_what_it_counts_later(
    tmp_path: Path, hanging: Hanging
) -> None:
    path = put(tmp_path, TOC, T_INFO)
    of = stores(tmp_path, files=hanging, seconds=0.2)
    began = time.monotonic()
    assert of.find_by_toc(REFERENCE, TOC) is None
    assert of.find_by_toc(REFERENCE, TOC) is None  # it is not waited for twice
    assert time.monotonic() - began < 2
    assert hanging.entered == 1
    assert "no answer within" in reasons(of)[0]
    assert "before" in reasons(of)[1]
    of.close()
    hanging.go.set()
    until(lambda: hanging.calls == [("use", path), ("release", path)])


@pytest.mark.parametrize("hanging", ["check"], indirect=True)
def test_the_store_behind_a_hanging_one_is_asked(tmp_path: Path, hanging: Hanging) -> None:
    class Mixed(Counting):
        def check(self, layer: Path) -> None:
            if "first" in layer.parts:
                hanging.check(layer)
            super().check(layer)

    put(tmp_path / "first", TOC, T_INFO)
    second = put(tmp_path / "second", TOC, T_INFO)
    of = stores(tmp_path / "first", tmp_path / "second", files=Mixed(), seconds=0.2)
    found = of.find_by_toc(REFERENCE, TOC)
    assert found is not None
    assert found.path == second


@pytest.mark.parametrize("hanging", ["release"], indirect=True)
def test_a_hanging_release_holds_nobody_up(tmp_path: Path, hanging: Hanging) -> None:
    path = put(tmp_path, TOC, T_INFO)
    of = stores(tmp_path, files=hanging, seconds=0.2)
    assert all(of.find_by_toc(REFERENCE, TOC) for _ in range(4))
    began = time.monotonic()
    of.close()
    release_path(path, seconds=0.2, files=hanging)
    assert time.monotonic() - began < 2
    hanging.go.set()
    until(lambda: hanging.uses[path] == -1)  # four lookups, four releases and one more


def test_lookups_run_side_by_side(tmp_path: Path) -> None:
    barrier = threading.Barrier(4)

    class Together(Counting):
        def check(self, layer: Path) -> None:
            barrier.wait(10)
            super().check(layer)

    put(tmp_path, TOC, T_INFO)
    of = stores(tmp_path, files=Together())
    found: list[AlsLayer | None] = []
    threads = [
        threading.Thread(target=lambda: found.append(of.find_by_toc(REFERENCE, TOC)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(found)


# -- export ------------------------------------------------------------------------


def test_the_blob_is_read_between_use_and_release(tmp_path: Path) -> None:
    path = put(tmp_path, TOC, T_INFO)
    files = Counting()
    with open_blob(path, files=files) as (stream, facts):
        assert files.calls == [("use", path)]
        assert stream.read(2) + stream.read(100) == b"blob"
        assert facts.expected_diff_id == DIFF
    assert files.calls == [("use", path), ("release", path)]


def test_an_export_that_breaks_off_releases(tmp_path: Path) -> None:
    path = put(tmp_path, TOC, T_INFO)
    files = Counting()
    with pytest.raises(RuntimeError), open_blob(path, files=files):
        raise RuntimeError
    assert files.uses[path] == 0


@pytest.mark.parametrize("lost", ["info", "blob"])
def test_an_export_without_the_store_is_an_error(tmp_path: Path, lost: str) -> None:
    path = put(tmp_path, TOC, T_INFO)
    (path / lost).unlink()
    files = Counting()
    with pytest.raises(StorageError, match="layer store"), open_blob(path, files=files):
        pass
    assert files.uses[path] == 0


@pytest.mark.parametrize("hanging", ["info"], indirect=True)
def test_an_export_from_a_hanging_store_is_an_error(tmp_path: Path, hanging: Hanging) -> None:
    path = put(tmp_path, TOC, T_INFO)
    with (
        pytest.raises(StorageError, match="no answer within"),
        open_blob(path, seconds=0.2, files=hanging),
    ):
        pass
    hanging.go.set()
    until(lambda: hanging.calls == [("use", path), ("release", path)])


def test_no_stores_are_false() -> None:
    assert not stores()
    assert stores().find_by_toc(REFERENCE, TOC) is None
