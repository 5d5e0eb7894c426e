"""Where a layer's bytes come from when some places fail or lie, and what goes on afterwards."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from lab.simimages import Publisher
from lab.simregistry import SimRegistry
from layerstore import limits
from layerstore.content import LayerContent
from layerstore.errors import ContentError
from layerstore.formats import parse_footer
from layerstore.formats.footer import build_footer

FILES = [{"app/main": bytes(range(256)) * 2000, "etc/b": b"b"}]


@pytest.fixture
def second() -> Iterator[SimRegistry]:
    with SimRegistry() as registry:
        yield registry


@pytest.mark.parametrize("fault", ["reset", "status", "short"])
def test_a_place_that_fails_later_does_not_hide_the_one_that_works(
    asker, publisher, registry, second, monkeypatch, fault
):
    monkeypatch.setattr(limits, "TOC_TAIL_MIN_BYTES", 1024)
    monkeypatch.setattr(limits, "BACKOFF_FIRST_SECONDS", 0.001)
    files = [{f"f{number}": bytes([number]) + b"x" * 20_000 for number in range(200)}]
    image = publisher.push("app", "1", files)
    Publisher(second).push("app", "1", files)
    name = image.layers[0].toc_digest
    asker.view(f"{registry.host}/app:1", name)
    view = asker.view(f"{second.host}/app:1", name)
    second.fault(fault, match="/blobs/", status=503, after=0)
    begin = time.monotonic()
    assert asker.read(view, "f3") == files[0]["f3"]
    assert time.monotonic() - begin < 5
    failed = second.count("GET", image.layers[0].digest)
    assert asker.read(view, "f150") == files[0]["f150"]
    assert second.count("GET", image.layers[0].digest) == failed


def test_a_store_without_references_knows_its_sources_after_a_restart(
    asker, publisher, registry, monkeypatch
):
    monkeypatch.setattr(limits, "TOC_TAIL_MIN_BYTES", 1024)
    image = publisher.push("app", "1", [*FILES, {"other": b"other"}])
    asker.view(f"{registry.host}/app:1", image.layers[1].toc_digest)
    view = asker.view("", image.layers[0].toc_digest)
    asker.restart()
    assert asker.read(view, "app/main") == FILES[0]["app/main"]


def test_a_layer_of_another_size_under_known_digests_is_refused(asker, publisher, registry, second):
    """The index and what is fetched depend on the size, and neither digest tells it."""
    image = publisher.push("app", "1", FILES)
    digest, blob = image.layers[0].digest, image.blobs[0]
    toc_offset = parse_footer(blob[-51:], len(blob)).toc_offset
    longer = blob[:toc_offset] + bytes(512) + blob[toc_offset:-51] + build_footer(toc_offset + 512)

    def lie(manifest: dict[str, Any]) -> None:
        manifest["layers"][0]["size"] = len(longer)

    evil = Publisher(second).push("evil", "1", FILES, change=lie)
    assert evil.layers[0].digest == digest
    second.blobs[digest] = longer
    asker.view(f"{second.host}/evil:1", image.layers[0].toc_digest)
    assert asker.reason(f"{registry.host}/app:1", image.layers[0].toc_digest) == "invalid-layer"


def test_background_work_goes_on_after_the_disk_failed_once(
    asker, publisher, registry, monkeypatch
):
    monkeypatch.setattr(limits, "BACKGROUND_RETRY_SECONDS", 0.05)
    monkeypatch.setattr(limits, "BACKGROUND_QUIET_SECONDS", 0.05)
    real, failures = LayerContent.complete_step, [OSError(5, "Input/output error")]

    def step(self: LayerContent) -> bool:
        if failures:
            raise failures.pop()
        return real(self)

    monkeypatch.setattr(LayerContent, "complete_step", step)
    asker.options["background"] = True
    asker.restart()
    image = publisher.push("app", "1", FILES)
    view = asker.view(f"{registry.host}/app:1", image.layers[0].toc_digest)
    content = asker.store.layers.open(view.slot).content
    until = time.monotonic() + 8
    while not content.complete and time.monotonic() < until:
        time.sleep(0.02)
    assert not failures
    assert content.complete


def test_the_root_is_listed_while_the_database_waits_for_the_disk(asker, publisher, registry):
    image = publisher.push("app", "1", FILES)
    asker.view(f"{registry.host}/app:1", image.layers[0].toc_digest)
    listed = threading.Event()

    def list_root() -> None:
        assert asker.store.references() == (f"{registry.host}/app:1",)
        listed.set()

    with asker.store._state._lock:
        threading.Thread(target=list_root, daemon=True).start()
        assert listed.wait(20)


def test_wrong_bytes_are_fetched_again_from_another_place(
    asker, publisher, registry, second, monkeypatch
):
    """An image that claims a known layer must not keep that layer's own image from its bytes."""
    monkeypatch.setattr(limits, "TOC_TAIL_MIN_BYTES", 1024)
    files = [{f"f{number}": bytes([number]) + b"x" * 20_000 for number in range(200)}]
    image = publisher.push("app", "1", files)
    Publisher(second).push("app", "1", files)
    view = asker.view(f"{registry.host}/app:1", image.layers[0].toc_digest)
    asker.view(f"{second.host}/app:1", image.layers[0].toc_digest)
    blob = second.blobs[image.layers[0].digest]
    second.blobs[image.layers[0].digest] = bytes(len(blob))
    with pytest.raises(ContentError):
        asker.read(view, "f3")
    assert asker.read(view, "f3") == files[0]["f3"]
