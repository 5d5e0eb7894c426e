"""How a layer's bytes are laid out: footers, TOCs, gzip members, tar streams.

The writers are loaded when they are first asked for: only conversions need them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from layerstore.formats.compression import Compression, LayerStream
from layerstore.formats.estargz import (
    NO_PREFETCH_LANDMARK,
    PREFETCH_LANDMARK,
    TOC_NAME,
    read_toc,
)
from layerstore.formats.footer import FOOTER_BYTES, Footer, build_footer, parse_footer
from layerstore.formats.gzipmember import decompress_member
from layerstore.formats.tarstream import TarEntry, TarReader
from layerstore.formats.toc import TocEntry, iter_toc

if TYPE_CHECKING:
    from layerstore.formats.estargz_writer import (
        EstargzOptions,
        EstargzResult,
        write_estargz,
        write_estargz_external,
    )
    from layerstore.formats.zstdchunked_writer import (
        ZstdChunkedOptions,
        ZstdChunkedResult,
        write_zstd_chunked,
    )

__all__ = [
    "Compression",
    "EstargzOptions",
    "EstargzResult",
    "FOOTER_BYTES",
    "NO_PREFETCH_LANDMARK",
    "PREFETCH_LANDMARK",
    "TOC_NAME",
    "Footer",
    "LayerStream",
    "TarEntry",
    "TarReader",
    "TocEntry",
    "ZstdChunkedOptions",
    "ZstdChunkedResult",
    "build_footer",
    "decompress_member",
    "iter_toc",
    "parse_footer",
    "read_toc",
    "write_estargz",
    "write_estargz_external",
    "write_zstd_chunked",
]

_ESTARGZ: Final = "estargz_writer"
_ZSTD: Final = "zstdchunked_writer"
_HOMES: Final = {
    "EstargzOptions": _ESTARGZ,
    "EstargzResult": _ESTARGZ,
    "write_estargz": _ESTARGZ,
    "write_estargz_external": _ESTARGZ,
    "ZstdChunkedOptions": _ZSTD,
    "ZstdChunkedResult": _ZSTD,
    "write_zstd_chunked": _ZSTD,
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
    return found
