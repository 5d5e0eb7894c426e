"""A layer as a read-only file tree: the compact index, compiled from a TOC and mapped.

``build_index`` applies the entries of a TOC in order and writes the index file;
``LayerIndex`` reads it in place.  Overlay's conventions (whiteouts as devices 0:0,
opaque directories by extended attribute) are already applied.
"""

from .compiler import IndexSummary, build_index
from .index import ROOT, Child, Chunk, FileContent, Inode, LayerIndex, Member
from .names import clean_path

__all__ = [
    "ROOT",
    "Child",
    "Chunk",
    "FileContent",
    "IndexSummary",
    "Inode",
    "LayerIndex",
    "Member",
    "build_index",
    "clean_path",
]
