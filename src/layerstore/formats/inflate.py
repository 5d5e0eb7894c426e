"""zlib's ``inflate``, block by block.

Python's zlib and isal decompress streams, but neither stops at the end of a deflate block
nor tells where one lies, without which no one can go on from the middle of a stream.  The
library itself is there wherever Python's zlib module is; this is the thin layer over the
five functions that are needed (zlib.h; the manual's ``Z_BLOCK`` and ``data_type``).
"""

from __future__ import annotations

import ctypes
from typing import Final

from layerstore.errors import InvalidLayer

_LIBRARY: Final = "libz.so.1"
_GZIP_WBITS: Final = 31
_BLOCK: Final = 5  # flush: stop at the end of a block
_OK, _STREAM_END, _BUF_ERROR = 0, 1, -5
_LAST_BLOCK: Final = 64
_AT_BOUNDARY: Final = 128
_UNUSED_BITS: Final = 7
WINDOW_BYTES: Final = 32 * 1024


class _ZStream(ctypes.Structure):
    _fields_ = (
        ("next_in", ctypes.c_void_p),
        ("avail_in", ctypes.c_uint),
        ("total_in", ctypes.c_ulong),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_uint),
        ("total_out", ctypes.c_ulong),
        ("msg", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("zalloc", ctypes.c_void_p),
        ("zfree", ctypes.c_void_p),
        ("opaque", ctypes.c_void_p),
        ("data_type", ctypes.c_int),
        ("adler", ctypes.c_ulong),
        ("reserved", ctypes.c_ulong),
    )


def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(_LIBRARY)
    stream = ctypes.POINTER(_ZStream)
    library.zlibVersion.restype = ctypes.c_char_p
    library.inflateInit2_.argtypes = (stream, ctypes.c_int, ctypes.c_char_p, ctypes.c_int)
    library.inflate.argtypes = (stream, ctypes.c_int)
    library.inflateReset.argtypes = (stream,)
    library.inflateEnd.argtypes = (stream,)
    library.inflateGetDictionary.argtypes = (
        stream,
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_uint),
    )
    return library


class Inflater:
    """Decompresses gzip members into one buffer.  For one thread at a time.

    After each ``step``: ``at_member`` says that the next byte begins a member, ``at_block``
    that it begins a block on a whole byte, neither the first nor behind the last.
    ``consumed`` and ``produced`` count bytes of the whole stream.
    """

    def __init__(self, buffer_bytes: int) -> None:
        self._zlib = _load()
        self._stream = _ZStream()
        self._input = b""
        self._buffer = ctypes.create_string_buffer(buffer_bytes)
        self._size = buffer_bytes
        self._window = ctypes.create_string_buffer(WINDOW_BYTES)
        self._open = False
        self.consumed = 0
        self.produced = 0
        self.at_member = True
        self.at_block = False
        if self._zlib.inflateInit2_(
            self._stream, _GZIP_WBITS, self._zlib.zlibVersion(), ctypes.sizeof(_ZStream)
        ):
            raise MemoryError("zlib cannot be set up")
        self._open = True
        self._rewind()

    def __del__(self) -> None:
        if self._open:
            self._zlib.inflateEnd(self._stream)

    def feed(self, data: bytes) -> None:
        """The next bytes of the stream; only when ``hungry``."""
        self._input = data  # it must stay as long as zlib has its address
        self._stream.next_in = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value
        self._stream.avail_in = len(data)

    @property
    def hungry(self) -> bool:
        """Whether all that was fed is used up."""
        return not self._stream.avail_in

    @property
    def full(self) -> bool:
        """Whether the buffer must be taken before the next step."""
        return not self._stream.avail_out

    def step(self) -> None:
        """Decompress up to the end of a block, of the buffer or of what was fed.

        Raises InvalidLayer.
        """
        stream = self._stream
        taken, given = stream.avail_in, stream.avail_out
        status = self._zlib.inflate(stream, _BLOCK)
        self.consumed += taken - stream.avail_in
        self.produced += given - stream.avail_out
        if status == _STREAM_END:
            self._zlib.inflateReset(stream)
            self.at_member, self.at_block = True, False
            return
        if status not in (_OK, _BUF_ERROR):
            message = stream.msg.decode(errors="replace") if stream.msg else f"error {status}"
            raise InvalidLayer(f"the gzip stream is corrupt: {message}")
        if taken != stream.avail_in or given != stream.avail_out:
            self.at_member = False
        state = stream.data_type
        self.at_block = bool(state & _AT_BOUNDARY and not state & (_LAST_BLOCK | _UNUSED_BITS))

    def take(self) -> bytes:
        """What the buffer holds; it is empty then."""
        data = ctypes.string_at(self._buffer, self._size - self._stream.avail_out)
        self._rewind()
        return data

    def window(self) -> bytes:
        """The last 32 KiB that were produced in this member, or as many as there are."""
        length = ctypes.c_uint(WINDOW_BYTES)
        self._zlib.inflateGetDictionary(self._stream, self._window, ctypes.byref(length))
        return self._window.raw[: length.value]

    def _rewind(self) -> None:
        self._stream.next_out = ctypes.addressof(self._buffer)
        self._stream.avail_out = self._size
