"""Forms that ``convert`` brings layers into: which layers have one already, and how it is written.

================  =====================  ===========================================  ==========
form              media type             tar stream                                   TOC
================  =====================  ===========================================  ==========
eStargz           tar+gzip               reordered, landmark and TOC put in           in the blob
with external TOC tar+gzip               as it was, so config and diff IDs stay       in another image
zstd:chunked      tar+zstd               as it was, so config and diff IDs stay       in the blob
================  =====================  ===========================================  ==========
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import BinaryIO, Protocol

from layerstore.copy.transport import ImageSource
from layerstore.errors import ContentError, UsageError
from layerstore.formats import (
    FOOTER_BYTES,
    EstargzOptions,
    ZstdChunkedOptions,
    parse_footer,
    read_toc,
    write_estargz,
    write_estargz_external,
    write_zstd_chunked,
)
from layerstore.formats.announced import Form, announced
from layerstore.image import Descriptor, Digest, media_types


@dataclass(frozen=True, slots=True)
class WrittenLayer:
    """A blob that was written; ``external_toc`` is the blob that holds its TOC, if that is apart.

    ``prioritized`` are those of the wanted early files that the layer holds.
    """

    digest: Digest
    size: int
    diff_id: Digest
    toc_digest: Digest
    annotations: dict[str, str]
    prioritized: tuple[str, ...] = ()
    external_toc: bytes | None = None


class LayerForm(Protocol):
    """What ``convert`` makes of a layer."""

    @property
    def media_type(self) -> str:
        """The media type of the layers."""

    @property
    def prioritize(self) -> tuple[str, ...]:
        """Files to be placed first."""

    @property
    def external(self) -> bool:
        """Whether TOCs are kept in an image of their own."""

    @property
    def default(self) -> bool:
        """Whether nothing special is asked for: then a layer that has the form can stay."""

    def has(self, layer: Descriptor, source: ImageSource) -> bool:
        """Whether the blob really has the TOC of this form that its annotations promise."""

    def write(
        self, tar: BinaryIO, out: BinaryIO, threads: int, progress: Callable[[int], None]
    ) -> WrittenLayer:
        """Write the layer; raises what the writers in ``formats`` do."""


@dataclass(frozen=True, slots=True)
class Estargz:
    """eStargz, the TOC in the blob."""

    options: EstargzOptions = field(default_factory=EstargzOptions)

    media_type = media_types.OCI_LAYER_GZIP
    external = False

    @property
    def prioritize(self) -> tuple[str, ...]:
        """See ``LayerForm``."""
        return self.options.prioritize

    @property
    def default(self) -> bool:
        """See ``LayerForm``."""
        return self.options == EstargzOptions()

    def has(self, layer: Descriptor, source: ImageSource) -> bool:
        """See ``LayerForm``."""
        try:
            promised = announced(layer)
            if promised.form is not Form.ESTARGZ or promised.toc_digest is None:
                return False
            if layer.size < FOOTER_BYTES or not source.gives_blob(layer.digest):
                return False
            read = source.read_range
            tail = read(layer.digest, layer.size, layer.size - FOOTER_BYTES, FOOTER_BYTES)
            footer = parse_footer(tail, layer.size)
            if footer.external:
                return False
            member = read(layer.digest, layer.size, footer.toc_offset, footer.toc_size)
            return Digest.of(read_toc(member)) == promised.toc_digest
        except ContentError:
            return False

    def write(
        self, tar: BinaryIO, out: BinaryIO, threads: int, progress: Callable[[int], None]
    ) -> WrittenLayer:
        """See ``LayerForm``."""
        made = write_estargz(tar, out, self.options, threads=threads, progress=progress)
        return WrittenLayer(
            made.digest,
            made.size,
            made.diff_id,
            made.toc_digest,
            made.annotations,
            made.prioritized,
        )


@dataclass(frozen=True, slots=True)
class ExternalToc:
    """eStargz, the TOC in another image; raises ``UsageError`` for files to be placed first."""

    options: EstargzOptions = field(default_factory=EstargzOptions)

    media_type = media_types.OCI_LAYER_GZIP
    external = True
    prioritize = ()
    # A layer of this form is made anew, as the TOC may be anywhere: the same bytes come out.
    default = False

    def __post_init__(self) -> None:
        if self.options.prioritize:
            raise UsageError("with an external TOC all files keep their order")

    def has(self, layer: Descriptor, source: ImageSource) -> bool:
        """See ``LayerForm``."""
        return False

    def write(
        self, tar: BinaryIO, out: BinaryIO, threads: int, progress: Callable[[int], None]
    ) -> WrittenLayer:
        """See ``LayerForm``."""
        made, toc = write_estargz_external(
            tar, out, self.options, threads=threads, progress=progress
        )
        return WrittenLayer(
            made.digest,
            made.size,
            made.diff_id,
            made.toc_digest,
            made.annotations,
            external_toc=toc,
        )


@dataclass(frozen=True, slots=True)
class ZstdChunked:
    """zstd:chunked as containers/storage writes it."""

    options: ZstdChunkedOptions = field(default_factory=ZstdChunkedOptions)

    media_type = media_types.OCI_LAYER_ZSTD
    external = False
    prioritize = ()

    @property
    def default(self) -> bool:
        """See ``LayerForm``."""
        return self.options == ZstdChunkedOptions()

    def has(self, layer: Descriptor, source: ImageSource) -> bool:
        """See ``LayerForm``."""
        try:
            promised = announced(layer)
            if promised.form is not Form.ZSTD_CHUNKED or promised.toc is None:
                return False
            if not source.gives_blob(layer.digest):
                return False
            place = promised.toc
            packed = source.read_range(layer.digest, layer.size, place.offset, place.size)
            return Digest.of(packed) == promised.toc_digest
        except ContentError:
            return False

    def write(
        self, tar: BinaryIO, out: BinaryIO, threads: int, progress: Callable[[int], None]
    ) -> WrittenLayer:
        """See ``LayerForm``."""
        made = write_zstd_chunked(tar, out, self.options, threads=threads, progress=progress)
        return WrittenLayer(made.digest, made.size, made.diff_id, made.toc_digest, made.annotations)
