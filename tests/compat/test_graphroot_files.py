"""The files of a graph root, read and written by us and by Podman in turn."""

import http.client
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lab import images, tars
from lab.podman import PodmanEnv, unmount_below
from layerstore.errors import StorageError
from layerstore.graphroot import bigdata
from layerstore.graphroot.lockfile import LockFile
from layerstore.graphroot.records import ContainerRecord, ImageRecord, LayerRecord, dump_records
from layerstore.graphroot.storageconf import StorageConfig
from layerstore.graphroot.table import Table

NAME = "localhost/files:1"


@pytest.fixture
def env(podman_env: PodmanEnv) -> PodmanEnv:
    """An environment that has the small image."""
    source = images.small_image().source
    podman_env.skopeo("copy", "--quiet", source, f"containers-storage:{NAME}")
    return podman_env


def layers(env: PodmanEnv) -> Table[LayerRecord]:
    return Table(env.graph_root / "overlay-layers", "layers", LayerRecord)


def image_table(env: PodmanEnv) -> Table[ImageRecord]:
    return Table(env.graph_root / "overlay-images", "images", ImageRecord)


def containers(env: PodmanEnv) -> Table[ContainerRecord]:
    return Table(env.graph_root / "overlay-containers", "containers", ContainerRecord)


def test_what_podman_wrote_we_write_again(env: PodmanEnv) -> None:
    env.podman("tag", NAME, "localhost/files:2")
    kept = env.podman("create", "--name", "kept", NAME).stdout.strip()
    env.podman("create", "--rm", "--name", "volatile", NAME)
    env.podman("commit", "--quiet", "kept", "localhost/files:committed")
    top = image_table(env).snapshot()[0].layer
    env.containers_storage("set-metadata", "--metadata", "<a> & 'b' \"c\" é \u2028 \t \\", top)
    tables: list[Any] = [layers(env), image_table(env), containers(env)]
    for table in tables:
        before = {path: path.read_bytes() for path in table.paths if path.exists()}
        with table.lock.writing():
            records = table.load()
            assert records
            assert all(record.extra == {} for record in records)
            for path, data in before.items():
                volatile = path.name.startswith("volatile-")
                mine = [x for x in records if getattr(x, "volatile", False) is volatile]
                assert dump_records(mine) == data
            table.save([replace(record, names=()) for record in records])
            table.load()
            table.save(records)
        assert {path: path.read_bytes() for path in before} == before
    volatile = {record.names[0] for record in containers(env).snapshot() if record.volatile}
    assert volatile == ({"volatile"} if env.flavour == "debian13" else set())
    assert env.podman("inspect", "--format={{.Id}}", "kept").stdout.strip() == kept
    shown = json.loads(env.containers_storage("layer", "--json", top).stdout)
    assert "é \u2028" in json.dumps(shown, ensure_ascii=False)


def test_the_big_data_of_an_image(env: PodmanEnv) -> None:
    (record,) = image_table(env).snapshot()
    place = env.graph_root / "overlay-images" / record.id
    assert {bigdata.key_of(name) for name in os.listdir(place)} == set(record.big_data_names)
    for key in record.big_data_names:
        data = bigdata.read(place, key)
        assert len(data) == record.big_data_sizes[key]
        assert bigdata.digest_of(key, data) == record.big_data_digests[key]
    assert record.digest in record.digests
    # and one of ours, read by them
    table = image_table(env)
    with table.lock.writing():
        (record,) = table.load()
        for key in ("layerstore.test", "Layerstore-Test", "layerstore-Test:", "layerstoreX"):
            bigdata.write(place, key, key.encode())
            record = bigdata.BigData.of(record).with_item(key, key.encode()).put_into(record)
        table.save([record])
    for key in ("layerstore.test", "Layerstore-Test", "layerstore-Test:", "layerstoreX"):
        shown = env.containers_storage("get-image-data", record.id, key).stdout
        assert shown.strip() == key
        digest = env.containers_storage("get-image-data-digest", record.id, key).stdout
        assert digest.strip() == record.big_data_digests[key]
    # theirs of the same names stands in the same files
    for key in ("Other-Key", "otherX"):
        (file := env.directory / "data").write_text("theirs")
        env.containers_storage("set-image-data", "--file", file, record.id, key)
        assert bigdata.read(place, key) == b"theirs"
    env.podman("inspect", NAME)


def test_we_notice_what_they_change(env: PodmanEnv) -> None:
    table = image_table(env)
    first = table.snapshot()
    assert first[0].names == (NAME,)
    assert table.snapshot() is first
    env.podman("tag", NAME, "localhost/files:new")
    assert set(table.snapshot()[0].names) == {NAME, "localhost/files:new"}
    boxes = containers(env)
    assert boxes.snapshot() == ()
    stack = layers(env).snapshot()
    env.podman("create", "--rm", "--name", "box", NAME)
    assert [record.names for record in boxes.snapshot()] == [("box",)]
    assert len(layers(env).snapshot()) == len(stack) + 1
    env.podman("rm", "box")
    assert boxes.snapshot() == ()


@contextmanager
def service(env: PodmanEnv) -> Iterator[Path]:
    """A Podman that keeps running; its socket."""
    path = env.run_root / "podman.sock"
    command = [*env.command("podman"), "system", "service", "--time=0", f"unix://{path}"]
    with subprocess.Popen(
        command, env=env.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            end = time.monotonic() + 30
            while not path.exists():
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.05)
            yield path
        finally:
            process.terminate()


def ask(path: Path, question: str) -> Any:
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(60)
    connection.sock.connect(str(path))
    try:
        connection.request("GET", question)
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


def test_a_running_podman_notices_what_we_change(env: PodmanEnv) -> None:
    question = "/v4.0.0/libpod/images/json"
    table = image_table(env)
    with service(env) as path:
        assert [image["Names"] for image in ask(path, question)] == [[NAME]]
        for number in range(3):
            names = (f"localhost/ours:{number}", NAME)
            with table.lock.writing():
                (record,) = table.load()
                table.save([replace(record, names=names, names_history=names)])
            (image,) = ask(path, question)
            assert sorted(image["Names"]) == sorted(names)
        # Readers read together; a tool that starts does not, it opens the tables for writing.
        with table.lock.reading():
            assert len(ask(path, question)) == 1
        # and the other way round, with what it holds in memory
        env.podman("untag", NAME, "localhost/ours:2")
        assert [image["Names"] for image in ask(path, question)] == [[NAME]]
        assert table.snapshot()[0].names == (NAME,)


def test_they_wait_for_our_lock(env: PodmanEnv) -> None:
    for name in ("layers", "images", "containers"):
        lock = LockFile.at(env.graph_root / f"overlay-{name}/{name}.lock")
        with lock.writing():
            process = subprocess.Popen(
                [*env.command("containers-storage"), name],
                env=env.environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1.5)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors


def test_we_wait_for_their_lock(env: PodmanEnv) -> None:
    """An archive that arrives slowly keeps the layers locked."""
    (record, *_) = layers(env).snapshot()
    env.containers_storage("create-layer", "--id", "slow", record.id)
    pipe = env.directory / "pipe"
    os.mkfifo(pipe)
    archive = images.tar_bytes([tars.regular(b"big", b"x" * 100_000)])
    process = subprocess.Popen(
        [*env.command("containers-storage"), "apply-diff", "--file", str(pipe), "slow"],
        env=env.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    lock = layers(env).lock
    got = threading.Event()

    def read() -> None:
        with lock.reading():
            got.set()

    with pipe.open("wb") as stream:
        stream.write(archive[:80_000])
        stream.flush()
        end = time.monotonic() + 20
        taken = True
        while taken and time.monotonic() < end:
            with lock.try_writing() as taken:
                pass
            time.sleep(0.05)
        assert not taken
        reader = threading.Thread(target=read)
        reader.start()
        assert not got.wait(0.5)
        stream.write(archive[80_000:])
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert got.wait(30)
    reader.join()
    assert layers(env).snapshot()[-1].id == "slow"
    assert layers(env).snapshot()[-1].diff_digest is not None


def test_a_store_on_a_read_only_file_system(env: PodmanEnv) -> None:
    there = env.directory / "shared"
    there.mkdir()
    place = there / "overlay-images"
    try:
        subprocess.run(["mount", "--bind", env.graph_root, there], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", there], check=True)
        table = Table(place, "images", ImageRecord, read_only=True)
        assert [record.names for record in table.snapshot()] == [(NAME,)]
        with pytest.raises(StorageError, match="read-only"), table.lock.writing():
            pass
        # without a lock file there is nobody to wait for
        (env.graph_root / "overlay-images/images.lock").unlink()
        assert [record.names for record in table.snapshot()] == [(NAME,)]
        assert not (place / "images.lock").exists()
        writer = Table(place, "images", ImageRecord)
        with pytest.raises(StorageError, match="Read-only"):
            writer.snapshot()
    finally:
        unmount_below(there)


def test_the_configuration_is_theirs(make_podman_env: Any, flavour: Any, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    env = make_podman_env(
        flavour,
        additional_layer_store=store,
        storage_extra='[storage.options.overlay]\nmountopt = "nodev"\n',
    )
    info = json.loads(env.podman("info", "--format=json").stdout)["store"]
    config = StorageConfig.from_system(env=env.environment())
    config.check()
    assert str(config.graph_root) == info["graphRoot"]
    assert str(config.run_root) == info["runRoot"]
    assert config.driver == info["graphDriverName"]
    assert config.files == (Path(info["configFile"]),)
    assert ",".join(config.mount_options) == info["graphOptions"]["overlay.mountopt"]
    shown = str(info["graphOptions"])
    assert [f"{spec}" for spec in config.additional_layer_stores] == [f"{store}:ref"]
    assert f"{store}:ref" in shown
