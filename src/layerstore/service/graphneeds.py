"""Which layers the graph roots of the configuration link to, and which are mounted.

The links are the files ``additionallayer`` of their layers, of the additional image stores
beside them, too, and of other graph roots as long as something of theirs is mounted; mounted is
what an overlay mount of this machine stands on.  The graph root of ``storage.conf`` needs nothing
where it is not there; one that the configuration names must be there: its disk may not be mounted
yet.  One of the configuration that cannot be read makes everything count as needed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

from layerstore.errors import (
    ConfigError,
    InvalidDigest,
    InvalidReference,
    LayerstoreError,
    StorageError,
)
from layerstore.graphroot.storageconf import StorageConfig
from layerstore.provider import LookAtNeeds, Needs, names
from layerstore.service.config import Config

_log = logging.getLogger(__name__)


def graph_roots(config: Config) -> tuple[Path, ...]:
    """The graph roots of the configuration, else that of the machine's ``storage.conf``.

    A storage.conf that makes no sense is for its users to tell: then there is none.
    """
    if config.repair.graph_roots is not None:
        return tuple(map(Path, config.repair.graph_roots))
    try:
        return (StorageConfig.from_system().graph_root,)
    except ConfigError as error:
        _log.warning("event=no-graph-root error=%s", error)
        return ()


def image_stores(config: Config) -> tuple[Path, ...]:
    """The additional image stores that the configuration adds to those of ``storage.conf``."""
    return tuple(map(Path, config.repair.image_stores))


def require_named(config: Config) -> None:
    """Raises StorageError if a graph root or image store that the configuration names is missing."""
    for root in _named(config):
        _require(root)


def _named(config: Config) -> frozenset[Path]:
    return frozenset((*map(Path, config.repair.graph_roots or ()), *image_stores(config)))


def _require(root: Path) -> None:
    try:
        os.stat(root / "overlay")
    except OSError as error:
        raise StorageError(
            f"no graph root is there: {error.strerror}",
            subject=str(root),
            advice="mount its disk, or correct repair.graph_roots or repair.image_stores"
            " in the service's configuration",
        ) from error


def needs_of(config: Config) -> LookAtNeeds:
    """Looks at the graph roots, and at what is mounted, each time it is called."""
    return partial(_look, graph_roots(config), image_stores(config), _named(config))


def _look(roots: Sequence[Path], stores: Sequence[Path], named: Collection[Path]) -> Needs:
    # Most services have no need of it for long: their memory is not to pay for it.
    from layerstore.graphroot.lowers import linked_layers, mounted_layers  # noqa: PLC0415

    known = bool(roots)
    referenced: set[int] = set()
    running: set[int] = set()
    mounted = mounted_layers()
    configured = tuple(dict.fromkeys((*roots, *stores, *_machines_image_stores(roots))))
    for root in (*configured, *(mounted.graph_roots - set(configured))):
        try:
            if root in named:
                _require(root)
            layers = linked_layers(root, mounted)
        except (LayerstoreError, OSError) as error:
            if root not in configured:
                continue  # that of somebody else, as they see it
            _log.warning("event=graph-root-not-read graph_root=%s error=%s", root, error)
            known = False
            continue
        for layer in layers:
            keys = set(_keys(layer.path))
            referenced |= keys
            if layer.mounted:
                running |= keys
    return Needs(referenced, running, known)


def _machines_image_stores(roots: Sequence[Path]) -> tuple[Path, ...]:
    try:
        configured = StorageConfig.from_system()
    except ConfigError:
        return ()
    return configured.additional_image_stores if configured.graph_root in roots else ()


def _keys(layer: Path) -> Iterator[int]:
    """The views that a layer's path may mean, wherever the store is mounted for its client."""
    try:
        digest = names.digest_of(layer.name.encode())
    except InvalidDigest:
        return
    yield names.name_hash("", digest)
    try:
        yield names.name_hash(names.reference_of(layer.parent.name.encode()), digest)
    except (InvalidReference, InvalidDigest):
        return
