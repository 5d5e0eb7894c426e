"""A hundred layers of five thousand files are known: a start needs no registry, and about no time."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.fresh import fresh
from lab.rig import layer_path
from lab.simimages import Publisher
from lab.simregistry import SimRegistry
from lab.store import LayerstoreService
from layerstore.formats.announced import Form
from layerstore.image import Digest
from layerstore.provider.dialect import Dialect
from layerstore.provider.state import State

LAYERS = int(os.environ.get("LAYERSTORE_START_LAYERS", "100"))
FILES = int(os.environ.get("LAYERSTORE_START_FILES", "5000"))
TRIES = 3
MORE_SECONDS = 1.0  # a start with all that may take so much longer than one with nothing


@pytest.fixture
def place() -> Iterator[Path]:
    path = fresh("layerstore-start-")
    yield path
    shutil.rmtree(path)


def make_service(place: Path, host: str) -> LayerstoreService:
    registries = place / "registries.conf"
    registries.write_text(f'[[registry]]\nlocation = "{host}"\ninsecure = true\n')
    config = f'[registry]\nregistries_conf = "{registries}"\n'
    return LayerstoreService(place / "service", config=config)


def multiply(root: Path, host: str, slot: int) -> list[tuple[str, str]]:
    """Many layers like the one in ``slot``, each of an image of its own; their paths' elements."""
    state = State(root / "state.sqlite")
    model = state.layer(slot)
    view = next(view for view in state.views() if view.slot == slot)
    assert model is not None
    names = []
    for number in range(LAYERS):
        blob, toc = (Digest(f"sha256:{kind}{number:063x}") for kind in "bc")
        record = state.add_layer(
            blob, toc, model.diff_id, size=model.size, toc_offset=model.toc_offset,
            form=Form.ESTARGZ, notes=model.notes,
        )  # fmt: skip
        reference = f"{host}/many/{number}:1"
        state.add_view(reference, toc, Dialect.TOC, record.slot, view.info)
        state.set_complete(record.slot)
        state.set_verified(record.slot, 1)
        directory = root / "layers" / str(record.slot)
        directory.mkdir()
        os.link(root / "layers" / str(slot) / "index", directory / "index")
        for name in ("blob", "blob.map"):  # its contents are those of the model
            shutil.copy2(root / "layers" / str(slot) / name, directory / name)
        names.append((reference, str(toc)))
    state.close()
    return names


def seconds_to_serve(service: LayerstoreService, paths: list[Path]) -> tuple[float, float, float]:
    """Seconds from the start of the process until it serves, the first stat, the first read."""
    began = time.monotonic()
    service.start()
    serving = time.monotonic() - began
    file = paths[0] / "diff/d7/f7"
    os.stat(file)
    stat = time.monotonic() - began
    assert file.read_bytes() == b"7 7\n"
    return serving, stat, time.monotonic() - began


def test_a_start_with_many_known_layers_takes_no_longer(place: Path) -> None:
    service = make_service(place, "127.0.0.1:1")
    with SimRegistry() as registry:
        host = registry.host
        service = make_service(place, host)
        files = {f"d{n % 50}/f{n}": b"%d %d\n" % (n % 50, n) for n in range(FILES)}
        image = Publisher(registry).push("model", "1", [files])
        with service:
            diff = layer_path(service.mountpoint, f"{host}/model:1", image.layers[0].toc_digest)
            assert (diff / "diff/d7/f7").read_bytes() == b"7 7\n"
            service.wait_complete()
            slot = service.status()["layers"][0]["slot"]
    few = [seconds_and_stop(service, [diff]) for _ in range(TRIES)]
    names = multiply(service.root, host, slot)
    paths = [layer_path(service.mountpoint, *name) for name in names]
    many = [seconds_and_stop(service, paths[number:]) for number in range(TRIES)]
    with service:
        for path in paths:  # no registry is there any more
            assert (path / "diff/d1/f1").read_bytes() == b"1 1\n"
            assert (path / "info").stat().st_size > 0
        assert len(list((paths[-1] / "diff/d3").iterdir())) == len(range(3, FILES, 50))
        status = service.status()
    assert sum(layer["complete"] for layer in status["layers"]) == LAYERS + 1
    assert status["registry"]["requests"] == 0
    for what, times in (("nothing else", few), (f"{LAYERS} layers, {LAYERS * FILES} files", many)):
        best = [min(column) for column in zip(*times, strict=True)]
        print(f"{what}: serves after %.2f s, first stat %.2f s, first read %.2f s" % tuple(best))
    assert min(each[2] for each in many) < min(each[2] for each in few) + MORE_SECONDS


def seconds_and_stop(service: LayerstoreService, paths: list[Path]) -> tuple[float, float, float]:
    found = seconds_to_serve(service, paths)
    service.stop()
    subprocess.run(["umount", "-l", str(service.mountpoint)], capture_output=True, check=False)
    return found
