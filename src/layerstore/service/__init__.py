"""The service: keeper and server processes, configuration file, control socket.

What is named here is loaded when it is first asked for: the keeper lives in this room, too, and
must stay small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from layerstore import lazy

if TYPE_CHECKING:
    from layerstore.service.checking import Checker, CheckStatus, checker
    from layerstore.service.config import Config, load
    from layerstore.service.control import request
    from layerstore.service.diskuse import DiskReport, GcReport, disk_control
    from layerstore.service.fetching import FetchedLayer, Fetcher, FetchStatus, fetcher
    from layerstore.service.indexing import IndexKeeper, index_keeper
    from layerstore.service.localizing import LazyImage, lazy_images
    from layerstore.service.opening import passing_store
    from layerstore.service.places import DEFAULT_PATH, DEFAULT_ROOT
    from layerstore.service.reloading import reload
    from layerstore.service.unmounting import unmount

__all__ = [
    "DEFAULT_PATH",
    "DEFAULT_ROOT",
    "CheckStatus",
    "Checker",
    "Config",
    "DiskReport",
    "FetchStatus",
    "FetchedLayer",
    "Fetcher",
    "IndexKeeper",
    "LazyImage",
    "checker",
    "GcReport",
    "disk_control",
    "fetcher",
    "index_keeper",
    "lazy_images",
    "load",
    "passing_store",
    "reload",
    "request",
    "unmount",
]

_HOMES: Final = {
    "DEFAULT_PATH": "places",
    "DEFAULT_ROOT": "places",
    "CheckStatus": "checking",
    "Checker": "checking",
    "Config": "config",
    "DiskReport": "diskuse",
    "FetchStatus": "fetching",
    "FetchedLayer": "fetching",
    "Fetcher": "fetching",
    "IndexKeeper": "indexing",
    "checker": "checking",
    "GcReport": "diskuse",
    "disk_control": "diskuse",
    "fetcher": "fetching",
    "index_keeper": "indexing",
    "LazyImage": "localizing",
    "lazy_images": "localizing",
    "load": "config",
    "passing_store": "opening",
    "reload": "reloading",
    "request": "control",
    "unmount": "unmounting",
}
if not TYPE_CHECKING:  # else every name would be one to mypy
    __getattr__ = lazy.attributes(__name__, _HOMES)
