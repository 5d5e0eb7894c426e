"""Platforms: operating system, architecture and CPU variant, in Go's words.

OCI image specification ("Image Index", ``platform``).  The order in which
variants are acceptable follows containers/image, pkg/platform: an arm v8 CPU in
32 bit mode also runs v7, v6 and v5; a missing variant means the plain one.
"""

from __future__ import annotations

import platform as _platform
from typing import Final, Self

import msgspec

from layerstore.errors import UsageError

_MACHINES: Final = {
    "x86_64": ("amd64", ""),
    "amd64": ("amd64", ""),
    "aarch64": ("arm64", "v8"),
    "arm64": ("arm64", "v8"),
    "armv8l": ("arm", "v8"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "armv5tel": ("arm", "v5"),
    "i386": ("386", ""),
    "i586": ("386", ""),
    "i686": ("386", ""),
    "loongarch64": ("loong64", ""),
}

# Best first; a machine of one variant runs that one and those behind it.
_VARIANTS: Final = {
    "arm": ("v8", "v7", "v6", "v5"),
    "arm64": ("v8",),
    "amd64": ("v4", "v3", "v2", "v1"),
}
_PLAIN: Final = {"arm": "v7", "arm64": "v8", "amd64": "v1"}


class Platform(msgspec.Struct, frozen=True):
    """What an image runs on, or what a machine is."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def host(cls, machine: str | None = None) -> Self:
        """The platform of this machine (always Linux); ``machine`` is for tests."""
        name = (machine or _platform.machine()).lower()
        architecture, variant = _MACHINES.get(name, (name, ""))
        return cls("linux", architecture, variant)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``os/architecture[/variant]``; raises ``UsageError``."""
        parts = text.split("/")
        if len(parts) not in (2, 3) or not all(parts):
            raise UsageError("a platform is os/architecture[/variant]", subject=text)
        return cls(*parts)

    def rank(self, image: Platform) -> int | None:
        """How well an image for ``image`` suits a machine of this platform.

        0 is best, None means that it does not run.
        """
        if (self.os, self.architecture) != (image.os, image.architecture):
            return None
        plain = _PLAIN.get(self.architecture, "")
        mine, other = self.variant or plain, image.variant or plain
        if mine == other:
            return 0
        order = _VARIANTS.get(self.architecture, ())
        if mine not in order or other not in order:
            return None
        distance = order.index(other) - order.index(mine)
        return distance if distance > 0 else None

    def matches(self, image: Platform) -> bool:
        """Whether an image for ``image`` runs on a machine of this platform."""
        return self.rank(image) is not None

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)
