"""What a layer's descriptor announces: its form, and by which TOC it can be read lazily.

Media type and annotations are promises that nothing has checked yet (see
``image.annotations`` for the keys and their origin).  The TOC digest of a form is the
name by which clients of dialect T ask for the layer:

* eStargz, and zstd:chunked as stargz-snapshotter writes it (v0): the digest of the TOC's
  JSON, ``containerd.io/snapshot/stargz/toc.digest``;
* zstd:chunked as containers/storage writes it: the digest of the compressed TOC.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from layerstore import limits
from layerstore.errors import InvalidDigest, UnsupportedFormat
from layerstore.image import Descriptor, Digest, media_types
from layerstore.image.annotations import (
    ESTARGZ_TOC_DIGEST,
    ZSTD_OLD_TOC_DIGEST,
    ZSTD_OLD_TOC_POSITION,
    ZSTD_TARSPLIT_POSITION,
    ZSTD_TOC_DIGEST,
    ZSTD_TOC_POSITION,
)

_NUMBER: Final = re.compile(r"[0-9]{1,18}")
_CRFS: Final = 1  # the type of TOC that the position ends with


class Form(enum.StrEnum):
    """How a layer is laid out."""

    ESTARGZ = "estargz"
    ZSTD_CHUNKED = "zstd:chunked"
    ZSTD_CHUNKED_V0 = "zstd:chunked-v0"
    TAR = "tar"
    TAR_GZIP = "tar+gzip"
    TAR_ZSTD = "tar+zstd"

    @property
    def lazy(self) -> bool:
        """Whether it has a TOC."""
        return self in (Form.ESTARGZ, Form.ZSTD_CHUNKED, Form.ZSTD_CHUNKED_V0)


@dataclass(frozen=True, slots=True)
class Place:
    """A range of the blob, in bytes, and the size of what it holds uncompressed."""

    offset: int
    size: int
    uncompressed: int


@dataclass(frozen=True, slots=True)
class Announced:
    """``toc_digest`` is None for an ordinary layer; ``toc`` and ``tar_split`` are places that
    zstd:chunked names (eStargz has its TOC's place in the footer).  ``problem`` says what kept
    the TOC that the annotations speak of from being taken for one.
    """

    form: Form
    toc_digest: Digest | None = None
    toc: Place | None = None
    tar_split: Place | None = None
    problem: str = ""


_PLAIN: Final = {
    media_types.OCI_LAYER: Form.TAR,
    media_types.DOCKER_LAYER: Form.TAR,
    media_types.OCI_LAYER_GZIP: Form.TAR_GZIP,
    media_types.DOCKER_LAYER_GZIP: Form.TAR_GZIP,
    media_types.OCI_LAYER_ZSTD: Form.TAR_ZSTD,
    media_types.DOCKER_LAYER_ZSTD: Form.TAR_ZSTD,
}


def announced(descriptor: Descriptor) -> Announced:
    """Read a layer's descriptor.

    Annotations that contradict each other or make no sense leave an ordinary layer, with the
    ``problem``.  Raises UnsupportedFormat for a media type that is no tar archive kept in the
    registry.
    """
    plain = _PLAIN.get(descriptor.media_type)
    if plain is None:
        raise UnsupportedFormat(
            f"layers of type {descriptor.media_type!r} are not known", subject=descriptor.digest
        )
    try:
        return _with_toc(plain, descriptor.annotations, descriptor.size)
    except _ProblemError as problem:
        return Announced(plain, problem=str(problem))


def announced_name(descriptor: Descriptor) -> Digest | None:
    """The TOC digest that a layer is announced under; None for any layer that has none."""
    try:
        return announced(descriptor).toc_digest
    except UnsupportedFormat:
        return None


class _ProblemError(Exception):
    pass


def _with_toc(plain: Form, notes: Mapping[str, str], size: int) -> Announced:
    if ESTARGZ_TOC_DIGEST in notes and ZSTD_TOC_DIGEST in notes:
        raise _ProblemError("the annotations name TOCs of two formats")
    if ZSTD_TOC_DIGEST in notes:
        _expect(plain, Form.TAR_ZSTD)
        toc = _place(notes, ZSTD_TOC_POSITION, size, typed=True)
        if toc is None:
            raise _ProblemError("the annotations do not tell the place of the TOC")
        tar_split = _place(notes, ZSTD_TARSPLIT_POSITION, size, typed=False)
        return Announced(Form.ZSTD_CHUNKED, _digest(notes[ZSTD_TOC_DIGEST]), toc, tar_split)
    if ESTARGZ_TOC_DIGEST in notes and plain is Form.TAR_GZIP:
        return Announced(Form.ESTARGZ, _digest(notes[ESTARGZ_TOC_DIGEST]))
    text = notes.get(ESTARGZ_TOC_DIGEST, notes.get(ZSTD_OLD_TOC_DIGEST))
    if text is None:
        return Announced(plain)
    _expect(plain, Form.TAR_ZSTD)
    toc = _place(notes, ZSTD_OLD_TOC_POSITION, size, typed=True)
    if toc is None:
        raise _ProblemError("the annotations do not tell the place of the TOC")
    return Announced(Form.ZSTD_CHUNKED_V0, _digest(text), toc)


def _expect(plain: Form, wanted: Form) -> None:
    if plain is not wanted:
        raise _ProblemError(f"the TOC is one of {wanted} layers, and the layer is {plain}")


def _digest(text: str) -> Digest:
    try:
        digest = Digest.parse(text)
    except InvalidDigest:
        raise _ProblemError("the digest of the TOC is none") from None
    if digest.algorithm != "sha256":
        raise _ProblemError(f"the digest of the TOC is {digest.algorithm}")
    return digest


def _place(notes: Mapping[str, str], key: str, size: int, *, typed: bool) -> Place | None:
    """``offset:compressed:uncompressed``, and ``:type`` for a TOC; None if it is absent."""
    if key not in notes:
        return None
    parts = notes[key].split(":")
    if len(parts) != 3 + typed or not all(_NUMBER.fullmatch(part) for part in parts):
        raise _ProblemError(f"the annotation {key} is no position")
    offset, packed, uncompressed, *kind = map(int, parts)
    if typed and kind != [_CRFS]:
        raise _ProblemError(f"the TOC is of the unknown type {kind[0]}")
    if offset + packed > size:
        raise _ProblemError(f"the annotation {key} points beyond the end of the layer")
    # a tar-split is read as a stream, so only what is fetched of it is bounded
    if max(packed, uncompressed if typed else 0) > limits.TOC_BYTES:
        raise _ProblemError(f"the annotation {key} speaks of more than is read")
    return Place(offset, packed, uncompressed)
