"""``layerstore pull``: an image by its name, from a registry into the graph root.

A short name may stand for images of several registries, which are tried in order, as Podman
does.  The storage gets the image under the full name that was found.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from layerstore import limits
from layerstore.copy.context import CopyContext
from layerstore.copy.docker import RegistryImage
from layerstore.copy.names import TRANSPORTS, open_source
from layerstore.copy.policy import Policy
from layerstore.copy.progress import PullListener, Quiet, trying
from layerstore.copy.reuse import How
from layerstore.copy.storage_destination import IntoStorage, LayerOutcome, PullResult, pull_into
from layerstore.copy.transport import ImageSource
from layerstore.errors import LayerstoreError, NetworkError, RegistryError, UnknownObject
from layerstore.graphroot.images import Image
from layerstore.graphroot.store import Store
from layerstore.image import Digest, Platform, Reference
from layerstore.registry import FetchedManifest, RegistryClient, RegistrySettings
from layerstore.registry.alsauthhelper import hand_over
from layerstore.registry.credentials import user_id
from layerstore.registry.shortnames import alias_file, candidates, is_short

_DOCKER: Final = "docker://"


class When(enum.StrEnum):
    """What an image of that name in the storage changes."""

    ALWAYS = "always"
    """Nothing: the registry is asked, and what is new is pulled."""
    MISSING = "missing"
    """It is taken as it is."""
    NEWER = "newer"
    """It is taken if the registry has no other one under this name, or cannot be asked."""
    NEVER = "never"
    """It is taken, and there must be one."""


@dataclass(frozen=True)
class PullOptions:
    """How to pull.

    None for ``registry``, ``policy`` and ``platform`` is what this machine has.
    ``layer_stores`` False asks none of the configured additional layer stores; ``toc_layers``
    says whether layers may be known by their TOC only (None: if this machine's Podman can bear
    them); ``dialect_l`` asks for blobs too, and believes the answers without any check.
    ``parallel`` layers are under way at once.
    """

    when: When = When.ALWAYS
    platform: Platform | None = None
    registry: RegistrySettings | None = None
    policy: Policy | None = None
    layer_stores: bool = True
    toc_layers: bool | None = None
    dialect_l: bool = False
    parallel: int = limits.PULL_PARALLEL
    listener: PullListener = field(default_factory=Quiet)


def pull(text: str, store: Store | None = None, options: PullOptions | None = None) -> PullResult:
    """Pull the image called ``text`` into ``store`` (default: the storage of this machine).

    ``text`` is a reference, short names included, or ``TRANSPORT:NAME``.  Raises
    ``PolicyRejected``, ``NotFound`` and the other errors of registries; ``UnknownObject`` when
    there is no such image and it is not to be pulled; and what ``pull_into`` raises.
    """
    store = store or Store.open()
    options = options or PullOptions()
    if _has_transport(text):
        return _pull_from(text, store, options)
    text = text.removeprefix(_DOCKER)
    local = _local(store, text, options)
    if options.when is When.NEVER and local is None:
        raise UnknownObject("no such image, and it is not to be pulled", subject=text)
    if local is not None and options.when in (When.MISSING, When.NEVER):
        return _as_it_is(local)
    settings = options.registry or RegistrySettings.from_system()
    home = os.environ.get("HOME")
    aliases = alias_file(os.environ, Path(home) if home else None, user_id(os.environ))
    found = candidates(text, settings.registries, () if aliases is None else (aliases,))
    with RegistryClient(settings) as client:
        try:
            return _first_of(found, client, store, options, local)
        except (NetworkError, RegistryError):
            if options.when is When.NEWER and local is not None:
                return _as_it_is(local)
            raise


def registry_host(text: str) -> str | None:
    """The registry that ``text`` names; None for a short name and other transports."""
    text = text.removeprefix(_DOCKER)
    if _has_transport(text) or is_short(text):
        return None
    return Reference.parse(text).domain


def _has_transport(text: str) -> bool:
    """Whether ``text`` names an image elsewhere than in a registry."""
    transport, colon, _ = text.partition(":")
    return bool(colon) and transport in TRANSPORTS and transport != "docker"


def _first_of(
    found: Sequence[Reference],
    client: RegistryClient,
    store: Store,
    options: PullOptions,
    local: Image | None,
) -> PullResult:
    failures: list[LayerstoreError] = []
    for reference in found:
        options.listener.message(trying(reference))
        source = _Named(client, reference)
        try:
            if local is not None and source.manifest().digest in local.digests:
                return _as_it_is(local)  # only When.NEWER comes here with one
            return pull_into(store, source, [str(reference)], _into(source, options))
        except LayerstoreError as error:
            if not isinstance(error, NetworkError | RegistryError):
                raise
            failures.append(error)
    if len(failures) > 1:
        last = failures[-1]
        last.what += "; before it: " + "; ".join(map(str, failures[:-1]))
    raise failures[-1]


class _Named(RegistryImage):
    """An image of a registry whose manifest is asked for once; the layer store is told of it."""

    def __init__(self, client: RegistryClient, reference: Reference) -> None:
        super().__init__(client, reference)
        self._top: FetchedManifest | None = None

    def manifest(self, digest: Digest | None = None) -> FetchedManifest:
        """See ``ImageSource``."""
        if digest is not None:
            return super().manifest(digest)
        if self._top is None:
            self._top = super().manifest()
            hand_over(self._client, self.reference)
        return self._top


def _pull_from(text: str, store: Store, options: PullOptions) -> PullResult:
    context = CopyContext(source_registry=options.registry, storage=store.config)
    source = open_source(text, context)
    try:
        names = [str(name) for name in source.names]
        return pull_into(store, source, names, _into(source, options))
    finally:
        source.close()


def _into(source: ImageSource, options: PullOptions) -> IntoStorage:
    home = os.environ.get("HOME")
    policy = options.policy or Policy.load(home=Path(home) if home else None)

    def check(manifest: FetchedManifest, signatures: Sequence[bytes]) -> None:
        policy.check(source.transport, source.identity, manifest.raw, signatures)

    return IntoStorage(
        platform=options.platform or Platform.host(),
        check=check,
        layer_stores=options.layer_stores,
        toc_layers=options.toc_layers,
        dialect_l=options.dialect_l,
        parallel=options.parallel,
        listener=options.listener,
    )


def _local(store: Store, text: str, options: PullOptions) -> Image | None:
    """The image of that name in the storage, for the platform, if that matters."""
    if options.when is When.ALWAYS:
        return None
    try:
        image = store.image(text)
    except UnknownObject:
        return None
    if options.platform is not None and not options.platform.matches(
        image.parsed_config().platform
    ):
        return None
    return image


def _as_it_is(image: Image) -> PullResult:
    manifest = Digest.of(image.manifest())
    layers = zip(
        image.parsed_manifest().layers,
        image.parsed_config().diff_ids,
        image.layers(),
        strict=False,  # one with fewer layers than it should have is not mended here
    )
    return PullResult(
        image.id,
        image.digest or manifest,
        manifest,
        image.names,
        tuple(
            LayerOutcome(blob.digest, diff_id, blob.size, How.SHARED, layer.id)
            for blob, diff_id, layer in layers
        ),
    )
