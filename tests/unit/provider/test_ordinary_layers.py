"""Layers without a TOC: when they are served, as the administrator decides it; fetching ahead."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from lab.simimages import without_tocs
from lab.waiting import until
from layerstore.content import DiskRoom
from layerstore.errors import StorageError, UnknownObject, UsageError
from layerstore.image import Platform, Reference
from layerstore.provider import Ordinary, Policy, Refusal, View
from layerstore.provider.explain import explain

FILES = [{"bin/sh": b"shell" * 3000, "etc/a": b"a"}, {"app/main": b"main" * 5000}]


def ref(registry, repository: str = "app") -> str:
    return f"{registry.host}/{repository}:1"


def use(asker, **policy: Any) -> None:
    asker.options = {"background": False, "policy": Policy(**policy)}
    asker.restart()


@pytest.fixture
def image(publisher):
    return publisher.push("app", "1", FILES, change=without_tocs)


@pytest.mark.parametrize(
    ("policy", "reason"), [(Ordinary.OFF, "ordinary-layers-off"), (Ordinary.KNOWN, "not-here")]
)
def test_what_is_not_wanted_is_not_fetched(asker, registry, image, policy, reason):
    use(asker, ordinary=policy)
    for _ in range(2):
        assert asker.reason(ref(registry), image.layers[0].digest) == reason
    assert registry.count("GET", image.layers[0].digest) == 0


def test_auto_fetches_it_for_the_next_time(asker, registry, image, caplog):
    first = image.layers[0]
    assert asker.reason(ref(registry), first.digest) == "being-fetched"
    until(lambda: isinstance(asker.lookup(ref(registry), first.digest), View))
    view = asker.view(ref(registry), first.digest)
    assert json.loads(view.info) == {
        "compressed-diff-digest": first.digest,
        "compressed-size": first.size,
        "compression": 2,
        "diff-digest": first.diff_id,
        "diff-size": first.uncompressed_size,
    }
    before = registry.count("GET", "/blobs/")
    assert asker.read(view, "bin/sh") == FILES[0]["bin/sh"]
    assert registry.count("GET", "/blobs/") == before
    assert registry.count("GET", first.digest) == 1
    asker.restart()
    again = asker.view(ref(registry), first.digest)
    assert again == view
    assert asker.read(again, "etc/a") == b"a"


def test_the_policy_is_that_of_the_prefix(asker, registry, publisher, image):
    publisher.push("off/app", "1", FILES, change=without_tocs)
    prefixes = {f"{registry.host}/off": Ordinary.OFF, registry.host: Ordinary.EAGER}
    use(asker, ordinary=Ordinary.KNOWN, ordinary_by_prefix=prefixes)
    digest = image.layers[1].digest
    assert asker.reason(ref(registry, "off/app"), digest) == "ordinary-layers-off"
    assert asker.read(asker.view(ref(registry), digest), "app/main") == FILES[1]["app/main"]


def test_eager_waits_a_bounded_time(asker, registry, image):
    use(asker, ordinary=Ordinary.EAGER, eager_seconds=0.3)
    digest = image.layers[0].digest
    registry.fault("latency", match=digest, seconds=3.0, times=1)
    started = time.monotonic()
    assert asker.reason(ref(registry), digest) == "being-fetched"
    assert time.monotonic() - started < 2.5
    until(lambda: isinstance(asker.lookup(ref(registry), digest), View))


def test_nothing_is_fetched_ahead_where_the_disk_has_no_room(asker, registry, image):
    use(asker, disk=DiskRoom(limit=1, keep_free=0.0))
    assert asker.reason(ref(registry), image.layers[0].digest) == "no-room"
    assert registry.count("GET", image.layers[0].digest) == 0


def test_what_was_false_is_refused_with_its_reason(asker, registry, publisher):
    def other_diff_id(manifest: dict[str, Any]) -> None:
        without_tocs(manifest)
        config = {
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": ["sha256:" + "7" * 64]},
        }
        raw = json.dumps(config).encode()
        manifest["config"] |= {"digest": registry.add_blob("app", raw), "size": len(raw)}

    image = publisher.push("app", "1", FILES[:1], change=other_diff_id)
    digest = image.layers[0].digest
    until(lambda: asker.reason(ref(registry), digest) == "verification")
    fetched = registry.count("GET", digest)
    assert asker.reason(ref(registry), digest) == "verification"
    assert registry.count("GET", digest) == fetched, "a failure is not tried again at once"


def test_a_damaged_index_is_made_anew_from_the_blob(asker, registry, image):
    use(asker, ordinary=Ordinary.EAGER)
    view = asker.view(ref(registry), image.layers[0].digest)
    asker.close()
    index = asker.root / "layers" / str(view.slot) / "index"
    index.write_bytes(index.read_bytes()[:-40])
    asker.open()
    before = registry.count("GET", "/blobs/")
    assert asker.read(view, "bin/sh") == FILES[0]["bin/sh"]
    assert registry.count("GET", "/blobs/") == before


def test_a_damaged_layer_is_fetched_anew(asker, registry, image):
    use(asker, ordinary=Ordinary.EAGER)
    view = asker.view(ref(registry), image.layers[0].digest)
    asker.close()
    directory = asker.root / "layers" / str(view.slot)
    for name in ("index", "blob"):
        (directory / name).write_bytes(b"damaged")
    asker.open()
    with pytest.raises(StorageError, match="being fetched anew"):
        asker.store.layers.open(view.slot)
    until(lambda: not any(asker.store.ingests.status().values()))
    assert asker.read(view, "bin/sh") == FILES[0]["bin/sh"]


# -- fetching ahead ------------------------------------------------------------------


def follow(asker, job: str) -> dict[str, Any]:
    until(lambda: asker.store.fetches.status(job)["done"])
    status: dict[str, Any] = asker.store.fetches.status(job)
    return status


def test_all_layers_are_brought_and_verified(asker, registry, publisher):
    def mixed(manifest: dict[str, Any]) -> None:
        del manifest["layers"][1]["annotations"]

    use(asker, ordinary=Ordinary.OFF)
    image = publisher.push("app", "1", FILES, change=mixed)
    status = follow(asker, asker.store.fetches.start(ref(registry), ()))
    assert status["failure"] is None
    assert [(one["form"], one["state"]) for one in status["layers"]] == [
        ("estargz", "complete"),
        ("tar+gzip", "complete"),
    ]
    assert all(one["fetched"] == one["size"] for one in status["layers"])
    assert all(one["verified"] for one in asker.store.status()["layers"])
    registry.fault("reset")
    use(asker, ordinary=Ordinary.KNOWN)
    for number, path in ((0, "bin/sh"), (1, "app/main")):
        view = asker.view(ref(registry), image.layers[number].digest)
        assert asker.read(view, path) == FILES[number][path]


def test_a_layer_that_cannot_be_had_is_refused_with_its_reason(asker, registry, image):
    registry.fault("status", match=image.layers[1].digest, status=404)
    status = follow(asker, asker.store.fetches.start(ref(registry), ()))
    assert [one["state"] for one in status["layers"]] == ["complete", "refused"]
    assert status["layers"][1]["reason"] == "not-found"


def test_an_image_that_is_not_there_ends_the_job(asker, registry):
    status = follow(asker, asker.store.fetches.start(ref(registry, "none"), ()))
    assert status["layers"] == []
    assert "404" in str(status["failure"])


def test_the_platforms_of_an_index(asker, publisher, registry):
    images = [
        publisher.push("app", None, [{"x": name.encode()}], architecture=name)
        for name in ("amd64", "arm64", "s390x")
    ]
    publisher.push_index("app", "1", images)
    fetches = asker.store.fetches
    status = follow(asker, fetches.start(ref(registry), ("linux/arm64", "linux/s390x")))
    assert [one["digest"] for one in status["layers"]] == [
        images[1].layers[0].digest,
        images[2].layers[0].digest,
    ]
    assert len(follow(asker, fetches.start(ref(registry), None))["layers"]) == 3
    missing = follow(asker, fetches.start(ref(registry), ("linux/riscv64",)))
    assert "no image for linux/riscv64" in str(missing["failure"])
    with pytest.raises(UsageError):
        fetches.start(ref(registry), ("amd64",))


def test_a_job_can_be_cancelled_and_unknown_ones_are_told(asker, registry, image):
    registry.fault("latency", match=image.layers[0].digest, seconds=3.0)
    job = asker.store.fetches.start(ref(registry), ())
    until(lambda: asker.store.fetches.status(job)["layers"])
    asker.store.fetches.cancel(job)
    status = follow(asker, job)
    assert "refused" in [one["state"] for one in status["layers"]]
    with pytest.raises(UnknownObject):
        asker.store.fetches.status("99")


# -- explaining ------------------------------------------------------------------------


def test_what_is_explained_is_what_a_lookup_answers(asker, registry, publisher):
    def odd(manifest: dict[str, Any]) -> None:
        layers = manifest["layers"]
        del layers[1]["annotations"]
        layers[2]["annotations"]["containerd.io/snapshot/stargz/toc.digest"] = "sha256:" + "1" * 64
        layers[3]["mediaType"] = "application/x-unknown"

    files = [*FILES, {"c": b"c" * 100}, {"d": b"d" * 100}]
    publisher.push("app", "1", files, change=odd)
    reference = Reference.parse(ref(registry))
    use(asker, ordinary=Ordinary.KNOWN)
    (image,) = explain(asker.store, reference, (Platform.host(),), Ordinary.KNOWN)
    assert [layer.form for layer in image.layers] == ["estargz", "tar+gzip", "estargz", "unknown"]
    for layer in image.layers:
        for name, verdict in ((layer.digest, layer.dialect_l), (layer.toc_digest, layer.dialect_t)):
            if name is None:
                assert verdict.reason in ("no-toc-annotation", "unsupported-format")
                continue
            answer = asker.lookup(ref(registry), name)
            if isinstance(answer, Refusal):
                assert (verdict.served, verdict.reason) != ("lazy", "")
                assert verdict.reason == answer.reason
                assert verdict.detail
            else:
                assert verdict.served == "lazy"
    assert [layer.dialect_l.reason for layer in image.layers] == [
        "", "not-here", "verification", "unsupported-format",
    ]  # fmt: skip
    (later,) = explain(asker.store, reference, (Platform.host(),), Ordinary.AUTO)
    assert later.layers[1].dialect_l.served == "once-complete"
    assert later.layers[1].dialect_l.reason == "being-fetched"
