"""The daemon: configuration file, control socket, life cycle."""

from layerstore.service.config import DEFAULT_PATH, DEFAULT_ROOT, Config, load
from layerstore.service.control import request
from layerstore.service.daemon import serve

__all__ = ["DEFAULT_PATH", "DEFAULT_ROOT", "Config", "load", "request", "serve"]
