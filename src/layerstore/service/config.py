"""The configuration file of the service, ``/etc/layerstore/config.toml``.

A missing default file means defaults; unknown keys are errors, because a key
with a typing mistake would silently do nothing.
"""

from __future__ import annotations

import enum
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from layerstore import limits
from layerstore.content import DiskRoom
from layerstore.errors import ConfigError
from layerstore.provider import DialectL, Ordinary, Outage, Policy
from layerstore.registry import is_prefix
from layerstore.service.places import DEFAULT_PATH, DEFAULT_ROOT

_SIZE: Final = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([kmgt]?)(?:i?b)?", re.IGNORECASE)
_ANY_PREFIX: Final = re.compile(r"(`\$\.(ordinary|outage)\.prefixes\[\.\.\.\]`)")
_UNITS: Final = {"": 1, **{unit: 1024**power for power, unit in enumerate("kmgt", 1)}}


class RegistryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where registry settings are read, if not from the places that Podman uses."""

    authfile: str | None = None
    registries_conf: str | None = None


class RepairConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether layer records that a client forgot are made again, and in which graph roots.

    ``graph_roots`` None means the one of the machine's storage.conf.  ``image_stores`` are the
    additional image stores of their Podmans; those of storage.conf are known.
    """

    enabled: bool = True
    graph_roots: tuple[str, ...] | None = None
    image_stores: tuple[str, ...] = ()


class OrdinaryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When layers without a TOC are served, see ``provider.policy``.

    ``prefixes`` are those of registries.conf.
    """

    policy: Ordinary = Ordinary.AUTO
    prefixes: dict[str, Ordinary] = {}
    eager_seconds: Annotated[float, msgspec.Meta(ge=0, le=limits.EAGER_SECONDS_MAX)] = (
        limits.EAGER_SECONDS
    )


class OutageConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What reads do whose registry gives no answer, see ``provider.policy``.

    ``prefixes`` are those of registries.conf.
    """

    policy: Outage = Outage.WAIT
    prefixes: dict[str, Outage] = {}
    wait_seconds: Annotated[float, msgspec.Meta(ge=0, le=limits.OUTAGE_WAIT_MAX_SECONDS)] = (
        limits.OUTAGE_WAIT_SECONDS
    )


_Percent = Annotated[float, msgspec.Meta(ge=0, le=100)]


class DiskConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much of the disk the store may take, see ``content.room``.

    ``limit`` is a number of bytes or a text as "200 GiB".
    """

    limit: int | str | None = None
    high_percent: _Percent = 100 * limits.DISK_HIGH
    low_percent: _Percent = 100 * limits.DISK_LOW
    keep_free_percent: _Percent = 100 * limits.DISK_KEEP_FREE

    @property
    def room(self) -> DiskRoom:
        """The same as values; raises ConfigError."""
        if self.low_percent > self.high_percent:
            raise ConfigError("disk.low_percent is above disk.high_percent")
        limit = _size(self.limit)
        if limit is not None and limit < limits.DISK_LIMIT_MIN_BYTES:
            raise ConfigError(
                f"disk.limit: at least {limits.DISK_LIMIT_MIN_BYTES} bytes are needed"
            )
        return DiskRoom(
            limit, self.keep_free_percent / 100, self.high_percent / 100, self.low_percent / 100
        )


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file.  Paths are absolute."""

    root: str = str(DEFAULT_ROOT)
    prefetch: bool = True
    background_fetch: bool = True
    dialect_l: DialectL = DialectL.LAZY
    ordinary: OrdinaryConfig = OrdinaryConfig()
    outage: OutageConfig = OutageConfig()
    disk: DiskConfig = DiskConfig()
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    silent_seconds: Annotated[float, msgspec.Meta(ge=0, le=limits.SERVER_SILENT_MAX_SECONDS)] = (
        limits.SERVER_SILENT_SECONDS
    )
    registry: RegistryConfig = RegistryConfig()
    repair: RepairConfig = RepairConfig()

    @property
    def policy(self) -> Policy:
        """What of it decides about layers.  Raises ConfigError."""
        return Policy(
            dialect_l=self.dialect_l,
            ordinary=self.ordinary.policy,
            ordinary_by_prefix=self.ordinary.prefixes,
            eager_seconds=self.ordinary.eager_seconds,
            outage=self.outage.policy,
            outage_by_prefix=self.outage.prefixes,
            wait_seconds=self.outage.wait_seconds,
            disk=self.disk.room,
        )


def _size(value: int | str | None) -> int | None:
    if value is None or isinstance(value, int):
        found = value
    else:
        match = _SIZE.fullmatch(value.strip())
        found = -1 if match is None else int(float(match[1]) * _UNITS[match[2].lower()])
    if found is not None and found < 0:
        raise ConfigError(f"disk.limit: {value!r} is no size, as 200 GiB is")
    return found


def load(path: Path | None) -> Config:
    """Read ``path``, or the default file where it exists; ConfigError if it makes no sense."""
    return parse(read(path), path)


def read(path: Path | None) -> str | None:
    """The text of ``path``, or of the default file; None if that does not exist.  ConfigError."""
    if path is None and not DEFAULT_PATH.exists():
        return None
    path = path or DEFAULT_PATH
    try:
        return path.read_text()
    except OSError as error:
        raise ConfigError(f"cannot read: {error.strerror}", subject=str(path)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"not TOML: {error}", subject=str(path)) from error


def parse(text: str | None, path: Path | None) -> Config:
    """What `read` gave, as values; ConfigError if it makes no sense."""
    if text is None:
        return Config()
    path = path or DEFAULT_PATH
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not TOML: {error}", subject=str(path)) from error
    try:
        config = msgspec.convert(document, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(
            _with_prefix(str(error), document),
            subject=str(path),
            advice="see docs/configuration.md",
        ) from error
    try:
        _check(config)
        _ = config.policy
    except ConfigError as error:
        error.subject = str(path)
        raise
    return config


def _with_prefix(error: str, document: Mapping[str, Any]) -> str:
    """A decoder's message with the key that it leaves out of a table of prefixes."""
    found = _ANY_PREFIX.search(error)
    if found is None:
        return error
    wrong, right = found.groups()
    known: type[enum.StrEnum] = {"ordinary": Ordinary, "outage": Outage}[right]
    for prefix, value in document[right]["prefixes"].items():
        if value not in tuple(known):
            return error.replace(wrong, f"`{right}.prefixes.{json.dumps(prefix)}`")
    return error


def _check(config: Config) -> None:
    """What types cannot tell.  Raises ConfigError."""
    for key, value in (
        ("root", config.root),
        ("registry.authfile", config.registry.authfile),
        ("registry.registries_conf", config.registry.registries_conf),
        *(("repair.graph_roots", root) for root in config.repair.graph_roots or ()),
        *(("repair.image_stores", store) for store in config.repair.image_stores),
    ):
        if value is not None and (not value.startswith("/") or "\0" in value):
            raise ConfigError(f"{key} must be an absolute path")
    if 0 < config.silent_seconds < limits.SERVER_SILENT_MIN_SECONDS:
        raise ConfigError(
            f"silent_seconds: at least {limits.SERVER_SILENT_MIN_SECONDS:g}, or 0 for never"
        )
    for table, prefixes in (
        ("ordinary", config.ordinary.prefixes),
        ("outage", config.outage.prefixes),
    ):
        for prefix in prefixes:
            if not is_prefix(prefix):
                raise ConfigError(
                    f"{table}.prefixes: no reference begins with {prefix!r}",
                    advice="a prefix is a registry's host, host/repository or *.domain",
                )
