"""Whether Go's ``encoding/json`` reads configs and manifests as containers/image needs them.

Podman refuses to pull an image whose config or manifest has a value of the wrong type; but once
such an image is in the storage, ``podman images`` fails for all of them (config), or ``podman
inspect`` for this one (manifest).  So what comes into a storage is held to the same types: OCI
image-spec v1 ``Image``, ``Manifest`` and ``Index``, and containers/image ``Schema2Image``.  Keys are matched whatever their case, ``null`` is a value of every type, of
keys given twice both must be right, and unknown keys are free.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import re
from collections.abc import Callable
from typing import Any, Final

from layerstore.errors import InvalidManifest

_Test = Callable[[Any], str]
"""Tells the place of what is wrong below the value, and what was expected; or nothing."""

_TIME: Final = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)T([01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d+)?"
    r"(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)",
    re.ASCII,
)
_LEAP_YEAR: Final = 2000
_INT64: Final = 1 << 63


class _Object(list[tuple[str, Any]]):
    """The members of an object as they were written."""


def require_readable_config(raw: bytes) -> None:
    """Raise ``InvalidManifest`` for a config that Podman would not read."""
    _require(raw, "config", _IMAGE)


def require_readable_manifest(raw: bytes) -> None:
    """Raise ``InvalidManifest`` for a manifest or index that Podman would not read."""
    _require(raw, "manifest", _MANIFEST)


def _require(raw: bytes, what: str, test: _Test) -> None:
    try:
        document = json.loads(raw.decode("utf-8", "replace"), object_pairs_hook=_Object)
    except (ValueError, RecursionError) as error:
        raise InvalidManifest(f"not an image {what}: {error}") from None
    if wrong := test(document):
        raise InvalidManifest(f"the {what} is not one that Podman reads: {wrong.lstrip('.')}")


def _type(expected: str, kind: type) -> _Test:
    def test(value: Any) -> str:
        return "" if value is None or type(value) is kind else f": not {expected}"

    return test


def _number(value: Any) -> str:
    fits = type(value) is int and -_INT64 <= value < _INT64
    return "" if value is None or fits else ": not a whole number of 64 bits"


def _bytes(value: Any) -> str:
    if value is None:
        return ""
    if type(value) is str:
        with contextlib.suppress(ValueError):  # also for what is not ASCII
            base64.b64decode(value.replace("\r", "").replace("\n", ""), validate=True)
            return ""
    return ": not base64"


def _time(value: Any) -> str:
    if value is None:
        return ""
    if type(value) is str and (found := _TIME.fullmatch(value)):
        year, month, day = map(int, found.groups()[:3])
        try:
            datetime.date(year or _LEAP_YEAR, month, day)
        except ValueError:
            pass
        else:
            return ""
    return ": not a time as RFC 3339 writes it"


def _list(item: _Test) -> _Test:
    def test(value: Any) -> str:
        if value is None:
            return ""
        if type(value) is not list:
            return ": not a list"
        for number, one in enumerate(value):
            if wrong := item(one):
                return f"[{number}]{wrong}"
        return ""

    return test


def _map(item: _Test) -> _Test:
    def test(value: Any) -> str:
        if value is None:
            return ""
        if type(value) is not _Object:
            return ": not an object"
        for key, one in value:
            if wrong := item(one):
                return f".{key[:80]!r}{wrong}"
        return ""

    return test


def _struct(**members: _Test) -> _Test:
    known = {name.casefold(): test for name, test in members.items()}

    def test(value: Any) -> str:
        if value is None:
            return ""
        if type(value) is not _Object:
            return ": not an object"
        for key, one in value:
            name = key.casefold()
            if name in known and (wrong := known[name](one)):
                return f".{name}{wrong}"
        return ""

    return test


_TEXT: Final = _type("a string", str)
_BOOL: Final = _type("true or false", bool)
_TEXTS: Final = _list(_TEXT)
_SET: Final = _map(_struct())

_CONFIG: Final = _struct(
    **dict.fromkeys(
        (
            *("Hostname", "Domainname", "User", "Image", "WorkingDir", "MacAddress"),
            "StopSignal",
        ),
        _TEXT,
    ),
    **dict.fromkeys(
        (
            *("AttachStdin", "AttachStdout", "AttachStderr", "Tty", "OpenStdin", "StdinOnce"),
            *("ArgsEscaped", "NetworkDisabled"),
        ),
        _BOOL,
    ),
    **dict.fromkeys(("Env", "Cmd", "Entrypoint", "OnBuild", "Shell"), _TEXTS),
    ExposedPorts=_SET,
    Volumes=_SET,
    Labels=_map(_TEXT),
    StopTimeout=_number,
    Healthcheck=_struct(
        Test=_TEXTS, Interval=_number, Timeout=_number, StartPeriod=_number, Retries=_number
    ),
)

_IMAGE: Final = _struct(
    **dict.fromkeys(
        (
            *("id", "parent", "comment", "container", "docker_version", "author"),
            *("architecture", "variant", "os", "os.version"),
        ),
        _TEXT,
    ),
    **{"os.features": _TEXTS, "size": _number},
    created=_time,
    config=_CONFIG,
    container_config=_CONFIG,
    rootfs=_struct(type=_TEXT, diff_ids=_TEXTS),
    history=_list(
        _struct(created=_time, created_by=_TEXT, author=_TEXT, comment=_TEXT, empty_layer=_BOOL)
    ),
)

_DESCRIPTOR: Final = _struct(
    **dict.fromkeys(("mediaType", "digest", "artifactType"), _TEXT),
    size=_number,
    urls=_TEXTS,
    annotations=_map(_TEXT),
    data=_bytes,
    platform=_struct(
        **dict.fromkeys(("architecture", "os", "os.version", "variant"), _TEXT),
        **{"os.features": _TEXTS},
    ),
)

_MANIFEST: Final = _struct(
    schemaVersion=_number,
    mediaType=_TEXT,
    artifactType=_TEXT,
    config=_DESCRIPTOR,
    layers=_list(_DESCRIPTOR),
    manifests=_list(_DESCRIPTOR),
    subject=_DESCRIPTOR,
    annotations=_map(_TEXT),
)
