"""The transport ``dir:DIRECTORY``: one image as plain files, for looking at and debugging.

``manifest.json``, a ``version`` file, blobs under the hex digits of their digests,
``signature-N`` from 1.  An image for several platforms has the index as ``manifest.json``
and each image's manifest and signatures under ``HEX.manifest.json`` and
``HEX.signature-N`` (containers/image, "directory/directory_transport.go").

What tools wrote there may be compressed otherwise than the manifest says: readers look at
the bytes.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from layerstore import limits
from layerstore.copy.archivewriter import sync_directory
from layerstore.copy.localfiles import Directory, LocalFile, said
from layerstore.copy.transport import ImageDestination, ImageSource, Pieces
from layerstore.copy.unnamed import NewDirectory, publish
from layerstore.errors import NotFound, StorageError, UsageError
from layerstore.image import Digest, Reference, parse_manifest
from layerstore.registry import FetchedManifest

VERSION: Final = b"Directory Transport Version: 1.1\n"
_VERSION_PREFIX: Final = b"Directory Transport Version: "
_MANIFEST: Final = "manifest.json"


class DirSource(ImageSource):
    """The image of a directory."""

    transport = "dir"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._name = f"dir:{directory}"
        self._files = Directory(directory, self._name)

    @property
    def identity(self) -> Reference | str:
        """See ``ImageSource``: the resolved path."""
        return os.path.realpath(self._directory)

    def manifest(self, digest: Digest | None = None) -> FetchedManifest:
        """See ``ImageSource``."""
        if digest is None:
            raw = self._files.read(_MANIFEST, limits.MANIFEST_BYTES)
            return FetchedManifest(raw, parse_manifest(raw).media_type, Digest.of(raw))
        raw = self._one(digest, f"{_stem(digest)}.{_MANIFEST}")
        digest.verify(raw, subject=self._name)
        return FetchedManifest(raw, parse_manifest(raw).media_type, digest)

    def blob(self, digest: Digest, limit: int) -> bytes:
        """See ``ImageSource``."""
        raw = self._files.read(_stem(digest), limit)
        digest.verify(raw, subject=self._name)
        return raw

    def open_blob(self, digest: Digest, size: int) -> LocalFile:
        """See ``ImageSource``; a wrong size shows when the blob is verified."""
        return self._files.open(_stem(digest))

    def read_range(self, digest: Digest, size: int, offset: int, length: int) -> bytes:
        """See ``ImageSource``."""
        with self._files.open(_stem(digest)) as file:
            return file.at(offset, length)

    def signatures(self, digest: Digest) -> tuple[bytes, ...]:
        """See ``ImageSource``."""
        top = Digest.of(self._files.read(_MANIFEST, limits.MANIFEST_BYTES))
        prefix = "" if digest == top else f"{_stem(digest)}."
        found: list[bytes] = []
        while len(found) < limits.SIGNATURES:
            try:
                name = f"{prefix}signature-{len(found) + 1}"
                found.append(self._files.read(name, limits.SIGNATURE_BYTES))
            except NotFound:
                break
        return tuple(found)

    def _one(self, digest: Digest, name: str) -> bytes:
        try:
            return self._files.read(name, limits.MANIFEST_BYTES)
        except NotFound:
            # The only image of the directory may be asked for by its digest too.
            raw = self._files.read(_MANIFEST, limits.MANIFEST_BYTES)
            if Digest.of(raw) == digest:
                return raw
            raise


class DirDestination(ImageDestination):
    """A directory with one image; what it held before is replaced at ``commit``.

    Everything is gathered in a directory beside the final names first.  A new directory
    appears by one rename; in one that is there already the manifest is the last file to
    appear, and the old manifest the first to go.
    """

    takes_signatures = True

    def __init__(self, directory: Path) -> None:
        """Raises ``UsageError`` for a directory with other things in it, ``StorageError``."""
        self._name = f"dir:{directory}"
        try:
            self._directory = Path(os.path.realpath(directory))
            self._exists = self._directory.is_dir()
            if self._exists:
                self._refuse_other_things()
            elif self._directory.exists():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            parent = self._directory if self._exists else self._directory.parent
            parent.mkdir(parents=True, exist_ok=True)
            self._gathered = NewDirectory(parent)
            self._new = self._gathered.path
        except OSError as error:
            raise StorageError(said(error), subject=self._name) from error

    def has_blob(self, digest: Digest, size: int) -> bool:
        """See ``ImageDestination``: put before in this copy."""
        try:
            return (self._new / _stem(digest)).stat().st_size == size
        except OSError:
            return False

    def put_blob(self, digest: Digest, pieces: Pieces, size: int) -> None:
        """See ``ImageDestination``; raises ``StorageError``."""
        publish(self._new / _stem(digest), pieces, self._name)

    def put_manifest(self, raw: bytes, media_type: str, *, top: bool) -> None:
        """See ``ImageDestination``."""
        name = _MANIFEST if top else f"{_stem(Digest.of(raw))}.{_MANIFEST}"
        self._put(name, raw)

    def put_signatures(self, signatures: Sequence[bytes], digest: Digest, *, top: bool) -> None:
        """See ``ImageDestination``."""
        prefix = "" if top else f"{_stem(digest)}."
        for number, signature in enumerate(signatures, 1):
            self._put(f"{prefix}signature-{number}", signature)

    def commit(self) -> None:
        """See ``ImageDestination``."""
        try:
            self._put("version", VERSION)
            self._new.chmod(0o755)
            if self._exists:
                self._replace()
            else:
                os.rename(self._new, self._directory)
                sync_directory(self._directory.parent)
        except OSError as error:
            raise StorageError(said(error), subject=self._name) from error

    def close(self) -> None:
        """See ``ImageDestination``."""
        self._gathered.close()

    def _put(self, name: str, data: bytes) -> None:
        publish(self._new / name, lambda: (data,), self._name)

    def _refuse_other_things(self) -> None:
        if not any(self._directory.iterdir()):
            return
        try:
            version = Directory(self._directory, self._name).read("version", 1024)
        except NotFound:
            version = b""
        if not version.startswith(_VERSION_PREFIX):
            raise UsageError(
                "the directory holds other things than an image, and would be emptied",
                subject=self._name,
                advice="name a new directory",
            )

    def _replace(self) -> None:
        (self._directory / _MANIFEST).unlink(missing_ok=True)
        for old in self._directory.iterdir():
            if old == self._new:
                continue
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
            else:
                old.unlink()
        for new in sorted(self._new.iterdir(), key=lambda path: path.name == _MANIFEST):
            os.rename(new, self._directory / new.name)
        self._new.rmdir()
        sync_directory(self._directory)


def _stem(digest: Digest) -> str:
    """The name of a blob's file."""
    return digest.hex if digest.algorithm == "sha256" else f"{digest.algorithm}-{digest.hex}"
