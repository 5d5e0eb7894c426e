import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from layerstore import limits
from layerstore.errors import CorruptStorage, StorageError
from layerstore.graphroot import atomic
from layerstore.graphroot.records import ContainerRecord, ImageRecord, LayerRecord
from layerstore.graphroot.table import Table

TIME = "2024-05-06T07:08:09Z"


def layer(id_: str, **fields) -> LayerRecord:
    return LayerRecord(id_, created=TIME, **fields)


@pytest.fixture
def table(tmp_path: Path) -> Table[LayerRecord]:
    return Table(tmp_path, "layers", LayerRecord)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "layers.json"


def save(table: Table[LayerRecord], *records: LayerRecord, **options) -> None:
    with table.lock.writing():
        table.load()
        table.save(records, **options)


def test_an_empty_store_has_no_files(table: Table[LayerRecord], path: Path) -> None:
    assert table.snapshot() == ()
    assert not path.exists()


@pytest.mark.parametrize("data", [b"", b"[]", b"null"])
def test_an_empty_store_has_empty_files(table: Table[LayerRecord], path: Path, data: bytes) -> None:
    path.write_bytes(data)
    assert table.snapshot() == ()


def test_what_is_saved_is_loaded(table: Table[LayerRecord], path: Path, tmp_path: Path) -> None:
    save(table, layer("a", names=("<n>",)), layer("b", volatile=True), layer("c"))
    assert path.read_bytes() == (
        b'[{"id":"a","names":["\\u003cn\\u003e"],"created":"2024-05-06T07:08:09Z"},'
        b'{"id":"c","created":"2024-05-06T07:08:09Z"}]'
    )
    assert json.loads((tmp_path / "volatile-layers.json").read_bytes())[0]["id"] == "b"
    for file in ("layers.json", "volatile-layers.json"):
        assert (tmp_path / file).stat().st_mode & 0o7777 == 0o600
    other = Table(tmp_path, "layers", LayerRecord)
    expected = (layer("a", names=("<n>",)), layer("c"), layer("b", volatile=True))
    assert other.snapshot() == table.snapshot() == expected
    assert sorted(os.listdir(tmp_path)) == ["layers.json", "layers.lock", "volatile-layers.json"]


def test_an_empty_store_that_is_saved_has_a_file(table: Table[LayerRecord], path: Path) -> None:
    save(table)
    assert path.read_bytes() == b"[]"
    assert not path.with_name("volatile-layers.json").exists()


def test_images_have_no_volatile_twin(tmp_path: Path) -> None:
    table = Table(tmp_path, "images", ImageRecord)
    assert [path.name for path in table.paths] == ["images.json"]
    with table.lock.writing():
        table.load()
        table.save([ImageRecord("i", created=TIME)])
    assert sorted(os.listdir(tmp_path)) == ["images.json", "images.lock"]


def test_the_volatile_twin_may_be_elsewhere(tmp_path: Path) -> None:
    place = tmp_path / "run/overlay-containers"
    table = Table(tmp_path, "containers", ContainerRecord, volatile_directory=place)
    with table.lock.writing():
        table.load()
        table.save([ContainerRecord("x", created=TIME, volatile=True)])
    assert (place / "volatile-containers.json").exists()
    assert table.snapshot()[0].volatile


def test_a_load_is_repeated_only_after_a_change(
    table: Table[LayerRecord], path: Path, tmp_path: Path
) -> None:
    save(table, layer("a"))
    first = table.snapshot()
    assert table.snapshot() is first
    other = Table(tmp_path, "layers", LayerRecord)
    save(other, layer("b"))
    assert table.snapshot() == (layer("b"),)
    # a token alone
    second = table.snapshot()
    with table.lock.writing():
        table.lock.renew()
    assert table.snapshot() is not second
    # and a file alone, as somebody's editor leaves it
    path.with_name("new").write_bytes(b'[{"id":"d","created":"2024-05-06T07:08:09Z"}]')
    path.with_name("new").rename(path)
    assert table.snapshot() == (layer("d"),)
    path.unlink()
    assert table.snapshot() == ()


def test_only_files_that_change_are_written(table: Table[LayerRecord], path: Path) -> None:
    twin = path.with_name("volatile-layers.json")
    save(table, layer("a"), layer("b", volatile=True))
    stable, volatile = path.stat().st_ino, twin.stat().st_ino
    save(table, layer("a"), layer("c", volatile=True))
    assert path.stat().st_ino == stable
    assert twin.stat().st_ino != volatile
    volatile = twin.stat().st_ino
    save(table, layer("d"), layer("c", volatile=True))
    assert path.stat().st_ino != stable
    assert twin.stat().st_ino == volatile
    save(table, layer("d"), layer("e", volatile=True), volatile_too=False)
    assert twin.stat().st_ino == volatile
    assert [record.id for record in table.snapshot()] == ["d", "c"]


def test_the_token_comes_before_the_file(
    table: Table[LayerRecord], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []
    write = atomic.write_file

    def spy(*arguments, **options):
        seen.append(path.with_name("layers.lock").read_bytes())
        return write(*arguments, **options)

    monkeypatch.setattr(atomic, "write_file", spy)
    save(table, layer("a"))
    assert seen == [path.with_name("layers.lock").read_bytes()]
    assert len(seen[0]) == 64


def test_only_the_stable_file_waits_for_the_disk(
    table: Table[LayerRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    save(table, layer("a", volatile=True), volatile_too=True)
    assert not any("volatile" in name for name in synced)
    assert any(Path(name).name.startswith(".tmp-layers.json") for name in synced)
    assert str(tmp_path) in synced
    synced.clear()
    save(table, layer("b", volatile=True))
    assert synced == []


@pytest.mark.parametrize(
    "data",
    [
        b"[",
        b"{}",
        b"7",
        b"[7]",
        b'[{"id":"x","names":5}]',
        b'[{"created":"2024-05-06T07:08:09Z"}]',
        b"\x00" * 100,
        b'[{"id":"\xff"}]',
    ],
)
def test_a_damaged_file_is_told_and_left_alone(
    table: Table[LayerRecord], path: Path, data: bytes
) -> None:
    save(table, layer("a"))
    path.write_bytes(data)
    with pytest.raises(CorruptStorage, match=r"layers\.json"):
        table.snapshot()
    with table.lock.writing(), pytest.raises(StorageError):
        table.save([layer("b")])
    assert path.read_bytes() == data


def test_a_file_that_is_too_large(
    table: Table[LayerRecord], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "RECORDS_BYTES", 100)
    path.write_bytes(b" " * 101)
    with pytest.raises(StorageError, match="larger than 100"):
        table.snapshot()


def test_nothing_is_saved_over_what_was_not_loaded(
    table: Table[LayerRecord], path: Path, tmp_path: Path
) -> None:
    save(Table(tmp_path, "layers", LayerRecord), layer("a"))
    with table.lock.writing(), pytest.raises(StorageError, match="changed"):
        table.save([])
    assert table.snapshot() == (layer("a"),)
    save(Table(tmp_path, "layers", LayerRecord), layer("b"))
    with table.lock.writing(), pytest.raises(StorageError, match="changed"):
        table.save([layer("c")])
    assert b'"b"' in path.read_bytes()


def test_the_lock_must_be_held(table: Table[LayerRecord]) -> None:
    with pytest.raises(RuntimeError):
        table.load()
    with table.lock.reading():
        table.load()
        with pytest.raises(RuntimeError):
            table.save([])


def test_a_failed_write_leaves_the_old_file(
    table: Table[LayerRecord], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(table, layer("a"))
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for call in ("fsync", "rename", "write"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(StorageError, match="No space"):
                save(table, layer("b"))
        assert path.read_bytes() == before
        assert sorted(os.listdir(path.parent)) == ["layers.json", "layers.lock"]
        assert table.snapshot() == (layer("a"),)
    save(table, layer("b"))
    assert table.snapshot() == (layer("b"),)


def test_leftovers_of_dead_writers_are_swept(table: Table[LayerRecord], tmp_path: Path) -> None:
    (tmp_path / ".tmp-layers.json123456").write_bytes(b"half")
    (tmp_path / ".tmp-volatile-layers.json7").write_bytes(b"half")
    (tmp_path / ".tmp-mine").write_bytes(b"not ours")
    save(table, layer("a"))
    assert sorted(os.listdir(tmp_path)) == [".tmp-mine", "layers.json", "layers.lock"]


def test_a_name_belongs_to_the_last_record_that_has_it(
    table: Table[LayerRecord], path: Path
) -> None:
    records = (layer("a", names=("n", "m")), layer("b", names=("n",)), layer("c"))
    save(table, *records)
    assert [record.names for record in table.snapshot()] == [("m",), ("n",), ()]
    with table.lock.writing():
        assert table.load_as_written() == records
        table.save(table.load())
    assert [item.get("names") for item in json.loads(path.read_bytes())] == [["m"], ["n"], None]


def test_unknown_keys_survive_a_change(table: Table[LayerRecord], path: Path) -> None:
    path.write_bytes(b'[{"id":"a","created":"2024-05-06T07:08:09Z","new":{"k":1}}]')
    with table.lock.writing():
        (record,) = table.load()
        table.save([replace(record, names=("n",))])
    assert path.read_bytes() == (
        b'[{"id":"a","names":["n"],"created":"2024-05-06T07:08:09Z","new":{"k":1}}]'
    )


def test_a_read_only_table(table: Table[LayerRecord], tmp_path: Path) -> None:
    save(table, layer("a"))
    reader = Table(tmp_path / "gone", "layers", LayerRecord, read_only=True)
    assert reader.snapshot() == ()
    assert not (tmp_path / "gone").exists()
    reader = Table(tmp_path, "layers", LayerRecord, read_only=True)
    assert reader.snapshot() == (layer("a"),)
    with table.lock.writing(), pytest.raises(StorageError, match="read-only"):
        reader.save([])


def test_threads_that_add_records_lose_none(table: Table[LayerRecord], tmp_path: Path) -> None:
    def work(number: int) -> None:
        mine = Table(tmp_path, "layers", LayerRecord) if number % 2 else table
        for step in range(10):
            with mine.lock.writing():
                mine.save([*mine.load(), layer(f"{number}-{step}")])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({record.id for record in table.snapshot()}) == 40


def test_readers_never_see_half_a_change(table: Table[LayerRecord]) -> None:
    save(table, layer("a"), layer("b"))
    stop = threading.Event()
    wrong: list[object] = []

    def read() -> None:
        while not stop.is_set():
            found = tuple(record.metadata for record in table.snapshot())
            if len(set(found)) != 1 or len(found) != 2:
                wrong.append(found)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for thread in readers:
        thread.start()
    for number in range(20):
        save(table, layer("a", metadata=str(number)), layer("b", metadata=str(number)))
    stop.set()
    for thread in readers:
        thread.join()
    assert wrong == []
