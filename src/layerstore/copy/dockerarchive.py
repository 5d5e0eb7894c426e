"""The transport ``docker-archive:FILE[:NAME|:@N]``: what ``docker save`` and ``podman save`` write.

``manifest.json`` is a list with one entry for each image: the file of its config, its names
(``RepoTags``) and the files of its layers, lowest first.  Old versions call a layer
``ID/layer.tar``, Podman ``DIFFID.tar``, new versions of Docker ``blobs/sha256/HEX`` (the
archive then is an OCI layout too).  Layers are plain tars; some builders compress them.

There is no image manifest, so one is made up that describes the plain layers; what vouches
for them are the diff IDs of the config, and they are checked.  (Docker, "image/spec";
containers/image, "docker/internal/tarfile".)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from layerstore import limits
from layerstore.copy.archivereader import TarFiles
from layerstore.copy.archivewriter import ArchiveWriter
from layerstore.copy.localfiles import LocalFile
from layerstore.copy.transport import (
    PIECE_BYTES,
    BlobStream,
    DiffStream,
    ImageDestination,
    ImageSource,
    Pieces,
)
from layerstore.errors import (
    InvalidManifest,
    InvalidReference,
    LimitExceeded,
    NotFound,
    UsageError,
    VerificationError,
)
from layerstore.formats import Compression, LayerStream
from layerstore.image import Digest, Reference, media_types, parse_config, parse_manifest
from layerstore.image.manifest import Index
from layerstore.registry import FetchedManifest

_MANIFEST: Final = "manifest.json"
_REPOSITORIES: Final = "repositories"
_HEX: Final = re.compile(r"[0-9a-f]{64}")
_NUMBERED: Final = re.compile(r"@([0-9]{1,6})")


class _Entry(msgspec.Struct):
    config: str = msgspec.field(name="Config")
    repo_tags: list[str] | None = msgspec.field(name="RepoTags", default=None)
    layers: list[str] | None = msgspec.field(name="Layers", default=None)


@dataclass(frozen=True, slots=True)
class ArchivedImage:
    """One entry of ``manifest.json``: file names inside the archive, and the image's names."""

    config: str
    names: tuple[Reference, ...]
    layers: tuple[str, ...]


def parse_name(text: str) -> tuple[Path, str | None]:
    """Read ``FILE[:NAME|:@N]``; the first colon parts the two."""
    path, colon, which = text.partition(":")
    if not path or (colon and not which):
        raise UsageError(
            "the form is docker-archive:FILE[:NAME|:@N]", subject=f"docker-archive:{text}"
        )
    return Path(path), which or None


class DockerArchive:
    """An archive opened for reading; ``images`` are what it says it holds."""

    def __init__(
        self, path: Path, *, scratch: Path | None = None, files: TarFiles | None = None
    ) -> None:
        """``files`` is the archive where it is open already.

        Raises ``NotFound``, ``StorageError``, ``InvalidLayer`` and ``InvalidManifest``.
        """
        self.path = path
        self.subject = f"docker-archive:{path}"
        self.files = files or TarFiles(path, self.subject, scratch=scratch)
        try:
            self.images = self._read()
        except BaseException:
            self.files.close()
            raise

    def find(self, which: str | None) -> int:
        """The number of the image called ``which`` (None: the only one).

        Raises ``NotFound`` and ``UsageError``.
        """
        if which is None:
            if len(self.images) != 1:
                raise UsageError(
                    f"the archive holds {len(self.images)} images: name one", subject=self.subject
                )
            return 0
        if (number := _NUMBERED.fullmatch(which)) is not None:
            if int(number[1]) < len(self.images):
                return int(number[1])
        else:
            wanted = archive_tag(which)
            for position, image in enumerate(self.images):
                if wanted in image.names:
                    return position
        raise NotFound("no such image in the archive", subject=f"{self.subject}:{which}")

    def source(self, which: str | None) -> DockerArchiveSource:
        """The image called ``which``, see ``find``; closing it closes the archive."""
        number = self.find(which)
        by_name = which is not None and _NUMBERED.fullmatch(which) is None
        names = (archive_tag(which),) if which and by_name else self.images[number].names
        return DockerArchiveSource(self, number, names, owned=True)

    def image(self, number: int) -> DockerArchiveSource:
        """The image with that number; closing it leaves the archive open."""
        return DockerArchiveSource(self, number, self.images[number].names)

    def close(self) -> None:
        """No more will be read."""
        self.files.close()

    def _read(self) -> tuple[ArchivedImage, ...]:
        try:
            raw = self.files.read(_MANIFEST, limits.MANIFEST_BYTES)
        except NotFound:
            advice = "archives of Docker before 1.10 are not read"
            raise InvalidManifest(
                "no archive of images: manifest.json is missing",
                subject=self.subject,
                advice=advice if _REPOSITORIES in self.files else "",
            ) from None
        try:
            entries = msgspec.json.decode(raw, type=list[_Entry])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidManifest(
                f"manifest.json is malformed: {error}", subject=self.subject
            ) from None
        if not entries:
            raise InvalidManifest("the archive holds no image", subject=self.subject)
        return tuple(map(self._entry, entries))

    def _entry(self, entry: _Entry) -> ArchivedImage:
        layers = entry.layers or []
        if len(layers) > limits.MANIFEST_LAYERS:
            raise LimitExceeded(f"an image with {len(layers)} layers", subject=self.subject)
        for name in (entry.config, *layers):
            parts = name.split("/")
            if not name or name.startswith("/") or ".." in parts or "\0" in name:
                raise InvalidManifest(
                    f"manifest.json names a file outside of the archive: {name[:200]!r}",
                    subject=self.subject,
                )
        try:
            names = tuple(map(Reference.parse, entry.repo_tags or ()))
        except InvalidReference as error:
            raise InvalidManifest(
                f"manifest.json gives an image a name that is none: {error}", subject=self.subject
            ) from None
        config, *files = (os.path.normpath(name) for name in (entry.config, *layers))
        return ArchivedImage(config, names, tuple(files))


class DockerArchiveSource(ImageSource):
    """One image of an archive, with a manifest made up for it."""

    transport = "docker-archive"

    def __init__(
        self,
        archive: DockerArchive,
        number: int,
        names: tuple[Reference, ...],
        *,
        owned: bool = False,
    ) -> None:
        """``names`` are those of its names that are meant; ``owned``: closing closes the archive."""
        self._archive = archive
        self._image = archive.images[number]
        self._names = names
        self._owned = owned
        self._lock = threading.Lock()
        self._made: tuple[FetchedManifest, bytes, dict[Digest, str]] | None = None

    @property
    def names(self) -> tuple[Reference, ...]:
        """What the archive calls the image, or the one name that it was asked for by."""
        return self._names

    def manifest(self, digest: Digest | None = None) -> FetchedManifest:
        """See ``ImageSource``; reads compressed layers to know their sizes."""
        fetched, _, _ = self._make()
        if digest not in (None, fetched.digest):
            raise NotFound(f"no manifest {digest} in the archive", subject=self._archive.subject)
        return fetched

    def blob(self, digest: Digest, limit: int) -> bytes:
        """See ``ImageSource``."""
        _, config, _ = self._make()
        if Digest.of(config) == digest:
            if len(config) > limit:
                raise LimitExceeded(f"a config of {len(config)} bytes", subject=str(digest))
            return config
        with self._file(digest) as file:
            raw = file.read(limit + 1)
        if len(raw) > limit:
            raise LimitExceeded(f"more than {limit} bytes", subject=str(digest))
        digest.verify(raw, subject=self._archive.subject)
        return raw

    def open_blob(self, digest: Digest, size: int) -> BlobStream:
        """See ``ImageSource``: the plain layer, whatever it is in the archive."""
        return DiffStream(self._file(digest))

    def read_range(self, digest: Digest, size: int, offset: int, length: int) -> bytes:
        """See ``ImageSource``; used for plain layers only."""
        with self._file(digest) as file:
            return file.at(offset, length)

    def close(self) -> None:
        """See ``ImageSource``."""
        if self._owned:
            self._archive.close()

    def _file(self, diff_id: Digest) -> LocalFile:
        _, _, layers = self._make()
        try:
            name = layers[diff_id]
        except KeyError:
            raise NotFound("the image lacks this blob", subject=str(diff_id)) from None
        return self._archive.files.open(name)

    def _make(self) -> tuple[FetchedManifest, bytes, dict[Digest, str]]:
        with self._lock:
            if self._made is None:
                self._made = self._describe()
            return self._made

    def _describe(self) -> tuple[FetchedManifest, bytes, dict[Digest, str]]:
        image, subject = self._image, self._archive.subject
        config = self._archive.files.read(image.config, limits.CONFIG_BYTES)
        stem = Path(image.config).name.removesuffix(".json")
        if _HEX.fullmatch(stem) and hashlib.sha256(config).hexdigest() != stem:
            raise VerificationError(
                "the config is not what its file name says", subject=f"{subject}: {image.config}"
            )
        diff_ids = parse_config(config).diff_ids
        if len(diff_ids) != len(image.layers):
            raise InvalidManifest(
                f"{len(image.layers)} layers, but {len(diff_ids)} diff IDs", subject=subject
            )
        layers = dict(zip(diff_ids, image.layers, strict=True))
        sizes = {diff_id: self._plain_size(name) for diff_id, name in layers.items()}
        document = {
            "schemaVersion": 2,
            "mediaType": media_types.DOCKER_MANIFEST,
            "config": {
                "mediaType": media_types.DOCKER_CONFIG,
                "size": len(config),
                "digest": str(Digest.of(config)),
            },
            "layers": [
                {
                    "mediaType": media_types.DOCKER_LAYER,
                    "size": sizes[diff_id],
                    "digest": str(diff_id),
                }
                for diff_id in diff_ids
            ],
        }
        raw = _encode(document)
        fetched = FetchedManifest(raw, media_types.DOCKER_MANIFEST, Digest.of(raw))
        return fetched, config, layers

    def _plain_size(self, name: str) -> int:
        with self._archive.files.open(name) as file:
            stream = LayerStream(file)
            if stream.compression is Compression.NONE:
                return file.size
            size = 0
            while data := stream.read(PIECE_BYTES):
                size += len(data)
                if size > limits.ARCHIVE_BYTES:
                    raise LimitExceeded(
                        f"a layer of more than {limits.ARCHIVE_BYTES} bytes when unpacked",
                        subject=f"{self._archive.subject}: {name}",
                    )
            return size


class DockerArchiveWriter:
    """A new archive of one or more images; ``finish`` or ``abort`` ends it."""

    def __init__(self, path: Path, *, scratch: Path | None = None) -> None:
        """Raises ``UsageError`` for an archive that is there already, ``StorageError``."""
        subject = f"docker-archive:{path}"
        if path.is_file() and path.stat().st_size:
            raise UsageError(
                "the archive exists already, and images cannot be added to it", subject=subject
            )
        self._archive = ArchiveWriter(path, subject, scratch=scratch)
        self._lock = threading.Lock()
        self._begun: set[Digest] = set()
        self._files: dict[Digest, int] = {}
        self._ids: set[str] = set()
        self._entries: list[dict[str, Any]] = []
        self._repositories: dict[str, dict[str, str]] = {}

    def image(self, names: Sequence[Reference]) -> DockerArchiveDestination:
        """A place for one image, which is in the archive after its ``commit``."""
        return DockerArchiveDestination(self, names)

    def size(self, digest: Digest) -> int | None:
        """Bytes of a layer that is in the archive."""
        with self._lock:
            return self._files.get(digest)

    def add_layer(self, digest: Digest, pieces: Pieces, size: int) -> None:
        """Add a plain layer, once: another of the same digest is not waited for."""
        with self._lock:
            if digest in self._begun:
                return
            self._begun.add(digest)
        self._archive.add_blob(f"{digest.hex}.tar", pieces, size)
        with self._lock:
            self._files[digest] = size

    def add_image(
        self, config: bytes, layers: Sequence[Digest], names: Sequence[Reference]
    ) -> None:
        """Add an image whose layers are there."""
        digest = Digest.of(config)
        name = f"{digest.hex}.json"
        texts = list(map(str, names))
        with self._lock:
            top = self._add_old_form(config, layers)
            known = next((entry for entry in self._entries if entry["Config"] == name), None)
            if known is None:
                self._archive.add(name, config)
                self._entries.append(
                    {
                        "Config": name,
                        "RepoTags": texts,
                        "Layers": [f"{layer.hex}.tar" for layer in layers],
                    }
                )
            else:
                known["RepoTags"] += [text for text in texts if text not in known["RepoTags"]]
            for one in names:
                if top and one.tag is not None:
                    self._repositories.setdefault(one.name, {})[one.tag] = top

    def finish(self) -> None:
        """Give the archive its name."""
        if not self._entries:
            raise UsageError("an archive without an image")
        self._archive.add(_MANIFEST, _encode(self._entries))
        self._archive.add(_REPOSITORIES, _encode(self._repositories))
        self._archive.finish()

    def abort(self) -> None:
        """Leave nothing behind; does nothing after ``finish``."""
        self._archive.abort()

    def _add_old_form(self, config: bytes, layers: Sequence[Digest]) -> str:
        """Describe the layers as Docker before 1.10 did; return the identity of the topmost."""
        parent = ""
        document = json.loads(config)
        for number, layer in enumerate(layers):
            about: dict[str, Any] = {"created": "1970-01-01T00:00:00Z"}
            if number == len(layers) - 1:
                about = {
                    key: document[key]
                    for key in ("architecture", "author", "config", "created", "os", "variant")
                    if key in document
                }
            if parent:
                about["parent"] = parent
            identity = hashlib.sha256(_encode([str(layer), about])).hexdigest()
            if identity not in self._ids:
                self._ids.add(identity)
                self._archive.add(f"{identity}/VERSION", b"1.0")
                self._archive.add(f"{identity}/json", _encode({"id": identity} | about))
                self._archive.add_link(f"{identity}/layer.tar", f"../{layer.hex}.tar")
            parent = identity
        return parent


class DockerArchiveDestination(ImageDestination):
    """A place for one image in an archive that is being written."""

    manifest_types = (media_types.DOCKER_MANIFEST,)
    layer_form = Compression.NONE

    def __init__(
        self, archive: DockerArchiveWriter, names: Sequence[Reference], *, owned: bool = False
    ) -> None:
        """``owned``: the archive holds this image only, and is finished by ``commit``."""
        self._archive = archive
        self._names = tuple(names)
        self._owned = owned
        self._config: bytes | None = None
        self._layers: tuple[Digest, ...] | None = None

    def has_blob(self, digest: Digest, size: int) -> bool:
        """See ``ImageDestination``."""
        return self._archive.size(digest) == size

    def known_size(self, digest: Digest) -> int | None:
        """See ``ImageDestination``."""
        return self._archive.size(digest)

    def put_blob(self, digest: Digest, pieces: Pieces, size: int) -> None:
        """See ``ImageDestination``: a plain layer."""
        self._archive.add_layer(digest, pieces, size)

    def put_config(self, digest: Digest, raw: bytes) -> None:
        """See ``ImageDestination``."""
        self._config = raw

    def put_manifest(self, raw: bytes, media_type: str, *, top: bool) -> None:
        """See ``ImageDestination``: the manifest itself has no place here."""
        manifest = parse_manifest(raw, media_type)
        if isinstance(manifest, Index) or not top:
            raise UsageError("an archive of this kind has images for one platform each")
        self._layers = tuple(layer.digest for layer in manifest.layers)

    def commit(self) -> None:
        """See ``ImageDestination``."""
        if self._config is None or self._layers is None:
            raise UsageError("an archive without an image")
        self._archive.add_image(self._config, self._layers, self._names)
        if self._owned:
            self._archive.finish()

    def close(self) -> None:
        """See ``ImageDestination``."""
        if self._owned:
            self._archive.abort()


def archive_tag(text: str) -> Reference:
    """A name that an image may have in an archive; raises ``UsageError``."""
    reference = Reference.parse(text)
    if reference.digest is not None:
        raise UsageError("an archive knows images by tags, not by digests", subject=text)
    return reference


def _encode(document: object) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
