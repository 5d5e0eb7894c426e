"""From a reference and a digest to the layer of an image that is meant.

A reference is pinned to the documents that it stood for, so that a layer is
found long after its tag moved; it is resolved again only when a name is in none
of them.  The path says nothing about the platform, so every image of an index is
searched, the host's own first.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator

from layerstore import limits
from layerstore.errors import ContentError, LayerstoreError, NotFound, UnsupportedFormat
from layerstore.formats.announced import announced_name
from layerstore.image import (
    Descriptor,
    Digest,
    ImageConfig,
    Index,
    Manifest,
    Platform,
    Reference,
    parse_config,
    parse_manifest,
)
from layerstore.image.annotations import layer_toc
from layerstore.provider.dialect import Dialect
from layerstore.provider.loader import announced_toc
from layerstore.provider.refusal import NO_DIFF_ID, NOT_IN_IMAGE, UNKNOWN_LAYER, Refusal
from layerstore.provider.state import Document, State
from layerstore.registry import RegistryClient


@dataclasses.dataclass(frozen=True, slots=True)
class Match:
    """The layer of an image that a name stands for."""

    reference: Reference
    manifest: Manifest
    number: int  # position in manifest.layers
    dialect: Dialect
    repeated: bool = False  # the image has this layer more than once

    @property
    def descriptor(self) -> Descriptor:
        """The layer's descriptor."""
        return self.manifest.layers[self.number]


class Images:
    """Finds layers in images, remembers manifests.  Thread-safe."""

    def __init__(self, state: State, client: RegistryClient) -> None:
        self._state = state
        self._client = client
        self._host = Platform.host()
        self._lock = threading.Lock()
        self._asked: OrderedDict[str, tuple[float, LayerstoreError | None]] = OrderedDict()
        self._asking: dict[str, threading.Lock] = {}

    def find(self, reference: str, name: Digest, deadline: float) -> Match:
        """The layer ``name`` of the image ``reference``; asks the registry if need be.

        Raises Refusal if the image has no such layer, and what the registry raised.
        """
        _expect_sha256(name)
        parsed = Reference.parse(reference)
        for pinned in self._state.pins(reference):
            match = self._search(parsed, pinned, name, deadline)
            if match is not None:
                return match
        if parsed.digest is None or not self._state.pins(reference):
            current = self._refresh(reference, parsed, deadline)
            match = self._search(parsed, current, name, deadline)
            if match is not None:
                return match
        self._check_announced(reference, parsed, name, deadline)
        raise Refusal(NOT_IN_IMAGE, f"no layer {name} in the image", subject=reference)

    def find_anywhere(self, name: Digest, deadline: float) -> Match:
        """The layer ``name`` of any image that is known already; of one that repeats it, if any."""
        _expect_sha256(name)
        found: Match | None = None
        for reference in self._state.references():
            parsed = Reference.parse(reference)
            for pinned in self._state.pins(reference):
                try:
                    match = self._search(parsed, pinned, name, deadline, fetch=False)
                except LayerstoreError:
                    continue
                if match is not None and (found is None or match.repeated):
                    found = match
        if found is None:
            raise Refusal(UNKNOWN_LAYER, "no known image has this layer", subject=name)
        return found

    def diff_id(self, match: Match, deadline: float) -> Digest:
        """The DiffID that the image's config gives for the layer."""
        return self._diff_ids(match.reference, match.manifest, deadline)[match.number]

    def chosen(
        self, reference: Reference, platforms: Collection[Platform] | None, deadline: float
    ) -> list[tuple[Manifest, tuple[Digest, ...]]]:
        """The images of a reference as it stands now, each with the DiffIDs of its layers.

        Those of an index that suit one of ``platforms`` best, or all of them, without what is
        no image there.  Raises NotFound if there is none, Refusal, and what the registry raised.
        """
        top = self._refresh(str(reference), reference, deadline)
        document = self._document(reference, top, deadline, fetch=True)
        if isinstance(document, Manifest):
            manifests = [document]
        elif platforms is None:
            every = self._manifests(reference, top, deadline, fetch=True, images_only=True)
            manifests = list(every)
            if not manifests:
                raise NotFound("the index has no image", subject=str(reference))
        else:
            entries = {platform: document.select(platform) for platform in platforms}
            for platform, entry in entries.items():
                if entry is None:
                    raise NotFound(f"no image for {platform}", subject=str(reference))
            wanted = dict.fromkeys(entry.digest for entry in entries.values() if entry is not None)
            inner = (self._document(reference, one, deadline, fetch=True) for one in wanted)
            manifests = [one for one in inner if isinstance(one, Manifest)]
        return [(one, self._diff_ids(reference, one, deadline)) for one in manifests]

    def _diff_ids(
        self, reference: Reference, manifest: Manifest, deadline: float
    ) -> tuple[Digest, ...]:
        config = self._config(reference, manifest, deadline)
        if len(config.diff_ids) != len(manifest.layers):
            raise Refusal(
                NO_DIFF_ID,
                f"config has {len(config.diff_ids)} diff IDs for {len(manifest.layers)} layers",
                subject=str(reference),
            )
        return config.diff_ids

    def _refresh(self, reference: str, parsed: Reference, deadline: float) -> Digest:
        """Resolve the reference at the registry, at most once in a while."""
        with self._lock:
            asking = self._asking.setdefault(reference, threading.Lock())
        with asking:
            recent = self._recent(reference)
            if recent is not None:
                return recent
            error: LayerstoreError | None = None
            try:
                fetched = self._client.manifest(parsed, deadline=deadline)
                parse_manifest(fetched.raw, fetched.media_type)
                self._state.add_document(Document(fetched.digest, fetched.media_type, fetched.raw))
                self._state.pin(reference, fetched.digest)
            except LayerstoreError as caught:
                error = copy.copy(caught)  # without what led to it, which is large
                raise
            finally:
                with self._lock:
                    self._asked[reference] = (time.monotonic(), error)
                    self._asked.move_to_end(reference)
                    while len(self._asked) > limits.REFRESHED:
                        self._asked.popitem(last=False)
                    self._asking.pop(reference, None)
            return fetched.digest

    def _recent(self, reference: str) -> Digest | None:
        """What the reference was resolved to a moment ago; raises what went wrong then."""
        with self._lock:
            when, error = self._asked.get(reference, (float("-inf"), None))
        age = time.monotonic() - when
        if error is not None and age < limits.FAILURE_SECONDS:
            raise copy.copy(error)
        if error is None and age < limits.REFRESH_SECONDS:
            return self._state.pins(reference)[0]
        return None

    def _search(
        self,
        reference: Reference,
        digest: Digest,
        name: Digest,
        deadline: float,
        *,
        fetch: bool = True,
    ) -> Match | None:
        for manifest in self._manifests(reference, digest, deadline, fetch=fetch):
            numbers = [
                number
                for number, layer in enumerate(manifest.layers)
                if name in (layer.digest, announced_name(layer))
            ]
            if numbers:
                first = numbers[0]
                is_blob = manifest.layers[first].digest == name
                dialect = Dialect.LAYER if is_blob else Dialect.TOC
                return Match(reference, manifest, first, dialect, repeated=len(numbers) > 1)
        return None

    def _check_announced(
        self, reference: str, parsed: Reference, name: Digest, deadline: float
    ) -> None:
        """Say what is wrong with the layer whose annotations give a client this name.

        Only once no image has a right one: the publisher may have mended them meanwhile.
        """
        for pinned in self._state.pins(reference):
            for manifest in self._manifests(parsed, pinned, deadline, fetch=False):
                for layer in manifest.layers:
                    if layer_toc(layer.annotations) == name:
                        announced_toc(layer)

    def _manifests(
        self,
        reference: Reference,
        digest: Digest,
        deadline: float,
        *,
        fetch: bool,
        images_only: bool = False,
    ) -> Iterator[Manifest]:
        """The manifest, or those of an index; a lookup may be of whatever a client takes for one."""
        top = self._document(reference, digest, deadline, fetch=fetch)
        if isinstance(top, Manifest):
            yield top
            return
        failure: LayerstoreError | None = None
        native = top.select(self._host)
        for entry in sorted(top.manifests, key=lambda entry: entry is not native):
            if images_only and not entry.may_be_image:
                continue
            try:
                inner = self._document(reference, entry.digest, deadline, fetch=fetch)
            except (NotFound, ContentError) as error:
                # an index may list images that were never copied or are of another kind
                failure = failure or error
                continue
            if isinstance(inner, Manifest) and (inner.is_image or not images_only):
                yield inner
        if failure is not None and fetch and not isinstance(failure, NotFound):
            raise failure

    def _document(
        self, reference: Reference, digest: Digest, deadline: float, *, fetch: bool
    ) -> Manifest | Index:
        known = self._state.document(digest)
        if known is None:
            if not fetch:
                raise NotFound("manifest is not stored", subject=digest)
            fetched = self._client.manifest(reference, digest, deadline=deadline)
            known = Document(digest, fetched.media_type, fetched.raw)
            parsed = parse_manifest(known.body, known.media_type)
            self._state.add_document(known)
            return parsed
        return parse_manifest(known.body, known.media_type)

    def _config(self, reference: Reference, manifest: Manifest, deadline: float) -> ImageConfig:
        digest = manifest.config.digest
        known = self._state.document(digest)
        if known is not None:
            return parse_config(known.body)
        raw = self._client.blob(reference, digest, limits.CONFIG_BYTES, deadline=deadline)
        config = parse_config(raw)
        self._state.add_document(Document(digest, manifest.config.media_type, raw))
        return config


def _expect_sha256(name: Digest) -> None:
    if name.algorithm != "sha256":
        raise UnsupportedFormat(f"layers with digests of {name.algorithm} are not served")
