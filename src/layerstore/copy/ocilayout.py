"""The transport ``oci:DIRECTORY[:TAG]``: an OCI image layout on disk.

``index.json`` names manifests by the annotation ``org.opencontainers.image.ref.name``;
everything else lies in ``blobs/ALGORITHM/HEX`` (OCI image specification,
image-layout.md).  What stands for the name may also be ``@N``, the N-th entry of
``index.json`` from 0.
"""

from __future__ import annotations

import json
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from layerstore import limits
from layerstore.copy.localfiles import Directory, FileSet, LocalFile
from layerstore.copy.transport import ImageDestination, ImageSource, Pieces
from layerstore.copy.unnamed import publish
from layerstore.errors import InvalidManifest, InvalidReference, LimitExceeded, NotFound, UsageError
from layerstore.formats import Compression
from layerstore.image import Digest, Reference, media_types, parse_manifest
from layerstore.registry import FetchedManifest

REF_NAME: Final = "org.opencontainers.image.ref.name"
CONTAINERD_NAME: Final = "io.containerd.image.name"
LAYOUT: Final = b'{"imageLayoutVersion":"1.0.0"}'
_NUMBERED: Final = re.compile(r"@([0-9]{1,6})")
_NOT_IN_NAMES: Final = re.compile(r"[^a-z0-9._/-]+")
_EMPTY: Final[dict[str, Any]] = {
    "schemaVersion": 2,
    "mediaType": media_types.OCI_INDEX,
    "manifests": [],
}


def parse_name(text: str, transport: str = "oci") -> tuple[Path, str | None]:
    """Read ``PATH[:TAG]``; the first colon parts the two, as in containers/image."""
    path, colon, tag = text.partition(":")
    if not path or (colon and not tag):
        what = "DIRECTORY" if transport == "oci" else "FILE"
        raise UsageError(f"the form is {transport}:{what}[:TAG]", subject=f"{transport}:{text}")
    return Path(path), tag or None


def require_tag(tag: str | None) -> None:
    """Refuse ``@N`` where an image is written."""
    if tag is not None and tag.startswith("@"):
        raise UsageError("a number chooses from images that are there", subject=tag)


@dataclass(frozen=True, slots=True)
class LayoutEntry:
    """One entry of ``index.json``; ``name`` is the text that an image tool gave it."""

    digest: Digest
    media_type: str
    name: str | None


class OciReader(ImageSource):
    """The image ``tag`` of a layout; None is the only one."""

    transport = "oci"

    def __init__(self, files: FileSet, place: Path, tag: str | None) -> None:
        """``place`` is the directory or archive, for messages and policy.json."""
        self._files = files
        self._place = place
        self._tag = tag
        self._name = f"{self.transport}:{place}" + (f":{tag}" if tag else "")

    @property
    def identity(self) -> Reference | str:
        """See ``ImageSource``: the resolved path and the tag."""
        path = os.path.realpath(self._place)
        return f"{path}:{self._tag}" if self._tag else path

    def entries(self) -> tuple[LayoutEntry, ...]:
        """The images of the layout, in order."""
        return tuple(map(self._entry, self._read_index()["manifests"]))

    @property
    def names(self) -> tuple[Reference, ...]:
        """See ``ImageSource``: what the layout calls the image, as ``local_names`` has it."""
        name = self._named().name
        return () if name is None else local_names(name)

    def manifest(self, digest: Digest | None = None) -> FetchedManifest:
        """See ``ImageSource``; raises ``NotFound`` for a tag that is not there."""
        media_type = ""
        if digest is None:
            entry = self._named()
            digest, media_type = entry.digest, entry.media_type
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

    def open_blob(self, digest: Digest, size: int) -> LocalFile:
        """See ``ImageSource``; a wrong size shows when the blob is verified."""
        return self._open(digest)

    def read_range(self, digest: Digest, size: int, offset: int, length: int) -> bytes:
        """See ``ImageSource``."""
        with self._open(digest) as file:
            return file.at(offset, length)

    def close(self) -> None:
        """See ``ImageSource``."""
        self._files.close()

    def _open(self, digest: Digest) -> LocalFile:
        try:
            return self._files.open(blob_name(digest))
        except NotFound:
            raise NotFound("the layout lacks this blob", subject=f"{self._name}@{digest}") from None

    def _named(self) -> LayoutEntry:
        entries = self._read_index()["manifests"]
        if self._tag is not None:
            number = _NUMBERED.fullmatch(self._tag)
            if number is not None:
                entries = entries[int(number[1]) :][:1]
            else:
                entries = [entry for entry in entries if ref_name(entry) == self._tag]
        if not entries:
            raise NotFound("no such image in the layout", subject=self._name)
        if len(entries) > 1:
            raise UsageError("the layout holds several images: name a tag", subject=self._name)
        return self._entry(entries[0])

    def _entry(self, entry: dict[str, Any]) -> LayoutEntry:
        try:
            media_type = entry["mediaType"]
            if not isinstance(media_type, str):
                raise TypeError
            name = (entry.get("annotations") or {}).get(CONTAINERD_NAME) or ref_name(entry)
            return LayoutEntry(Digest.parse(entry["digest"]), media_type, name)
        except (KeyError, TypeError):
            raise InvalidManifest("index.json is malformed", subject=self._name) from None

    def _read_index(self) -> dict[str, Any]:
        try:
            raw = self._files.read("index.json", limits.MANIFEST_BYTES)
        except NotFound:
            raise NotFound("no OCI layout: index.json is missing", subject=self._name) from None
        return load_index(raw)


class OciLayout(OciReader, ImageDestination):
    """A layout in a directory, source and destination in one."""

    manifest_types = (media_types.OCI_MANIFEST, media_types.OCI_INDEX)
    layer_form = Compression.GZIP

    def __init__(self, directory: Path, tag: str | None) -> None:
        name = f"oci:{directory}"
        super().__init__(Directory(directory, name), directory, tag)
        self._directory = directory
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[Reference, ...]:
        """See ``ImageSource``: the tag that was given, where it is a name."""
        try:
            return (Reference.parse(self._tag),) if self._tag else ()
        except InvalidReference:
            return ()

    def has_blob(self, digest: Digest, size: int) -> bool:
        """See ``ImageDestination``: a file of that size, written whole by its rename."""
        try:
            return self._blob_path(digest).stat().st_size == size
        except OSError:
            return False

    def put_blob(self, digest: Digest, pieces: Pieces, size: int) -> None:
        """See ``ImageDestination``; raises ``StorageError``."""
        publish(self._blob_path(digest), pieces, self._name)

    def put_manifest(self, raw: bytes, media_type: str, *, top: bool) -> None:
        """See ``ImageDestination``."""
        publish(self._blob_path(Digest.of(raw)), lambda: (raw,), self._name)
        if not top:
            return
        with self._lock:
            path = self._directory / "index.json"
            index = self._read_index() if path.exists() else dict(_EMPTY)
            index["manifests"] = [
                other for other in index["manifests"] if ref_name(other) != self._tag
            ] + [index_entry(raw, media_type, self._tag)]
            marker = self._directory / "oci-layout"
            if not marker.exists():
                publish(marker, lambda: (LAYOUT,), self._name)
            encoded = encode_index(index)
            publish(path, lambda: (encoded,), self._name)

    def _blob_path(self, digest: Digest) -> Path:
        return self._directory / blob_name(digest)


def local_names(text: str) -> tuple[Reference, ...]:
    """A name as Podman completes those of its own images: ``localhost/`` where no host is.

    None for what cannot be a name: any text may stand in a layout.
    """
    first, slash, _ = text.partition("/")
    if text.startswith("/"):
        text = f"localhost/{_NOT_IN_NAMES.sub('-', text.lower()).strip('/')}"
    elif not slash or not ("." in first or ":" in first or first == "localhost"):
        text = f"localhost/{text}"
    try:
        reference = Reference.parse(text)
    except InvalidReference:
        return ()
    return (reference,) if reference.digest is None else ()


def blob_name(digest: Digest) -> str:
    """Where a blob lies in a layout."""
    return f"blobs/{digest.algorithm}/{digest.hex}"


def ref_name(entry: dict[str, Any]) -> str | None:
    """The name that an entry of ``index.json`` has."""
    name = (entry.get("annotations") or {}).get(REF_NAME)
    return name if isinstance(name, str) else None


def index_entry(raw: bytes, media_type: str, tag: str | None) -> dict[str, Any]:
    """An entry of ``index.json`` for a manifest."""
    entry: dict[str, Any] = {
        "mediaType": media_type,
        "digest": str(Digest.of(raw)),
        "size": len(raw),
    }
    if tag is not None:
        entry["annotations"] = {REF_NAME: tag}
    return entry


def new_index(*entries: dict[str, Any]) -> bytes:
    """The bytes of an ``index.json`` with these entries only."""
    return encode_index(_EMPTY | {"manifests": list(entries)})


def load_index(raw: bytes) -> dict[str, Any]:
    """Read ``index.json``, keeping what we do not know; raises ``InvalidManifest``."""
    parse_manifest(raw, media_types.OCI_INDEX)
    index = json.loads(raw)
    index.setdefault("manifests", [])
    assert isinstance(index, dict)
    return index


def encode_index(index: dict[str, Any]) -> bytes:
    """The bytes of an ``index.json``."""
    return json.dumps(index, ensure_ascii=False, separators=(",", ":")).encode()
