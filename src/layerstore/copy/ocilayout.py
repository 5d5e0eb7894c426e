"""The transport ``oci:DIRECTORY[:TAG]``: an OCI image layout on disk.

``index.json`` names manifests by the annotation ``org.opencontainers.image.ref.name``;
everything else lies in ``blobs/ALGORITHM/HEX`` (OCI image specification,
image-layout.md).
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from layerstore import limits
from layerstore.copy.transport import ImageDestination, ImageSource, Pieces
from layerstore.errors import (
    InvalidManifest,
    LimitExceeded,
    NotFound,
    StorageError,
    UsageError,
)
from layerstore.image import Digest, media_types, parse_manifest
from layerstore.registry import FetchedManifest

REF_NAME: Final = "org.opencontainers.image.ref.name"
_LAYOUT: Final = b'{"imageLayoutVersion":"1.0.0"}'
_EMPTY: Final[dict[str, Any]] = {
    "schemaVersion": 2,
    "mediaType": media_types.OCI_INDEX,
    "manifests": [],
}


def parse_name(text: str) -> tuple[Path, str | None]:
    """Read ``DIRECTORY[:TAG]``; the first colon parts the two, as in containers/image."""
    directory, colon, tag = text.partition(":")
    if not directory or (colon and not tag):
        raise UsageError("an OCI layout is oci:DIRECTORY[:TAG]", subject=f"oci:{text}")
    return Path(directory), tag or None


class OciLayout(ImageSource, ImageDestination):
    """Source and destination in one; ``tag`` None is the only image of the layout."""

    transport = "oci"

    def __init__(self, directory: Path, tag: str | None) -> None:
        self._directory = directory
        self._tag = tag
        self._name = f"oci:{directory}" + (f":{tag}" if tag else "")
        self._lock = threading.Lock()

    # -- source -------------------------------------------------------------------

    def manifest(self, digest: Digest | None = None) -> FetchedManifest:
        """See ``ImageSource``; raises ``NotFound`` for a tag that is not there."""
        media_type = ""
        if digest is None:
            digest, media_type = self._named()
        raw = self.blob(digest, limits.MANIFEST_BYTES)
        return FetchedManifest(raw, media_type or parse_manifest(raw).media_type, digest)

    def blob(self, digest: Digest, limit: int) -> bytes:
        """See ``ImageSource``."""
        with self._open(digest) as file:
            raw = file.read(limit + 1)
        if len(raw) > limit:
            raise LimitExceeded(f"more than {limit} bytes", subject=f"{self._name}@{digest}")
        digest.verify(raw, subject=self._name)
        return raw

    def open_blob(self, digest: Digest, size: int) -> _File:
        """See ``ImageSource``; a wrong size shows when the blob is verified."""
        return self._open(digest)

    def read_range(self, digest: Digest, size: int, offset: int, length: int) -> bytes:
        """See ``ImageSource``."""
        with self._open(digest) as file:
            return file.at(offset, length)

    def close(self) -> None:
        """Nothing is kept open."""

    # -- destination --------------------------------------------------------------

    def has_blob(self, digest: Digest, size: int) -> bool:
        """See ``ImageDestination``: a file of that size, written whole by its rename."""
        try:
            return self._blob_path(digest).stat().st_size == size
        except OSError:
            return False

    def take_over(self, source: ImageSource, digest: Digest) -> bool:
        """Link a blob of another layout on the same file system? No: it must be verified."""
        return False

    def put_blob(self, digest: Digest, pieces: Pieces, size: int) -> None:
        """See ``ImageDestination``; raises ``StorageError``."""
        self._publish(self._blob_path(digest), pieces)

    def put_manifest(self, raw: bytes, media_type: str, *, top: bool) -> None:
        """See ``ImageDestination``."""
        digest = Digest.of(raw)
        self._publish(self._blob_path(digest), lambda: (raw,))
        if not top:
            return
        with self._lock:
            index = self._read_index() if self._index_path.exists() else dict(_EMPTY)
            entry: dict[str, Any] = {
                "mediaType": media_type,
                "digest": str(digest),
                "size": len(raw),
            }
            if self._tag is not None:
                entry["annotations"] = {REF_NAME: self._tag}
            index["manifests"] = [
                other for other in index["manifests"] if _ref_name(other) != self._tag
            ] + [entry]
            marker = self._directory / "oci-layout"
            if not marker.exists():
                self._publish(marker, lambda: (_LAYOUT,))
            encoded = json.dumps(index, ensure_ascii=False, separators=(",", ":")).encode()
            self._publish(self._index_path, lambda: (encoded,))

    # -- files --------------------------------------------------------------------

    @property
    def _index_path(self) -> Path:
        return self._directory / "index.json"

    def _blob_path(self, digest: Digest) -> Path:
        return self._directory / "blobs" / digest.algorithm / digest.hex

    def _open(self, digest: Digest) -> _File:
        try:
            return _File(self._blob_path(digest))
        except FileNotFoundError:
            raise NotFound("the layout lacks this blob", subject=f"{self._name}@{digest}") from None
        except OSError as error:
            raise StorageError(_said(error), subject=self._name) from error

    def _named(self) -> tuple[Digest, str]:
        entries = self._read_index()["manifests"]
        if self._tag is not None:
            entries = [entry for entry in entries if _ref_name(entry) == self._tag]
        if not entries:
            raise NotFound("no such image in the layout", subject=self._name)
        if len(entries) > 1:
            raise UsageError("the layout holds several images: name a tag", subject=self._name)
        try:
            media_type = entries[0]["mediaType"]
            if not isinstance(media_type, str):
                raise TypeError
            return Digest.parse(entries[0]["digest"]), media_type
        except (KeyError, TypeError):
            raise InvalidManifest("index.json is malformed", subject=self._name) from None

    def _read_index(self) -> dict[str, Any]:
        try:
            with self._index_path.open("rb") as file:
                raw = file.read(limits.MANIFEST_BYTES + 1)
        except FileNotFoundError:
            raise NotFound("no OCI layout: index.json is missing", subject=self._name) from None
        except OSError as error:
            raise StorageError(_said(error), subject=self._name) from error
        parse_manifest(raw, media_types.OCI_INDEX)
        index = json.loads(raw)
        index.setdefault("manifests", [])
        assert isinstance(index, dict)
        return index

    def _publish(self, path: Path, pieces: Pieces) -> None:
        """Write a file that is whole whenever it is there."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".new-", delete=False) as file:
                try:
                    for piece in pieces():
                        file.write(piece)
                    file.flush()
                    os.fsync(file.fileno())
                    os.fchmod(file.fileno(), 0o644)
                    os.rename(file.name, path)
                except BaseException:
                    os.unlink(file.name)
                    raise
        except OSError as error:
            raise StorageError(_said(error), subject=self._name) from error


class _File:
    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._path = path

    def read(self, n: int, /) -> bytes:
        try:
            return self._file.read(n)
        except OSError as error:
            raise StorageError(_said(error), subject=str(self._path)) from error

    def at(self, offset: int, length: int) -> bytes:
        self._file.seek(offset)
        return self.read(length)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def _ref_name(entry: dict[str, Any]) -> str | None:
    name = (entry.get("annotations") or {}).get(REF_NAME)
    return name if isinstance(name, str) else None


def _said(error: OSError) -> str:
    return error.strerror or str(error)
