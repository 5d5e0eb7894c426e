"""The transport ``containers-storage:``: an image of a graph root as a source.

The graph root keeps an image's manifest and config as they came, but not the blobs of layers
that were extracted: of those there is the tar stream.  Two kinds of layers still have their
blobs: those of an additional layer store, which has the compressed blob beside the files, and
those that came uncompressed.  An image all of whose layers do is copied byte for byte, with its
signatures; others get a new manifest.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from functools import cached_property
from types import TracebackType
from typing import Final, Self

from layerstore import limits
from layerstore.copy.transport import BlobStream, ImageSource
from layerstore.errors import (
    CorruptStorage,
    InvalidReference,
    LimitExceeded,
    NotFound,
    UnknownObject,
)
from layerstore.graphroot.images import Image
from layerstore.graphroot.layers import Layer
from layerstore.graphroot.store import Store
from layerstore.image import Descriptor, Digest, Reference, parse_manifest
from layerstore.registry import FetchedManifest

_ID: Final = re.compile("[0-9a-f]{64}")
_SHORTEST_ID: Final = 3  # digits of a beginning


class StorageSource(ImageSource):
    """An image of a storage, with the manifest of the one platform that it has."""

    transport = "containers-storage"

    def __init__(self, store: Store, name: str) -> None:
        """The image called ``name``, as Podman resolves names, or ``split_id`` does.

        Raises ``UnknownObject`` and ``InvalidReference``.
        """
        name, image_id = split_id(store, name)
        self._image: Final = store.image(image_id or name)
        self._name: Final = _full_name(self._image, name)
        if image_id and name and Reference.parse(name).name not in _repositories(self._image):
            raise UnknownObject(
                "the image of this ID has other names", subject=f"{name}@{image_id}"
            )

    @property
    def image(self) -> Image:
        """The image itself."""
        return self._image

    @property
    def identity(self) -> str:
        """See ``ImageSource``: ``[overlay@/graph/root]name``, or the id where it has none."""
        config = self._image.store.config
        name = self._name or f"@{self._image.id}"
        return f"[{config.driver}@{config.graph_root}]{name}"

    @property
    def reference(self) -> Reference | None:
        """See ``ImageSource``."""
        return Reference.parse(self._name) if self._name else None

    def manifest(self, digest: Digest | None = None) -> FetchedManifest:
        """See ``ImageSource``; also the index through which the image was chosen, by digest."""
        raw = self._image.manifest()
        found = Digest.of(raw)
        if digest is not None and digest != found:
            if digest not in self._image.digests:
                raise NotFound("the image has no such manifest", subject=str(digest))
            raw = self._image.index(digest)
            digest.verify(raw, subject=f"image {self._image.id}")
            found = digest
        return FetchedManifest(raw, parse_manifest(raw).media_type, found)

    def blob(self, digest: Digest, limit: int) -> bytes:
        """See ``ImageSource``: the config."""
        raw = self._image.big_data(str(digest))
        if len(raw) > limit:
            raise LimitExceeded(f"more than {limit} bytes", subject=str(digest))
        digest.verify(raw, subject=f"image {self._image.id}")
        return raw

    def gives_blob(self, digest: Digest) -> bool:
        """See ``ImageSource``."""
        layer = self._by_blob.get(digest)
        return layer is not None and (self._is_kept(layer, digest) or layer.diff_id == digest)

    def open_blob(self, digest: Digest, size: int) -> BlobStream:
        """See ``ImageSource``; raises ``NotFound`` for a blob that was not kept."""
        layer = self._by_blob.get(digest)
        if layer is not None and self._is_kept(layer, digest):
            return _StoredBlob(layer)
        if layer is not None and layer.diff_id == digest:
            return Pieced(layer.tar())
        if digest == self._image.parsed_manifest().config.digest:
            return _Bytes(self.blob(digest, limits.CONFIG_BYTES))
        raise NotFound("the storage does not keep this blob", subject=str(digest))

    def read_range(self, digest: Digest, size: int, offset: int, length: int) -> bytes:
        """See ``ImageSource``."""
        with self.open_blob(digest, size) as stream:
            while offset > 0 and (data := stream.read(min(offset, limits.STREAM_BYTES))):
                offset -= len(data)
            found = b""
            while len(found) < length and (data := stream.read(length - len(found))):
                found += data
        return found

    def layer_diff(self, layer: Descriptor, diff_id: Digest) -> BlobStream:
        """See ``ImageSource``."""
        found = self._by_diff_id.get(diff_id) or self._by_blob.get(layer.digest)
        if found is None:
            raise NotFound("the image has no such layer", subject=str(layer.digest))
        return Pieced(found.tar())

    def signatures(self, digest: Digest) -> tuple[bytes, ...]:
        """See ``ImageSource``."""
        return self._image.signatures() if digest == self._image.manifest_digest else ()

    def _is_kept(self, layer: Layer, digest: Digest) -> bool:
        """Whether a layer store has the blob with this digest beside the layer.

        The manifest of an image that was built here names layers by their tar streams, and
        that of another image may name one that was packed otherwise.
        """
        known = layer.record.compressed_diff_digest
        return layer.is_lazy and known in (None, digest) and digest not in self._by_diff_id

    @cached_property
    def _layers(self) -> list[Layer]:
        layers = self._image.layers()
        listed = len(self._image.parsed_manifest().layers)
        if len(layers) != listed:
            raise CorruptStorage(
                f"{len(layers)} layers, but the manifest lists {listed}",
                subject=f"image {self._image.id}",
                advice="layerstore check storage tells more",
            )
        return layers

    @cached_property
    def _by_blob(self) -> dict[Digest, Layer]:
        listed = self._image.parsed_manifest().layers
        return {blob.digest: layer for blob, layer in zip(listed, self._layers, strict=True)}

    @cached_property
    def _by_diff_id(self) -> dict[Digest, Layer]:
        diff_ids = self._image.parsed_config().diff_ids
        return dict(zip(diff_ids, self._layers, strict=False))


class Pieced:
    """A stream of bytes that come in pieces, such as a layer's tar stream."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._piece = memoryview(b"")

    def read(self, n: int, /) -> bytes:
        """At most ``n`` bytes, ``b""`` only at the end."""
        while not self._piece:
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._piece = memoryview(piece)
        data, self._piece = self._piece[:n], self._piece[n:]
        return bytes(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        close = getattr(self._pieces, "close", None)
        if close is not None:
            close()


class _StoredBlob:
    """The blob of a lazy layer, in use until it is closed."""

    def __init__(self, layer: Layer) -> None:
        self._held = contextlib.ExitStack()
        self._stream, _ = self._held.enter_context(layer.blob())

    def read(self, n: int, /) -> bytes:
        try:
            return self._stream.read(n)
        except OSError as error:
            raise CorruptStorage(f"the layer store fails: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.close()


class _Bytes(io.BytesIO):
    """A blob that is in memory."""

    def __enter__(self) -> Self:
        return self


def split_id(store: Store, text: str) -> tuple[str, str]:
    """The name and the full id of ``[NAME]@ID``; "" for what is not there.

    As containers/image (storage, "ParseStoreReference") has it: what follows the last @ is a
    digest, then it belongs to the name; or a full id; or the beginning of one that is in ``store``.
    Raises ``InvalidReference``.
    """
    name, at, end = text.rpartition("@")
    if not at or ":" in end:
        return text, ""
    if _ID.fullmatch(end):
        return name, end
    if len(end) >= _SHORTEST_ID:
        found = {image.id for image in store.images() if image.id.startswith(end)}
        if len(found) == 1:
            return name, found.pop()
    raise InvalidReference("the part behind @ is no digest and no ID of an image", subject=text)


def _repositories(image: Image) -> set[str]:
    found = set()
    for name in image.names:
        with contextlib.suppress(InvalidReference):  # others wrote it
            found.add(Reference.parse(name).name)
    return found


def _full_name(image: Image, text: str) -> str:
    """The name of ``image`` that ``text`` means, "" if it is no name."""
    try:
        full = str(Reference.parse(text)) if text else ""
    except InvalidReference:
        full = ""
    if full in image.names:
        return full
    return image.names[0] if image.names else ""
