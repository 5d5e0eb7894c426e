"""A store whose disk takes nothing: what is known is served, what is new refused, the rest waits."""

from __future__ import annotations

import errno

from lab.simimages import Publisher
from lab.simregistry import SimRegistry
from lab.waiting import until
from layerstore import limits

FILES = [{"app/main": b"main" * 5000, "etc/b": b"b"}]


def test_what_can_wait_waits_for_room(
    asker, publisher: Publisher, registry: SimRegistry, monkeypatch
):
    monkeypatch.setattr(limits, "FULL_DISK_SECONDS", 0.02)
    monkeypatch.setattr(limits, "FULL_DISK_ROOM_BYTES", 1 << 60)
    image = publisher.push("app", "1", FILES)
    other = publisher.push("other", "1", [{"etc/c": b"c" * 3000}])
    view = asker.view(f"{registry.host}/app:1", image.layers[0].toc_digest)
    store = asker.store
    disk = store._objects.disk
    disk.failed(OSError(errno.ENOSPC, "No space left on device"), "cannot write", "it")

    assert asker.view(f"{registry.host}/app:1", image.layers[0].toc_digest) == view
    asked = registry.count("GET")
    reason = asker.reason(f"{registry.host}/other:1", other.layers[0].toc_digest)
    assert (reason, registry.count("GET")) == ("no-room", asked)
    assert asker.read(view, "app/main") == b"main" * 5000

    asked = registry.count("GET")
    store.layers._background = True
    store.layers.complete(view.slot)
    until(lambda: view.slot in store.layers._paused)
    assert registry.count("GET") == asked
    monkeypatch.setattr(limits, "FULL_DISK_ROOM_BYTES", 0)
    until(lambda: not disk.full)
    until(lambda: store._state.is_complete(view.slot))
    asker.view(f"{registry.host}/other:1", other.layers[0].toc_digest)
