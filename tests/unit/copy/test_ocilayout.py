"""OCI layouts as a source and destination."""

import json
from pathlib import Path

import pytest

from layerstore.copy.ocilayout import OciLayout, parse_name
from layerstore.errors import (
    InvalidManifest,
    LimitExceeded,
    NotFound,
    StorageError,
    UsageError,
    VerificationError,
)
from layerstore.image import Digest, media_types

CONFIG = b"{}"
MANIFEST = json.dumps(
    {
        "schemaVersion": 2,
        "mediaType": media_types.OCI_MANIFEST,
        "config": {"mediaType": "x", "digest": str(Digest.of(CONFIG)), "size": 2},
        "layers": [],
    }
).encode()


def put(layout: OciLayout, raw: bytes = MANIFEST, *, top: bool = True) -> None:
    layout.put_manifest(raw, media_types.OCI_MANIFEST, top=top)


@pytest.mark.parametrize(
    ("text", "parts"),
    [("dir", (Path("dir"), None)), ("/a/b:c", (Path("/a/b"), "c")), ("a:b:c", (Path("a"), "b:c"))],
)
def test_names(text: str, parts: tuple[Path, str | None]) -> None:
    assert parse_name(text) == parts


@pytest.mark.parametrize("text", ["", ":tag", "dir:"])
def test_names_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        parse_name(text)


def test_what_is_put_comes_back(tmp_path: Path) -> None:
    layout = OciLayout(tmp_path / "new" / "layout", "v1")
    digest = Digest.of(CONFIG)
    assert not layout.has_blob(digest, 2)
    layout.put_blob(digest, lambda: [b"{", b"}"], 2)
    put(layout)
    assert layout.has_blob(digest, 2)
    assert not layout.has_blob(digest, 3)
    assert layout.blob(digest, 10) == CONFIG
    assert layout.read_range(digest, 2, 1, 1) == b"}"
    fetched = layout.manifest()
    assert (fetched.raw, fetched.media_type) == (MANIFEST, media_types.OCI_MANIFEST)
    assert layout.manifest(Digest.of(MANIFEST)).raw == MANIFEST
    assert json.loads((tmp_path / "new/layout/oci-layout").read_bytes()) == {
        "imageLayoutVersion": "1.0.0"
    }
    assert not list(tmp_path.rglob(".new-*"))


def test_names_are_replaced_and_others_stay(tmp_path: Path) -> None:
    other = MANIFEST + b" "
    put(OciLayout(tmp_path, "a"))
    put(OciLayout(tmp_path, "b"))
    put(OciLayout(tmp_path, "a"), other)
    assert OciLayout(tmp_path, "a").manifest().raw == other
    assert OciLayout(tmp_path, "b").manifest().raw == MANIFEST
    with pytest.raises(UsageError):
        OciLayout(tmp_path, None).manifest()
    with pytest.raises(NotFound):
        OciLayout(tmp_path, "c").manifest()


def test_without_a_tag_the_only_image_is_meant(tmp_path: Path) -> None:
    put(OciLayout(tmp_path, None))
    put(OciLayout(tmp_path, None), MANIFEST + b" ")
    assert OciLayout(tmp_path, None).manifest().raw == MANIFEST + b" "


def test_a_manifest_that_is_not_on_top_has_no_name(tmp_path: Path) -> None:
    put(OciLayout(tmp_path, "a"), top=False)
    with pytest.raises(NotFound):
        OciLayout(tmp_path, "a").manifest()


def test_damage_and_size_are_noticed(tmp_path: Path) -> None:
    layout = OciLayout(tmp_path, "a")
    put(layout)
    digest = Digest.of(MANIFEST)
    with pytest.raises(LimitExceeded):
        layout.blob(digest, 10)
    (tmp_path / "blobs/sha256" / digest.hex).write_bytes(MANIFEST + b" ")
    with pytest.raises(VerificationError):
        layout.manifest()


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b'{"schemaVersion":2,"manifests":[{}]}'])
def test_a_malformed_index(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "index.json").write_bytes(raw)
    with pytest.raises((InvalidManifest, NotFound)):
        OciLayout(tmp_path, None).manifest()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError):
        put(OciLayout(tmp_path / "file", "a"))
