"""Layers whose annotations name a TOC, but do not lead to it: Podman asks by that name all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from layerstore import limits
from layerstore.image import Platform, Reference, media_types
from layerstore.image.annotations import (
    ESTARGZ_TOC_DIGEST,
    ZSTD_TARSPLIT_POSITION,
    ZSTD_TOC_DIGEST,
    ZSTD_TOC_POSITION,
)
from layerstore.provider import Ordinary
from layerstore.provider.explain import explain

FILES = [{"a": b"a" * 500}, {"b": b"b" * 500}]
TOC = "sha256:" + "4" * 64

Change = Callable[[dict[str, Any]], None]


def chunked(**notes: str) -> Change:
    """The first layer claims to be zstd:chunked."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["layers"][0]["mediaType"] = media_types.OCI_LAYER_ZSTD
        manifest["layers"][0]["annotations"] = {ZSTD_TOC_DIGEST: TOC} | notes

    return change


def of_type(media_type: str) -> Change:
    """The first layer is of another type than its annotations, which are those of eStargz."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["layers"][0]["mediaType"] = media_type
        manifest["layers"][0]["annotations"] = {ESTARGZ_TOC_DIGEST: TOC}

    return change


@pytest.mark.parametrize(
    ("change", "reason", "said"),
    [
        (chunked(), "bad-toc-annotation", "do not tell the place"),
        (chunked(**{ZSTD_TOC_POSITION: "-5:3:9:1"}), "bad-toc-annotation", "is no position"),
        (chunked(**{ZSTD_TOC_POSITION: "5:3:9:2"}), "bad-toc-annotation", "unknown type 2"),
        (
            chunked(**{ZSTD_TOC_POSITION: "5:3:9:1", ZSTD_TARSPLIT_POSITION: "-1:2:3"}),
            "bad-toc-annotation",
            "is no position",
        ),
        (of_type(media_types.OCI_LAYER), "bad-toc-annotation", "the layer is tar"),
        (of_type(media_types.OCI_LAYER_ZSTD), "bad-toc-annotation", "do not tell the place"),
        (of_type("application/x-odd"), "unsupported-format", "application/x-odd"),
    ],
)
def test_what_is_wrong_with_them_is_said_by_lookup_and_explain(
    asker, publisher, registry, caplog, change: Change, reason: str, said: str
):
    image = publisher.push("app", "1", FILES, change=change)
    reference = f"{registry.host}/app:1"
    assert asker.reason(reference, TOC) == reason
    (line,) = [r.getMessage() for r in caplog.records if "lookup-refused" in r.getMessage()]
    assert f"reason={reason}" in line
    assert said in line
    assert image.layers[0].digest in line
    (found,) = explain(
        asker.store, Reference.parse(reference), (Platform("linux", "amd64"),), Ordinary.OFF
    )
    verdict = found.layers[0].dialect_t
    assert (verdict.served, verdict.reason) == ("never", reason)
    assert said in verdict.detail
    # the image's other layer is none the worse for it
    asker.view(reference, image.layers[1].toc_digest)


def test_two_formats_at_once_are_explained(asker, publisher, registry):
    """Podman refuses such an image itself."""

    def both(manifest: dict[str, Any]) -> None:
        manifest["layers"][0]["annotations"][ZSTD_TOC_DIGEST] = TOC

    publisher.push("app", "1", FILES, change=both)
    reference = Reference.parse(f"{registry.host}/app:1")
    (found,) = explain(asker.store, reference, (Platform("linux", "amd64"),), Ordinary.OFF)
    assert found.layers[0].dialect_t.reason == "bad-toc-annotation"
    assert "two formats" in found.layers[0].dialect_t.detail


def test_an_image_that_was_mended_is_served(asker, publisher, registry, monkeypatch):
    def without_place(manifest: dict[str, Any]) -> None:
        manifest["layers"][0]["mediaType"] = media_types.OCI_LAYER_ZSTD

    reference = f"{registry.host}/app:1"
    bad = publisher.push("app", "1", FILES, change=without_place)
    toc = bad.layers[0].toc_digest
    assert asker.reason(reference, toc) == "bad-toc-annotation"
    publisher.push("app", "1", FILES)
    monkeypatch.setattr(limits, "REFRESH_SECONDS", 0.0)
    monkeypatch.setattr(limits, "FAILURE_SECONDS", 0.0)
    assert asker.read(asker.view(reference, toc), "a") == FILES[0]["a"]


@pytest.mark.parametrize("with_reference", [True, False])
def test_a_name_in_sha512_is_a_refused_lookup(asker, publisher, registry, caplog, with_reference):
    publisher.push("app", "1", FILES)
    reference = f"{registry.host}/app:1" if with_reference else ""
    assert asker.reason(reference, "sha512:" + "0" * 128) == "unsupported-format"
    assert asker.store.status()["lookups"] == {"unsupported-format": 1}
    assert caplog.text.count("event=lookup-refused reason=unsupported-format") == 1
