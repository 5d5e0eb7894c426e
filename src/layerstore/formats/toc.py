"""The table of contents (TOC) of a lazily readable layer, as values.

eStargz and zstd:chunked describe a layer by a JSON document
``{"version": 1, "entries": [...]}`` whose entries follow the tar stream
(stargz-snapshotter, docs/estargz.md; containers/storage, pkg/chunked).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import msgspec

from layerstore import limits
from layerstore.errors import InvalidLayer, LayerstoreError, LimitExceeded


class TocEntry(msgspec.Struct, rename="camel", omit_defaults=True, kw_only=True, gc=False):
    """One entry of a TOC, field for field as in JSON.

    ``size``, ``offset``, ``chunk_offset``, ``chunk_size`` and ``inner_offset``
    are bytes; ``offset`` counts in the compressed blob, ``inner_offset`` in the
    uncompressed gzip member.  ``mode`` holds the tar permission bits (07777).
    ``xattrs`` values are standard base64.

    ``name_raw`` and ``link_name_raw`` are layerstore's own: base64 of the exact
    bytes of a name that JSON cannot hold (not UTF-8).  Other readers ignore them
    and see the same U+FFFD that Go writes there.
    """

    name: str
    type: str
    size: int = 0
    modtime: str = ""
    link_name: str = ""
    mode: int = 0
    uid: int = 0
    gid: int = 0
    user_name: str = ""
    group_name: str = ""
    offset: int = 0
    end_offset: int = 0
    dev_major: int = 0
    dev_minor: int = 0
    xattrs: dict[str, str] | None = None
    digest: str = ""
    chunk_offset: int = 0
    chunk_size: int = 0
    chunk_digest: str = ""
    chunk_type: str = ""
    inner_offset: int = 0
    name_raw: str = ""
    link_name_raw: str = ""


class _Document(msgspec.Struct, gc=False):
    version: int
    entries: msgspec.Raw = msgspec.Raw(b"null")


def _object_pattern(depth: int) -> str:
    """Return a pattern for a JSON object with objects nested to ``depth`` below it."""
    inside = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
    if depth:
        inside += "|" + _object_pattern(depth - 1)
    return r'\{[^{}"]*+(?:(?:' + inside + r')[^{}"]*+)*+\}'


# Possessive throughout, so that a match is one pass over the bytes.  It only finds where an
# entry ends; what is inside is judged by the JSON decoder.
_ENTRY: Final = re.compile(rf"[ \t\r\n]*+{_object_pattern(4)}[ \t\r\n]*+".encode(), re.DOTALL)
_EMPTY: Final = re.compile(rb"null|\[[ \t\r\n]*+\]")  # Go writes null for an empty list
_OPEN: Final = ord("[")
_COMMA: Final = ord(",")
_CLOSE: Final = ord("]")


def iter_toc(json: bytes) -> Iterator[TocEntry]:
    """Yield the entries of a TOC document one by one, in their order.

    Only the entry at hand is decoded, so memory does not grow with the number of entries.
    JSON types are strict; fields that are not known are skipped.  Whether names, offsets
    and chunks make sense together is for the caller to check.

    Raises ``InvalidLayer`` for a document that is no version 1 TOC and ``LimitExceeded``
    above ``limits.TOC_BYTES``, ``limits.TOC_ENTRIES`` or ``limits.TOC_ENTRY_BYTES``; the
    entries before the fault have been yielded by then.
    """
    if len(json) > limits.TOC_BYTES:
        raise LimitExceeded(f"the table of contents has {len(json)} bytes")
    try:
        document = msgspec.json.decode(json, type=_Document)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise InvalidLayer(f"the table of contents is no valid document: {error}") from None
    if document.version != 1:
        raise InvalidLayer(f"the table of contents has version {document.version}, not 1")
    with memoryview(document.entries) as entries:
        yield from _iter_entries(entries)


def _iter_entries(entries: memoryview) -> Iterator[TocEntry]:
    if _EMPTY.fullmatch(entries):
        return
    if entries[0] != _OPEN:
        raise InvalidLayer("the entries of the table of contents are no list")
    decode = msgspec.json.Decoder(TocEntry).decode
    match = _ENTRY.match
    position = 1
    count = 0
    while True:
        found = match(entries, position, position + limits.TOC_ENTRY_BYTES)
        if found is None:
            raise _no_entry(entries, position, count)
        end = found.end()
        try:
            entry = decode(entries[position:end])
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise InvalidLayer(f"entry {count} of the table of contents: {error}") from None
        count += 1
        if count > limits.TOC_ENTRIES:
            raise LimitExceeded(f"the table of contents has more than {limits.TOC_ENTRIES} entries")
        yield entry
        separator = entries[end] if end < len(entries) else 0
        position = end + 1
        if separator == _CLOSE and position == len(entries):
            return
        if separator != _COMMA:
            raise _no_entry(entries, end, count)


def _no_entry(entries: memoryview, position: int, count: int) -> LayerstoreError:
    if len(entries) - position > limits.TOC_ENTRY_BYTES and entries[position] != _COMMA:
        return LimitExceeded(
            f"entry {count} of the table of contents is not an object of at most "
            f"{limits.TOC_ENTRY_BYTES} bytes"
        )
    return InvalidLayer(f"entry {count} of the table of contents is not an object")
