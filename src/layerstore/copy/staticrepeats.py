"""Layers that an image has more than once: no client may find them in a static store.

A name has one directory, and an overlay mount takes no directory twice: it fails with ELOOP, at
``podman run``, long after the pull.  So such a layer has no name in the store, and a client pulls it
plainly.  It never gets one: without the reference nothing tells for which image a client asks, and
with it the tag may move back.  ``.layerstore/repeated`` holds an empty file for each such name,
at the same path as the name would have in the store.

A name that was there first cannot be taken away, because clients of earlier images have its path on
disk; then it is the image that is refused.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from layerstore.copy.reuse import WantedLayer
from layerstore.copy.staticstore import OWN, PUBLIC, StaticStore, layer_name
from layerstore.errors import StorageError, UsageError
from layerstore.graphroot.atomic import sync_directory, write_file
from layerstore.image import Reference

_REPEATED: Final = "repeated"


def repeated_names(layers: Sequence[WantedLayer]) -> set[str]:
    """The names under which a client would find one directory for several layers of an image."""
    blobs = Counter(layer.descriptor.digest for layer in layers)
    tocs = Counter(layer.toc for layer in layers if layer.toc is not None)
    found: set[str] = set()
    for layer in layers:
        digest, toc = layer.descriptor.digest, layer.toc
        if blobs[digest] > 1:
            found.add(digest)
        if toc is not None and (tocs[toc] > 1 or blobs[digest] > 1):
            found.add(toc)
    return found


class Repeats:
    """The names that a store never has, for one reference or for none."""

    def __init__(self, store: StaticStore, reference: Reference | None) -> None:
        self._store = store
        self._reference = reference

    def add(self, names: Iterable[str]) -> None:
        """Keep these names out of the store from now on; call it inside ``writing``.

        Raises ``UsageError`` if the store has one of them, ``StorageError``.
        """
        wanted = sorted(name for name in names if not self.has(name))
        for name in wanted:
            path = self._store.directory / layer_name(self._reference, name).path
            if os.path.lexists(path):
                raise UsageError(
                    f"the image has the layer {name} more than once, and the store offers that layer"
                    " already: a client would find one directory for several layers, and no overlay"
                    " mount takes it twice",
                    subject=str(self._store.directory),
                    advice=f"once no machine has containers or images of that layer, remove {path}"
                    " and unpack the image again; docs/static-stores.md has other ways",
                )
        try:
            for name in wanted:
                marker = self._marker(name)
                for directory in (self._directory, marker.parent):
                    if not directory.is_dir():
                        directory.mkdir()
                        os.chmod(directory, PUBLIC)
                        sync_directory(directory.parent)
                write_file(marker, b"", mode=0o644)
        except OSError as error:
            raise StorageError(
                f"cannot be written: {error.strerror or error}", subject=str(self._directory)
            ) from error

    def has(self, name: str) -> bool:
        """Whether this name is kept out."""
        return self._marker(name).exists()

    @property
    def _directory(self) -> Path:
        return self._store.directory / OWN / _REPEATED

    def _marker(self, name: str) -> Path:
        return self._directory / layer_name(self._reference, name).path
