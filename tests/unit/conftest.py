"""Stores on a simulated registry, asked as the file system asks them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.simimages import Publisher
from lab.simregistry import SimRegistry
from lab.waiting import until
from layerstore.image import Digest
from layerstore.provider import Refusal, Store, View
from layerstore.registry import RegistryClient, RegistrySettings
from layerstore.registry.registriesconf import RegistriesConf


class Asker:
    """A store that can be restarted, and lookups that wait for their answer."""

    def __init__(self, root: Path, registry: SimRegistry) -> None:
        self.root = root
        self.registry = registry
        self.options: dict[str, Any] = {"background": False}
        self.store = self.open()
        # before the first mark nothing is trusted: what a lookup fetched is fetched again
        until((root / "content" / "synced").exists)

    def open(self) -> Store:
        settings = RegistrySettings(
            registries=RegistriesConf(), tls_verify=False, attempts=2, read_seconds=2.0
        )
        self.client = RegistryClient(settings)
        self.store = Store(self.root, self.client, **self.options)
        return self.store

    def restart(self) -> None:
        self.close()
        self.open()

    def close(self) -> None:
        self.store.close()
        self.client.close()

    def lookup(self, reference: str, name: str, seconds: float = 30.0) -> View | Refusal:
        done = threading.Event()
        answers: list[View | Refusal] = []

        def answer(result: View | Refusal) -> None:
            answers.append(result)
            done.set()

        self.store.resolve(reference, Digest(name), answer)
        assert done.wait(seconds), "the lookup was never answered"
        assert len(answers) == 1
        return answers[0]

    def view(self, reference: str, name: str) -> View:
        result = self.lookup(reference, name)
        assert isinstance(result, View), result
        return result

    def reason(self, reference: str, name: str) -> str:
        result = self.lookup(reference, name)
        assert isinstance(result, Refusal), result
        return result.reason

    def read(self, view: View, path: str) -> bytes:
        """Read a file of the layer as the file system would."""
        opened = self.store.layers.open(view.slot)
        entry = opened.index.entry_of_path(path.encode())
        assert entry is not None
        size = opened.index.inode(entry).size
        done = threading.Event()
        errors: list[Exception | None] = []

        def finish(error: Exception | None) -> None:
            errors.append(error)
            done.set()

        opened.content.fetch(entry, 0, size, finish)
        assert done.wait(30)
        if errors[0] is not None:
            raise errors[0]
        data = opened.content.read_stored(entry, 0, size)
        assert data is not None
        return bytes(data)


@pytest.fixture
def registry() -> Iterator[SimRegistry]:
    with SimRegistry() as simulated:
        yield simulated


@pytest.fixture
def publisher(registry: SimRegistry) -> Publisher:
    return Publisher(registry)


@pytest.fixture
def asker(tmp_path: Path, registry: SimRegistry) -> Iterator[Asker]:
    asker = Asker(tmp_path / "state", registry)
    yield asker
    asker.close()
