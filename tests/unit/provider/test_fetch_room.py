"""Images that are fetched ahead where the disk limit leaves no room for them."""

from __future__ import annotations

import random
from typing import Any

import pytest

from lab.waiting import until
from layerstore import limits
from layerstore.content import DiskRoom
from layerstore.provider import Policy

LIMIT = 16 * limits.MIB
HIGH = LIMIT // 4
ABOVE_HIGH = HIGH + 50_000


@pytest.fixture
def small_disk(asker) -> None:
    asker.options["policy"] = Policy(disk=DiskRoom(limit=LIMIT, keep_free=0.0, high=0.25, low=0.2))
    asker.restart()


def push(publisher, registry, size: int) -> tuple[str, Any]:
    image = publisher.push("app", "1", [{"data": random.Random(size).randbytes(size)}])
    return f"{registry.host}/app:1", image.layers[0]


def fetch(asker, reference: str, *, keep: bool = False) -> dict[str, Any]:
    job = asker.store.fetches.start(reference, (), keep=keep)
    until(lambda: asker.store.fetches.status(job)["done"])
    layers: list[dict[str, Any]] = asker.store.fetches.status(job)["layers"]
    assert len(layers) == 1
    return layers[0]


def test_a_layer_that_could_not_stay_is_not_downloaded(asker, publisher, registry, small_disk):
    reference, pushed = push(publisher, registry, ABOVE_HIGH)
    layer = fetch(asker, reference)
    assert (layer["state"], layer["reason"]) == ("refused", "no-room")
    assert f"it has {pushed.size} bytes, and above {HIGH} bytes the store evicts" in layer["detail"]
    assert "raise disk.limit, or pin the image" in layer["detail"]
    assert sum(path.stat().st_blocks * 512 for path in asker.root.rglob("blob")) < limits.MIB


def test_a_pinned_one_may_pass_the_high_mark(asker, publisher, registry, small_disk):
    reference, _ = push(publisher, registry, ABOVE_HIGH)
    layer = fetch(asker, reference, keep=True)
    assert (layer["state"], layer["detail"]) == ("complete", "")


def test_what_was_evicted_on_its_way_is_not_blamed_on_the_check(
    asker, publisher, registry, small_disk, monkeypatch
):
    reference, _ = push(publisher, registry, limits.MIB)
    real = asker.store.layers.mark_complete

    def evicted_first(slot: int) -> None:
        asker.store.layers.drop_blob(slot)
        real(slot)

    monkeypatch.setattr(asker.store.layers, "mark_complete", evicted_first)
    layer = fetch(asker, reference)
    assert (layer["state"], layer["reason"]) == ("refused", "no-room")
    assert "it was evicted before it was checked" in layer["detail"]
