"""Manifests and indexes: every document means one thing or is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerstore import limits
from layerstore.errors import ContentError, InvalidManifest, LimitExceeded
from layerstore.image import Digest, Index, Manifest, Platform, media_types, parse_manifest

A, B = Digest.of(b"a"), Digest.of(b"b")
CONFIG = {"mediaType": media_types.OCI_CONFIG, "digest": A, "size": 1}
LAYER = {
    "mediaType": media_types.OCI_LAYER_GZIP,
    "digest": B,
    "size": 2,
    "annotations": {"k": "v"},
}
MANIFEST: dict[str, Any] = {
    "schemaVersion": 2,
    "mediaType": media_types.OCI_MANIFEST,
    "config": CONFIG,
    "layers": [LAYER, LAYER],
    "annotations": {"x": "y"},
}
ENTRY: dict[str, Any] = {
    "mediaType": media_types.OCI_MANIFEST,
    "digest": A,
    "size": 3,
    "platform": {"os": "linux", "architecture": "arm", "variant": "v7", "os.version": "1"},
}
INDEX: dict[str, Any] = {
    "schemaVersion": 2,
    "mediaType": media_types.OCI_INDEX,
    "manifests": [ENTRY],
}


def _raw(base: dict[str, Any], **changes: Any) -> bytes:
    document = {**base, **changes}
    return json.dumps({k: v for k, v in document.items() if v != "REMOVE"}).encode()


def test_manifest() -> None:
    manifest = parse_manifest(_raw(MANIFEST))
    assert isinstance(manifest, Manifest)
    assert manifest.media_type == media_types.OCI_MANIFEST
    assert (manifest.config.digest, manifest.config.size) == (A, 1)
    assert isinstance(manifest.config.digest, Digest)
    assert [layer.annotations for layer in manifest.layers] == [{"k": "v"}] * 2
    assert manifest.annotations == {"x": "y"}


def test_index() -> None:
    index = parse_manifest(_raw(INDEX))
    assert isinstance(index, Index)
    assert index.manifests[0].platform == Platform("linux", "arm", "v7")


@pytest.mark.parametrize(
    ("base", "stated", "header", "kind"),
    [
        (MANIFEST, media_types.DOCKER_MANIFEST, None, media_types.DOCKER_MANIFEST),
        (INDEX, media_types.DOCKER_LIST, media_types.DOCKER_LIST, media_types.DOCKER_LIST),
        (MANIFEST, "REMOVE", None, media_types.OCI_MANIFEST),
        (INDEX, "REMOVE", None, media_types.OCI_INDEX),
        (MANIFEST, "REMOVE", media_types.OCI_MANIFEST, media_types.OCI_MANIFEST),
        (MANIFEST, "REMOVE", "text/plain", media_types.OCI_MANIFEST),
        (
            MANIFEST,
            media_types.OCI_MANIFEST,
            media_types.OCI_MANIFEST.upper() + "; charset=utf-8",
            media_types.OCI_MANIFEST,
        ),
    ],
)
def test_media_types(base: dict[str, Any], stated: str, header: str | None, kind: str) -> None:
    assert parse_manifest(_raw(base, mediaType=stated), header).media_type == kind


def test_null_is_absent() -> None:
    layer = {**LAYER, "annotations": None, "urls": None, "platform": None}
    manifest = parse_manifest(_raw(MANIFEST, layers=[layer], annotations=None, manifests=None))
    assert isinstance(manifest, Manifest)
    assert manifest.layers[0].annotations == {}


@pytest.mark.parametrize(
    ("base", "header", "changes"),
    [
        (MANIFEST, None, {"schemaVersion": 1}),
        (MANIFEST, None, {"schemaVersion": 3}),
        (MANIFEST, None, {"schemaVersion": "2"}),
        (MANIFEST, None, {"schemaVersion": "REMOVE"}),
        (MANIFEST, None, {"manifests": [ENTRY]}),
        (MANIFEST, None, {"manifests": []}),
        (MANIFEST, None, {"fsLayers": []}),
        (MANIFEST, None, {"history": []}),
        (INDEX, None, {"layers": []}),
        (INDEX, None, {"config": CONFIG}),
        (MANIFEST, None, {"mediaType": media_types.OCI_INDEX}),
        (MANIFEST, None, {"mediaType": "REMOVE", "manifests": [ENTRY]}),
        (MANIFEST, None, {"mediaType": "REMOVE", "layers": "REMOVE"}),
        (MANIFEST, None, {"mediaType": "application/json"}),
        (MANIFEST, media_types.DOCKER_MANIFEST, {}),
        (MANIFEST, media_types.OCI_INDEX, {}),
        (MANIFEST, media_types.DOCKER_MANIFEST, {"mediaType": "REMOVE"}),
        (MANIFEST, media_types.OCI_INDEX, {"mediaType": "REMOVE"}),
        (MANIFEST, None, {"config": "REMOVE"}),
        (MANIFEST, None, {"layers": "REMOVE"}),
        (MANIFEST, None, {"layers": {}}),
        (MANIFEST, None, {"config": {**CONFIG, "size": -1}}),
        (MANIFEST, None, {"config": {**CONFIG, "size": 1 << 63}}),
        (MANIFEST, None, {"config": {**CONFIG, "size": 1.5}}),
        (MANIFEST, None, {"config": {**CONFIG, "size": "1"}}),
        (MANIFEST, None, {"config": {**CONFIG, "size": True}}),
        (MANIFEST, None, {"config": {**CONFIG, "mediaType": ""}}),
        (MANIFEST, None, {"config": {**CONFIG, "digest": "sha256:00"}}),
        (MANIFEST, None, {"config": {**CONFIG, "digest": 5}}),
        (MANIFEST, None, {"config": {**CONFIG, "Digest": B}}),
        (MANIFEST, None, {"Layers": []}),
        (MANIFEST, None, {"annotations": {"a": 1}}),
        (INDEX, None, {"manifests": [{**ENTRY, "platform": {"os": "linux"}}]}),
    ],
)
def test_refused(base: dict[str, Any], header: str | None, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidManifest):
        parse_manifest(_raw(base, **changes), header)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"null",
        b"\xff",
        b"{",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"schemaVersion":2,"schemaVersion":2}',
        _raw(MANIFEST)[:-1] + b',"layers":[]}',
        _raw(MANIFEST).replace(b'"k": "v"', b'"k": "v", "k": "w"'),
    ],
)
def test_bytes_that_are_refused(raw: bytes) -> None:
    with pytest.raises(InvalidManifest):
        parse_manifest(raw)


@pytest.mark.parametrize(
    "raw",
    [
        b" " * (limits.MANIFEST_BYTES + 1),
        _raw(MANIFEST, layers=[LAYER] * (limits.MANIFEST_LAYERS + 1)),
        _raw(INDEX, manifests=[ENTRY] * (limits.INDEX_MANIFESTS + 1)),
        _raw(MANIFEST, annotations={str(n): "" for n in range(limits.ANNOTATIONS + 1)}),
    ],
)
def test_bounds(raw: bytes) -> None:
    with pytest.raises(LimitExceeded):
        parse_manifest(raw)


def test_select() -> None:
    def entry(os: str, architecture: str, variant: str = "") -> dict[str, Any]:
        platform = {"os": os, "architecture": architecture, "variant": variant}
        digest = Digest.of(f"{os}/{architecture}/{variant}".encode())
        return {**ENTRY, "platform": platform, "digest": digest}

    entries = [
        {**ENTRY, "platform": None},
        entry("unknown", "unknown"),
        entry("linux", "arm", "v6"),
        entry("linux", "arm", "v7"),
        entry("linux", "amd64"),
        entry("linux", "arm64", "v8"),
    ]
    index = parse_manifest(_raw(INDEX, manifests=entries))
    assert isinstance(index, Index)
    for wanted, found in {
        "linux/arm/v7": "linux/arm/v7",
        "linux/arm/v6": "linux/arm/v6",
        "linux/arm/v8": "linux/arm/v7",
        "linux/arm64": "linux/arm64/v8",
        "linux/amd64": "linux/amd64/",
        "linux/amd64/v3": "linux/amd64/",
    }.items():
        chosen = index.select(Platform.parse(wanted))
        assert chosen is not None
        assert chosen.digest == Digest.of(found.encode()), wanted
    assert index.select(Platform.parse("linux/arm/v5")) is None
    assert index.select(Platform.parse("windows/amd64")) is None


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["mediaType", "digest", "size", "layers", "annotations", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@given(
    st.sampled_from([MANIFEST, INDEX]),
    st.dictionaries(
        st.sampled_from([*MANIFEST, "manifests", "history", "other"]), _JSON, max_size=3
    ),
)
def test_any_change_is_read_or_refused(base: dict[str, Any], changes: dict[str, Any]) -> None:
    try:
        parsed = parse_manifest(_raw(base, **changes))
    except ContentError:
        return
    descriptors = parsed.layers if isinstance(parsed, Manifest) else parsed.manifests
    assert all(entry.size >= 0 and Digest.parse(entry.digest) for entry in descriptors)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(ContentError):
        parse_manifest(raw)
