"""The daemon: configuration file, control socket, life cycle."""

from layerstore.service.config import DEFAULT_PATH, DEFAULT_ROOT, Config, load
from layerstore.service.control import request
from layerstore.service.daemon import serve
from layerstore.service.fetching import FetchedLayer, Fetcher, FetchStatus, fetcher
from layerstore.service.opening import passing_store

__all__ = [
    "DEFAULT_PATH",
    "DEFAULT_ROOT",
    "Config",
    "FetchStatus",
    "FetchedLayer",
    "Fetcher",
    "fetcher",
    "load",
    "passing_store",
    "request",
    "serve",
]
