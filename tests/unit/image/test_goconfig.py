"""Configs and manifests that Podman refuses, each tried with ``podman pull`` of 4.3.1 and 5.4.2."""

from __future__ import annotations

import json
from typing import Any

import pytest

from layerstore.errors import InvalidManifest
from layerstore.image.goconfig import require_readable_config, require_readable_manifest

GOOD: dict[str, Any] = {
    "created": "2024-02-29T12:00:00.123456789+02:00",
    "architecture": "amd64",
    "os": "linux",
    "os.features": ["a"],
    "config": {
        "Env": ["A=b"],
        "Cmd": None,
        "Labels": {"a": "b"},
        "ExposedPorts": {"80/tcp": {}},
        "Healthcheck": {"Test": ["NONE"], "Interval": 3000000000},
        "Unknown": 5,
    },
    "container_config": {"Tty": False},
    "rootfs": {"type": "layers", "diff_ids": ["sha256:x"]},
    "history": [{"created": "0001-01-01T00:00:00Z", "empty_layer": True}, None],
    "size": 5,
    "moby.buildkit": [1, {"a": 1.5}],
}


def test_what_builders_write_is_read() -> None:
    require_readable_config(json.dumps(GOOD).encode())
    require_readable_config(b"{}")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        *(
            ({"created": value}, "created: not a time")
            for value in (
                "not a time",
                5,
                "",
                "9999999-01-01T00:00:00Z",
                "2020-01-01t00:00:00z",
                "2020-01-01 00:00:00Z",
                "2020-01-01T00:00:60Z",
                "2023-02-29T00:00:00Z",
            )
        ),
        ({"CREATED": "zzz"}, "created: not a time"),
        ({"history": "x"}, "history: not a list"),
        ({"history": [{"created_by": 7}]}, r"history\[0\]\.created_by: not a string"),
        ({"history": [{"created": "x"}]}, r"history\[0\]\.created: not a time"),
        ({"history": [{"empty_layer": "x"}]}, r"history\[0\]\.empty_layer: not true or false"),
        ({"config": 7}, "config: not an object"),
        ({"config": []}, "config: not an object"),
        ({"config": {"Labels": {"a": 5}}}, r"config\.labels\.'a': not a string"),
        ({"config": {"Cmd": "x"}}, r"config\.cmd: not a list"),
        ({"config": {"Env": {"a": 1}}}, r"config\.env: not a list"),
        ({"config": {"Volumes": {"/a": 5}}}, r"config\.volumes\.'/a': not an object"),
        ({"config": {"Healthcheck": {"Test": 5}}}, r"config\.healthcheck\.test: not a list"),
        ({"config": {"Shell": 7}}, r"config\.shell: not a list"),
        ({"config": {"StopTimeout": 1.5}}, r"config\.stoptimeout: not a whole number"),
        ({"architecture": 5}, "architecture: not a string"),
        ({"os.features": "x"}, r"os\.features: not a list"),
        ({"author": 5}, "author: not a string"),
        ({"container": 5}, "container: not a string"),
        ({"size": 1 << 63}, "size: not a whole number"),
        ({"rootfs": {"type": 5}}, r"rootfs\.type: not a string"),
    ],
)
def test_a_value_of_another_type_is_named(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidManifest, match=told):
        require_readable_config(json.dumps(GOOD | changed).encode())


def test_both_of_two_values_must_be_right() -> None:
    with pytest.raises(InvalidManifest, match="author"):
        require_readable_config(b'{"author": 5, "author": "x"}')


@pytest.mark.parametrize("raw", [b"", b"[1]", b"{", b"[" * 100000])
def test_what_is_no_config_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidManifest):
        require_readable_config(raw)


DESCRIPTOR: dict[str, Any] = {
    "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
    "digest": "sha256:" + "0" * 64,
    "size": 5,
    "urls": ["https://example.com"],
    "annotations": {"a": "b"},
    "data": "aGVs\nbG8=",
    "platform": {"os": "linux", "architecture": "amd64", "os.features": ["x"]},
    "artifactType": "a/b",
}
MANIFEST: dict[str, Any] = {
    "schemaVersion": 2,
    "config": DESCRIPTOR,
    "layers": [DESCRIPTOR, {**DESCRIPTOR, "urls": None}],
    "subject": DESCRIPTOR,
    "annotations": {},
    "artifactType": None,
    "unknown": [7],
}


def test_manifests_and_indexes_are_read() -> None:
    require_readable_manifest(json.dumps(MANIFEST).encode())
    require_readable_manifest(json.dumps({"manifests": [DESCRIPTOR], "layers": None}).encode())


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"subject": 7}, "subject: not an object"),
        ({"SUBJECT": []}, "subject: not an object"),
        ({"subject": {**DESCRIPTOR, "size": "5"}}, "subject.size: not a whole number"),
        ({"artifactType": []}, "artifacttype: not a string"),
        ({"annotations": {"a": 7}}, "annotations.'a': not a string"),
        ({"config": {**DESCRIPTOR, "data": "x"}}, "config.data: not base64"),
        ({"config": {**DESCRIPTOR, "data": 7}}, "config.data: not base64"),
        ({"config": {**DESCRIPTOR, "artifactType": 1.5}}, "config.artifacttype: not a string"),
        ({"layers": [{**DESCRIPTOR, "data": "\u00e9"}]}, r"layers\[0\].data: not base64"),
        ({"layers": [{**DESCRIPTOR, "platform": 7}]}, r"layers\[0\].platform: not an object"),
        ({"manifests": [DESCRIPTOR, {"urls": 7}]}, r"manifests\[1\].urls: not a list"),
    ],
)
def test_manifests_that_podman_refuses(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidManifest, match=told):
        require_readable_manifest(json.dumps({**MANIFEST, **changed}).encode())
