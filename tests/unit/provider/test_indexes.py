"""Indexes of ordinary layers on nodes that were given them, and on those that lost the contents."""

from __future__ import annotations

import io
import json
import random
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.simimages import without_tocs
from lab.waiting import until
from layerstore import limits
from layerstore.errors import ContentError, LayerstoreError, StorageError
from layerstore.formats.compression import zstd
from layerstore.image import Digest
from layerstore.provider import DialectL, Ordinary, Policy, ordinary
from layerstore.provider.refuted import Claim

NOISE = random.Random(5)
FILES = [
    {"usr/first": NOISE.randbytes(300_000)}
    | {f"usr/f{number:02}": NOISE.randbytes(60_000) for number in range(40)}
    | {"usr/last": NOISE.randbytes(50_000) + b"line\n" * 20_000}
]


def ref(registry) -> str:
    return f"{registry.host}/app:1"


def use(asker, **policy: Any) -> None:
    asker.options = {"background": False, "policy": Policy(**policy)}
    asker.restart()


@pytest.fixture(autouse=True)
def many_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordinary, "_SPACING", 100_000)
    monkeypatch.setattr(limits, "CHECKPOINT_MIN_BYTES", 1)


@pytest.fixture
def image(publisher):
    return publisher.push("app", "1", FILES, change=without_tocs)


@pytest.fixture
def file(asker, registry, image, tmp_path: Path) -> Path:
    """The file of a node that has the layer."""
    use(asker, ordinary=Ordinary.EAGER)
    asker.view(ref(registry), image.layers[0].digest)
    saved = tmp_path / "indexes"
    said = asker.store.indexes.save([names(image)], saved)
    assert [(one.blob_digest, one.size) for one in said] == [
        (image.layers[0].digest, image.layers[0].size)
    ]
    return saved


@pytest.fixture
def other(asker, tmp_path: Path, registry) -> Iterator[Any]:
    """Another node."""
    node = type(asker)(tmp_path / "other", registry)
    use(node, ordinary=Ordinary.KNOWN)
    yield node
    node.close()


def names(image) -> tuple[Digest, Digest]:
    return Digest(image.layers[0].digest), Digest(image.layers[0].diff_id)


def sent_bytes(registry, digest: str) -> int:
    """Bytes of the blob that the registry sent."""
    return sum(entry.sent for entry in registry.requests("GET", digest))


def test_a_node_that_was_given_the_index_reads_single_files_by_range(other, registry, image, file):
    digest = image.layers[0].digest
    assert other.reason(ref(registry), digest) == "not-here"
    assert [one.blob_digest for one in other.store.indexes.load(file)] == [digest]
    assert other.store.indexes.load(file) == []  # known by now
    registry.log.clear()
    view = other.view(ref(registry), digest)
    # of what was not read here only that is said without which there is no lazy layer
    assert json.loads(view.info) == {
        "compressed-size": image.layers[0].size,
        "compression": 2,
        "diff-digest": image.layers[0].diff_id,
        "diff-size": image.layers[0].uncompressed_size,
    }
    for name in ("usr/f20", "usr/last"):
        assert other.read(view, name) == FILES[0][name]
    assert 0 < sent_bytes(registry, digest) < image.layers[0].size // 2
    other.restart()
    assert other.read(view, "usr/f05") == FILES[0]["usr/f05"]
    # complete, it is checked like any other
    other.store.layers.hasten(view.slot, lambda _: None)
    until(lambda: other.store.status()["layers"][0]["verified"])


def test_a_fetch_of_such_a_layer_brings_what_is_missing(other, registry, image, file):
    other.store.indexes.load(file)
    view = other.view(ref(registry), image.layers[0].digest)
    other.read(view, "usr/first")
    registry.log.clear()
    job = other.store.fetches.start(ref(registry), ())
    until(lambda: other.store.fetches.status(job)["done"])
    (layer,) = other.store.fetches.status(job)["layers"]
    assert layer["state"] == "complete"
    assert sent_bytes(registry, image.layers[0].digest) < image.layers[0].size
    assert other.store.status()["layers"][0]["verified"]


def test_what_is_to_be_verified_first_waits(other, registry, image, file):
    other.store.indexes.load(file)
    use(other, ordinary=Ordinary.KNOWN, dialect_l=DialectL.VERIFIED)
    assert other.reason(ref(registry), image.layers[0].digest) == "not-here"
    use(other, ordinary=Ordinary.OFF)
    assert other.reason(ref(registry), image.layers[0].digest) == "ordinary-layers-off"


def test_a_node_that_lost_the_contents_reads_by_range(asker, registry, image, file):
    view = asker.view(ref(registry), image.layers[0].digest)
    asker.store.layers.drop_blob(view.slot)
    asker.close()
    shutil.rmtree(asker.root / "content")
    asker.open()
    registry.log.clear()
    assert asker.read(view, "usr/f20") == FILES[0]["usr/f20"]
    assert 0 < sent_bytes(registry, image.layers[0].digest) < image.layers[0].size // 2
    # known by name still, but not complete: a fetch brings what is missing
    job = asker.store.fetches.start(ref(registry), ())
    until(lambda: asker.store.fetches.status(job)["done"])
    assert asker.store.fetches.status(job)["layers"][0]["state"] == "complete"
    registry.fault("reset")
    assert asker.read(view, "usr/last") == FILES[0]["usr/last"]


def test_an_index_of_another_layer_shows_nothing_and_is_found_out(
    other, registry, publisher, image, file, tmp_path: Path
):
    """A blob of the same size with another byte: somewhere in a file that is stored as it is."""
    honest = registry.blobs[image.layers[0].digest]
    at = honest.index(FILES[0]["usr/f20"][1000:1016])
    blob = honest[:at] + bytes([honest[at] ^ 1]) + honest[at + 1 :]
    digest = str(Digest.of(blob))

    def victim(manifest: dict[str, Any]) -> None:
        manifest["layers"][0] = {
            "mediaType": manifest["layers"][0]["mediaType"],
            "digest": registry.add_blob("app", blob),
            "size": len(blob),
        }

    publisher.push("app", "1", FILES, change=victim)
    lie = changed(
        file, tmp_path / "lie", lambda head: head["layers"][0].update({"blob_digest": digest})
    )
    other.store.indexes.load(lie)
    view = other.view(ref(registry), digest)
    assert other.read(view, "usr/f05") == FILES[0]["usr/f05"]
    with pytest.raises(ContentError):
        other.read(view, "usr/f20")


def test_of_a_layer_in_quarantine_nothing_is_saved(asker, registry, image, tmp_path: Path):
    use(asker, ordinary=Ordinary.EAGER)
    view = asker.view(ref(registry), image.layers[0].digest)
    asker.store.layers.quarantine(view.slot, Claim.DIFF_ID, "it is another")
    with pytest.raises(StorageError, match="in quarantine: diff-id: it is another"):
        asker.store.indexes.save([names(image)], tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def changed(file: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The file with another head."""
    out = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(zstd.decompress(file.read_bytes()))) as archive,
        tarfile.open(fileobj=out, mode="w") as written,
    ):
        for member in archive:
            data = archive.extractfile(member)
            assert data is not None
            content = data.read()
            if member.name == "layers.json":
                head = json.loads(content)
                change(head)
                content = json.dumps(head).encode()
            member.size = len(content)
            written.addfile(member, io.BytesIO(content))
    target.write_bytes(zstd.compress(out.getvalue()))
    return target


@pytest.mark.parametrize(
    "change",
    [
        {"form": "estargz"}, {"form": "tar+zstd"}, {"form": 5}, {"size": 0}, {"size": 77},
        {"diff_size": -1}, {"blob_digest": "x"}, {"diff_id": "sha256:1"}, {"form": "tar"},
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(other, file, tmp_path: Path, change: dict[str, Any]):
    spoiled = changed(file, tmp_path / "spoiled", lambda head: head["layers"][0].update(change))
    with pytest.raises(LayerstoreError):
        other.store.indexes.load(spoiled)
    assert other.store.status()["layers"] == []
    assert not list((other.root / "layers").iterdir())


def test_damaged_files_are_refused(other, file, tmp_path: Path):
    good = file.read_bytes()
    plain = zstd.decompress(good)
    bad = tmp_path / "bad"
    wrong = [b"", b"text", good[:-20], good[:200], zstd.compress(b""), zstd.compress(plain[:3000])]
    wrong += [
        zstd.compress(plain[:at] + b"\xff" + plain[at + 1 :])
        for at in (1600, 9000, len(plain) // 2)
    ]
    wrong.append(zstd.compress(plain.replace(b'"version":1', b'"version":2')))
    for data in wrong:
        bad.write_bytes(data)
        with pytest.raises(LayerstoreError):
            other.store.indexes.load(bad)
    with pytest.raises(StorageError):
        other.store.indexes.load(tmp_path / "absent")
    assert other.store.status()["layers"] == []


def test_only_what_was_verified_here_is_saved(other, image, tmp_path: Path):
    with pytest.raises(StorageError, match="not taken in"):
        other.store.indexes.save([names(image)], tmp_path / "none")
    assert not (tmp_path / "none").exists()
