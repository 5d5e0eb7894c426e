"""A store on its root directory, held by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from layerstore.errors import ServiceError, StorageError
from layerstore.provider import Ordinary, Store
from layerstore.registry import RegistryClient, RegistrySettings
from layerstore.service.config import Config, OrdinaryConfig


@contextlib.contextmanager
def open_store(root: Path, config: Config) -> Iterator[Store]:
    """The store below ``root``, for this process alone.

    Raises ServiceError if a service uses it, StorageError and ConfigError.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_locked(root))
        client = RegistryClient(
            RegistrySettings.from_system(
                auth_file=_path(config.registry.authfile),
                registries_conf=_path(config.registry.registries_conf),
            )
        )
        stack.callback(client.close)
        store = Store(
            root,
            client,
            policy=config.policy,
            prefetch=config.prefetch,
            background=config.background_fetch,
        )
        stack.callback(store.close)
        yield store


@contextlib.contextmanager
def passing_store(config: Config) -> Iterator[Store]:
    """A store that is thrown away: it fetches nothing ahead, and ordinary layers only if told to."""
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
        tempfile.TemporaryDirectory(prefix="layerstore-judge-") as root,
        open_store(Path(root), quiet) as store,
    ):
        yield store


def _judged(policy: Ordinary) -> Ordinary:
    return Ordinary.OFF if policy is Ordinary.OFF else Ordinary.KNOWN


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Hold the root directory's lock, so that two services never share it."""
    path = root / "lock"
    try:
        lock = path.open("w")
    except OSError as error:
        raise StorageError(
            f"cannot open: {error.strerror}",
            subject=str(path),
            advice="run it as the owner of the root directory, or name another --root",
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ServiceError(
                "another layerstore service uses this root directory", subject=str(root)
            ) from error
        yield
