import base64
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerstore.errors import CorruptStorage, StorageError, UsageError
from layerstore.graphroot import atomic, bigdata
from layerstore.graphroot.bigdata import BigData
from layerstore.graphroot.records import ImageRecord
from layerstore.image import Digest

A = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("manifest", "manifest"),
        ("signatures", "signatures"),
        ("a.b.0", "a.b.0"),
        # [T] as podman and containers-storage write them
        (f"manifest-{A}", "=" + base64.b64encode(f"manifest-{A}".encode()).decode()),
        (A, "=" + base64.b64encode(A.encode()).decode()),
        ("signature-0a", "=c2lnbmF0dXJlLTBh"),
        ("Manifest", "=TWFuaWZlc3Q="),
        ("éa", "=w6lh"),
        # the slip: the last character is not looked at
        ("keY", "keY"),
        ("key-", "key-"),
        ("X", "X"),
        ("é", "é"),
        ("=", "="),
    ],
)
def test_file_names(key: str, name: str) -> None:
    assert bigdata.file_name(key) == name
    assert bigdata.key_of(name) == key


@pytest.mark.parametrize("key", ["", ".", "..", "/", "a/", "\0", "k" * 256, "???a", "\ud800a"])
def test_keys_that_give_no_file_name(key: str) -> None:
    with pytest.raises(UsageError):
        bigdata.file_name(key)


@pytest.mark.parametrize("name", ["", "=???", "=bWFuaWZlc3Q=", "..", "a-b", "=w6k"])
def test_names_that_no_key_gives(name: str) -> None:
    assert bigdata.key_of(name) is None


@given(st.text(max_size=60))
def test_names_and_keys_are_one_to_one(key: str) -> None:
    try:
        name = bigdata.file_name(key)
    except UsageError:
        return
    assert "/" not in name
    assert name not in ("", ".", "..")
    assert bigdata.key_of(name) == key


def test_items_are_stored_and_removed(tmp_path: Path) -> None:
    place = tmp_path / "overlay-images/abc"
    bigdata.write(place, A, b"config")
    bigdata.write(place, A, b"config, again")
    assert bigdata.read(place, A) == b"config, again"
    assert place.stat().st_mode & 0o777 == 0o700
    (file,) = place.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    bigdata.remove(place, A)
    bigdata.remove(place, A)
    with pytest.raises(CorruptStorage, match="missing"):
        bigdata.read(place, A)


def test_an_item_that_is_too_large(tmp_path: Path) -> None:
    bigdata.write(tmp_path, "manifest", b"12345")
    assert bigdata.read(tmp_path, "manifest", limit=5) == b"12345"
    with pytest.raises(StorageError, match="larger than 4"):
        bigdata.read(tmp_path, "manifest", limit=4)


def test_a_symbolic_link_is_not_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"keep")
    place = tmp_path / "image"
    place.mkdir()
    (place / "manifest").symlink_to(victim)
    bigdata.write(place, "manifest", b"new")
    assert victim.read_bytes() == b"keep"
    assert bigdata.read(place, "manifest") == b"new"


def test_leftovers_are_swept(tmp_path: Path) -> None:
    bigdata.write(tmp_path, "manifest", b"x")
    (tmp_path / ".tmp-manifest123").touch()
    (tmp_path / ".tmp-=c2ln1").touch()
    atomic.sweep(tmp_path)
    assert os.listdir(tmp_path) == ["manifest"]


def test_the_fields_of_a_record() -> None:
    empty = ImageRecord("x")
    data = BigData.of(empty).with_item("manifest", b"{}").with_item(A, b"12")
    data = data.with_item("manifest", b"{ }")
    record = data.put_into(empty)
    assert record.big_data_names == ("manifest", A)
    assert record.big_data_sizes == {"manifest": 3, A: 2}
    assert record.big_data_digests == {"manifest": Digest.of(b"{ }"), A: Digest.of(b"12")}
    assert BigData.of(record) == data
    assert data.without("manifest").put_into(empty).big_data_names == (A,)
    assert data.without("manifest").without(A) == BigData()


def schema1(signatures: int = 1) -> tuple[bytes, bytes]:
    """A signed schema 1 manifest and the part that counts."""
    body = b'{\n   "schemaVersion": 1,\n   "name": "a"'
    protected = base64.urlsafe_b64encode(
        json.dumps(
            {"formatLength": len(body), "formatTail": base64.urlsafe_b64encode(b"\n}").decode()}
        ).encode()
    ).decode()
    entry = {"header": {}, "signature": "x", "protected": protected.rstrip("=")}
    signed = body + b',\n   "signatures": ' + json.dumps([entry] * signatures).encode() + b"\n}"
    json.loads(signed)
    return signed, body + b"\n}"


def test_the_signatures_of_schema_1_do_not_count() -> None:
    signed, payload = schema1()
    assert bigdata.manifest_digest(signed) == Digest.of(payload)
    assert bigdata.digest_of("manifest-x", signed) == Digest.of(payload)
    assert bigdata.digest_of("config", signed) == Digest.of(signed)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b'{"schemaVersion":2,"signatures":[]}',
        b'{"schemaVersion":1,"signatures":[]}',
        b'{"schemaVersion":1,"signatures":[{"protected":"e30"}]}',
        b'{"schemaVersion":1,"signatures":[{"protected":5}]}',
        b'{"schemaVersion":1,"signatures":"x"',
    ],
)
def test_any_other_manifest_is_its_bytes(data: bytes) -> None:
    assert bigdata.manifest_digest(data) == Digest.of(data)
