"""The images that the consumer is measured with.

``python``: Debian with Python and its numeric libraries, four layers, 200 MB packed.
``many``: 24,000 small files in four layers.  ``large``: three layers with one large file each,
half of which can be compressed.  ``tall``: twenty small layers, pulled whole and lazily.
``zstd``: ``python`` with its layers packed with zstd.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from lab import images, tars
from lab.oci import LayerSource, RunConfig, StoredImage
from lab.tars import Member

_RECIPE: Final = 1
_SEED: Final = 20240301
_MIB: Final = 1 << 20
MANY_LAYERS: Final = 4
MANY_FILES: Final = 6000
_FILES_PER_DIRECTORY: Final = 60
_LARGE_LAYERS: Final = 3
_LARGE_BYTES: Final = 96 * _MIB
TALL_LAYERS: Final = 20
_TALL_FILES: Final = 60


def python() -> StoredImage:
    """The image of the other benchmarks."""
    return images.python_image()


def many_files() -> StoredImage:
    """Sizes of files as in a tree of sources: most are small."""
    return _image("bench-many", [_sources(n, MANY_FILES) for n in range(MANY_LAYERS)])


def large_files() -> StoredImage:
    """One file a layer."""
    return _image("bench-large", [_large(number) for number in range(_LARGE_LAYERS)])


def tall() -> StoredImage:
    """Every layer a few dozen files, as the steps of a long Dockerfile leave them."""
    return _image("bench-tall", [_sources(n, _TALL_FILES) for n in range(TALL_LAYERS)])


PLAIN: Final[dict[str, Callable[[], StoredImage]]] = {
    "python": python,
    "many": many_files,
    "large": large_files,
    "tall": tall,
}
ZSTD: Final = "zstd"
"""Made of ``python`` while it is pushed."""


def _image(name: str, layers: Sequence[Iterator[Member]]) -> StoredImage:
    def build(scratch: Path) -> tuple[Sequence[LayerSource], RunConfig]:
        sources = []
        for number, members in enumerate(layers):
            tar = scratch / f"{number}.tar"
            with tar.open("wb") as out:
                tars.write_tar(out, members)
            sources.append(LayerSource(tar))
        return sources, RunConfig(cmd=("/bin/sh",))

    return images.cached(None, name, {name: _RECIPE}, build)


def _sources(layer: int, files: int) -> Iterator[Member]:
    chance = random.Random(_SEED + layer)
    words = [chance.randbytes(chance.randint(2, 9)).hex().encode() for _ in range(2000)]
    yield tars.directory(b"./")
    made: set[bytes] = set()
    for number in range(files):
        module, file = divmod(number, _FILES_PER_DIRECTORY)
        path = b"src%d/part%02d/module%03d" % (layer, module % 10, module)
        parts = path.split(b"/")
        for parent in (b"/".join(parts[:depth]) for depth in (1, 2, 3)):
            if parent not in made:
                made.add(parent)
                yield tars.directory(parent)
        size = min(int(chance.expovariate(1 / 4000)), 60_000)
        text = b" ".join(chance.choices(words, k=size // 4 + 1))[:size]
        yield tars.regular(b"%b/file%03d.py" % (path, file), text)


def _large(layer: int) -> Iterator[Member]:
    chance = random.Random(_SEED + layer)
    line = chance.randbytes(48).hex().encode() + b"\n"
    pieces = (
        chance.randbytes(_MIB) if number % 2 else (line * (_MIB // len(line) + 1))[:_MIB]
        for number in itertools.count()
    )
    yield tars.directory(b"./")
    yield tars.directory(b"data/")
    content = b"".join(itertools.islice(pieces, _LARGE_BYTES // _MIB))
    yield tars.regular(b"data/large%d.bin" % layer, content)
