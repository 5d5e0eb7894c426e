"""Images for tests, demo and benchmarks, built once and kept in `.cache/images`.

`small_image`: a few megabytes around a static busybox; the image of most tests.
`python_image`: Debian with Python, NumPy, pandas and SciPy; the demo's and the benchmarks' image.

Every layer begins with the entry `./` (mode 0755) as a real build's layers do.
"""

import hashlib
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from lab import debian, oci, tars, xattrs
from lab.debroot import python_layers
from lab.oci import LayerSource, RunConfig, StoredImage
from lab.tars import Member
from layerstore.copy.convert import ConvertOptions, convert
from layerstore.copy.layerform import Estargz
from layerstore.formats import EstargzOptions

CACHE: Final = debian.CACHE / "images"

APPLETS: Final = (
    *("sh", "cat", "cp", "cut", "date", "dd", "df", "du", "echo", "env", "expr", "find"),
    *("grep", "head", "id", "ln", "ls", "md5sum", "mkdir", "mv", "od", "ps", "pwd", "readlink"),
    *("rm", "sed", "sha256sum", "sleep", "sort", "stat", "sync", "tail", "tar", "tee", "test"),
    *("touch", "tr", "true", "uname", "uniq", "wc", "xargs", "yes"),
)

SMALL_FILES: Final = 200
SMALL_BIG_BYTES: Final = 12 << 20
"""Size of `/data/big.bin` of the small image: three chunks of the usual 4 MiB."""

_SMALL_RECIPE: Final = 2
_PYTHON_RECIPE: Final = 2
_SEED: Final = 20240101


def small_image(
    directory: Path | None = None,
    *,
    architecture: str = "amd64",
    big_bytes: int = SMALL_BIG_BYTES,
    marker: str = "",
) -> StoredImage:
    """A busybox image of three layers; `podman run` prints `hello from small amd64: 199 files`.

    Made for every architecture from the same busybox of this machine, so that an index of several
    differs in `/etc/marker` and the config only.  `marker` is further text for that file: images
    with different markers share the first two layers but not the last.  The layout lies below
    `directory` (`.cache/images` by default).
    """
    recipe = {"small": _SMALL_RECIPE, "arch": architecture, "big": big_bytes, "marker": marker}
    config = RunConfig(cmd=("/app/hello",), architecture=architecture)

    def build(_: Path) -> tuple[Sequence[LayerSource], RunConfig]:
        return _small_sources(f"{architecture} {marker}".rstrip(), big_bytes), config

    return cached(directory, "small", recipe, build)


def small_index(
    directory: Path | None = None, architectures: Sequence[str] = ("amd64", "arm64")
) -> StoredImage:
    """An index of small images, one for each architecture, in a layout of its own."""
    root = directory or CACHE
    layout = root / f"small-index-{_key({'of': architectures, 'recipe': _SMALL_RECIPE})}"
    with debian.lock(root / "lock"):
        if not layout.exists():
            with _scratch(root) as scratch:
                target = Path(scratch) / "layout"
                images = [
                    oci.write_image(
                        target,
                        each,
                        _small_sources(each, SMALL_BIG_BYTES),
                        RunConfig(cmd=("/app/hello",), architecture=each),
                    )
                    for each in architectures
                ]
                oci.write_index(target, "latest", images)
                target.rename(layout)
    return oci.read_image(layout, "latest")


def python_image(directory: Path | None = None) -> StoredImage:
    """Debian with Python, NumPy, pandas, SciPy and a compiler in four layers, about 200 MB packed.

    `podman run` prints one line: `hello from pandas X numpy Y: mean=...`.  The layers: a base with
    setuid programs and a file capability (ping), the interpreter with its library, the numeric
    libraries, and an application with whiteouts of the layers' documentation, an opaque directory
    and hard links.  Needs root (owners, chroot).  Raises lab.debian.DebianError.
    """
    config = RunConfig(cmd=("python3", "/app/hello.py"), env=(*RunConfig().env, "LANG=C.UTF-8"))

    def build(scratch: Path) -> tuple[Sequence[LayerSource], RunConfig]:
        return [LayerSource(tar) for tar in python_layers(scratch)], config

    return cached(directory, "python", {"python": _PYTHON_RECIPE}, build)


def lazy(image: StoredImage, layout: Path, prioritize: tuple[str, ...] = ()) -> StoredImage:
    """The image as eStargz, in a new layout; packed little, because these are looked at, not kept."""
    options = ConvertOptions(form=Estargz(EstargzOptions(level=1, prioritize=prioritize)))
    convert(f"oci:{image.layout}:{image.tag}", f"oci:{layout}:latest", options)
    return oci.read_image(layout, "latest")


def busybox() -> bytes:
    """Debian's statically linked busybox."""
    (package,) = [
        path for path in debian.download(["busybox-static"]) if path.name.startswith("busybox-st")
    ]
    with tempfile.TemporaryDirectory() as scratch:
        debian.unpack([package], Path(scratch))
        return (Path(scratch) / "usr/bin/busybox").read_bytes()


def base_members() -> list[Member]:
    """A root file system with busybox, enough for `podman run`."""
    members = [tars.directory(b"./")]
    members += [tars.directory(b"bin/"), tars.regular(b"bin/busybox", busybox(), mode=0o755)]
    members += [tars.symlink(b"bin/" + name.encode(), b"busybox") for name in APPLETS]
    members += [
        tars.directory(b"dev/"),
        tars.directory(b"etc/"),
        tars.regular(b"etc/group", b"root:x:0:\nnogroup:x:65534:\nstaff:x:50:\n"),
        tars.regular(
            b"etc/passwd",
            b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n",
        ),
        tars.directory(b"opt/"),
        tars.directory(b"opt/plugins/", uid=1000, gid=50),
        tars.regular(b"opt/plugins/old", b"an old plug-in\n"),
        tars.directory(b"opt/plugins/deep/"),
        tars.regular(b"opt/plugins/deep/older", b"an older plug-in\n"),
        tars.directory(b"proc/"),
        tars.directory(b"root/", mode=0o700),
        tars.directory(b"run/"),
        tars.directory(b"sys/"),
        tars.directory(b"tmp/", mode=0o1777),
        tars.directory(b"usr/"),
        tars.directory(b"usr/share/"),
        tars.directory(b"usr/share/doc/"),
        tars.regular(b"usr/share/doc/kept", b"kept\n"),
        tars.regular(b"usr/share/doc/removed", b"removed\n"),
        tars.directory(b"usr/share/doc/tree/"),
        tars.regular(b"usr/share/doc/tree/leaf", b"leaf\n"),
    ]
    return members


def tar_bytes(members: Sequence[Member]) -> bytes:
    """The archive of these members."""
    return b"".join(piece for member in members for piece in tars.encode(member)) + bytes(1024)


def noise(size: int, seed: int = _SEED) -> bytes:
    """Bytes that do not compress, the same for the same seed."""
    return random.Random(seed).randbytes(size)


def _small_sources(marker: str, big_bytes: int) -> list[LayerSource]:
    layers = (base_members(), _small_data(big_bytes), _small_app(marker))
    return [LayerSource(tar_bytes(layer)) for layer in layers]


def _small_data(big_bytes: int) -> list[Member]:
    first = tars.regular(b"data/links/first", noise(3000, 1), uid=1000, gid=50)
    members = [
        tars.directory(b"./"),
        tars.directory(b"data/"),
        tars.regular(b"data/big.bin", noise(big_bytes)),
        tars.regular(
            b"data/capable",
            b"#!/bin/sh\necho capable\n",
            mode=0o755,
            xattrs={xattrs.CAPABILITY: xattrs.file_capability(xattrs.CAP_NET_RAW)},
        ),
        tars.regular(b"data/empty"),
        tars.directory(b"data/links/"),
        first,
        # as tar writes them: extraction applies the owner of a link's own entry
        tars.hard_link(b"data/links/second", b"data/links/first", uid=1000, gid=50),
        tars.hard_link(b"data/third", b"data/links/first", uid=1000, gid=50),
        tars.regular(b"data/noted", b"noted\n", xattrs={b"user.note": b"\x00binary\xff"}),
        tars.regular(b"data/setuid", b"#!/bin/sh\nid -u\n", mode=0o4755),
        tars.directory(b"data/small/"),
    ]
    members += [
        tars.regular(b"data/small/%03d.txt" % number, b"file %d\n" % number * (number + 1))
        for number in range(SMALL_FILES)
    ]
    members.append(tars.symlink(b"data/to-big", b"big.bin"))
    return members


def _small_app(marker: str) -> list[Member]:
    script = (
        b'#!/bin/sh\necho "hello from small $(cat /etc/marker): $(ls /data/small | wc -l) files"\n'
    )
    return [
        tars.directory(b"./"),
        tars.directory(b"app/"),
        tars.regular(b"app/hello", script, mode=0o755),
        tars.directory(b"data/"),
        tars.directory(b"data/links/"),
        tars.whiteout(b"data/links/second"),
        tars.directory(b"data/small/"),
        tars.whiteout(b"data/small/000.txt"),
        tars.directory(b"etc/"),
        tars.regular(b"etc/marker", f"{marker}\n".encode()),
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


def cached(
    directory: Path | None,
    name: str,
    recipe: dict[str, object],
    build: Callable[[Path], tuple[Sequence[LayerSource], RunConfig]],
) -> StoredImage:
    """The image of this recipe: an earlier one, or built now and moved into place whole.

    `build` gets a scratch directory and gives the layers and the config.
    """
    root = directory or CACHE
    layout = root / f"{name}-{_key(recipe)}"
    with debian.lock(root / "lock"):
        if not layout.exists():
            with _scratch(root) as scratch:
                sources, config = build(Path(scratch))
                target = Path(scratch) / "layout"
                oci.write_image(target, "latest", sources, config)
                target.rename(layout)
    return oci.read_image(layout, "latest")


def _scratch(root: Path) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(dir=root, prefix=".build-", ignore_cleanup_errors=True)


def _key(recipe: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
