"""The file format of a layer index.

A layer index is what the provider needs of a TOC, compiled once into flat tables
that are mapped into memory and read in place.  It never leaves the machine that
wrote it: numbers are in native byte order, and a file of another version or byte
order is built again from its TOC.

::

    header                fixed, HEADER
    INODES                one RECORD per entry; entry 0 is the root directory
    PREFIXES    u64       per name: its first eight bytes as a big-endian number
    TARGETS     u32       per name: the entry it names
    NAME_ENDS   u32 n+1   per name: where its bytes start in NAMES (the next one's start is its end)
    NAMES                 the names themselves
    CHUNKS                one CHUNK per chunk; a file's chunks are neighbours, in file order
    MEMBERS     u64 n+1   compressed offsets of the members, ascending; last: the TOC's
    MEMBER_ENDS u32 n+1   per member: where its chunks start in MEMBER_CHUNKS
    MEMBER_CHUNKS u32     chunk numbers by member, then by inner offset
    DIGESTS               per file of several chunks: file digest (or zeros), content key
    XATTRS                attribute sets, see ``xattrs``
    SYMLINKS              targets of symbolic links
    checksum              BLAKE2b over all that stands before it

The names of one directory are neighbours and sorted, so a lookup is a binary
search: first over PREFIXES, whose numbers sort as the names do, then, only among
names that share eight bytes, over the names.  A hash table would be a little
faster but could be made to collide by the publisher of a layer.

Sections start at multiples of eight bytes, so that they can be cast.
"""

from __future__ import annotations

import enum
import hashlib
import struct
from typing import Final

MAGIC: Final = b"lslayer\0"
VERSION: Final = 2
BYTE_ORDER: Final = 0x01020304
CHECKSUM_BYTES: Final = 32
ALIGNMENT: Final = 8
NO_LANDMARK_SEEN: Final = -1
NO_MEMBER: Final = 0xFFFF_FFFF  # of a chunk that is a hole


class Section(enum.IntEnum):
    """Sections in file order."""

    INODES = 0
    PREFIXES = 1
    TARGETS = 2
    NAME_ENDS = 3
    NAMES = 4
    CHUNKS = 5
    MEMBERS = 6
    MEMBER_ENDS = 7
    MEMBER_CHUNKS = 8
    DIGESTS = 9
    XATTRS = 10
    SYMLINKS = 11


SECTIONS: Final = len(Section)

# magic, version, byte order; file size, blob size, TOC offset, content bytes; landmark;
# entries, names, directories, files, chunks, members, entries with attributes, packing;
# offset of each section, then their end.
HEADER: Final = struct.Struct(f"=8sII4Qq8I{SECTIONS + 1}Q")

# mode, uid, gid, nlink, size, major, minor, mtime, xattrs, first, count, extra, flags, unused.
# directory: first name, number of names, parent entry
# regular file: first chunk, number of chunks, 1 + number in DIGESTS for several chunks
# symbolic link: offset in SYMLINKS, length
RECORD: Final = struct.Struct("=4IQ2Iq6I")
ATTRIBUTES: Final = struct.Struct("=4IQ2IqI")  # the head of a record, up to xattrs
RECORD_BYTES: Final = RECORD.size
RECORD_WORDS: Final = RECORD_BYTES // 4
MODE_WORD, XATTR_WORD, FIRST_WORD, COUNT_WORD, EXTRA_WORD, FLAGS_WORD = 0, 10, 11, 12, 13, 14

FLAG_DIGEST: Final = 1  # a file of several chunks whose own digest is known

CHUNK: Final = struct.Struct("=QIIQ32sI")  # file offset, size, member, inner offset, digest, entry
CHUNK_BYTES: Final = CHUNK.size
CHUNK_WORDS: Final = CHUNK_BYTES // 4
OWNER_WORD: Final = CHUNK_WORDS - 1
CHUNK_MARK: Final = struct.Struct("=24xQ28x")  # the first eight bytes of its digest
DIGEST_PAIR: Final = struct.Struct("=32s32s")
PAIR_MARKS: Final = struct.Struct("=Q24xQ24x")

KEY_PREFIX: Final = b"layerstore chunk list v1\0"
KEY_CHUNK: Final = struct.Struct("<QQ32s")  # file offset, size, digest


def checksum() -> hashlib.blake2b:
    """The running checksum of an index file."""
    return hashlib.blake2b(digest_size=CHECKSUM_BYTES, person=b"layer index")


def padding(length: int) -> int:
    """Bytes that bring ``length`` to the next section boundary."""
    return -length % ALIGNMENT


def prefix(name: bytes) -> int:
    """The first eight bytes of ``name`` as a number that sorts as names do."""
    return int.from_bytes(name[:8].ljust(8, b"\0"), "big")
