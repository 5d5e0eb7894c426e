"""Where the frames of a zstd stream begin: the only places it can be read from."""

from __future__ import annotations

from layerstore import limits
from layerstore.errors import InvalidLayer
from layerstore.formats.checkpoints import Checkpoint
from layerstore.formats.compression import Readable, zstd

_INPUT_BYTES = 256 * limits.KIB


class FrameReader:
    """The plain stream inside zstd ``source``; collects ``points`` about every ``spacing`` bytes.

    As ``CheckpointReader``, but that a frame never needs a window.
    """

    def __init__(self, source: Readable, spacing: int) -> None:
        self._source = source
        self._spacing = spacing
        self._frame = zstd.ZstdDecompressor()
        self._fed = 0
        self._produced = 0
        self._ended = False
        self.points: list[Checkpoint] = [Checkpoint(0, 0, b"")]

    def read(self, n: int, /) -> bytes:
        """At most ``n`` bytes, ``b""`` only at the end; errors as of ``CheckpointReader``."""
        try:
            while not self._ended:
                data = self._input()
                if self._ended:
                    break
                output = self._frame.decompress(data, n)
                if output:
                    self._produced += len(output)
                    return output
        except zstd.ZstdError as error:
            raise InvalidLayer(f"the zstd stream is corrupt: {error}") from None
        return b""

    def _input(self) -> bytes:
        """What to give to the frame at hand; a new one is begun behind the last."""
        if self._frame.eof:
            rest = self._frame.unused_data
            offset = self._fed - len(rest)
            rest = rest or self._more()
            if not rest:
                self._ended = True
                return b""
            if self._produced - self.points[-1].plain_offset >= self._spacing:
                self.points.append(Checkpoint(offset, self._produced, b""))
            self._frame = zstd.ZstdDecompressor()
            return rest
        if not self._frame.needs_input:
            return b""
        data = self._more()
        if not data:
            raise InvalidLayer("the zstd stream is truncated")
        return data

    def _more(self) -> bytes:
        data = self._source.read(_INPUT_BYTES)
        self._fed += len(data)
        return data
