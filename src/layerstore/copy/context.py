"""What a copy needs to know of its surroundings."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from layerstore import limits
from layerstore.copy.progress import PullListener, Quiet
from layerstore.image import Platform
from layerstore.registry import RegistrySettings

if TYPE_CHECKING:
    from layerstore.copy.policy import Policy
    from layerstore.graphroot.storageconf import StorageConfig


@dataclass(frozen=True)
class CopyContext:
    """Settings of a copy; those that are None are the machine's.

    ``platform`` chooses from images for several, ``scratch`` is for large temporary files,
    ``parallel`` counts blobs on their way at once.
    """

    source_registry: RegistrySettings | None = None
    destination_registry: RegistrySettings | None = None
    storage: StorageConfig | None = None
    policy: Policy | None = None
    platform: Platform | None = None
    listener: PullListener = field(default_factory=Quiet)
    parallel: int = limits.PULL_PARALLEL
    scratch: Path | None = None
