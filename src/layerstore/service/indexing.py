"""Indexes of ordinary layers in files: saved and loaded by the service that runs, else by this process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from layerstore.errors import NoServiceError
from layerstore.image import Digest
from layerstore.provider import GivenLayer, Store
from layerstore.service.config import Config
from layerstore.service.control import request
from layerstore.service.opening import open_store

Method = Callable[[Mapping[str, Any]], Mapping[str, object]]


class _Save(msgspec.Struct, frozen=True):
    layers: tuple[tuple[str, str], ...]
    path: str


class _Load(msgspec.Struct, frozen=True):
    path: str


def index_methods(store: Store) -> dict[str, Method]:
    """What the control socket offers."""

    def save(asked: Mapping[str, Any]) -> Mapping[str, object]:
        wanted = msgspec.convert(asked, _Save)
        names = [(Digest.parse(digest), Digest.parse(diff_id)) for digest, diff_id in wanted.layers]
        return {"layers": store.indexes.save(names, Path(wanted.path))}

    def load(asked: Mapping[str, Any]) -> Mapping[str, object]:
        return {"layers": store.indexes.load(Path(msgspec.convert(asked, _Load).path))}

    return {"index-save": save, "index-load": load}


class IndexKeeper:
    """Whoever has the store.  Methods raise ServiceError, StorageError and what a file deserves."""

    def __init__(self, ask: Callable[..., Mapping[str, object]]) -> None:
        self._ask = ask

    def save(self, layers: Sequence[tuple[Digest, Digest]], path: Path) -> tuple[GivenLayer, ...]:
        """See ``Indexes.save``; ``path`` is absolute."""
        names = [(str(digest), str(diff_id)) for digest, diff_id in layers]
        return self._layers(self._ask("index-save", layers=names, path=str(path)))

    def load(self, path: Path) -> tuple[GivenLayer, ...]:
        """See ``Indexes.load``; ``path`` is absolute."""
        return self._layers(self._ask("index-load", path=str(path)))

    @staticmethod
    def _layers(answer: Mapping[str, object]) -> tuple[GivenLayer, ...]:
        return msgspec.convert(answer["layers"], tuple[GivenLayer, ...])


@contextlib.contextmanager
def index_keeper(root: Path, config: Config) -> Iterator[IndexKeeper]:
    """The service whose root directory is ``root``; where none runs, the store itself.

    Raises ServiceError, StorageError and ConfigError.
    """
    try:
        request(root, "status")
    except NoServiceError:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open_store(root, config) as store:
            methods = index_methods(store)
            yield IndexKeeper(lambda name, **asked: methods[name](asked))
    else:
        yield IndexKeeper(partial(request, root))
