"""What is claimed of a layer is checked once all of it is here; who lies is quarantined."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from lab import simimages
from lab.waiting import until
from layerstore.errors import VerificationError
from layerstore.image.annotations import ESTARGZ_TOC_DIGEST, ESTARGZ_UNCOMPRESSED_SIZE
from layerstore.provider import DialectL, Ordinary, Policy, Refusal, View
from layerstore.provider.names import name_hash

FILES = [{"bin/sh": b"honest" * 3000, "etc/a": b"a"}]
EVIL = [{"bin/sh": b"evil!!" * 3000, "etc/a": b"a"}]


def ref(registry, repository: str = "app", tag: str = "1") -> str:
    return f"{registry.host}/{repository}:{tag}"


def complete(asker, view: View) -> None:
    """Bring all of the layer here and wait for the verdict."""
    asker.store.layers.hasten(view.slot, lambda _: None)
    until(lambda: state_of(asker, view) in ("verified", "quarantined"))


def state_of(asker, view: View) -> str:
    (layer,) = [one for one in asker.store.status()["layers"] if one["slot"] == view.slot]
    if layer["quarantine"]:
        return "quarantined"
    return "verified" if layer["verified"] else "unknown"


def reopen(asker, **policy: Any) -> None:
    asker.options = {"background": False, "policy": Policy(**policy)}
    asker.restart()


def attack(asker, publisher, registry) -> tuple[Any, Any]:
    """An attacker's image with an honest blob's digest and diff ID, and a TOC of their own.

    Their registry serves their blob under the honest digest.
    """
    honest = publisher.push("app", "1", FILES)
    evil, blob = simimages.layer(EVIL[0])
    good = honest.layers[0]
    config = json.dumps(honest.config).encode()
    annotations = {
        ESTARGZ_TOC_DIGEST: evil.toc_digest,
        ESTARGZ_UNCOMPRESSED_SIZE: str(evil.uncompressed_size),
    }

    def change(manifest: dict[str, Any]) -> None:
        manifest["layers"][0] |= {
            "digest": good.digest, "size": len(blob), "annotations": annotations,
        }  # fmt: skip
        manifest["config"] |= {
            "digest": registry.add_blob("evil", config),
            "size": len(config),
        }

    publisher.push("evil", "1", EVIL, change=change)
    registry.lie_about("evil", good.digest, blob)
    return honest, evil


def test_an_honest_layer_is_verified_and_then_all_is_claimed(asker, publisher, registry):
    image = publisher.push("app", "1", FILES)
    made = image.layers[0]
    view = asker.view(ref(registry), made.toc_digest)
    assert "diff-digest" not in json.loads(view.info)
    complete(asker, view)
    assert state_of(asker, view) == "verified"
    publisher.push("other", "1", FILES)
    for name in (made.toc_digest, made.digest):
        info = json.loads(asker.view(ref(registry, "other"), name).info)
        assert info["compressed-diff-digest"] == made.digest
        assert info["diff-digest"] == made.diff_id
        assert info["diff-size"] == made.uncompressed_size
    asker.restart()
    assert state_of(asker, view) == "verified"


def test_a_config_with_another_diff_id_is_found(asker, publisher, registry, caplog):
    """One who claims a popular layer's diff ID for contents of their own."""
    publisher.push("honest", "1", FILES)
    evil = publisher.push("evil", "1", EVIL)
    config = dict(evil.config)
    config["rootfs"] = {"type": "layers", "diff_ids": ["sha256:" + "5" * 64]}
    raw = json.dumps(config).encode()

    def change(manifest: dict[str, Any]) -> None:
        manifest["config"] |= {"digest": registry.add_blob("liar", raw), "size": len(raw)}

    liar = publisher.push("liar", "1", EVIL, change=change)
    made = liar.layers[0]
    view = asker.view(ref(registry, "liar"), made.digest)
    honest = asker.lookup(ref(registry, "evil"), made.digest)
    assert isinstance(honest, Refusal), "the second story about one blob is not shown"
    assert honest.reason == "contradiction"
    until(lambda: state_of(asker, view) == "quarantined")
    with pytest.raises(VerificationError, match="quarantine"):
        asker.store.layers.open(view.slot)
    assert "event=layer-quarantined" in caplog.text
    assert asker.reason(ref(registry, "liar"), made.toc_digest) == "quarantined"
    # those who tell the truth about the same blob are served
    until(lambda: isinstance(asker.lookup(ref(registry, "evil"), made.digest), View))
    asker.restart()
    with pytest.raises(VerificationError, match="quarantine"):
        asker.store.layers.open(view.slot)
    assert asker.store.quarantined(asker.store.view(view.key))


@pytest.mark.parametrize("dialect", ["L", "T"])
def test_an_honest_digest_with_the_attackers_toc(asker, publisher, registry, dialect):
    honest, evil = attack(asker, publisher, registry)
    good = honest.layers[0]
    name = good.digest if dialect == "L" else evil.toc_digest
    view = asker.view(ref(registry, "evil"), name)
    info = json.loads(view.info)
    assert "compressed-diff-digest" not in info
    assert dialect == "L" or "diff-digest" not in info
    complete_or_doubt(asker, view)
    assert state_of(asker, view) == "quarantined"
    for one in (good.digest, evil.toc_digest):
        known = asker.store.view(name_hash(ref(registry, "evil"), one))
        result = known if known is not None else asker.lookup(ref(registry, "evil"), one)
        if isinstance(result, View):
            assert asker.store.quarantined(result)
        else:
            assert result.reason == "quarantined"
    # the honest image gets honest files, by either name
    for one in (good.digest, good.toc_digest):
        assert asker.read(asker.view(ref(registry), one), "bin/sh") == FILES[0]["bin/sh"]


def complete_or_doubt(asker, view: View) -> None:
    asker.store.layers.hasten(view.slot, lambda _: None)
    until(lambda: state_of(asker, view) == "quarantined")


def test_who_repeats_a_lie_is_refused_at_once_whatever_else_they_claim(asker, publisher, registry):
    honest, evil = attack(asker, publisher, registry)
    lie = "sha256:" + "6" * 64
    for repository in ("again", "third"):
        registry.lie_about(repository, honest.layers[0].digest, simimages.layer(EVIL[0])[1])

    def another_diff_id(manifest: dict[str, Any]) -> None:
        change_layer(manifest)
        config = {
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [lie]},
        }
        raw = json.dumps(config).encode()
        for repository in ("again", "third"):
            digest = registry.add_blob(repository, raw)
        manifest["config"] |= {"digest": digest, "size": len(raw)}

    evil_manifest = json.loads(registry.manifests["evil", "1"][0])

    def change_layer(manifest: dict[str, Any]) -> None:
        manifest["layers"] = evil_manifest["layers"]

    publisher.push("again", "1", EVIL, change=another_diff_id)
    # both are offered by now, and one of them is found out
    first = asker.view(ref(registry, "evil"), evil.toc_digest)
    second = asker.view(ref(registry, "again"), evil.toc_digest)
    assert first.slot != second.slot
    complete_or_doubt(asker, first)
    assert state_of(asker, second) == "quarantined"

    lie = "sha256:" + "8" * 64
    publisher.push("third", "1", EVIL, change=another_diff_id)
    for _ in range(2):
        for name in (evil.toc_digest, evil_manifest["layers"][0]["digest"]):
            assert asker.reason(ref(registry, "third"), name) == "quarantined"
        asker.restart()


def test_where_layers_must_be_verified_first_the_attack_fails_from_the_start(
    asker, publisher, registry
):
    reopen(asker, dialect_l=DialectL.VERIFIED, ordinary=Ordinary.EAGER)
    honest, _evil = attack(asker, publisher, registry)
    good = honest.layers[0]
    assert asker.reason(ref(registry, "evil"), good.digest) == "verification"
    view = asker.view(ref(registry), good.digest)
    assert json.loads(view.info)["compressed-diff-digest"] == good.digest
    assert asker.read(view, "bin/sh") == FILES[0]["bin/sh"]


def test_dialect_l_can_be_switched_off(asker, publisher, registry):
    reopen(asker, dialect_l=DialectL.OFF)
    image = publisher.push("app", "1", FILES)
    assert asker.reason(ref(registry), image.layers[0].digest) == "dialect-l-off"
    asker.view(ref(registry), image.layers[0].toc_digest)


def test_lost_bytes_are_no_lie(asker, publisher, registry, caplog):
    image = publisher.push("app", "1", FILES)
    view = asker.view(ref(registry), image.layers[0].toc_digest)
    layer = asker.store.layers.open(view.slot)
    while layer.content.complete_step():
        pass
    blob = asker.root / "layers" / str(view.slot) / "blob"
    data = bytearray(blob.read_bytes())
    data[30] ^= 1  # the disk has lost a bit of a tar header after the digest was checked
    blob.write_bytes(data)
    asker.store.layers.mark_complete(view.slot)
    asker.store.layers.verified(view.slot).wait(10)
    assert "event=layer-lost-bytes" in caplog.text
    complete(asker, view)
    assert state_of(asker, view) == "verified"


def test_bytes_that_came_damaged_are_no_lie(asker, publisher, registry):
    image = publisher.push("app", "1", [FILES[0] | {"big": random.Random(1).randbytes(3 << 20)}])
    made = image.layers[0]
    blob = registry.blobs[made.digest]
    view = asker.view(ref(registry), made.toc_digest)
    registry.lie_about("app", made.digest, bytes(len(blob)))
    content = asker.store.layers.open(view.slot).content
    for _ in range(4):
        assert content.complete_step(), "fetched once more, at once"
        with pytest.raises(VerificationError):
            content.complete_step()
    assert not asker.store.quarantined(view)
    registry.lie_about("app", made.digest, blob)
    complete(asker, view)
    assert state_of(asker, view) == "verified"
