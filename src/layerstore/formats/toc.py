"""The table of contents (TOC) of a lazily readable layer, as values.

eStargz and zstd:chunked describe a layer by a JSON document
``{"version": 1, "entries": [...]}`` whose entries follow the tar stream
(stargz-snapshotter, docs/estargz.md; containers/storage, pkg/chunked).
"""

from __future__ import annotations

import msgspec


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
