"""How an image comes into a graph root, and what came of it: options and results of a pull."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from layerstore import limits
from layerstore.copy.progress import PullListener, Quiet
from layerstore.copy.reuse import How
from layerstore.image import Digest, Platform
from layerstore.registry import FetchedManifest

Check = Callable[[FetchedManifest, Sequence[bytes]], None]


def _accept(manifest: FetchedManifest, signatures: Sequence[bytes]) -> None:
    return


@dataclass(frozen=True)
class IntoStorage:
    """How to bring an image into a graph root.

    ``check`` judges manifest and signatures before they are believed, and raises
    ``PolicyRejected``.  ``layer_stores`` False asks none; ``toc_layers`` says whether layers
    known by their TOC are allowed (None: see ``oldtools``); ``dialect_l`` also asks for blobs,
    and believes what is said.  ``keep_blobs`` keeps what has come of large blobs, for the next
    attempt.  ``parallel`` layers are under way at once.
    """

    platform: Platform = field(default_factory=Platform.host)
    check: Check = _accept
    layer_stores: bool = True
    toc_layers: bool | None = None
    dialect_l: bool = False
    keep_blobs: bool = True
    parallel: int = limits.PULL_PARALLEL
    listener: PullListener = field(default_factory=Quiet)
    lookup_seconds: float = limits.LAYER_STORE_SECONDS


@dataclass(frozen=True, slots=True)
class LayerOutcome:
    """One layer of a pulled image, and where it came from."""

    digest: Digest
    diff_id: Digest
    size: int
    how: How
    layer_id: str


@dataclass(frozen=True, slots=True)
class PullResult:
    """The image in the storage; ``digest`` is what its name stands for: an index's, perhaps.

    ``misses`` say why a layer store did not give a layer.
    """

    image_id: str
    digest: Digest
    manifest_digest: Digest
    names: tuple[str, ...]
    layers: tuple[LayerOutcome, ...]
    misses: tuple[str, ...] = ()
