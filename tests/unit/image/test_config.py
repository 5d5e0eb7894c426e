"""Image configs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerstore import limits
from layerstore.errors import ContentError, InvalidManifest, LimitExceeded
from layerstore.image import Digest, ImageConfig, Platform, parse_config

A = Digest.of(b"a")
CONFIG: dict[str, Any] = {
    "os": "linux",
    "architecture": "arm64",
    "variant": "v8",
    "created": "2024-01-01T00:00:00Z",
    "rootfs": {"type": "layers", "diff_ids": [A, A]},
    "history": [{"created_by": "x"}],
    "config": {"Env": ["A=b"]},
}


def test_fields() -> None:
    assert parse_config(json.dumps(CONFIG).encode()) == ImageConfig(
        platform=Platform("linux", "arm64", "v8"),
        diff_ids=(A, A),
        created="2024-01-01T00:00:00Z",
    )


def test_artifact() -> None:
    assert parse_config(b"{}") == ImageConfig(platform=Platform("", ""), diff_ids=())


@pytest.mark.parametrize(
    "changes",
    [
        {"rootfs": {"type": "other", "diff_ids": []}},
        {"rootfs": {"type": "layers", "diff_ids": ["x"]}},
        {"rootfs": []},
        {"os": 1},
    ],
)
def test_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidManifest):
        parse_config(json.dumps({**CONFIG, **changes}).encode())


def test_bounds() -> None:
    many = {"type": "layers", "diff_ids": [A] * (limits.MANIFEST_LAYERS + 1)}
    with pytest.raises(LimitExceeded):
        parse_config(json.dumps({**CONFIG, "rootfs": many}).encode())
    with pytest.raises(LimitExceeded):
        parse_config(b" " * (limits.CONFIG_BYTES + 1))


@given(st.binary(max_size=100))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    try:
        parse_config(raw)
    except ContentError:
        return
