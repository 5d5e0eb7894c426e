"""Checking the cache: by the service that runs, else by this process itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from layerstore.errors import NoServiceError, ServiceError
from layerstore.provider import Checks
from layerstore.service.config import Config
from layerstore.service.control import request
from layerstore.service.fetching import Method
from layerstore.service.opening import open_store


class Damage(msgspec.Struct, frozen=True):
    """What was found; ``repaired`` says what was done about it, empty if it remains."""

    kind: str
    subject: str
    detail: str
    repaired: str


class CheckStatus(msgspec.Struct, frozen=True):
    """How far a check is; ``error`` is what ended it early; ``more_findings`` are not listed."""

    done: bool
    error: str
    checked_bytes: int
    total_bytes: int
    layers: int
    objects: int
    findings: tuple[Damage, ...]
    more_findings: int

    @property
    def remaining(self) -> int:
        """How much damage was not repaired."""
        return self.more_findings + sum(not one.repaired for one in self.findings)


class Checker(Protocol):
    """Whoever checks.  Methods raise ServiceError."""

    def start(self, *, repair: bool) -> str: ...
    def status(self, job: str) -> CheckStatus: ...
    def cancel(self, job: str) -> None: ...


def check_methods(checks: Checks) -> dict[str, Method]:
    """What the control socket offers."""

    def start(asked: Mapping[str, Any]) -> Mapping[str, object]:
        repair = asked.get("repair")
        if not isinstance(repair, bool):
            raise ServiceError("a check is one with repair or without")
        return {"job": checks.start(repair=repair)}

    def status(asked: Mapping[str, Any]) -> Mapping[str, object]:
        return {"check": checks.status(str(asked.get("job")))}

    def cancel(asked: Mapping[str, Any]) -> Mapping[str, object]:
        checks.cancel(str(asked.get("job")))
        return {}

    return {"check-start": start, "check-status": status, "check-cancel": cancel}


class _Remote:
    def __init__(self, root: Path) -> None:
        self._root = root

    def start(self, *, repair: bool) -> str:
        return str(request(self._root, "check-start", repair=repair)["job"])

    def status(self, job: str) -> CheckStatus:
        answer = request(self._root, "check-status", job=job)
        return msgspec.convert(answer["check"], CheckStatus)

    def cancel(self, job: str) -> None:
        request(self._root, "check-cancel", job=job)


class _Local:
    def __init__(self, checks: Checks) -> None:
        self._checks = checks
        self.start = checks.start
        self.cancel = checks.cancel

    def status(self, job: str) -> CheckStatus:
        return msgspec.convert(self._checks.status(job), CheckStatus)


@contextlib.contextmanager
def checker(root: Path, config: Config) -> Iterator[Checker]:
    """The service whose root directory is ``root``; where none runs, the store itself, which
    fetches nothing ahead.

    Raises ServiceError, StorageError and ConfigError.
    """
    try:
        request(root, "status")
    except NoServiceError:
        if not root.is_dir():
            raise ServiceError("no store is here", subject=str(root)) from None
        quiet = msgspec.structs.replace(config, prefetch=False, background_fetch=False)
        with open_store(root, quiet) as store:
            yield _Local(store.checks)
    else:
        yield _Remote(root)
