"""Verified bytes on local disk: objects by digest, partial objects, fetch scheduling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from layerstore import lazy

if TYPE_CHECKING:
    from layerstore.content.fetcher import is_passing
    from layerstore.content.files import OpenFile
    from layerstore.content.layer import LayerContent
    from layerstore.content.layermap import LayerMap
    from layerstore.content.ledger import Ledger
    from layerstore.content.objects import ObjectStore
    from layerstore.content.outages import Outages
    from layerstore.content.room import DiskRoom, Room
    from layerstore.content.scheduler import Priority, Scheduler
    from layerstore.content.stats import ContentStats, LayerStats
    from layerstore.content.stream import ByteSource

__all__ = [
    "ByteSource",
    "ContentStats",
    "DiskRoom",
    "LayerContent",
    "LayerMap",
    "LayerStats",
    "Ledger",
    "ObjectStore",
    "OpenFile",
    "Outages",
    "Priority",
    "Room",
    "Scheduler",
    "is_passing",
]

_HOMES: Final = {
    "ByteSource": "stream",
    "ContentStats": "stats",
    "DiskRoom": "room",
    "LayerContent": "layer",
    "LayerMap": "layermap",
    "LayerStats": "stats",
    "Ledger": "ledger",
    "ObjectStore": "objects",
    "OpenFile": "files",
    "Outages": "outages",
    "Priority": "scheduler",
    "Room": "room",
    "Scheduler": "scheduler",
    "is_passing": "fetcher",
}
if not TYPE_CHECKING:  # else every name would be one to mypy
    __getattr__ = lazy.attributes(__name__, _HOMES)
