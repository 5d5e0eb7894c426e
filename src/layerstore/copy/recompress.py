"""Bringing one blob from a source to a destination: as it is, unpacked, or packed anew.

Whatever is moved is verified while it moves, and before its last byte is handed on: the
blob against the digest and size in the manifest, and a layer that is unpacked or packed
against the diff ID in the config.  A blob that stays as it is needs no temporary file; the
digest and size of a new one are known only when it is made, so it is made in a file.
"""

from __future__ import annotations

import enum
import hashlib
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from isal import igzip_lib

from layerstore import limits
from layerstore.copy.transport import PIECE_BYTES, BlobStream, ImageSource, Pieces
from layerstore.copy.unnamed import NewFile
from layerstore.errors import ContentError, LimitExceeded, VerificationError
from layerstore.formats import Compression, LayerStream
from layerstore.formats.compression import Readable, detect
from layerstore.image import Descriptor, Digest

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_HEAD_BYTES: Final = 8
_ADVICE: Final = "the content was damaged or replaced on its way"
_FAST_LEVELS: Final = (1, 2, 3)
_GZIP_WBITS: Final = 31

GZIP_LEVEL: Final = 5
ZSTD_LEVEL: Final = 3
LEVELS: Final = {Compression.GZIP: range(1, 10), Compression.ZSTD: range(1, 23)}

Tell = Callable[[int], None]


class Form(enum.Enum):
    """What shall become of a blob."""

    AS_IS = "as-is"
    PLAIN = "none"
    GZIP = "gzip"
    ZSTD = "zstd"

    @property
    def compression(self) -> Compression:
        """How blobs of this form are packed; not for ``AS_IS``."""
        return Compression(self.value)


@dataclass(frozen=True, slots=True)
class MadeBlob:
    """A blob made in a file without a name, which is there until ``file`` is closed."""

    file: NewFile
    digest: Digest
    size: int
    compression: Compression


class OpenedBlob:
    """A blob of a source whose first bytes have been looked at; a context manager.

    ``compression`` is what the bytes show, whatever the manifest says.
    """

    def __init__(self, source: ImageSource, blob: Descriptor, check: Tell) -> None:
        """``check`` is called with the position after each read, and may raise."""
        self._source = source
        self._blob = blob
        self._check = check
        self._stream: BlobStream | None = source.open_blob(blob.digest, blob.size)
        self._head = b""
        try:
            while len(self._head) < _HEAD_BYTES:
                data = self._stream.read(_HEAD_BYTES - len(self._head))
                if not data:
                    break
                self._head += data
        except BaseException:
            self.close()
            raise
        self.compression = detect(self._head)

    def pieces(self) -> Iterator[bytes]:
        """The verified bytes; the last only when all are right.  Anew at each call."""
        blob = self._blob
        head, stream = self._head, self._stream
        self._stream, self._head = None, b""
        if stream is None:
            head, stream = b"", self._source.open_blob(blob.digest, blob.size)
        digest = hashlib.new(blob.digest.algorithm)
        size = 0
        with stream:
            data = head
            held = b""
            while data or (data := stream.read(PIECE_BYTES)):
                digest.update(data)
                size += len(data)
                self._check(size)
                if size > blob.size:
                    break
                if held:
                    yield held
                held, data = data, b""
        require(blob, f"{blob.digest.algorithm}:{digest.hexdigest()}", size)
        if held:
            yield held

    def close(self) -> None:
        """Give up a connection that is not used."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.__exit__(None, None, None)

    def __enter__(self) -> OpenedBlob:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def blob_pieces(source: ImageSource, blob: Descriptor, check: Tell) -> Pieces:
    """The verified bytes of a blob for ``ImageDestination.put_blob``."""

    def pieces() -> Iterator[bytes]:
        with OpenedBlob(source, blob, check) as opened:
            yield from opened.pieces()

    return pieces


def make_blob(
    tar: Readable,
    form: Form,
    directory: Path,
    *,
    level: int | None = None,
    diff_id: Digest | None,
    subject: str,
    from_files: bool = False,
) -> MadeBlob:
    """Pack the tar stream ``tar`` into a new file in ``directory``.

    ``diff_id`` is what the stream must have; ``from_files`` says that it is put together out of
    files that a storage has extracted.  The file is the caller's to close.
    Raises ``VerificationError``, ``LimitExceeded``, ``OSError`` and what ``tar.read`` raises.
    """
    packer = _packer(form, level)
    plain, packed = hashlib.sha256(), hashlib.sha256()
    length = size = 0
    file = NewFile(directory)
    try:

        def emit(data: bytes) -> None:
            nonlocal size
            if data:
                file.write(data, size)
                packed.update(data)
                size += len(data)

        while data := tar.read(PIECE_BYTES):
            length += len(data)
            if length > limits.ARCHIVE_BYTES:
                raise LimitExceeded(
                    f"a layer of more than {limits.ARCHIVE_BYTES} bytes when unpacked",
                    subject=subject,
                )
            plain.update(data)
            emit(packer.compress(data))
        emit(packer.flush())
        found = Digest(f"sha256:{plain.hexdigest()}")
        if diff_id is not None and found != diff_id:
            raise wrong_diff_id(diff_id, found, subject, from_files=from_files)
        digest = Digest(f"sha256:{packed.hexdigest()}")
        return MadeBlob(file, digest, size, form.compression)
    except BaseException:
        file.close()
        raise


def wrong_diff_id(
    stated: Digest, found: Digest, subject: str, *, from_files: bool
) -> VerificationError:
    """The error for a layer whose tar stream is not the one that the config states."""
    if from_files:
        return VerificationError(
            f"the layer had the diff ID {stated}, its files in the storage give {found}",
            subject=subject,
            advice="layerstore check storage --full tells whether they changed; if not, the engine"
            " that pulled the image cannot give this archive back (one with sparse files, say):"
            " take the image from where it came from",
        )
    return VerificationError(
        f"the config states the diff ID {stated}, the layer has {found}",
        subject=subject,
        advice="the image contradicts itself: build or push it anew",
    )


def unpacked(opened: OpenedBlob) -> _Unpacked:
    """The tar stream in a blob, which is verified when the stream ends."""
    return _Unpacked(opened.pieces())


def require(blob: Descriptor, found: str, size: int) -> None:
    """Raise ``VerificationError`` unless digest and size are the blob's."""
    if (found, size) != (blob.digest, blob.size):
        raise VerificationError(
            f"expected {blob.digest} of {blob.size} bytes, found {found} in {size} bytes",
            subject=f"blob {blob.digest}",
            advice=_ADVICE,
        )


class _Unpacked:
    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._source = _Iterated(pieces)
        self._tar: LayerStream | None = None

    def read(self, n: int, /) -> bytes:
        try:
            if self._tar is None:
                self._tar = LayerStream(self._source)
            data = self._tar.read(n)
            if not data:
                # Bytes behind the stream (a footer) belong to the blob's digest too.
                self._source.drain()
        except VerificationError:
            raise
        except ContentError:
            # Damage on the way and a bad image are different faults: see which it is.
            self._source.drain()
            raise
        return data


class _Iterated:
    """Pieces as a stream."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""

    def read(self, n: int, /) -> bytes:
        if not self._rest:
            self._rest = next(self._pieces, b"")
        given, self._rest = self._rest[:n], self._rest[n:]
        return given

    def drain(self) -> None:
        for _ in self._pieces:
            pass


class _Packer(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...

    def flush(self) -> bytes: ...


class _Plain:
    def compress(self, data: bytes, /) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


class _FastGzip:
    """One gzip member for each piece: a file of members is a gzip file (RFC 1952)."""

    def __init__(self, level: int) -> None:
        self._level = level
        self._any = False

    def compress(self, data: bytes, /) -> bytes:
        self._any = True
        return igzip_lib.compress(data, self._level, igzip_lib.COMP_GZIP)

    def flush(self) -> bytes:
        return b"" if self._any else self.compress(b"")


def _packer(form: Form, level: int | None) -> _Packer:
    if form is Form.GZIP:
        level = GZIP_LEVEL if level is None else level
        if level in _FAST_LEVELS:
            return _FastGzip(level)
        return zlib.compressobj(level, wbits=_GZIP_WBITS)
    if form is Form.ZSTD:
        return zstd.ZstdCompressor(level=ZSTD_LEVEL if level is None else level)
    return _Plain()
