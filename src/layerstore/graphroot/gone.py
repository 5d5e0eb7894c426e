"""Objects are values: what they stand for may be removed meanwhile.

Nothing of an image that was removed can be read any more.  That is no damage of the storage, and
``unless_gone`` keeps the two apart.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from layerstore.errors import CorruptStorage, LayerstoreError, RemovedObject
from layerstore.graphroot.records import ImageRecord
from layerstore.graphroot.table import Table


class _Area(Protocol):
    @property
    def table(self) -> Table[ImageRecord]: ...


class _Recorded(Protocol):
    @property
    def id(self) -> str: ...

    @property
    def area(self) -> _Area: ...


_O = TypeVar("_O", bound=_Recorded)
_P = ParamSpec("_P")
_R = TypeVar("_R")


def unless_gone(method: Callable[Concatenate[_O, _P], _R]) -> Callable[Concatenate[_O, _P], _R]:
    """``method``, which raises ``RemovedObject`` for a ``CorruptStorage`` of what has no record."""

    @functools.wraps(method)
    def guarded(one: _O, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return method(one, *args, **kwargs)
        except CorruptStorage as error:
            if _is_there(one):
                raise
            raise RemovedObject("was removed meanwhile", subject=one.id) from error

    return guarded


def _is_there(one: _Recorded) -> bool:
    table = one.area.table
    if table.lock.held_for_writing:
        return True  # who holds the lock knows what is there
    with contextlib.suppress(LayerstoreError):
        return any(record.id == one.id for record in table.snapshot())
    return True
