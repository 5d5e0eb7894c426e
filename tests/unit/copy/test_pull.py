"""Pulls from a simulated registry into a graph root: what is fetched, kept, refused and found."""

from __future__ import annotations

import base64
import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lab.simimages import OCI_INDEX, OCI_MANIFEST, Image, Publisher
from lab.simregistry import SimRegistry
from lab.waiting import until
from layerstore.copy import pullplan, storage_destination
from layerstore.copy.docker import RegistryImage
from layerstore.copy.intostorage import IntoStorage, PullResult
from layerstore.copy.policy import Policy
from layerstore.copy.pull import PullOptions, When, pull
from layerstore.copy.reuse import How, layer_ids
from layerstore.copy.spool import DIRECTORY, Spool
from layerstore.copy.storage_destination import pull_into
from layerstore.errors import (
    InvalidLayer,
    InvalidManifest,
    LayerstoreError,
    LimitExceeded,
    NotFound,
    PolicyRejected,
    UnknownObject,
    UnsupportedFormat,
    VerificationError,
)
from layerstore.graphroot.identity import image_id, layer_id, released_image_id
from layerstore.graphroot.layers import Layer
from layerstore.graphroot.storageconf import LayerStoreSpec, StorageConfig
from layerstore.graphroot.store import Store
from layerstore.image import Digest, Platform, Reference, media_types
from layerstore.registry import RegistryClient, RegistrySettings
from layerstore.registry.registriesconf import RegistriesConf

AMD64 = Platform("linux", "amd64")
ACCEPTING = Policy.parse(b'{"default": [{"type": "insecureAcceptAnything"}]}')
SETTINGS = RegistrySettings(
    registries=RegistriesConf(), tls_verify=False, attempts=2, sleep=lambda _: None
)
FILES = [{"base": b"the base\n"}, {"middle": b"the middle\n"}, {"top": b"the top\n"}]


class Puller:
    """A registry, a graph root, a static layer store, and pulls between them."""

    def __init__(self, directory: Path, registry: SimRegistry) -> None:
        self.directory = directory
        self.registry = registry
        self.publisher = Publisher(registry)
        self.client = RegistryClient(SETTINGS)
        self.layer_store = directory / "als"
        self.layer_store.mkdir()
        self.config = StorageConfig(directory / "root", directory / "run")
        self.store = Store.open(self.config)

    def with_layer_store(self) -> None:
        spec = LayerStoreSpec(self.layer_store, with_reference=True)
        self.config = replace(self.config, additional_layer_stores=(spec,))
        self.store = Store.open(self.config)

    def name(self, name: str) -> str:
        return f"{self.registry.host}/{name}"

    def pull(self, name: str, **options: Any) -> PullResult:
        reference = Reference.parse(self.name(name))
        how = IntoStorage(**{"platform": AMD64, "toc_layers": True, **options})
        source = RegistryImage(self.client, reference)
        return pull_into(self.store, source, [str(reference)], how)

    def publish(self, name: str, files: Sequence[Any] = FILES, **options: Any) -> Image:
        repository, _, tag = name.partition(":")
        return self.publisher.push(repository, tag, files, **options)

    def blobs_asked(self, image: Image) -> list[str]:
        """The layers' blobs that were asked for, each as often as it was."""
        layers = {str(layer.digest) for layer in image.layers}
        asked = [
            entry.path.rpartition("/")[2] for entry in self.registry.requests("GET", "/blobs/")
        ]
        return [digest for digest in asked if digest in layers]

    def file(self, result: PullResult, number: int, name: str) -> bytes:
        return self.layer(result, number).diff_path.joinpath(name).read_bytes()

    def layer(self, result: PullResult, number: int) -> Layer:
        return self.store.layer(result.layers[number].layer_id)

    def serve_lazily(
        self,
        name: str,
        image: Image,
        number: int,
        *,
        content: dict[str, bytes] | None = None,
        info: dict[str, Any] | bytes | None = None,
        by: str = "toc",
    ) -> Path:
        """Put a layer of an image into the static layer store, as an honest one would."""
        written = image.layers[number]
        key = str(written.toc_digest if by == "toc" else written.digest)
        reference = base64.b64encode(self.name(name).encode()).decode()
        place = self.layer_store / reference / key
        (place / "diff").mkdir(parents=True)
        for path, data in (content if content is not None else FILES[number]).items():
            (place / "diff" / path).write_bytes(data)
        if info is None:
            info = {"toc-digest": key, "diff-size": -1, "compression": 2}
        raw = info if isinstance(info, bytes) else json.dumps(info).encode()
        (place / "info").write_bytes(raw)
        (place / "blob").write_bytes(image.blobs[number])
        return place

    def staged(self) -> list[Path]:
        return list((self.config.graph_root / "overlay/tempdirs").glob("temp-dir-*"))

    def partial(self) -> list[Path]:
        return sorted((self.config.graph_root / DIRECTORY).glob("*"))


@pytest.fixture
def registry() -> Iterator[SimRegistry]:
    with SimRegistry() as simulated:
        yield simulated


@pytest.fixture
def puller(tmp_path: Path, registry: SimRegistry) -> Iterator[Puller]:
    puller = Puller(tmp_path, registry)
    yield puller
    puller.client.close()


def how(result: PullResult) -> list[str]:
    return [layer.how.value for layer in result.layers]


def plain(manifest: dict[str, Any]) -> None:
    for layer in manifest["layers"]:
        del layer["annotations"]


# -- ordinary pulls ----------------------------------------------------------------------------


def test_an_image_comes_whole(puller: Puller) -> None:
    image = puller.publish("a/b:1")
    result = puller.pull("a/b:1")
    assert how(result) == ["pulled"] * 3
    assert result.image_id == image.manifest["config"]["digest"].removeprefix("sha256:")
    assert result.digest == result.manifest_digest == image.digest
    assert puller.file(result, 2, "top") == b"the top\n"
    stored = puller.store.image(puller.name("a/b:1"))
    assert stored.manifest() == json.dumps(image.manifest).encode()
    assert [layer.diff_id for layer in stored.layers()] == [one.diff_id for one in image.layers]
    parent = ""
    for outcome, written in zip(result.layers, image.layers, strict=True):
        record = puller.store.layer(outcome.layer_id).record
        assert record.id == layer_id(parent, diff_id=written.diff_id)
        assert (record.compressed_diff_digest, record.compressed_size) == (
            written.digest,
            written.size,
        )
        assert record.compression == 2
        parent = record.id
    assert puller.staged() == []
    assert puller.partial() == []


def test_a_second_pull_asks_for_no_layer(puller: Puller) -> None:
    image = puller.publish("a/b:1")
    first = puller.pull("a/b:1")
    asked = len(puller.blobs_asked(image))
    again = puller.pull("a/b:1")
    assert how(again) == ["shared"] * 3
    assert again.image_id == first.image_id
    assert len(puller.blobs_asked(image)) == asked


def test_layers_below_are_shared_between_images(puller: Puller) -> None:
    puller.publish("a/b:1")
    puller.pull("a/b:1")
    other = puller.publish("a/c:1", [*FILES[:2], {"else": b"x"}])
    result = puller.pull("a/c:1")
    assert how(result) == ["shared", "shared", "pulled"]
    assert puller.blobs_asked(other)[2:] == [str(other.layers[2].digest)]


def test_content_in_another_place_is_copied_and_not_fetched(puller: Puller) -> None:
    first = puller.publish("a/b:1")
    puller.pull("a/b:1")
    second = puller.publish("a/c:1", [FILES[1], FILES[2], FILES[0]])
    before = len(puller.blobs_asked(first))
    result = puller.pull("a/c:1")
    assert how(result) == ["local"] * 3
    assert len(puller.blobs_asked(second)) == before
    assert puller.file(result, 0, "middle") == b"the middle\n"
    record = puller.layer(result, 0).record
    assert record.id == first.layers[1].diff_id.removeprefix("sha256:")
    assert record.compressed_diff_digest == first.layers[1].digest


def test_a_damaged_layer_is_not_copied_but_fetched(puller: Puller) -> None:
    puller.publish("a/b:1")
    result = puller.pull("a/b:1")
    puller.layer(result, 1).diff_path.joinpath("middle").write_bytes(b"THE MIDDLE\n")
    puller.publish("a/c:1", [FILES[1]])
    assert puller.file(puller.pull("a/c:1"), 0, "middle") == b"the middle\n"


def test_a_layer_that_an_image_has_twice_is_fetched_once(puller: Puller) -> None:
    image = puller.publish("a/b:1", [FILES[0], FILES[1], FILES[0]])
    result = puller.pull("a/b:1")
    assert how(result) == ["pulled", "pulled", "local"]
    assert sorted(puller.blobs_asked(image)) == sorted(
        {str(layer.digest) for layer in image.layers}
    )
    assert puller.file(result, 2, "base") == b"the base\n"


def test_an_image_without_layers(puller: Puller) -> None:
    puller.publish("a/b:1", [])
    result = puller.pull("a/b:1")
    assert result.layers == ()
    assert puller.store.image(result.image_id).top_layer == ""


def test_names_move_to_what_was_pulled_last(puller: Puller) -> None:
    puller.publish("a/b:1")
    old = puller.pull("a/b:1")
    puller.publish("a/b:1", FILES[:1])
    new = puller.pull("a/b:1")
    assert puller.store.image(puller.name("a/b:1")).id == new.image_id
    assert puller.store.image(old.image_id).names == ()


def test_another_manifest_of_the_same_content_is_the_same_image(puller: Puller) -> None:
    puller.publish("a/b:1")
    first = puller.pull("a/b:1")
    other = puller.publish("a/b:2", change=plain)
    second = puller.pull("a/b:2")
    assert second.image_id == first.image_id
    image = puller.store.image(second.image_id)
    assert image.digest == other.digest
    assert set(image.names) == {puller.name("a/b:1"), puller.name("a/b:2")}


# -- indexes -------------------------------------------------------------------------------------


def test_an_image_for_another_platform_is_taken_with_a_warning(
    puller: Puller, caplog: pytest.LogCaptureFixture
) -> None:
    puller.publish("a/b:1")
    puller.pull("a/b:1")
    assert caplog.messages == []
    puller.pull("a/b:1", platform=Platform("linux", "arm64"))
    assert caplog.messages == [
        "image platform (linux/amd64) does not match the expected platform (linux/arm64)"
    ]


def test_an_index_leads_to_the_platform_and_is_kept(puller: Puller) -> None:
    images = [
        puller.publish(f"m/a:{arch}", [{"arch": arch.encode()}], architecture=arch)
        for arch in ("arm64", "amd64")
    ]
    puller.publisher.push_index("m/a", "1", images)
    index = puller.registry.manifests["m/a", "1"][0]
    result = puller.pull("m/a:1")
    assert puller.file(result, 0, "arch") == b"amd64"
    assert result.digest == Digest.of(index)
    assert result.manifest_digest == images[1].digest
    stored = puller.store.image(result.image_id)
    assert stored.index(Digest.of(index)) == index
    by_digest = puller.pull(f"m/a@{Digest.of(index)}")
    assert by_digest.image_id == result.image_id
    assert puller.store.image(puller.name(f"m/a@{Digest.of(index)}")).id == result.image_id
    arm = puller.pull("m/a:1", platform=Platform("linux", "arm64"))
    assert puller.file(arm, 0, "arch") == b"arm64"
    with pytest.raises(NotFound, match=r"no image for the platform linux/riscv64.*linux/amd64"):
        puller.pull("m/a:1", platform=Platform("linux", "riscv64"))


def test_an_index_must_be_the_one_that_the_digest_names(puller: Puller) -> None:
    images = [puller.publish("m/a:x", FILES[:1])]
    puller.publisher.push_index("m/a", "1", images)
    index = Digest.of(puller.registry.manifests["m/a", "1"][0])
    puller.registry.fault("other", f"manifests/{index}", data=b'{"schemaVersion":2}')
    with pytest.raises(VerificationError):
        puller.pull(f"m/a@{index}")


def test_indexes_inside_indexes_end_somewhere(puller: Puller) -> None:
    platform = {"os": "linux", "architecture": "amd64"}
    image = puller.publish("m/a:x", FILES[:1])
    below: tuple[str, str] = (image.digest, OCI_MANIFEST)
    for depth in range(1, 8):
        entry = {"digest": below[0], "mediaType": below[1], "size": 1, "platform": platform}
        raw = json.dumps(
            {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}
        ).encode()
        digest = puller.registry.add_manifest("m/a", raw, f"d{depth}", media_type=OCI_INDEX)
        below = (digest, OCI_INDEX)
    assert how(puller.pull("m/a:d2")) == ["pulled"]
    with pytest.raises(LimitExceeded, match="nested"):
        puller.pull("m/a:d7")


# -- what is refused ---------------------------------------------------------------------------


def test_schema_1_is_refused(puller: Puller) -> None:
    raw = json.dumps({"schemaVersion": 1, "name": "a/b", "tag": "1", "fsLayers": [], "history": []})
    puller.registry.add_manifest(
        "a/b",
        raw.encode(),
        "1",
        media_type="application/vnd.docker.distribution.manifest.v1+prettyjws",
    )
    with pytest.raises(InvalidManifest, match="schema"):
        puller.pull("a/b:1")


def _one_layer_less(manifest: dict[str, Any]) -> None:
    del manifest["layers"][0]


def _foreign(manifest: dict[str, Any]) -> None:
    manifest["layers"][1]["urls"] = ["https://elsewhere.example/layer"]


def _config_of_another_size(manifest: dict[str, Any]) -> None:
    manifest["config"]["size"] += 1


def _large_config(manifest: dict[str, Any]) -> None:
    manifest["config"]["size"] = 1 << 40


def _artifact(manifest: dict[str, Any]) -> None:
    manifest["config"]["mediaType"] = "application/vnd.cncf.helm.config.v1+json"


def _swapped(manifest: dict[str, Any]) -> None:
    manifest["layers"][:2] = manifest["layers"][1::-1]


def _huge_layer(manifest: dict[str, Any]) -> None:
    manifest["layers"][0]["size"] = (1 << 63) - 1


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (_one_layer_less, InvalidManifest, "2 layers, the config 3"),
        (_foreign, UnsupportedFormat, "foreign"),
        (_config_of_another_size, InvalidManifest, "bytes, not"),
        (_large_config, LimitExceeded, "config"),
        (_artifact, UnsupportedFormat, "not a container image"),
        (_swapped, VerificationError, "announces"),
        (_huge_layer, LayerstoreError, "bytes"),
    ],
)
def test_hostile_images_are_refused(
    puller: Puller,
    change: Callable[[dict[str, Any]], None],
    error: type[Exception],
    said: str,
) -> None:
    puller.publish("a/b:1", change=change)
    with pytest.raises(error, match=said):
        puller.pull("a/b:1")
    assert puller.store.images() == []
    assert puller.staged() == []


def test_a_config_that_is_none_is_refused(puller: Puller) -> None:
    bad = puller.registry.add_blob("a/b", b'{"rootfs": {"diff_ids": "many"}}')

    def change(manifest: dict[str, Any]) -> None:
        manifest["config"] |= {"digest": bad, "size": 32}

    puller.publish("a/b:1", change=change)
    with pytest.raises(InvalidManifest, match="not an image config"):
        puller.pull("a/b:1")


def test_a_config_that_would_break_podman_images_is_refused(puller: Puller) -> None:
    raw = b'{"created": "not a time"}'
    bad = puller.registry.add_blob("a/b", raw)

    def change(manifest: dict[str, Any]) -> None:
        manifest["config"] |= {"digest": bad, "size": len(raw)}

    puller.publish("a/b:1", change=change)
    with pytest.raises(InvalidManifest, match="not one that Podman reads: created"):
        puller.pull("a/b:1")
    assert puller.store.images() == []


def test_a_blob_that_is_another_is_refused_and_what_was_below_stays(puller: Puller) -> None:
    image = puller.publish("a/b:1")
    puller.registry.fault("flip", f"blobs/{image.layers[1].digest}", after=30)
    with pytest.raises((VerificationError, InvalidLayer)):
        puller.pull("a/b:1", parallel=1)
    assert puller.store.images() == []
    assert [layer.diff_id for layer in puller.store.layers()] == [image.layers[0].diff_id]
    assert puller.staged() == []
    assert puller.partial() == []
    puller.registry.faults.clear()
    assert how(puller.pull("a/b:1")) == ["shared", "pulled", "pulled"]


# -- interruptions ------------------------------------------------------------------------------

BIG = os.urandom(4 << 20)


def test_a_connection_that_breaks_is_taken_up(puller: Puller) -> None:
    image = puller.publish("a/b:1", [{"big": BIG}])
    puller.registry.fault("reset", "/blobs/sha256", after=2 << 20, times=1, skip=1)
    assert puller.file(puller.pull("a/b:1"), 0, "big") == BIG
    ranges = [
        entry.headers.get("range")
        for entry in puller.registry.requests("GET", str(image.layers[0].digest))
    ]
    assert ranges[0] is None
    assert ranges[1] is not None
    assert int(ranges[1].removeprefix("bytes=").rstrip("-")) > 1 << 20


def test_an_interrupted_pull_goes_on_where_it_stopped(puller: Puller) -> None:
    image = puller.publish("a/b:1", [FILES[0], {"big": BIG}])
    _break_after(puller, image, 2 << 20)
    (kept,) = puller.partial()
    size = kept.stat().st_size
    assert size >= 2 << 20
    assert kept.read_bytes() == image.blobs[1][:size]
    puller.registry.faults.clear()
    before = len(puller.registry.requests("GET", str(image.layers[1].digest)))
    result = puller.pull("a/b:1")
    assert how(result) == ["shared", "pulled"]
    assert puller.file(result, 1, "big") == BIG
    (asked,) = puller.registry.requests("GET", str(image.layers[1].digest))[before:]
    assert asked.headers["range"] == f"bytes={size}-"
    assert puller.partial() == []


def _break_after(puller: Puller, image: Image, count: int) -> None:
    """Let a pull fail for good when ``count`` bytes of the second layer have come."""
    digest = image.layers[1].digest
    puller.registry.fault("reset", f"blobs/{digest}", after=count, times=1)
    puller.registry.fault("status", f"blobs/{digest}", status=503)
    with pytest.raises(LayerstoreError):
        puller.pull("a/b:1")


def test_bytes_kept_that_are_wrong_cost_a_fetch_and_no_more(puller: Puller) -> None:
    image = puller.publish("a/b:1", [FILES[0], {"big": BIG}])
    _break_after(puller, image, 2 << 20)
    (kept,) = puller.partial()
    kept.write_bytes(bytes(kept.stat().st_size))
    puller.registry.faults.clear()
    assert puller.file(puller.pull("a/b:1"), 1, "big") == BIG
    assert puller.partial() == []


def test_a_layer_above_that_was_ready_is_not_fetched_again(puller: Puller) -> None:
    image = puller.publish("a/b:1", [{"big": BIG}, {"other": BIG[::-1]}])
    puller.registry.fault("latency", f"blobs/{image.layers[0].digest}", seconds=1.0)
    puller.registry.fault("status", f"blobs/{image.layers[0].digest}", status=403)
    with pytest.raises(LayerstoreError):
        puller.pull("a/b:1")
    assert [path.stat().st_size for path in puller.partial()] == [image.layers[1].size]
    puller.registry.faults.clear()
    before = len(puller.registry.requests("GET", str(image.layers[1].digest)))
    puller.pull("a/b:1")
    assert len(puller.registry.requests("GET", str(image.layers[1].digest))) == before


def test_what_a_pull_left_that_died_when_its_layer_was_in_place_goes(puller: Puller) -> None:
    image = puller.publish("a/b:1", [FILES[0], {"big": BIG}])
    puller.pull("a/b:1")
    kept = Spool(puller.config.graph_root).open(image.layers[1].digest, image.layers[1].size)
    assert kept is not None
    kept.append(b"x" * 100)
    puller.pull("a/b:1")
    assert len(puller.partial()) == 1  # somebody has it
    kept.close()
    puller.pull("a/b:1")
    assert puller.partial() == []


def test_what_was_kept_expires(puller: Puller) -> None:
    spool = Spool(puller.config.graph_root)
    old = Digest.of(b"old")
    kept = spool.open(old, 4 << 20)
    assert kept is not None
    kept.append(b"x" * 100)
    assert spool.open(old, 4 << 20) is None  # somebody has it
    spool.expire(seconds=-1)
    assert len(puller.partial()) == 1
    kept.close()
    spool.expire()
    assert len(puller.partial()) == 1
    spool.expire(seconds=-1)
    assert puller.partial() == []
    assert spool.open(old, 100) is None  # too small to be kept


def test_a_staging_directory_that_somebody_removes_is_made_anew(
    puller: Puller, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = puller.publish("a/b:1", [FILES[0], {"big": BIG}])
    put = Store.put_layer
    removed: list[bool] = []

    def removing(self: Store, *args: Any, **kwargs: Any) -> Layer:
        if not removed:
            removed.append(True)
            # the large layer has arrived, so only its tree is lost, at whatever point that is
            until(lambda: [p.stat().st_size for p in puller.partial()] == [image.layers[1].size])
            # and once only: what the pull makes anew meanwhile is not removed again
            gone = self.config.graph_root / "overlay/gone"
            (self.config.graph_root / "overlay/tempdirs").rename(gone)
            while gone.exists():
                shutil.rmtree(gone, ignore_errors=True)
        return put(self, *args, **kwargs)

    monkeypatch.setattr(Store, "put_layer", removing)
    result = puller.pull("a/b:1")
    assert puller.file(result, 1, "big") == BIG
    # what was kept of the large one spared another fetch
    assert puller.blobs_asked(image).count(str(image.layers[1].digest)) == 1
    assert puller.staged() == []


def test_layers_that_vanish_are_fetched_after_all(
    puller: Puller, monkeypatch: pytest.MonkeyPatch
) -> None:
    puller.publish("a/b:1")
    first = puller.pull("a/b:1")
    puller.publish("a/c:1", [*FILES, {"more": b"x"}])
    plan = pullplan.Planner.plan
    times: list[int] = []

    def racing(self: pullplan.Planner) -> list[pullplan.Plan]:
        found = plan(self)
        if not times:
            puller.store.remove_image(first.image_id, force=True)
        times.append(len(found))
        return found

    monkeypatch.setattr(pullplan.Planner, "plan", racing)
    result = puller.pull("a/c:1")
    assert how(result) == ["pulled"] * 4
    assert times == [4, 4]
    assert puller.file(result, 0, "base") == b"the base\n"


def _pull_in_process(root: str, run: str, name: str, barrier: Any, answers: Any) -> None:
    store = Store.open(StorageConfig(Path(root), Path(run)))
    reference = Reference.parse(name)
    barrier.wait()
    with RegistryClient(SETTINGS) as client:
        result = pull_into(store, RegistryImage(client, reference), [str(reference)])
    answers.put(result.image_id)


def test_several_processes_pull_the_same_image_at_once(puller: Puller) -> None:
    puller.publish("a/b:1", [*FILES, {"big": BIG}])
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(3), context.Queue()
    arguments = (
        *(str(puller.config.graph_root), str(puller.config.run_root)),
        *(puller.name("a/b:1"), barrier, answers),
    )
    processes = [context.Process(target=_pull_in_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len({answers.get(timeout=30) for _ in processes}) == 1
    assert len(puller.store.images()) == 1
    assert len(puller.store.layers()) == 4
    assert puller.staged() == []
    assert puller.partial() == []


# -- layer stores ---------------------------------------------------------------------------------


def test_layers_come_from_the_layer_store_lazily(puller: Puller) -> None:
    puller.with_layer_store()
    image = puller.publish("a/b:1")
    places = [puller.serve_lazily("a/b:1", image, number) for number in range(3)]
    result = puller.pull("a/b:1")
    assert how(result) == ["als"] * 3
    assert puller.blobs_asked(image) == []
    config = Digest(image.manifest["config"]["digest"])
    tocs = [layer.toc_digest for layer in image.layers]
    assert result.image_id == image_id(config, tocs)
    parent = ""
    for number, written in enumerate(image.layers):
        layer = puller.layer(result, number)
        assert layer.id == layer_id(parent, toc_digest=written.toc_digest)
        assert layer.additional_layer == places[number]
        assert layer.record.diff_digest is None
        assert layer.record.compressed_diff_digest is None
        assert layer.record.expected_diff_id == written.diff_id
        # from the annotation, since the store does not know
        assert layer.record.diff_size > 0
        parent = layer.id
    again = puller.pull("a/b:1")
    assert how(again) == ["toc"] * 3
    assert again.image_id == result.image_id


def test_a_layer_store_may_have_some_layers_only(puller: Puller) -> None:
    puller.with_layer_store()
    image = puller.publish("a/b:1")
    puller.serve_lazily("a/b:1", image, 1)
    result = puller.pull("a/b:1")
    assert how(result) == ["pulled", "als", "pulled"]
    assert puller.file(result, 2, "top") == b"the top\n"
    assert len(result.misses) == 2


def test_checked_layers_of_the_storage_come_before_the_layer_store(puller: Puller) -> None:
    image = puller.publish("a/b:1")
    first = puller.pull("a/b:1")
    puller.with_layer_store()
    for number in range(3):
        puller.serve_lazily("a/b:1", image, number)
    result = puller.pull("a/b:1")
    assert how(result) == ["shared"] * 3
    assert result.image_id == first.image_id


@pytest.mark.parametrize(
    "info",
    [
        b"{",
        b"[]",
        b"{}",
        {"toc-digest": "sha256:" + "0" * 64},
        {"toc-digest": 7},
        b'{"toc-digest": "' + b"x" * (2 << 20) + b'"}',
    ],
)
def test_a_broken_layer_store_is_a_miss(puller: Puller, info: dict[str, Any] | bytes) -> None:
    puller.with_layer_store()
    image = puller.publish("a/b:1")
    for number in range(3):
        puller.serve_lazily("a/b:1", image, number, info=info)
    result = puller.pull("a/b:1")
    assert how(result) == ["pulled"] * 3
    assert len(result.misses) == 3


def test_a_layer_store_that_is_gone_is_a_miss(puller: Puller) -> None:
    puller.with_layer_store()
    image = puller.publish("a/b:1")
    for number in range(3):
        puller.serve_lazily("a/b:1", image, number)
    lazy = puller.pull("a/b:1")
    shutil.rmtree(puller.layer_store)
    result = puller.pull("a/b:1")
    assert how(result) == ["pulled"] * 3
    assert result.image_id != lazy.image_id
    assert puller.file(result, 0, "base") == b"the base\n"


def test_a_layer_store_is_not_asked_when_it_must_not_be(puller: Puller) -> None:
    puller.with_layer_store()
    image = puller.publish("a/b:1")
    for number in range(3):
        puller.serve_lazily("a/b:1", image, number)
    assert how(puller.pull("a/b:1", layer_stores=False)) == ["pulled"] * 3


def test_beside_an_old_podman_nothing_is_known_by_its_toc_only(
    puller: Puller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    puller.with_layer_store()
    image = puller.publish("a/b:1")
    for number in range(3):
        puller.serve_lazily("a/b:1", image, number)
    program = tmp_path / "podman"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program.write_text("#!/bin/sh\necho podman version 4.9.3\n")
    program.chmod(0o755)
    result = puller.pull("a/b:1", toc_layers=None)
    assert how(result) == ["pulled"] * 3
    assert all("Podman" in miss for miss in result.misses)
    puller.store.remove_image(result.image_id)
    program.write_text("#!/bin/sh\necho podman version 5.4.2\n")
    assert how(puller.pull("a/b:1", toc_layers=None)) == ["als"] * 3


def test_a_directory_of_a_layer_store_is_used_once_in_an_image(puller: Puller) -> None:
    # overlayfs refuses a lower directory that is there twice
    puller.with_layer_store()
    image = puller.publish("a/b:1", [FILES[0], FILES[1], FILES[0]])
    puller.serve_lazily("a/b:1", image, 0)
    assert how(puller.pull("a/b:1")) == ["als", "pulled", "pulled"]


def test_a_layer_whose_store_fails_at_the_commit_is_pulled(
    puller: Puller, monkeypatch: pytest.MonkeyPatch
) -> None:
    puller.with_layer_store()
    image = puller.publish("a/b:1")
    places = [puller.serve_lazily("a/b:1", image, number) for number in range(3)]
    plan = pullplan.Planner.plan

    def failing(self: pullplan.Planner) -> list[pullplan.Plan]:
        found = plan(self)
        shutil.rmtree(places[0], ignore_errors=True)
        return found

    monkeypatch.setattr(pullplan.Planner, "plan", failing)
    result = puller.pull("a/b:1")
    # the layer itself needs nothing from its store to be committed, but the next one does
    assert how(result) == ["pulled", "als", "als"]
    assert puller.file(result, 0, "base") == b"the base\n"


def test_dialect_l_only_when_enabled(puller: Puller) -> None:
    puller.with_layer_store()
    image = puller.publish("a/b:1", change=plain)
    for number, written in enumerate(image.layers):
        info = {"diff-digest": written.diff_id, "diff-size": 10240, "compression": 2}
        puller.serve_lazily("a/b:1", image, number, by="blob", info=info)
    lazy = puller.pull("a/b:1", dialect_l=True)
    assert how(lazy) == ["als"] * 3
    assert lazy.layers[0].layer_id == layer_id("", diff_id=image.layers[0].diff_id)
    assert how(puller.pull("a/b:1", dialect_l=True)) == ["shared"] * 3
    # Who does not believe the store gets an image of its own, whatever is there.
    checked = puller.pull("a/b:1")
    assert how(checked) == ["pulled"] * 3
    assert checked.layers[0].layer_id == layer_ids("", image.layers[0].diff_id)[1]
    assert checked.image_id != lazy.image_id
    assert puller.pull("a/b:1").image_id == checked.image_id


def test_an_image_beside_unchecked_layers_leaves_its_usual_id_to_podman(puller: Puller) -> None:
    puller.with_layer_store()
    image = puller.publish("a/b:1", change=plain)
    store = Store.open(puller.config)
    written = image.layers[0]
    info = {"diff-digest": written.diff_id, "diff-size": 10240, "compression": 2}
    puller.serve_lazily("a/b:1", image, 0, by="blob", info=info)
    lazy = puller.pull("a/b:1", dialect_l=True)
    # another image keeps the layers, this one goes
    first = store.image(lazy.image_id)
    keep = store.put_image(
        image_id="ab" * 32,
        layer=first.top_layer,
        names=["localhost/keep:1"],
        manifest=first.manifest(),
        config=first.config(),
    )
    store.remove_image(lazy.image_id)
    checked = puller.pull("a/b:1")
    assert checked.layers[0].layer_id == layer_ids("", written.diff_id)[1]
    assert checked.image_id not in (lazy.image_id, keep.id)


def test_dialect_l_with_another_diff_id_is_a_miss(puller: Puller) -> None:
    puller.with_layer_store()
    image = puller.publish("a/b:1", FILES[:1], change=plain)
    info = {"diff-digest": Digest.of(b"x"), "diff-size": 10240, "compression": 2}
    puller.serve_lazily("a/b:1", image, 0, by="blob", info=info)
    assert how(puller.pull("a/b:1", dialect_l=True)) == ["pulled"]


# -- the attack ----------------------------------------------------------------------------------


def _attack(puller: Puller, *, claims: bool) -> tuple[Image, PullResult]:
    """An image whose blob digest and diff ID are another's, and whose TOC is its own.

    The layer store shows what the TOC says, as it must; with ``claims`` it even states the
    honest digests, and Podman's record believes them.
    """
    honest = puller.publish("good/image:1", [{"program": b"honest\n"}])
    evil = puller.publisher.push("evil/tools", None, [{"program": b"evil\n"}])

    def change(manifest: dict[str, Any]) -> None:
        manifest["layers"][0]["annotations"] = evil.manifest["layers"][0]["annotations"]

    attack = puller.publish("evil/image:1", [{"program": b"honest\n"}], change=change)
    attack.layers[0] = replace(attack.layers[0], toc_digest=evil.layers[0].toc_digest)
    info = {"toc-digest": evil.layers[0].toc_digest, "diff-size": 10240, "compression": 2}
    if claims:
        info |= {
            "diff-digest": honest.layers[0].diff_id,
            "compressed-diff-digest": honest.layers[0].digest,
        }
    puller.serve_lazily("evil/image:1", attack, 0, content={"program": b"evil\n"}, info=info)
    result = puller.pull("evil/image:1")
    assert how(result) == ["als"]
    assert puller.file(result, 0, "program") == b"evil\n"
    return honest, result


@pytest.mark.parametrize("claims", [False, True])
def test_a_toc_cannot_answer_for_the_honest_blob(puller: Puller, claims: bool) -> None:
    puller.with_layer_store()
    honest, evil = _attack(puller, claims=claims)
    result = puller.pull("good/image:1")
    assert how(result) == ["pulled"]
    assert puller.file(result, 0, "program") == b"honest\n"
    assert result.layers[0].layer_id != evil.layers[0].layer_id
    assert result.image_id != evil.image_id
    assert result.image_id == honest.manifest["config"]["digest"].removeprefix("sha256:")
    # The other way round: the honest image is there and must not become evil.
    again = puller.pull("evil/image:1")
    assert puller.file(puller.pull("good/image:1"), 0, "program") == b"honest\n"
    assert puller.store.image(puller.name("good/image:1")).id == result.image_id
    assert again.image_id == evil.image_id


def test_a_record_that_podman_wrote_with_a_stores_claims_answers_for_nothing(
    puller: Puller,
) -> None:
    puller.with_layer_store()
    honest, evil = _attack(puller, claims=True)
    # As Podman records it: what `info` states stands in the record.
    with puller.store.layer_area.editing() as edit:
        record = edit.get(evil.layers[0].layer_id)
        assert record is not None
        edit.put(
            replace(
                record,
                diff_digest=Digest(honest.layers[0].diff_id),
                compressed_diff_digest=Digest(honest.layers[0].digest),
            )
        )
        edit.save()
    result = puller.pull("good/image:1")
    assert puller.file(result, 0, "program") == b"honest\n"
    assert how(result) == ["pulled"]


def test_images_of_equal_layers_and_other_configs_are_not_merged(puller: Puller) -> None:
    puller.with_layer_store()
    image = puller.publish("a/b:1", FILES[:1])
    puller.serve_lazily("a/b:1", image, 0)
    first = puller.pull("a/b:1")
    config = json.dumps({**image.config, "config": {"Cmd": ["other"]}}).encode()

    def change(manifest: dict[str, Any]) -> None:
        digest = puller.registry.add_blob("a/b", config)
        manifest["config"] |= {"digest": digest, "size": len(config)}

    puller.publish("a/b:2", FILES[:1], change=change)
    second = puller.pull("a/b:2")
    assert how(second) == ["toc"]
    assert second.image_id != first.image_id
    assert puller.store.image(second.image_id).config() == config
    assert puller.store.image(first.image_id).config() == json.dumps(image.config).encode()


def test_an_image_that_podman_pulled_by_toc_is_recognised(puller: Puller) -> None:
    puller.with_layer_store()
    image = puller.publish("a/b:1", FILES[:1])
    puller.serve_lazily("a/b:1", image, 0)
    ours = puller.pull("a/b:1")
    stored = puller.store.image(ours.image_id)
    released = released_image_id([image.layers[0].toc_digest])
    puller.store.put_image(
        image_id=released,
        layer=stored.top_layer,
        names=[puller.name("a/b:podman")],
        manifest=stored.manifest(),
        config=stored.config(),
    )
    puller.store.remove_image(ours.image_id, force=True)
    assert puller.pull("a/b:1").image_id == released


# -- pull() ----------------------------------------------------------------------------------------


def options(**more: Any) -> PullOptions:
    return PullOptions(**{"registry": SETTINGS, "policy": ACCEPTING, "platform": AMD64, **more})


def test_when_to_pull(puller: Puller) -> None:
    name = puller.name("a/b:1")
    with pytest.raises(UnknownObject, match="not to be pulled"):
        pull(name, puller.store, options(when=When.NEVER))
    puller.publish("a/b:1")
    first = pull(name, puller.store, options(when=When.MISSING))
    assert how(first) == ["pulled"] * 3
    puller.publish("a/b:1", FILES[:1])
    for when in (When.MISSING, When.NEVER):
        found = pull(name, puller.store, options(when=when))
        assert (found.image_id, how(found)) == (first.image_id, ["shared"] * 3)
    newer = pull(name, puller.store, options(when=When.NEWER))
    assert newer.image_id != first.image_id
    asked = puller.registry.count("GET", "/blobs/")
    assert pull(name, puller.store, options(when=When.NEWER)).image_id == newer.image_id
    assert puller.registry.count("GET", "/blobs/") == asked
    assert pull(f"docker://{name}", puller.store, options()).image_id == newer.image_id


def test_newer_makes_do_with_what_is_there(puller: Puller) -> None:
    name = puller.name("a/b:1")
    puller.publish("a/b:1")
    first = pull(name, puller.store, options())
    puller.registry.fault("status", "manifests", status=404)
    assert pull(name, puller.store, options(when=When.NEWER)).image_id == first.image_id
    with pytest.raises(NotFound):
        pull(name, puller.store, options())


def test_a_rejected_image_leaves_nothing(puller: Puller) -> None:
    image = puller.publish("a/b:1")
    rejecting = Policy.parse(b'{"default": [{"type": "reject"}]}')
    with pytest.raises(PolicyRejected):
        pull(puller.name("a/b:1"), puller.store, options(policy=rejecting))
    assert not puller.store.images()
    assert not puller.store.layers()
    assert puller.blobs_asked(image) == []


def test_short_names_are_tried_in_order(puller: Puller) -> None:
    puller.publish("found/thing:latest")
    host = puller.registry.host
    search = (f"{host}/empty", f"{host}/found")
    settings = replace(SETTINGS, registries=RegistriesConf(search=search))
    result = pull("thing", puller.store, options(registry=settings))
    assert result.names == (f"{host}/found/thing:latest",)
    with pytest.raises(NotFound, match=r"before it:.*empty/nothing"):
        pull("nothing", puller.store, options(registry=settings))


def test_of_tag_and_digest_the_digest_counts(puller: Puller) -> None:
    image = puller.publish("a/b:1")
    result = pull(f"{puller.name('a/b:other')}@{image.digest}", puller.store, options())
    assert result.names == (f"{puller.name('a/b')}@{image.digest}",)


def test_images_come_from_other_transports_too(puller: Puller, tmp_path: Path) -> None:
    image = puller.publish("a/b:1")
    layout = tmp_path / "layout"
    blobs = layout / "blobs/sha256"
    blobs.mkdir(parents=True)
    raw = json.dumps(image.manifest).encode()
    config = json.dumps(image.config).encode()
    for data in (*image.blobs, raw, config):
        (blobs / hashlib.sha256(data).hexdigest()).write_bytes(data)
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    entry = {"mediaType": media_types.OCI_MANIFEST, "digest": image.digest, "size": len(raw)}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    result = pull(f"oci:{layout}", puller.store, options())
    assert how(result) == ["pulled"] * 3
    assert puller.store.image(result.image_id).names == ()
    for tag, names in (
        ("quay.io/x/y:z", ("quay.io/x/y:z",)),
        ("v1", ("docker.io/library/v1:latest", "quay.io/x/y:z")),
        ("No Name", ("docker.io/library/v1:latest", "quay.io/x/y:z")),
    ):
        entry["annotations"] = {"org.opencontainers.image.ref.name": tag}
        (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
        assert pull(f"oci:{layout}:{tag}", puller.store, options()).image_id == result.image_id
        assert puller.store.image(result.image_id).names == names


def test_the_layer_store_is_told_of_the_credentials_once(puller: Puller, tmp_path: Path) -> None:
    told = tmp_path / "told"
    program = tmp_path / "helper"
    program.write_text(f"#!/bin/sh\ncat >> {told}\n")
    program.chmod(0o755)
    settings = replace(SETTINGS, registries=RegistriesConf(auth_helper=str(program)))
    puller.publish("a/b:1")
    pull(puller.name("a/b:1"), puller.store, options(registry=settings))
    assert json.loads(told.read_text()) == {puller.name("a/b:1"): {}}


def test_outcomes_of_a_pull_are_words() -> None:
    assert [one.value for one in How] == ["shared", "toc", "als", "local", "pulled"]
    assert storage_destination.PullResult is PullResult
