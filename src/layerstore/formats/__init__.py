"""How a layer's bytes are laid out: footers, TOCs, gzip members, tar streams."""

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
