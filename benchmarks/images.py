"""The benchmarks' image in three forms: as built, as eStargz, as eStargz with early files first."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import layerstore
from lab.images import python_image
from lab.opened import opened_files
from lab.podman import PodmanEnv, run

PLAIN: Final = "bench:plain"
LAZY: Final = "bench:estargz"
EARLY: Final = "bench:estargz-early"
PROGRAM: Final = ("python3", "/app/hello.py")
_CONVERT_SECONDS: Final = 900.0


@dataclass(frozen=True, slots=True)
class Pushed:
    """What lies in the registry: compressed bytes of the layers by "name:tag"."""

    sizes: dict[str, int]

    def size(self, image: str) -> int:
        """Compressed bytes of an image's layers."""
        return self.sizes[image]


def push(env: PodmanEnv, registry: str, scratch: Path) -> Pushed:
    """Build the image if need be, and push all its forms to ``registry`` ("host:port")."""
    image = python_image()
    plain = f"{registry}/{PLAIN}"
    env.skopeo("copy", "--quiet", image.source, f"docker://{plain}")
    env.podman("pull", "--quiet", plain)
    early = scratch / "early-files"
    early.write_text("".join(f"{name}\n" for name in opened_files(env, plain, *PROGRAM)))
    for target, options in ((LAZY, ()), (EARLY, ("--prioritize", f"@{early}"))):
        _convert(env, plain, f"{registry}/{target}", *options)
    sizes = {}
    for each in (PLAIN, LAZY, EARLY):
        raw = env.skopeo("inspect", "--raw", f"docker://{registry}/{each}").stdout
        sizes[each] = sum(layer["size"] for layer in json.loads(raw)["layers"])
    return Pushed(sizes)


def _convert(env: PodmanEnv, source: str, target: str, *options: str) -> None:
    arguments = ("convert", f"docker://{source}", f"docker://{target}", "--quiet", *options)
    run(
        [sys.executable, "-m", "layerstore.cli", *arguments],
        {**env.environment(), "PYTHONPATH": str(Path(layerstore.__file__).parents[1])},
        timeout=_CONVERT_SECONDS,
    )
