"""From a tar entry to its entry in the TOC, as Go's writer would put it.

JSON holds Unicode only: as Go does, each byte of a name that is not UTF-8 becomes one
U+FFFD, and layerstore adds the exact bytes in ``nameRaw``.
"""

from __future__ import annotations

import codecs
import datetime
import functools
from base64 import b64encode
from typing import Final

from layerstore.errors import UnsupportedFormat
from layerstore.formats import tarstream
from layerstore.formats.tarstream import TarEntry
from layerstore.formats.toc import TocEntry

ENTRY_TYPES: Final = {
    tarstream.REGULAR: "reg",
    tarstream.HARD_LINK: "hardlink",
    tarstream.SYMLINK: "symlink",
    tarstream.CHARACTER: "char",
    tarstream.BLOCK_DEVICE: "block",
    tarstream.DIRECTORY: "dir",
    tarstream.FIFO: "fifo",
}
_EPOCH: Final = datetime.datetime(1970, 1, 1)
_REPLACEMENT: Final = "\ufffd"
_PERMISSIONS: Final = 0o7777
_GO_REPLACE: Final = "layerstore.go-replace"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return _REPLACEMENT * (error.end - error.start), error.end


codecs.register_error(_GO_REPLACE, _replace_each_byte)


class EntryNames:
    """The user and group names that the TOC has told so far: each is written once per id."""

    def __init__(self) -> None:
        self._users: dict[int, bytes] = {}
        self._groups: dict[int, bytes] = {}

    def user(self, uid: int, name: bytes) -> str:
        """Return ``name`` if it is news about ``uid``, else the empty text."""
        return _news(self._users, uid, name)

    def group(self, gid: int, name: bytes) -> str:
        """Return ``name`` if it is news about ``gid``, else the empty text."""
        return _news(self._groups, gid, name)


def toc_entry(entry: TarEntry, names: EntryNames) -> TocEntry:
    """Return the TOC entry of ``entry`` without what concerns the payload's place and digest."""
    name, name_raw = json_name(entry.name)
    link_name, link_name_raw = json_name(entry.link_name)
    return TocEntry(
        name=name,
        name_raw=name_raw,
        type=ENTRY_TYPES[entry.type],
        size=entry.size,
        modtime=rfc3339(entry.mtime_ns),
        link_name=link_name,
        link_name_raw=link_name_raw,
        mode=entry.mode & _PERMISSIONS,
        uid=entry.uid,
        gid=entry.gid,
        user_name=names.user(entry.uid, entry.user_name),
        group_name=names.group(entry.gid, entry.group_name),
        dev_major=entry.dev_major,
        dev_minor=entry.dev_minor,
        xattrs=toc_xattrs(entry.xattrs) if entry.xattrs else None,
    )


def json_name(name: bytes) -> tuple[str, str]:
    """Return a name for JSON, and base64 of its exact bytes if the first does not tell them.

    A name that holds U+FFFD itself counts as one that needs its bytes.
    """
    if not name:
        return "", ""
    text = name.decode("utf-8", _GO_REPLACE)
    return text, b64encode(name).decode() if _REPLACEMENT in text else ""


@functools.lru_cache(maxsize=1024)
def rfc3339(nanoseconds: int) -> str:
    """Return a time since 1970 in UTC; empty for 0 and for years that RFC 3339 cannot write."""
    seconds, fraction = divmod(nanoseconds, 1_000_000_000)
    if not nanoseconds:
        return ""
    try:
        text = (_EPOCH + datetime.timedelta(seconds=seconds)).isoformat(timespec="seconds")
    except OverflowError:
        return ""
    return f"{text}.{fraction:09d}".rstrip("0") + "Z" if fraction else text + "Z"


def _news(known: dict[int, bytes], number: int, name: bytes) -> str:
    if known.get(number, b"") == name:
        return ""
    known[number] = name
    return name.decode("utf-8", _GO_REPLACE)


def toc_xattrs(attributes: dict[bytes, bytes]) -> dict[str, str]:
    """Return extended attributes as a TOC holds them; ``UnsupportedFormat`` where it cannot."""
    try:
        return {
            name.decode(): b64encode(value).decode() for name, value in sorted(attributes.items())
        }
    except UnicodeDecodeError:
        raise UnsupportedFormat(
            "the name of an extended attribute is not UTF-8, which a TOC cannot hold"
        ) from None
