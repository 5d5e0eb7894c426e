"""The command line of a keeper, which its servers have, too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

LOG_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s %(message)s"


@dataclass(frozen=True, slots=True)
class Options:
    """Paths are absolute; ``root`` and ``config`` None mean what the server makes of it."""

    mountpoint: Path
    root: Path | None
    config: Path | None
    debug: bool

    def arguments(self) -> list[str]:
        """As a command line, for a server or a new keeper."""
        given: list[str] = ["--debug"] if self.debug else []
        if self.root is not None:
            given += ["--root", str(self.root)]
        if self.config is not None:
            given += ["--config", str(self.config)]
        return [*given, str(self.mountpoint)]
