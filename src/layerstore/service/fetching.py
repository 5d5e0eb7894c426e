"""Fetching images ahead of time: by the service that runs, else by this process itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from layerstore.errors import NoServiceError, ServiceError, UnknownObject
from layerstore.service.config import Config
from layerstore.service.control import request

if TYPE_CHECKING:
    from layerstore.provider import Fetches

_FORGOTTEN: Final = "forgotten"

Method = Callable[[Mapping[str, Any]], Mapping[str, object]]


class FetchedLayer(msgspec.Struct, frozen=True):
    """A layer on its way; sizes in bytes of the blob.

    ``state`` is waiting, fetching, verifying, complete, or refused for the ``reason``.
    """

    digest: str
    form: str
    size: int
    fetched: int
    state: str
    reason: str
    detail: str


class FetchStatus(msgspec.Struct, frozen=True):
    """How far a job is; ``failure`` is what ended all of it."""

    done: bool
    layers: tuple[FetchedLayer, ...]
    failure: str | None


class Fetcher(Protocol):
    """Whoever fetches.  Methods raise ServiceError, and what the reference or platforms deserve."""

    def start(
        self, reference: str, platforms: tuple[str, ...] | None, *, keep: bool = False
    ) -> str: ...
    def status(self, job: str) -> FetchStatus: ...
    def cancel(self, job: str) -> None: ...


def fetch_methods(fetches: Fetches) -> dict[str, Method]:
    """What the control socket offers."""

    def start(asked: Mapping[str, Any]) -> Mapping[str, object]:
        reference, platforms = asked.get("reference"), asked.get("platforms")
        if not isinstance(reference, str) or not isinstance(platforms, list | None):
            raise ServiceError("a fetch has a reference, and a list of platforms or none")
        return {"job": fetches.start(reference, platforms, keep=bool(asked.get("keep")))}

    def status(asked: Mapping[str, Any]) -> Mapping[str, object]:
        try:
            return fetches.status(str(asked.get("job")))
        except UnknownObject:
            return {_FORGOTTEN: True}

    def cancel(asked: Mapping[str, Any]) -> Mapping[str, object]:
        fetches.cancel(str(asked.get("job")))
        return {}

    return {"fetch-start": start, "fetch-status": status, "fetch-cancel": cancel}


class _Remote:
    """Asks the service.  Jobs live as long as its server: the next one is asked for the same again,
    and what was fetched already is here.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._asked: dict[str, tuple[str, tuple[str, ...] | None, bool]] = {}
        self._now: dict[str, str] = {}  # job as we gave it -> as the present server knows it

    def start(
        self, reference: str, platforms: tuple[str, ...] | None, *, keep: bool = False
    ) -> str:
        asked = request(
            self._root, "fetch-start", reference=reference, platforms=platforms, keep=keep
        )
        job = str(asked["job"])
        self._asked[job] = reference, platforms, keep
        return job

    def status(self, job: str) -> FetchStatus:
        known = self._now.get(job, job)
        answer = request(self._root, "fetch-status", job=known)
        if _FORGOTTEN in answer:
            reference, platforms, keep = self._asked[job]
            self._now[job] = known = self.start(reference, platforms, keep=keep)
            answer = request(self._root, "fetch-status", job=known)
        return msgspec.convert(answer, FetchStatus)

    def cancel(self, job: str) -> None:
        request(self._root, "fetch-cancel", job=self._now.get(job, job))


class _Local:
    def __init__(self, fetches: Fetches) -> None:
        self._fetches = fetches
        self.start = fetches.start
        self.cancel = fetches.cancel

    def status(self, job: str) -> FetchStatus:
        return msgspec.convert(self._fetches.status(job), FetchStatus)


@contextlib.contextmanager
def fetcher(root: Path, config: Config) -> Iterator[Fetcher]:
    """The service whose root directory is ``root``; where none runs, the store itself.

    Raises ServiceError, StorageError and ConfigError.
    """
    try:
        request(root, "status")
    except NoServiceError:
        from layerstore.service.opening import open_store  # noqa: PLC0415 - the whole store

        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open_store(root, config) as store:
            yield _Local(store.fetches)
    else:
        yield _Remote(root)
