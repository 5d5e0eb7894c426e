"""The transport ``oci-archive:FILE[:TAG]``: an OCI image layout in a tar archive."""

from __future__ import annotations

import threading
from pathlib import Path

from layerstore.copy.archivereader import TarFiles
from layerstore.copy.archivewriter import ArchiveWriter
from layerstore.copy.ocilayout import LAYOUT, OciReader, blob_name, index_entry, new_index
from layerstore.copy.transport import ImageDestination, Pieces
from layerstore.errors import UsageError
from layerstore.formats import Compression
from layerstore.image import Digest, media_types


class OciArchiveSource(OciReader):
    """One image of an archive, read in place."""

    transport = "oci-archive"

    def __init__(
        self,
        path: Path,
        tag: str | None,
        *,
        scratch: Path | None = None,
        files: TarFiles | None = None,
    ) -> None:
        """``files`` is the archive where it is open already."""
        super().__init__(files or TarFiles(path, f"oci-archive:{path}", scratch=scratch), path, tag)


class OciArchiveDestination(ImageDestination):
    """A new archive with one image; an old one under its name is replaced at ``commit``."""

    manifest_types = (media_types.OCI_MANIFEST, media_types.OCI_INDEX)
    layer_form = Compression.GZIP

    def __init__(self, path: Path, tag: str | None, *, scratch: Path | None = None) -> None:
        """Raises ``StorageError``."""
        self._tag = tag
        self._archive = ArchiveWriter(path, f"oci-archive:{path}", scratch=scratch)
        self._lock = threading.Lock()
        self._begun: set[Digest] = set()
        self._blobs: dict[Digest, int] = {}
        self._index: bytes | None = None

    def has_blob(self, digest: Digest, size: int) -> bool:
        """See ``ImageDestination``: put into this archive before."""
        with self._lock:
            return self._blobs.get(digest) == size

    def put_blob(self, digest: Digest, pieces: Pieces, size: int) -> None:
        """See ``ImageDestination``; a blob that is on its way already is not waited for."""
        with self._lock:
            if digest in self._begun:
                return
            self._begun.add(digest)
        self._archive.add_blob(blob_name(digest), pieces, size)
        with self._lock:
            self._blobs[digest] = size

    def put_manifest(self, raw: bytes, media_type: str, *, top: bool) -> None:
        """See ``ImageDestination``."""
        digest = Digest.of(raw)
        if not self.has_blob(digest, len(raw)):
            self.put_blob(digest, lambda: (raw,), len(raw))
        if top:
            self._index = new_index(index_entry(raw, media_type, self._tag))

    def commit(self) -> None:
        """See ``ImageDestination``."""
        if self._index is None:
            raise UsageError("an archive without an image")
        self._archive.add("oci-layout", LAYOUT)
        self._archive.add("index.json", self._index)
        self._archive.finish()

    def close(self) -> None:
        """See ``ImageDestination``."""
        self._archive.abort()
