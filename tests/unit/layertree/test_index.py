"""Reading: lookups in large directories, damage, threads, memory, the file itself."""

import base64
import gc
import io
import mmap
import os
import pickle
import random
import stat
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerstore.errors import InvalidLayer, StorageError
from layerstore.formats.toc import TocEntry
from layerstore.layertree import LayerIndex, build_index
from layerstore.layertree.layout import HEADER, VERSION

DIGEST = "sha256:" + "0" * 64


def many(count: int) -> Iterator[TocEntry]:
    for number in range(count):
        if number % 100 == 0:
            yield TocEntry(name=f"usr/lib/dir{number}/", type="dir", mode=0o755)
        else:
            name = f"usr/lib/dir{number // 100 * 100}/module_{number}.py"
            yield TocEntry(
                name=name, type="reg", size=10, offset=1000 + number, chunk_digest=DIGEST
            )


def write(entries: Any, path: Path) -> LayerIndex:
    build_index(entries, path, blob_size=1 << 30, toc_offset=1 << 29)
    return LayerIndex.open(path)


NAMES = st.binary(min_size=1, max_size=12).filter(lambda name: name not in (b".", b".."))


@settings(max_examples=100)
@given(
    st.sets(
        st.one_of(NAMES, NAMES.map(lambda name: b"python3-" + name)).map(
            lambda name: name.replace(b"/", b"_").replace(b"\0", b"_")
        ),
        max_size=40,
    )
)
def test_every_name_is_found_and_no_other(names: set[bytes]) -> None:
    names = {name for name in names if name not in (b".", b"..") and not name.startswith(b".wh.")}
    entries = [
        TocEntry(name="?", type="fifo", uid=number, name_raw=base64.b64encode(name).decode())
        for number, name in enumerate(names)
    ]
    out = io.BytesIO()
    build_index(entries, out, blob_size=10, toc_offset=10)
    index = LayerIndex.from_bytes(out.getvalue())
    assert [child.name for child in index.children(0)] == sorted(names)
    for number, name in enumerate(names):
        found = index.lookup(0, name)
        assert found is not None
        assert index.inode(found).uid == number
        for other in (name + b"x", name + b"\0", name[:-1], b"\0" + name):
            assert (index.lookup(0, other) is not None) == (other in names)


def test_children_by_slices(toc: Any) -> None:
    index = toc.build([toc.reg("b"), toc.dir("a", 0o700), toc.symlink("c", "x")])
    assert [(child.name, child.mode) for child in index.children(0)] == [
        (b"a", stat.S_IFDIR | 0o700),
        (b"b", stat.S_IFREG | 0o644),
        (b"c", stat.S_IFLNK | 0o777),
    ]
    assert [child.name for child in index.children(0, 1)] == [b"b", b"c"]
    assert [child.name for child in index.children(0, 1, 2)] == [b"b"]
    assert index.children(0, 3) == index.children(0, 2, 1) == index.children(0, 0, 0) == []
    assert [child.name for child in index.children(0, -1, 99)] == [b"a", b"b", b"c"]
    assert all(index.lookup(0, child.name) == child.entry for child in index.children(0))


def test_paths(toc: Any) -> None:
    index = toc.build([toc.reg("a/b/c")])
    entry = index.entry_of_path(b"a/b/c")
    assert entry is not None
    assert index.entry_of_path(b"/a//b/./c/") == entry
    assert index.entry_of_path(b"") == index.entry_of_path(b"/") == 0
    assert index.entry_of_path(b"a/x") is None
    assert index.entry_of_path(b"a/b/c/d") is None


def test_numbers_depend_on_the_toc_alone(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(many(3000), tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_sizes_of_the_blob_are_kept(toc: Any) -> None:
    index = toc.build([], 1000, 1051)
    assert (index.toc_offset, index.blob_size) == (1000, 1051)


# -- the file --------------------------------------------------------------------------


def test_any_damaged_byte_is_detected(toc: Any) -> None:
    out = io.BytesIO()
    build_index([toc.reg("a", b"a"), toc.reg("b/c")], out, blob_size=2000, toc_offset=2000)
    whole = out.getvalue()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        with pytest.raises(StorageError):
            LayerIndex.from_bytes(bytes(damaged))
    for length in (0, 1, HEADER.size, len(whole) - 1):
        with pytest.raises(StorageError):
            LayerIndex.from_bytes(whole[:length])
    with pytest.raises(StorageError):
        LayerIndex.from_bytes(whole + b"\0")


def test_damage_on_disk_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "index"
    write(many(200), path).close()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match="damaged") as caught:
        LayerIndex.open(path)
    assert caught.value.subject == str(path)
    path.write_bytes(b"")
    with pytest.raises(StorageError):
        LayerIndex.open(path)
    with pytest.raises(StorageError):
        LayerIndex.open(tmp_path / "missing")


def test_a_file_that_the_disk_does_not_give_is_not_mapped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process that touches a mapped page which cannot be read is ended by the kernel."""
    mapped: list[object] = []
    monkeypatch.setattr(mmap, "mmap", lambda *_, **__: mapped.append(1))
    with pytest.raises(StorageError):
        LayerIndex.open("/proc/self/mem")  # reading its first page gives EIO
    assert mapped == []


def test_another_version_is_refused() -> None:
    out = io.BytesIO()
    build_index([], out, blob_size=0, toc_offset=0)
    data = bytearray(out.getvalue())
    data[8:12] = (VERSION + 1).to_bytes(4, "little")
    with pytest.raises(StorageError, match="version"):
        LayerIndex.from_bytes(bytes(data))


def test_a_refused_toc_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidLayer):
        write([TocEntry(name="..", type="dir")], tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        write([], tmp_path / "missing" / "index")
    (tmp_path / "index").mkdir()
    with pytest.raises(StorageError):
        write([], tmp_path / "index")
    assert os.listdir(tmp_path) == ["index"]


def test_a_stream_may_have_something_before(toc: Any) -> None:
    out = io.BytesIO()
    out.write(b"before")
    build_index([toc.reg("a")], out, blob_size=1, toc_offset=1)
    assert LayerIndex.from_bytes(out.getvalue()[6:]).lookup(0, b"a") == 1


# -- life ------------------------------------------------------------------------------


def test_after_close(tmp_path: Path) -> None:
    with write(many(200), tmp_path / "index") as index:
        assert index.inode(0)
    index.close()
    for call in (index.inode, index.children, index.content, index.chunk, index.member):
        with pytest.raises(IndexError):
            call(0)
    with pytest.raises(IndexError):
        index.lookup(0, b"usr")
    del index
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_it_outlives_its_name(tmp_path: Path) -> None:
    index = write(many(200), tmp_path / "index")
    (tmp_path / "index").unlink()
    assert index.entry_of_path(b"usr/lib/dir100/module_101.py") is not None


def test_it_is_not_pickled(toc: Any) -> None:
    with pytest.raises(TypeError):
        pickle.dumps(toc.build([]))


def test_threads(tmp_path: Path) -> None:
    index = write(many(5000), tmp_path / "index")
    expected = list(index.walk())
    wrong: list[object] = []

    def read(seed: int) -> None:
        sample = random.Random(seed).sample(expected, 800)
        for path, entry in sample:
            if index.entry_of_path(path) != entry:
                wrong.append(path)
        if list(index.walk()) != expected:
            wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_hundred_thousand_entries_leave_no_objects(tmp_path: Path) -> None:
    count = 100_000
    path = tmp_path / "index"
    build_index(many(count), path, blob_size=1 << 30, toc_offset=1 << 29)
    gc.collect()
    tracemalloc.start()
    try:
        index = LayerIndex.open(path)
        sample = [index.inode(entry).size for entry in range(0, index.entries, 7)]
        assert len(sample) > count // 8
        for number in range(0, count, 50):
            directory = index.entry_of_path(b"usr/lib/dir%d" % (number // 100 * 100))
            assert directory is not None
            assert index.children(directory, 3, 5)
        del sample, directory
        gc.collect()
        alive, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert index.entries == count + 3
    assert alive < 100_000, f"{alive} bytes are alive for {count} entries"


def test_building_needs_memory_in_proportion_only(tmp_path: Path) -> None:
    count = 20_000
    tracemalloc.start()
    try:
        build_index(many(count), tmp_path / "index", blob_size=1 << 30, toc_offset=1 << 29)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak / count < 400
