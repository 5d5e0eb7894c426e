from __future__ import annotations

import contextlib
import json
import random
import threading
import time

import pytest

from lab.simimages import Publisher
from lab.simregistry import SimRegistry
from layerstore import limits
from layerstore.errors import LayerstoreError
from layerstore.image import Digest, Reference
from layerstore.image.annotations import ESTARGZ_TOC_DIGEST, ESTARGZ_UNCOMPRESSED_SIZE
from layerstore.provider import Refusal, View

FILES = [{"bin/sh": b"shell" * 100, "etc/a": b"a"}, {"app/main": b"main" * 5000, "etc/b": b"b"}]


def ref(registry, tag: str = "1", repository: str = "app") -> str:
    return f"{registry.host}/{repository}:{tag}"


def test_dialect_t_is_looked_up_by_toc_digest(asker, publisher, registry):
    image = publisher.push("app", "1", FILES)
    view = asker.view(ref(registry), image.layers[1].toc_digest)
    assert json.loads(view.info) == {
        "toc-digest": image.layers[1].toc_digest,
        "diff-size": -1,
        "compression": 2,
        "compressed-size": image.layers[1].size,
        "flags": {"expected-layer-diffid": image.layers[1].diff_id},
    }
    assert asker.read(view, "app/main") == b"main" * 5000


def test_dialect_l_is_looked_up_by_blob_digest(asker, publisher, registry):
    image = publisher.push("app", "1", FILES)
    view = asker.view(ref(registry), image.layers[0].digest)
    assert json.loads(view.info) == {
        "diff-digest": image.layers[0].diff_id,
        "diff-size": image.layers[0].uncompressed_size,
        "compression": 2,
        "compressed-size": image.layers[0].size,
    }
    assert asker.read(view, "bin/sh") == b"shell" * 100


def test_both_dialects_and_all_references_share_one_layer(asker, publisher, registry):
    image = publisher.push("app", "1", FILES)
    publisher.push("other", "2", FILES)
    views = [
        asker.view(ref(registry), image.layers[1].toc_digest),
        asker.view(ref(registry), image.layers[1].digest),
        asker.view(ref(registry, "2", "other"), image.layers[1].digest),
    ]
    assert len({view.slot for view in views}) == 1
    assert len({view.number for view in views}) == 3
    asker.read(views[0], "app/main")
    before = registry.count("GET", "/blobs/")
    asker.read(views[2], "app/main")
    assert registry.count("GET", "/blobs/") == before


def test_a_lookup_asks_for_each_document_once_and_for_every_toc(asker, publisher, registry):
    image = publisher.push("app", "1", FILES)
    for written in image.layers:
        asker.view(ref(registry), written.toc_digest)
    assert registry.count("GET", "/manifests/") == 1
    for written in image.layers:
        assert registry.count("GET", written.digest) == 1
    assert registry.count("GET", image.manifest["config"]["digest"]) == 1


def test_concurrent_lookups_of_one_image_resolve_it_once(asker, publisher, registry):
    image = publisher.push("app", "1", [{f"f{n}": bytes([n]) * 100} for n in range(6)])
    registry.fault("latency", match="manifests", seconds=0.2)
    answers: list[View | Refusal] = []
    threads = [
        threading.Thread(
            target=lambda w=written: answers.append(asker.lookup(ref(registry), w.toc_digest))
        )
        for written in image.layers
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(isinstance(answer, View) for answer in answers)
    assert len(answers) == 18
    assert registry.count("GET", "/manifests/") == 1


def test_a_name_in_no_image_is_refused_with_its_reason(asker, publisher, registry):
    publisher.push("app", "1", FILES)
    assert asker.reason(ref(registry), "sha256:" + "0" * 64) == "not-in-image"
    assert asker.store.status()["lookups"] == {"not-in-image": 1}


def test_a_layer_that_an_image_has_twice_is_refused(asker, publisher, registry):
    """Its one path would be two lower directories of one overlay, which the kernel refuses."""
    image = publisher.push("app", "1", [{"x": b"once"}, {"y": b"twice"}, {"y": b"twice"}])
    once, twice = image.layers[0], image.layers[1]
    assert asker.read(asker.view(ref(registry), once.digest), "x") == b"once"
    for name in (twice.digest, twice.toc_digest):
        assert asker.reason(ref(registry), name) == "repeated-layer"
        assert asker.reason("", name) == "repeated-layer"


def test_every_platform_of_an_index_is_searched(asker, publisher, registry):
    amd = publisher.push("app", None, [{"x": b"amd"}], architecture="amd64")
    arm = publisher.push("app", None, [{"x": b"arm"}], architecture="arm64")
    odd = publisher.push("app", None, [{"x": b"odd"}], architecture="riscv64")
    publisher.push_index("app", "1", [amd, arm, odd])
    for image, content in ((odd, b"odd"), (amd, b"amd"), (arm, b"arm")):
        view = asker.view(ref(registry), image.layers[0].toc_digest)
        assert asker.read(view, "x") == content


def test_an_index_with_images_that_were_never_copied_is_searched_all_the_same(
    asker, publisher, registry
):
    here = publisher.push("app", None, [{"x": b"here"}], architecture="s390x")
    absent = publisher.push("elsewhere", None, [{"x": b"gone"}], architecture="amd64")
    publisher.push_index("app", "1", [absent, here])
    assert asker.read(asker.view(ref(registry), here.layers[0].digest), "x") == b"here"


def test_a_moved_tag_serves_old_and_new_layers(asker, publisher, registry, monkeypatch):
    old = publisher.push("app", "1", [{"x": b"old"}])
    asker.view(ref(registry), old.layers[0].toc_digest)
    new = publisher.push("app", "1", [{"x": b"new"}])
    monkeypatch.setattr(limits, "REFRESH_SECONDS", 0.0)
    assert asker.read(asker.view(ref(registry), new.layers[0].toc_digest), "x") == b"new"
    asker.restart()
    assert asker.read(asker.view(ref(registry), old.layers[0].toc_digest), "x") == b"old"
    assert asker.read(asker.view(ref(registry), old.layers[0].digest), "x") == b"old"


def test_a_flood_of_unknown_names_asks_the_registry_once(asker, publisher, registry):
    publisher.push("app", "1", FILES)
    for number in range(30):
        assert asker.reason(ref(registry), f"sha256:{number:064x}") == "not-in-image"
    assert registry.count("GET", "/manifests/") == 1


def test_a_passing_failure_is_forgotten_soon(asker, publisher, registry, monkeypatch):
    image = publisher.push("app", "1", FILES)
    fault = registry.fault("status", match="manifests", status=404)
    assert asker.reason(ref(registry), image.layers[0].toc_digest) == "not-found"
    assert fault.hits >= 1
    fault.times = fault.hits
    assert asker.reason(ref(registry), image.layers[0].toc_digest) == "not-found"
    monkeypatch.setattr(limits, "FAILURE_SECONDS", 0.0)
    asker.view(ref(registry), image.layers[0].toc_digest)


def test_known_layers_need_no_registry_after_a_restart(asker, publisher, registry):
    image = publisher.push("app", "1", FILES)
    view = asker.view(ref(registry), image.layers[1].toc_digest)
    asker.read(view, "app/main")
    asker.restart()
    before = len(registry.requests())
    again = asker.view(ref(registry), image.layers[1].toc_digest)
    assert again == view
    assert asker.read(again, "app/main") == b"main" * 5000
    assert len(registry.requests()) == before


def test_a_restarted_store_fetches_what_is_missing(asker, publisher, registry):
    image = publisher.push("app", "1", [{"x": b"x", "big": bytes(range(256)) * 3000}])
    view = asker.view(ref(registry), image.layers[0].toc_digest)
    asker.restart()
    assert asker.read(view, "big") == bytes(range(256)) * 3000


def test_without_reference_known_layers_are_served(asker, publisher, registry):
    image = publisher.push("app", "1", FILES)
    assert asker.reason("", image.layers[0].toc_digest) == "unknown-layer"
    asker.view(ref(registry), image.layers[1].toc_digest)
    asker.restart()  # a refusal is remembered for some seconds
    view = asker.view("", image.layers[0].toc_digest)
    assert asker.read(view, "bin/sh") == b"shell" * 100
    assert json.loads(view.info)["toc-digest"] == image.layers[0].toc_digest


def test_use_counts_survive_a_restart(asker, publisher, registry):
    image = publisher.push("app", "1", FILES)
    view = asker.view(ref(registry), image.layers[0].toc_digest)
    for _ in range(3):
        asker.store.use(view)
    asker.store.release(view)
    asker.restart()
    (uses,) = (one["uses"] for one in asker.store.status()["layers"] if one["slot"] == view.slot)
    assert uses == 2


def spoil_toc_digest(manifest):
    manifest["layers"][0]["annotations"][ESTARGZ_TOC_DIGEST] = "sha256:" + "1" * 64


def drop_annotations(manifest):
    del manifest["layers"][0]["annotations"]


def drop_size(manifest):
    del manifest["layers"][0]["annotations"][ESTARGZ_UNCOMPRESSED_SIZE]


def claim_zstd(manifest):
    manifest["layers"][0]["mediaType"] = "application/vnd.oci.image.layer.v1.tar+zstd"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (spoil_toc_digest, "verification"),
        (drop_annotations, "being-fetched"),
        (drop_size, "being-fetched"),
        (claim_zstd, "being-fetched"),
    ],
)
def test_what_cannot_be_trusted_is_refused_with_its_reason(
    asker, publisher, registry, change, reason, caplog
):
    image = publisher.push("app", "1", FILES, change=change)
    assert asker.reason(ref(registry), image.layers[0].digest) == reason
    lines = [r.getMessage() for r in caplog.records if "lookup-refused" in r.getMessage()]
    assert len(lines) == 1
    assert f"reason={reason}" in lines[0]
    assert asker.store.status()["lookups"] == {reason: 1}
    # the image's other layer is none the worse for it
    assert asker.read(asker.view(ref(registry), image.layers[1].digest), "etc/b") == b"b"


def test_each_refused_lookup_is_one_line_and_one_more_of_its_reason(
    asker, publisher, registry, caplog
):
    publisher.push("app", "1", FILES)
    registry.fault("latency", match="manifests", seconds=0.2, times=1)
    answered: list[View | Refusal] = []
    absent = Digest("sha256:" + "2" * 64)
    for _ in range(3):  # they wait for one answer
        asker.store.resolve(ref(registry), absent, answered.append)
    asker.lookup(ref(registry), absent)
    assert asker.reason(ref(registry), absent) == "not-in-image"  # answered from memory
    assert len(answered) == 3
    lines = [r.getMessage() for r in caplog.records if "lookup-refused" in r.getMessage()]
    assert len(lines) == 5
    assert all("reason=not-in-image" in line for line in lines)
    assert asker.store.status()["lookups"] == {"not-in-image": 5}


def test_an_honest_digest_with_a_foreign_toc_shows_only_the_foreign_view(
    asker, publisher, registry
):
    """Dialect T: the attack of als-protocol section 9 gains nothing on the honest name."""
    honest = publisher.push("app", "1", [{"x": b"honest"}])
    evil = publisher.push("evil", "1", [{"x": b"evil!!"}])

    def swap(manifest):
        manifest["layers"][0]["annotations"] = evil.manifest["layers"][0]["annotations"]

    attack = publisher.push("attack", "1", [{"x": b"honest"}], change=swap)
    assert attack.layers[0].digest == honest.layers[0].digest
    reason = asker.reason(ref(registry, "1", "attack"), evil.layers[0].toc_digest)
    assert reason == "verification"  # that blob does not hold that TOC
    view = asker.view(ref(registry), honest.layers[0].toc_digest)
    assert asker.read(view, "x") == b"honest"


@pytest.mark.parametrize(
    ("kind", "options", "reasons"),
    [
        ("status", {"status": 401}, {"authentication"}),
        ("status", {"status": 404}, {"not-found"}),
        ("status", {"status": 500}, {"registry"}),
        ("status", {"status": 429, "headers": {"Retry-After": "0"}}, {"rate-limited"}),
        ("reset", {}, {"network"}),
        ("stall", {"after": 10, "seconds": 20}, {"network", "timeout"}),
        ("short", {"after": 20}, {"network"}),
        ("other", {"data": b"?" * 5000}, {"invalid-layer", "registry", "network"}),
        ("range", {"value": "bytes 0-10/11"}, {"registry", "network"}),
        ("flip", {"after": 5}, {"invalid-layer", "verification"}),
    ],
)
def test_a_bad_registry_is_a_reasoned_refusal_in_bounded_time(
    asker, publisher, registry, kind, options, reasons
):
    image = publisher.push("app", "1", [{f"f{n}": bytes([n]) * 9000 for n in range(9)}])
    if kind == "flip":
        options = {"after": image.layers[0].size - 200}  # hits TOC or footer, whatever the window
    fault = registry.fault(kind, match=f"blobs/{image.layers[0].digest}", **options)
    start = time.monotonic()
    assert asker.reason(ref(registry), image.layers[0].toc_digest) in reasons
    assert time.monotonic() - start < limits.RESOLVE_SECONDS
    assert fault.hits >= 1


def test_a_small_blob_is_taken_whole_where_ranges_are_ignored(asker, publisher, registry):
    image = publisher.push("app", "1", [{f"f{n}": bytes([n]) * 90_000 for n in range(9)}])
    registry.fault("ignore-range", match="blobs/")
    view = asker.view(ref(registry), image.layers[0].toc_digest)
    for number in range(9):
        assert asker.read(view, f"f{number}") == bytes([number]) * 90_000
    assert registry.count("GET", image.layers[0].digest) == 1


def test_a_large_blob_is_refused_where_ranges_are_ignored(asker, publisher, registry, monkeypatch):
    monkeypatch.setattr(limits, "WHOLE_BLOB_BYTES", 1000)
    monkeypatch.setattr(limits, "TOC_TAIL_MIN_BYTES", 500)
    noise = bytes((n * 7919 >> 3) & 255 for n in range(50_000))
    image = publisher.push("app", "1", [{"noise": noise}])
    registry.fault("ignore-range", match="blobs/")
    assert asker.reason(ref(registry), image.layers[0].toc_digest) == "no-ranges"
    sent = sum(one.sent for one in registry.requests("GET", image.layers[0].digest))
    assert sent < 3 * len(image.blobs[0])


def test_a_corrupted_chunk_never_reaches_a_reader(asker, publisher, registry, caplog):
    noise = random.Random(3).randbytes(300_000)
    image = publisher.push("app", "1", [{"noise": noise, "small": b"fine"}])
    blob = bytearray(image.blobs[0])
    blob[len(blob) // 2] ^= 4
    registry.blobs[image.layers[0].digest] = bytes(blob)
    view = asker.view(ref(registry), image.layers[0].toc_digest)
    with pytest.raises(LayerstoreError):
        asker.read(view, "noise")
    assert asker.read(view, "small") == b"fine"
    assert asker.store.status()["content"]["refused_units"] >= 1
    assert "event=bytes-refused" in caplog.text


def test_a_silent_registry_costs_one_time_out_an_image_not_one_a_layer(
    asker, publisher, registry, monkeypatch
):
    image = publisher.push("app", "1", [{f"f{n}": bytes([n]) * 9} for n in range(5)])
    monkeypatch.setattr(limits, "RESOLVE_SECONDS", 1.0)
    registry.fault("stall", match="/blobs/", after=0, seconds=20)
    start = time.monotonic()
    for written in image.layers:
        assert asker.reason(ref(registry), written.toc_digest) in ("timeout", "network")
    assert time.monotonic() - start < 4


def test_a_complete_layer_that_lost_its_blob_is_not_complete(asker, publisher, registry):
    image = publisher.push("app", "1", FILES)
    view = asker.view(ref(registry), image.layers[1].toc_digest)
    content = asker.store.layers.open(view.slot).content
    while content.complete_step():
        pass
    asker.store.layers.mark_complete(view.slot)
    asker.close()
    (asker.root / "layers" / str(view.slot) / "blob").write_bytes(b"")
    asker.open()
    assert asker.read(view, "app/main") == b"main" * 5000
    content = asker.store.layers.open(view.slot).content
    assert content.read_blob(0, 10) is None
    while content.complete_step():
        pass
    assert content.read_blob(0, 1 << 20) == image.blobs[1]


@pytest.mark.parametrize("damage", [b"", b"junk", None])
@pytest.mark.parametrize("registry_works", [True, False])
def test_a_damaged_index_is_built_anew_with_the_same_numbers(
    asker, publisher, registry, damage, registry_works
):
    image = publisher.push("app", "1", FILES)
    view = asker.view(ref(registry), image.layers[1].toc_digest)
    asker.read(view, "app/main")
    entry = asker.store.layers.open(view.slot).index.entry_of_path(b"app/main")
    asker.close()
    path = asker.root / "layers" / str(view.slot) / "index"
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    if not registry_works:
        registry.fault("status", match="", status=500)  # the TOC is stored here, too
    asker.open()
    assert asker.read(view, "app/main") == b"main" * 5000
    assert asker.store.layers.open(view.slot).index.entry_of_path(b"app/main") == entry


def test_too_many_waiting_lookups_are_refused_at_once(asker, registry, monkeypatch):
    registry.fault("stall", match="manifests", after=0, seconds=5)
    answered: list[View | Refusal] = []
    start = time.monotonic()
    for number in range(limits.RESOLVE_QUEUE + 50):
        asker.store.resolve(f"{registry.host}/r{number}:1", "sha256:" + "2" * 64, answered.append)
    assert time.monotonic() - start < 2
    assert sum(isinstance(a, Refusal) and a.reason == "busy" for a in answered) >= 30


def test_a_registry_that_says_nothing_holds_no_other_up(asker, publisher, registry):
    registry.fault("latency", match="/silent", seconds=30)
    with SimRegistry() as living:
        image = Publisher(living).push("app", "1", FILES)
        answered: list[View | Refusal] = []
        for number in range(40):
            reference = f"{registry.host}/silent{number}:1"
            asker.store.resolve(reference, Digest("sha256:" + "2" * 64), answered.append)
        asker.view(ref(living), image.layers[0].toc_digest)
        assert answered == []
        assert registry.count() <= limits.RESOLVE_SILENT
        # one time-out tells of all images there, until it answers anything
        until = time.monotonic() + 20
        while len(answered) < 40 and time.monotonic() < until:
            time.sleep(0.05)
        assert {one.reason for one in answered if isinstance(one, Refusal)} <= {
            "network", "timeout", "outage",
        }  # fmt: skip
        assert len(answered) == 40
        own = publisher.push("app", "1", FILES)
        assert asker.reason(ref(registry), own.layers[0].toc_digest) in ("network", "timeout")
        asker.client.manifest(Reference.parse(ref(registry)))
        asker.view(ref(registry), own.layers[1].toc_digest)


def test_what_floods_of_lookups_leave_behind_is_bounded(asker, registry):
    missing = Digest("sha256:" + "2" * 64)
    for number in range(2 * limits.RESOLVE_QUEUE):
        asker.lookup(f"{registry.host}/r{number}:1", missing)
    refusals = asker.store._refusals
    assert len(refusals._refused) == limits.RESOLVE_QUEUE
    assert refusals._asking == {}
    images = asker.store._images
    assert len(images._asked) <= limits.REFRESHED
    errors = [error for _, error in images._asked.values() if error is not None]
    assert errors
    assert all(error.__traceback__ is None for error in errors)
    for number in range(2 * limits.HOSTS):
        with contextlib.suppress(LayerstoreError):
            asker.client.manifest(Reference.parse(f"127.0.0.{number + 2}:1/x:1"))
    assert len(asker.client._hosts) == limits.HOSTS


def test_background_completion_and_the_verified_claim(asker, publisher, registry, monkeypatch):
    asker.close()
    asker.options = {"background": True}
    asker.open()
    image = publisher.push("app", "1", FILES)
    view = asker.view(ref(registry), image.layers[1].digest)
    until = time.monotonic() + 20
    while time.monotonic() < until:
        (report,) = (r for r in asker.store.status()["layers"] if r["slot"] == view.slot)
        if report["complete"]:
            break
        time.sleep(0.05)
    assert report["complete"]
    registry.fault("status", match="", status=500)
    assert asker.read(view, "app/main") == b"main" * 5000
    assert asker.store.layers.open(view.slot).content.read_blob(0, 1 << 20) == image.blobs[1]
