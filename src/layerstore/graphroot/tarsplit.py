"""The tar-split that containers/storage keeps beside a layer's extracted files.

``<layer id>.tar-split.gz``: the JSON lines of ``formats.tarsplit``, gzip compressed.
"""

from __future__ import annotations

import binascii
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from gzip import BadGzipFile
from typing import BinaryIO, Final, cast

import msgspec
from isal import igzip, isal_zlib

from layerstore import limits
from layerstore.errors import CorruptStorage
from layerstore.formats import tarsplit
from layerstore.formats.gzipmember import GzipError
from layerstore.formats.tarsplit import crc64

_SEGMENT: Final = 2
_FILE: Final = 1
_READ_BYTES: Final = limits.MIB
_LINE_BYTES: Final = 2 * limits.TAR_EXTENDED_HEADER_BYTES
_GZIP_MAGIC: Final = b"\x1f\x8b"
_GZIP_WBITS: Final = 31

__all__ = ["SplitFile", "TarSplitWriter", "assemble", "content", "crc64", "lines"]


class TarSplitWriter(tarsplit.TarSplitWriter):
    """Writes the lines of one layer to ``out`` as containers/storage keeps them."""

    def __init__(self, out: BinaryIO) -> None:
        # The fast level: the lines are read once in a while, and written at every pull.
        super().__init__(out, isal_zlib.compressobj(level=1, wbits=_GZIP_WBITS))


class _Line(msgspec.Struct, frozen=True):
    type: int
    name: str = ""
    name_raw: str = ""
    size: int = 0
    payload: str | None = None


@dataclass(frozen=True, slots=True)
class SplitFile:
    """An entry of the archive; its content of ``size`` bytes is not in the tar-split."""

    name: bytes
    size: int
    crc: bytes


def assemble(tar_split: BinaryIO, open_file: Callable[[bytes], BinaryIO]) -> Iterator[bytes]:
    """Give the tar stream back, in pieces of at most 1 MiB for files.

    ``tar_split`` is the file of JSON lines, compressed or not.  ``open_file`` is called with the
    name of an entry as it stands in the archive, and gives its content or raises OSError.  Raises
    CorruptStorage for a damaged tar-split, and for a file that changed since it was extracted.
    """
    for line in lines(tar_split):
        if isinstance(line, bytes):
            yield line
        else:
            yield from content(line, open_file)


def lines(tar_split: BinaryIO) -> Iterator[bytes | SplitFile]:
    """What is in a tar-split: raw bytes of the stream, and entries in the place of contents.

    Raises CorruptStorage for a damaged one, OSError.
    """
    for line in _lines(tar_split):
        if line.type == _SEGMENT:
            yield _base64(line.payload or "")
        elif line.type == _FILE:
            name = _base64(line.name_raw) if line.name_raw else line.name.encode()
            yield SplitFile(name, line.size, _base64(line.payload or ""))


def content(line: SplitFile, open_file: Callable[[bytes], BinaryIO]) -> Iterator[bytes]:
    """The content of one entry, in pieces.

    Raises CorruptStorage for a file that changed; less than ``line.size`` bytes were given then.
    """
    if line.size <= 0:
        return
    shown = line.name.decode(errors="replace")
    left, crc = line.size, 0
    try:
        file = open_file(line.name)
    except OSError as error:
        raise CorruptStorage(
            f"the file is not what it was when the layer was extracted: {error.strerror or 'gone'}",
            subject=shown,
            advice="remove the image and pull it again",
        ) from error
    with file:
        while left:
            data = file.read(min(left, _READ_BYTES))
            if not data:
                raise CorruptStorage(
                    f"the file is {left} bytes shorter than when the layer was extracted",
                    subject=shown,
                )
            crc = crc64(data, crc)
            left -= len(data)
            if not left:
                _check(line, crc, longer=bool(file.read(1)), shown=shown)
            yield data


def _check(line: SplitFile, crc: int, *, longer: bool, shown: str) -> None:
    if longer:
        raise CorruptStorage("the file is longer than when the layer was extracted", subject=shown)
    if crc.to_bytes(8, "big") != line.crc:
        raise CorruptStorage(
            "file integrity checksum failed: it changed since the layer was extracted",
            subject=shown,
            advice="remove the image and pull it again",
        )


def _lines(tar_split: BinaryIO) -> Iterator[_Line]:
    decoder = msgspec.json.Decoder(_Line)
    head = tar_split.read(2)
    tar_split.seek(-len(head), 1)
    # isal declares no types here.
    opened = cast("Callable[..., BinaryIO]", igzip.IGzipFile)
    file = opened(fileobj=tar_split, mode="rb") if head == _GZIP_MAGIC else tar_split
    try:
        while text := file.readline(_LINE_BYTES):
            yield decoder.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CorruptStorage(f"a line of the tar-split is damaged: {error}") from None
    except (EOFError, BadGzipFile, GzipError) as error:
        raise CorruptStorage(f"the tar-split is damaged: {error}") from None


def _base64(text: str) -> bytes:
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:
        raise CorruptStorage(f"a line of the tar-split is damaged: {error}") from None
