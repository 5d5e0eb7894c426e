"""Whether the files of an ordinary layer are still what its archive made of them.

The tar-split knows the archive but for the contents of files: put together with those, the tar
stream must have the layer's diff ID.  That says nothing of owners, modes, times, links, devices,
attributes, and of files that came later.  So the headers are extracted once more, into a place
for temporary files and without contents, and the two trees compared.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Final

from layerstore import limits
from layerstore.errors import ContentError, CorruptStorage
from layerstore.formats.tarstream import TarReader
from layerstore.graphroot.extract import ExtractOptions, Extractor
from layerstore.graphroot.layers import Layer
from layerstore.graphroot.removal import remove_tree
from layerstore.graphroot.treecheck import tree_differences

_TOLD: Final = 3  # differences of one layer
_CLOCK_NS: Final = 2 * 10**9  # by which the times of a file system may lag behind ours


def content_problem(layer: Layer, options: ExtractOptions) -> str:
    """What is wrong with the files of ``layer``, which has a diff ID and a tar-split; "" for nothing.

    ``options`` are those that the layer was extracted with.  Raises StorageError if it cannot be
    looked at, or if the system's place for temporary files cannot take it.
    """
    with tempfile.TemporaryDirectory(prefix="layerstore-check-") as scratch:
        return _Check(layer, options, Path(scratch)).problem()


class _Check:
    def __init__(self, layer: Layer, options: ExtractOptions, scratch: Path) -> None:
        self._layer = layer
        self._options = options
        self._expected = scratch / "diff"
        assert layer.diff_id is not None
        self._diff_id = layer.diff_id
        self._stream = _HashedStream(layer.tar(), layer.diff_id.algorithm)

    def problem(self) -> str:
        began = time.time_ns() - _CLOCK_NS
        try:
            try:
                root_entry = self._extract_headers()
                self._stream.drain()
                if self._stream.digest != self._diff_id:
                    return f"its files are no longer {self._diff_id}"
            except CorruptStorage as error:
                return str(error)
            if root_entry is None or self._layer.record.uid_map or self._layer.record.gid_map:
                return ""
            found = tree_differences(
                self._expected,
                self._layer.diff_path,
                made_after_ns=began,
                contents=False,
                roots=root_entry,
            )
            told = list(islice(found, _TOLD + 1))
            return "; ".join([*told[:_TOLD], *(["and more"] if told[_TOLD:] else [])])
        finally:
            if self._expected.exists():
                remove_tree(self._expected)

    def _extract_headers(self) -> bool | None:
        """Whether the archive has an entry for its root; None for what we would not extract.

        Others may have taken an archive that we refuse: then only its digest is compared.
        """
        self._expected.mkdir(mode=0o755)
        reader = TarReader(self._stream)
        try:
            with Extractor(self._expected, self._options) as extractor:
                for entry in reader:
                    extractor.apply(replace(entry, size=0) if entry.size else entry, reader.read)
                extractor.finish()
        except ContentError:
            return None
        return extractor.root_entry


class _HashedStream:
    """The pieces of a tar stream as a file; hashes what is read."""

    def __init__(self, pieces: Iterator[bytes], algorithm: str) -> None:
        self._pieces = pieces
        self._piece = memoryview(b"")
        self._algorithm = algorithm
        self._hash = hashlib.new(algorithm)

    def read(self, n: int, /) -> bytes:
        while not self._piece:
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._hash.update(piece)
            self._piece = memoryview(piece)
        data, self._piece = bytes(self._piece[:n]), self._piece[n:]
        return data

    def drain(self) -> None:
        """Read to the end."""
        while self.read(limits.MIB):
            pass

    @property
    def digest(self) -> str:
        """Of what was read."""
        return f"{self._algorithm}:{self._hash.hexdigest()}"
