"""A store on its root directory, held by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec

from layerstore import limits
from layerstore.errors import ServiceError
from layerstore.provider import Ordinary, Store, check_state
from layerstore.registry import RegistriesConf, RegistryClient, RegistrySettings
from layerstore.service.config import Config, OrdinaryConfig
from layerstore.service.graphneeds import needs_of
from layerstore.service.places import SERVER_LOCK, unusable


@contextlib.contextmanager
def open_store(
    root: Path,
    config: Config,
    *,
    patience: float = 0.0,
    registry: RegistrySettings | None = None,
) -> Iterator[Store]:
    """The store below ``root``, for this process alone.

    ``registry`` is what `registry_settings` said before, if it was asked.  Raises ServiceError if
    a service uses it, and still does after ``patience`` seconds, StorageError and ConfigError.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(root, patience))
        client = RegistryClient(registry or registry_settings(config))
        stack.callback(client.close)
        store = Store(
            root,
            client,
            policy=config.policy,
            needs=needs_of(config),
            prefetch=config.prefetch,
            background=config.background_fetch,
        )
        stack.callback(store.close)
        yield store


def registry_settings(config: Config, registries: RegistriesConf | None = None) -> RegistrySettings:
    """Where registries are and how to speak to them.  Raises ConfigError.

    ``registries`` is what registries.conf said before; else it is read.
    """
    return RegistrySettings.from_system(
        auth_file=_path(config.registry.authfile),
        registries_conf=_path(config.registry.registries_conf),
        registries=registries,
    )


@contextlib.contextmanager
def passing_store(config: Config) -> Iterator[Store]:
    """A store that is thrown away: it fetches nothing ahead, and ordinary layers only if told to.

    It logs no warnings unless everything is logged: what is wrong with a layer it raises, and of
    itself there is nothing to tell.
    """
    quiet = msgspec.structs.replace(
        config,
        prefetch=False,
        background_fetch=False,
        ordinary=OrdinaryConfig(
            policy=_judged(config.ordinary.policy),
            prefixes={prefix: _judged(one) for prefix, one in config.ordinary.prefixes.items()},
        ),
    )
    with (
        _errors_only("layerstore.provider", "layerstore.content"),
        tempfile.TemporaryDirectory(prefix="layerstore-judge-") as root,
        open_store(Path(root), quiet) as store,
    ):
        yield store


@contextlib.contextmanager
def _errors_only(*names: str) -> Iterator[None]:
    """Log no warnings below these names, unless everything is logged."""
    loggers = [logging.getLogger(name) for name in names]
    quiet = [(each, each.level) for each in loggers if not each.isEnabledFor(logging.DEBUG)]
    for logger, _ in quiet:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in quiet:
            logger.setLevel(level)


def _judged(policy: Ordinary) -> Ordinary:
    return Ordinary.OFF if policy is Ordinary.OFF else Ordinary.KNOWN


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def check_root(root: Path) -> None:
    """Whether a store can be expected to open below ``root``, where another process may have it
    open now.  Raises StorageError.
    """
    _lock_file(root).close()
    check_state(root)


@contextlib.contextmanager
def locked(root: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold the root directory's lock, so that two services never share it.

    Raises ServiceError if one uses it, and still does after ``patience`` seconds, StorageError.
    """
    end = time.monotonic() + patience
    with _lock_file(root) as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() >= end:
                    raise ServiceError(
                        "another layerstore service uses this root directory", subject=str(root)
                    ) from error
            time.sleep(limits.LOCK_RETRY_SECONDS)
        yield


def _lock_file(root: Path) -> IO[str]:
    path = root / SERVER_LOCK
    try:
        return path.open("w")
    except OSError as error:
        raise unusable(path, error) from error
