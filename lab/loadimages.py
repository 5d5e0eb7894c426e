"""Images for loads that run for a while: files of all sizes, no two images with the same contents.

Each holds what a walk can get wrong (links, attributes, whiteouts, an opaque directory) and, for
readers, files from a few bytes up to some chunks.  Run, it reads a part of them and prints their
checksums; what it has to print is computed here from the contents, not by running it anywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lab import images, tars
from lab.oci import LayerSource, RunConfig, StoredImage
from lab.tars import Member

_RECIPE: Final = 3
_BIG_BYTES: Final = 6 << 20
_FIRST_BIG_BYTES: Final = 40 << 20
"""Of `/data/big.bin`: more than one chunk of the usual 4 MiB; many in the first image."""
_SIZES: Final = (700, 4096, 5000, 20_000, 70_000, 131_072, 300_000, 1_000_000)
_SMALL_FILES: Final = 120
RUN: Final = (
    "cat /etc/number; for f in /data/run/* /app/small/00?; do sha256sum < $f; done; ls /app | wc -l"
)
"""What the shell in it runs: `prints` is what comes out."""


def load_image(number: int, directory: Path | None = None) -> StoredImage:
    """The image of this number, about 12 MB (number 0: 46 MB); `prints` says what it writes when it runs."""

    def build(_: Path) -> tuple[Sequence[LayerSource], RunConfig]:
        layers = (_base(number), _data(number), _application(number))
        sources = [LayerSource(images.tar_bytes(layer), level=1) for layer in layers]
        return sources, RunConfig(cmd=("/bin/sh", "-c", RUN))

    return images.cached(directory, "load", {"load": _RECIPE, "number": number}, build)


def prints(number: int) -> str:
    """Standard output of the image of this number."""
    read = [_run_file(number, which) for which in range(len(_SIZES))]
    read += [_small_file(number, which) for which in range(10)]
    sums = [f"{hashlib.sha256(data).hexdigest()}  -" for data in read]
    return "\n".join([f"number {number}", *sums, "2", ""])


def _base(number: int) -> list[Member]:
    return [*images.base_members(), tars.regular(b"etc/number", f"number {number}\n".encode())]


def _data(number: int) -> list[Member]:
    big_bytes = _BIG_BYTES if number else _FIRST_BIG_BYTES
    first = tars.regular(b"data/first", images.noise(3000, number * 1000 + 1), uid=1000, gid=50)
    return [
        tars.directory(b"./"),
        tars.directory(b"data/"),
        tars.regular(b"data/big.bin", images.noise(big_bytes, number * 1000)),
        first,
        tars.hard_link(b"data/second", first),
        tars.symlink(b"data/to-big", b"big.bin"),
        tars.regular(b"data/noted", b"noted\n", xattrs={b"user.note": b"\x00binary\xff"}),
        tars.directory(b"data/run/"),
        *(
            tars.regular(b"data/run/%02d" % which, _run_file(number, which))
            for which in range(len(_SIZES))
        ),
        tars.directory(b"data/more/"),
        *(
            tars.regular(b"data/more/%02d" % which, images.noise(size, number * 1000 + 200 + which))
            for which, size in enumerate(_SIZES * 2)
        ),
    ]


def _application(number: int) -> list[Member]:
    members = [
        tars.directory(b"./"),
        tars.directory(b"app/"),
        tars.regular(b"app/about", b"about number %d\n" % number),
        tars.directory(b"app/small/"),
        tars.directory(b"opt/"),
        tars.directory(b"opt/plugins/"),
        tars.opaque(b"opt/plugins/"),
        tars.regular(b"opt/plugins/new", b"a new plug-in\n"),
        tars.directory(b"usr/"),
        tars.directory(b"usr/share/"),
        tars.directory(b"usr/share/doc/"),
        tars.whiteout(b"usr/share/doc/removed"),
        tars.whiteout(b"usr/share/doc/tree"),
    ]
    for which in range(_SMALL_FILES):
        name = b"app/small/%03d" % which
        members += [
            tars.regular(name, _small_file(number, which)),
            tars.symlink(name + b".link", b"%03d" % which),
        ]
    return members


def _run_file(number: int, which: int) -> bytes:
    return images.noise(_SIZES[which], number * 1000 + 100 + which)


def _small_file(number: int, which: int) -> bytes:
    return b"%d in %d\n" % (which, number) * (which + 1)
