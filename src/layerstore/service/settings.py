"""What a server goes by: the configuration file and registries.conf, as they were at the last reload."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from layerstore.registry import RegistriesConf, RegistrySettings
from layerstore.service import config as configuration
from layerstore.service import inforce
from layerstore.service.config import Config
from layerstore.service.opening import registry_settings


@dataclass(frozen=True)
class Settings:
    """Both files, read and found to make sense."""

    config: Config
    registry: RegistrySettings


class _Kept(msgspec.Struct, frozen=True):
    """``config`` is the file's text, which any release understands; None: there is no file."""

    config: str | None
    registries: RegistriesConf


def load(path: Path | None, memory: int | None) -> Settings:
    """The settings in force, which are in ``memory``; if it is empty, what the files say now.

    Those are in force then: ``memory`` holds them.  ``path`` is as for `config.load`.  ConfigError.
    """
    data = b"" if memory is None else inforce.read(memory)
    kept = _kept(data)
    text = configuration.read(path) if kept is None else kept.config
    config = configuration.parse(text, path)
    registry = registry_settings(config, None if kept is None else kept.registries)
    if memory is not None and not data:
        fresh = _Kept(text, registry.registries)
        inforce.write(memory, msgspec.json.encode(fresh, enc_hook=str))
    return Settings(config, registry)


def _kept(data: bytes) -> _Kept | None:
    try:
        return msgspec.json.decode(data, type=_Kept, dec_hook=_path) if data else None
    except msgspec.MsgspecError:  # that of a release which knows other things
        return None


def _path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError
