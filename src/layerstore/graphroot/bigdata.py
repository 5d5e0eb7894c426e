"""Big data: named byte strings that belong to an image, a container or a layer.

An image's manifest, config and signatures are big data items: files in the directory of the
record's id, listed in the record with their sizes and digests.  A key of lower-case letters,
digits and dots is the file name itself, any other is ``=`` and the key in base64.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from layerstore import limits
from layerstore.errors import CorruptStorage, StorageError, UsageError
from layerstore.graphroot import atomic
from layerstore.graphroot.records import ContainerRecord, ImageRecord
from layerstore.image import Digest

MANIFEST: Final = "manifest"

# The last character is not looked at: a slip of containers/storage that is now the format.
_PLAIN: Final = re.compile(r"[0-9a-z.]*.", re.DOTALL)

Owner = TypeVar("Owner", ImageRecord, ContainerRecord)


def file_name(key: str) -> str:
    """The name of the file that holds ``key``.

    Raises ``UsageError`` for a key that gives no file name; no tool could store it either.
    """
    try:
        data = key.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        data = b""
    name = key if _PLAIN.fullmatch(key) else f"={base64.b64encode(data).decode()}"
    if (
        not data
        or name in (".", "..")
        or "/" in name
        or "\0" in name
        or len(os.fsencode(name)) > limits.NAME_BYTES
    ):
        raise UsageError("cannot be the name of a big data item", subject=repr(key))
    return name


def key_of(name: str) -> str | None:
    """The key whose file has this name; None if no key gives it."""
    key = name
    if name.startswith("=") and len(name) > 1:
        try:
            key = base64.b64decode(name[1:], validate=True).decode("utf-8", "surrogateescape")
        except (binascii.Error, ValueError):
            return None
    try:
        return key if file_name(key) == name else None
    except UsageError:
        return None


def read(directory: Path, key: str, *, limit: int = limits.BIG_DATA_BYTES) -> bytes:
    """The bytes of ``key``; raises ``CorruptStorage`` if they are not there, ``StorageError``."""
    path = directory / file_name(key)
    try:
        return atomic.read_file(path, limit)[0]
    except FileNotFoundError as error:
        raise CorruptStorage(f"the file of {key!r} is missing", subject=str(path)) from error
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror}", subject=str(path)) from error


def write(directory: Path, key: str, data: bytes, *, sync: bool = True) -> None:
    """Store ``data``, in a directory (0700) that is made if missing; raises ``StorageError``."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot be created: {error.strerror}", subject=str(directory)
        ) from error
    atomic.write_file(directory / file_name(key), data, sync=sync)


def remove(directory: Path, key: str) -> None:
    """Remove the bytes of ``key``, if there are any; raises ``StorageError``."""
    path = directory / file_name(key)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    except OSError as error:
        raise StorageError(f"cannot be removed: {error.strerror}", subject=str(path)) from error


def manifest_digest(data: bytes) -> Digest:
    """The digest by which a manifest is asked for.

    That of its bytes; but a Docker schema 1 manifest carries its signatures inside, and they do
    not count.
    """
    return Digest.of(_without_signatures(data))


def digest_of(key: str, data: bytes) -> Digest:
    """The digest recorded for ``key``."""
    return manifest_digest(data) if key.startswith(MANIFEST) else Digest.of(data)


@dataclass(frozen=True, slots=True)
class BigData:
    """The three fields of a record that list its big data."""

    names: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict, hash=False)
    digests: Mapping[str, Digest] = field(default_factory=dict, hash=False)

    @classmethod
    def of(cls, record: ImageRecord | ContainerRecord) -> Self:
        """What ``record`` lists."""
        return cls(record.big_data_names, record.big_data_sizes, record.big_data_digests)

    def with_item(self, key: str, data: bytes) -> Self:
        """With ``key`` added, or changed in its place."""
        names = self.names if key in self.names else (*self.names, key)
        return replace(
            self,
            names=names,
            sizes={**self.sizes, key: len(data)},
            digests={**self.digests, key: digest_of(key, data)},
        )

    def without(self, key: str) -> Self:
        """With ``key`` taken away."""
        return replace(
            self,
            names=tuple(name for name in self.names if name != key),
            sizes={name: size for name, size in self.sizes.items() if name != key},
            digests={name: digest for name, digest in self.digests.items() if name != key},
        )

    def put_into(self, record: Owner) -> Owner:
        """``record`` with these fields."""
        return replace(
            record,
            big_data_names=self.names,
            big_data_sizes=self.sizes,
            big_data_digests=self.digests,
        )


def _without_signatures(data: bytes) -> bytes:
    """The signed part of a Docker schema 1 manifest (JSON web signature, "pretty" form).

    Each signature says how many bytes from the start were signed, and what came after them.
    """
    if b'"signatures"' not in data or b'"schemaVersion"' not in data:
        return data
    try:
        document: Any = json.loads(data)
        if document["schemaVersion"] != 1:
            return data
        protected: Any = json.loads(_base64url(document["signatures"][0]["protected"]))
        length, tail = protected["formatLength"], _base64url(protected["formatTail"])
        if isinstance(length, int) and 0 <= length <= len(data):
            return data[:length] + tail
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        pass  # no such manifest: then it is its bytes
    return data


def _base64url(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
