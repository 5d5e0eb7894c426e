"""The store's directory tree as a client sees it through the mount."""

import base64
import contextlib
import errno
import gzip
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.oci import StoredImage
from lab.rig import MakeRig, Pushed, Rig
from lab.simregistry import SimRegistry
from layerstore import limits
from layerstore.image import toc_digest

QUICK_SECONDS = 1.0


@pytest.fixture
def rig(make_rig: MakeRig) -> Rig:
    """A store; what Podman would do is done by hand here."""
    return make_rig("debian12", config="background_fetch = false\n")


@contextlib.contextmanager
def quick(seconds: float = QUICK_SECONDS) -> Iterator[None]:
    """The block takes less than that."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def errno_of(path: Path) -> int:
    """What stat says; 0 if there is something."""
    try:
        path.stat()
    except OSError as error:
        return error.errno or -1
    return 0


def refusal(attempt: Callable[[], object]) -> int:
    """How an attempt fails; 0 if it does not."""
    try:
        attempt()
    except OSError as error:
        return error.errno or -1
    return 0


def announced(image: StoredImage) -> list[dict[str, str]]:
    """Annotations of the layers."""
    manifest = json.loads(image.blob(image.digest).read_bytes())
    return [layer["annotations"] for layer in manifest["layers"]]


def layer_uses(rig: Rig, digest: str) -> int:
    (count,) = [one["uses"] for one in rig.service.status()["layers"] if one["digest"] == digest]
    return int(count)


def test_info_of_dialect_l_states_the_exact_size(rig: Rig, small: Pushed) -> None:
    for layer in small.image.layers:
        path = rig.layer_path(rig.image(small.name), layer.digest)
        assert errno_of(path / "diff") == 0
        tar = gzip.decompress(small.image.blob(layer.digest).read_bytes())
        assert json.loads((path / "info").read_bytes()) == {
            "compressed-size": layer.size,
            "diff-digest": f"sha256:{hashlib.sha256(tar).hexdigest()}",
            "diff-size": len(tar),
            "compression": 2,
        }


def test_info_of_dialect_t_states_the_toc_and_the_expected_diff_id(rig: Rig, small: Pushed) -> None:
    for layer, annotations in zip(small.image.layers, announced(small.image), strict=True):
        toc = str(toc_digest(annotations))
        path = rig.layer_path(rig.image(small.name), toc)
        assert errno_of(path / "diff") == 0
        assert json.loads((path / "info").read_bytes()) == {
            "compressed-size": layer.size,
            "diff-size": -1,
            "compression": 2,
            "toc-digest": toc,
            "flags": {"expected-layer-diffid": layer.diff_id},
        }


def test_info_is_final_even_when_it_is_asked_for_first(rig: Rig, small: Pushed) -> None:
    layer = small.image.layers[0]
    path = rig.layer_path(rig.image(small.name), layer.digest)
    info = json.loads((path / "info").read_bytes())
    assert info["diff-digest"] == layer.diff_id
    assert errno_of(path / "diff") == 0
    assert json.loads((path / "info").read_bytes()) == info


def test_the_blob_is_byte_exact(rig: Rig, small: Pushed) -> None:
    for layer in small.image.layers:
        blob = rig.layer_path(rig.image(small.name), layer.digest) / "blob"
        assert blob.stat().st_size == layer.size
        assert blob.read_bytes() == small.image.blob(layer.digest).read_bytes()
    assert all(layer["complete"] for layer in rig.service.status()["layers"])


def test_use_and_release_are_signals_that_always_fail(rig: Rig, small: Pushed) -> None:
    layer = small.image.layers[0]
    path = rig.layer_path(rig.image(small.name), layer.digest)
    assert errno_of(path / "diff") == 0
    for count in (1, 2, 3):
        with pytest.raises(FileNotFoundError):
            os.open(path / "use", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        assert layer_uses(rig, layer.digest) == count
    assert errno_of(path / "use") == errno.ENOENT
    for count in (2, 1, 0, 0):
        with pytest.raises(FileNotFoundError):
            path.rmdir()
        assert layer_uses(rig, layer.digest) == count
    assert errno_of(path / "diff") == 0


def test_nothing_else_can_be_made_or_removed(rig: Rig, small: Pushed) -> None:
    path = rig.layer_path(rig.image(small.name), small.image.layers[1].digest)
    assert (path / "diff/data/small/000.txt").read_text() == "file 0\n"
    for attempt in (
        lambda: (rig.store / "new").write_text(""),
        (rig.store / "new").mkdir,
        lambda: (path / "new").write_text(""),
        lambda: (path / "diff/new").write_text(""),
        lambda: (path / "diff/data/small/000.txt").write_text(""),
        (path / "diff/data/small/000.txt").unlink,
        (path / "info").unlink,
        lambda: (path / "diff/data").rename(path / "diff/moved"),
        lambda: os.chmod(path / "diff/data", 0o700),
        lambda: os.setxattr(path / "diff/data", "user.note", b"x"),
    ):
        assert refusal(attempt) in (errno.EROFS, errno.EPERM, errno.EACCES)
    assert (path / "diff/data/small/000.txt").read_text() == "file 0\n"


def test_what_is_unknown_is_not_there_at_once(rig: Rig, small: Pushed) -> None:
    image = rig.image(small.name)
    layer = small.image.layers[0].digest
    unknown = f"sha256:{'0' * 64}"
    element = base64.b64encode(image.encode()).decode()
    for path in (
        rig.layer_path(image, unknown) / "diff",
        rig.layer_path(rig.image("no/such:1"), layer) / "diff",
        rig.store / unknown / "diff",
        rig.store / element / "sha256:0" / "diff",
        rig.store / element / f"sha512:{'0' * 128}" / "diff",
        rig.store / element / "diff",
        rig.store / element.rstrip("=") / layer / "diff" if "=" in element else rig.store / "x",
        rig.store / base64.b64encode(b"Not A Reference").decode() / layer / "diff",
        rig.store / "!" / layer / "diff",
        rig.store / ("A" * 255) / layer / "diff",
        rig.layer_path(image, layer) / "other",
        rig.layer_path(image, layer) / "diff/bin/no-such",
    ):
        with quick():
            assert errno_of(path) == errno.ENOENT, path
    log = rig.service.log()
    assert log.count("event=lookup-refused reason=not-in-image") == 1
    assert log.count("event=lookup-refused reason=not-found") == 1
    assert log.count("event=lookup-refused reason=unknown-layer") == 1
    assert log.count("event=lookup-refused reason=unsupported-format") == 1
    assert "Traceback" not in log


def test_a_hanging_registry_never_blocks_the_root(make_rig: MakeRig, small: Pushed) -> None:
    """The stall stays pending in the background of everything else here."""
    with SimRegistry() as hanging:
        hanging.fault("stall", "GET", after=0, seconds=3600)
        rig = make_rig("debian12", provider_upstream=hanging.host)
        image = rig.image(small.name)
        answers: dict[str, tuple[int, float]] = {}

        def look(digest: str) -> None:
            began = time.monotonic()
            number = errno_of(rig.layer_path(image, digest) / "diff")
            answers[digest] = number, time.monotonic() - began

        threads = [
            threading.Thread(target=look, args=(layer.digest,)) for layer in small.image.layers
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        for _ in range(3):
            with quick():
                assert rig.store.is_dir()
            with quick():
                assert list(rig.store.iterdir()) == []
            with quick():
                assert (rig.store / base64.b64encode(image.encode()).decode()).is_dir()
            with quick():
                os.statvfs(rig.store)
            with quick():
                assert rig.env.podman("images", "-q").stdout == ""
            with quick():
                rig.service.status()
        assert answers == {}
        for thread in threads:
            thread.join(limits.RESOLVE_ANSWER_SECONDS + 3)
        assert set(answers) == {layer.digest for layer in small.image.layers}
        for number, seconds in answers.values():
            assert number == errno.ENOENT
            assert seconds < limits.RESOLVE_ANSWER_SECONDS + 1
        assert rig.service.log().count("event=lookup-refused") == len(small.image.layers)
        began = time.monotonic()
        assert rig.service.stop() == 0
        assert time.monotonic() - began < 5
