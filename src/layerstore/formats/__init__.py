"""How a layer's bytes are laid out: footers, TOCs, gzip members, tar streams.

What is named here is loaded when it is first asked for: few programs need all of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from layerstore import lazy

if TYPE_CHECKING:
    from layerstore.formats.compression import Compression, LayerStream
    from layerstore.formats.estargz import (
        NO_PREFETCH_LANDMARK,
        PREFETCH_LANDMARK,
        TOC_NAME,
        read_toc,
    )
    from layerstore.formats.estargz_writer import (
        EstargzOptions,
        EstargzResult,
        write_estargz,
        write_estargz_external,
    )
    from layerstore.formats.footer import FOOTER_BYTES, Footer, build_footer, parse_footer
    from layerstore.formats.gzipmember import decompress_member
    from layerstore.formats.tarstream import TarEntry, TarReader
    from layerstore.formats.toc import TocEntry, iter_toc
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

_HOMES: Final = {
    "Compression": "compression",
    "EstargzOptions": "estargz_writer",
    "EstargzResult": "estargz_writer",
    "FOOTER_BYTES": "footer",
    "Footer": "footer",
    "LayerStream": "compression",
    "NO_PREFETCH_LANDMARK": "estargz",
    "PREFETCH_LANDMARK": "estargz",
    "TOC_NAME": "estargz",
    "TarEntry": "tarstream",
    "TarReader": "tarstream",
    "TocEntry": "toc",
    "ZstdChunkedOptions": "zstdchunked_writer",
    "ZstdChunkedResult": "zstdchunked_writer",
    "build_footer": "footer",
    "decompress_member": "gzipmember",
    "iter_toc": "toc",
    "parse_footer": "footer",
    "read_toc": "estargz",
    "write_estargz": "estargz_writer",
    "write_estargz_external": "estargz_writer",
    "write_zstd_chunked": "zstdchunked_writer",
}
if not TYPE_CHECKING:  # else every name would be one to mypy
    __getattr__ = lazy.attributes(__name__, _HOMES)
