"""The configuration file of the service, ``/etc/layerstore/config.toml``.

A missing default file means defaults; unknown keys are errors, because a key
with a typing mistake would silently do nothing.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Final, Literal

import msgspec

from layerstore.errors import ConfigError

DEFAULT_PATH: Final = Path("/etc/layerstore/config.toml")
DEFAULT_ROOT: Final = Path("/var/lib/layerstore")


class RegistryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where registry settings are read, if not from the places that Podman uses."""

    authfile: str | None = None
    registries_conf: str | None = None


class RepairConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether layer records that a client forgot are made again, and in which graph roots.

    ``graph_roots`` None means the one of the machine's storage.conf.
    """

    enabled: bool = True
    graph_roots: tuple[str, ...] | None = None


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file.  Paths are absolute."""

    root: str = str(DEFAULT_ROOT)
    prefetch: bool = True
    background_fetch: bool = True
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    registry: RegistryConfig = RegistryConfig()
    repair: RepairConfig = RepairConfig()


def load(path: Path | None) -> Config:
    """Read ``path``, or the default file where it exists; ConfigError if it makes no sense."""
    if path is None:
        if not DEFAULT_PATH.exists():
            return Config()
        path = DEFAULT_PATH
    try:
        document = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read: {error.strerror}", subject=str(path)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"not TOML: {error}", subject=str(path)) from error
    try:
        config = msgspec.convert(document, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(
            str(error), subject=str(path), advice="see docs/configuration.md"
        ) from error
    for key, value in (
        ("root", config.root),
        ("registry.authfile", config.registry.authfile),
        ("registry.registries_conf", config.registry.registries_conf),
        *(("repair.graph_roots", root) for root in config.repair.graph_roots or ()),
    ):
        if value is not None and not value.startswith("/"):
            raise ConfigError(f"{key} must be an absolute path", subject=str(path))
    return config
