"""TOCs of eStargz layers that are kept in an image of their own.

It is called like the image, with ``-esgztoc`` behind the tag, in the same repository; an
annotation of its layers names the eStargz blob whose TOC each holds (layer-formats, 2.6).
What it says is believed only if the TOC has the digest that the eStargz layer's own
descriptor announces.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator

from layerstore import limits
from layerstore.errors import LimitExceeded, NotFound
from layerstore.formats import read_toc
from layerstore.image import Descriptor, Digest, Index, Manifest, Reference, parse_manifest
from layerstore.image.annotations import ESTARGZ_LAYER_DIGEST
from layerstore.provider.refusal import NO_EXTERNAL_TOC, Refusal
from layerstore.registry import RegistryClient

_SUFFIX = "-esgztoc"


class ExternalTocs:
    """Finds TOCs by reference and blob digest.  Thread-safe."""

    def __init__(self, client: RegistryClient) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._asking: dict[str, threading.Lock] = {}
        self._recent: OrderedDict[str, tuple[float, dict[str, Descriptor]]] = OrderedDict()

    def toc(self, reference: Reference, blob: Digest, expected: Digest, deadline: float) -> bytes:
        """The TOC, exact bytes of its JSON, of the layer ``blob`` of an image.

        Raises Refusal if there is none, VerificationError if it is another than ``expected``,
        and the errors of formats and registry.
        """
        if reference.tag is None:
            raise Refusal(
                NO_EXTERNAL_TOC,
                "the layer's TOC is in another image, which only a tag leads to",
                subject=str(reference),
            )
        image = reference.with_tag(reference.tag + _SUFFIX)
        found = self._layers(image, deadline).get(blob)
        if found is None:
            raise Refusal(
                NO_EXTERNAL_TOC,
                f"the layer's TOC is in another image, and {image} does not have it",
                subject=blob,
            )
        if found.size > limits.TOC_BYTES:
            raise LimitExceeded("TOC is too large", subject=blob)
        packed = self._client.blob(image, found.digest, limits.TOC_BYTES, deadline=deadline)
        document = read_toc(packed)
        expected.verify(document, subject=f"TOC of layer {blob}")
        return document

    def _layers(self, image: Reference, deadline: float) -> dict[str, Descriptor]:
        """The layers of a TOC image by the eStargz blob that each is about."""
        name = str(image)
        with self._lock:
            asking = self._asking.setdefault(name, threading.Lock())
        with asking:
            when, known = self._recent.get(name, (float("-inf"), {}))
            if time.monotonic() - when < limits.EXTERNAL_TOC_SECONDS:
                return known
            try:
                known = {
                    layer.annotations[ESTARGZ_LAYER_DIGEST]: layer
                    for manifest in self._manifests(image, deadline)
                    for layer in manifest.layers
                    if ESTARGZ_LAYER_DIGEST in layer.annotations
                }
            except NotFound:
                known = {}
            with self._lock:
                self._recent[name] = (time.monotonic(), known)
                while len(self._recent) > limits.RESOLVE_QUEUE:
                    self._recent.popitem(last=False)
                self._asking.pop(name, None)
            return known

    def _manifests(self, image: Reference, deadline: float) -> Iterator[Manifest]:
        fetched = self._client.manifest(image, deadline=deadline)
        top = parse_manifest(fetched.raw, fetched.media_type)
        if isinstance(top, Manifest):
            yield top
            return
        assert isinstance(top, Index)
        for entry in top.manifests:
            inner = self._client.manifest(image, entry.digest, deadline=deadline)
            parsed = parse_manifest(inner.raw, inner.media_type)
            if isinstance(parsed, Manifest):
                yield parsed
