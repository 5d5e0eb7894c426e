"""Archives with sparse files, as GNU tar writes them."""

import subprocess
from pathlib import Path
from typing import Final

VERSIONS: Final = ("0.0", "0.1", "1.0")
"""Of the sparse files of PAX archives."""

_MIB: Final = 1 << 20
_PAGE: Final = 4096

FILES: Final = {
    "d/full": b"hello" * 1000,
    "d/hole": bytes(3 * _MIB),
    "d/sparse": bytes(_MIB) + b"A" * 5000 + bytes(2 * _MIB - 5000) + b"B" * 70_000 + bytes(_MIB),
    "d/tail": bytes(_MIB) + b"C" * 777,
}
"""What is in the archive; ``d/full`` is not sparse."""


def sparse_tar(place: Path, version: str) -> bytes:
    """A tar of ``FILES`` in one of ``VERSIONS``, or with GNU's own sparse files (``gnu``).

    ``place`` is a directory that takes the files.
    """
    source = place / "source"
    for name, content in FILES.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for start in range(0, len(content), _PAGE):
                piece = content[start : start + _PAGE]
                if any(piece):
                    file.seek(start)
                    file.write(piece)
            file.truncate(len(content))
    form = ["--format=gnu"] if version == "gnu" else ["--format=pax", f"--sparse-version={version}"]
    # raw: tar looks for the zeros itself, whatever the file system says of its holes
    made = subprocess.run(
        ["tar", *form, "-S", "--hole-detection=raw", "--sort=name", "-C", source, "-c", "d"],
        stdout=subprocess.PIPE,
        check=True,
    )
    return made.stdout
