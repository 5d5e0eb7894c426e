"""Who needs what: which image was made from which, which are dangling, what a name filter means.

An image without names is *dangling*.  A dangling image from which another one was made (an
earlier step of a build) is *intermediate*: Podman's list leaves it out, and it cannot simply go.
That an image was made from another is said nowhere; it follows from the configs, as Podman
decides it (containers/common, libimage, "areParentAndChild"): the parent has the child's top
layer or the one below it, its layers are the first of the child's, and so are the steps of its
history, of which the child has exactly one more.  What a build made in several steps at once
(``--layers=false``) has no parent.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from layerstore.errors import InvalidReference, LayerstoreError, UsageError
from layerstore.graphroot.records import parse_time
from layerstore.image import Reference

if TYPE_CHECKING:
    from layerstore.graphroot.images import Image
    from layerstore.graphroot.layers import Layer
    from layerstore.graphroot.store import Store

_TRUE: Final = frozenset(("1", "t", "T", "TRUE", "true", "True"))
_FALSE: Final = frozenset(("0", "f", "F", "FALSE", "false", "False"))


@dataclass(frozen=True, slots=True)
class ImageFilter:
    """Which images to list; every condition that is there must hold."""

    references: tuple[str, ...] = ()
    """Patterns; one of them must match a name (``reference_matches``)."""
    dangling: bool | None = None

    @classmethod
    def parse(cls, texts: Sequence[str]) -> ImageFilter:
        """``reference=PATTERN`` and ``dangling=BOOL``; raises ``UsageError``."""
        references: list[str] = []
        dangling: bool | None = None
        for text in texts:
            key, separator, value = text.partition("=")
            if not separator:
                raise UsageError("a filter has the form KEY=VALUE", subject=text)
            if key == "reference":
                references.append(value)
            elif key == "dangling":
                if value not in _TRUE | _FALSE:
                    raise UsageError("dangling is true or false", subject=text)
                dangling = value in _TRUE
            else:
                raise UsageError(f"unsupported image filter {key!r}", subject=text)
        return cls(tuple(references), dangling)


@dataclass(frozen=True, slots=True)
class ImageSummary:
    """One image of a list.  ``size`` is in bytes; ``parent`` is an id or empty."""

    image: Image
    size: int
    containers: int
    parent: str
    intermediate: bool


def summaries(
    store: Store,
    wanted: ImageFilter | None = None,
    *,
    all_images: bool = False,
    with_parents: bool = False,
) -> list[ImageSummary]:
    """The images that match, the newest first; intermediate ones only with ``all_images``.

    ``parent`` is filled in ``with_parents``.

    An image whose content is damaged is listed all the same, with what the records say.
    """
    wanted = wanted or ImageFilter()
    images = store.images()
    # Only an image without names can be intermediate; reading every config takes its time.
    above = origins(images) if with_parents or not all(image.names for image in images) else {}
    with_children = {parent for found in above.values() for parent in found}
    named = [_lookup(store, pattern) for pattern in wanted.references]
    used: dict[str, int] = {}
    for container in store.containers():
        used[container.image_id] = used.get(container.image_id, 0) + 1
    sizes = _ChainSizes(store)
    found = []
    for image in images:
        intermediate = not image.names and image.id in with_children
        if intermediate and not all_images:
            continue
        if wanted.dangling is not None and wanted.dangling != (not image.names):
            continue
        if wanted.references and not (
            image.id in named
            or any(
                reference_matches(name, pattern)
                for name in image.names
                for pattern in wanted.references
            )
        ):
            continue
        parent = next(iter(above.get(image.id, ())), "")
        size = sizes.of(image.top_layer) + sum(image.record.big_data_sizes.values())
        found.append(ImageSummary(image, size, used.get(image.id, 0), parent, intermediate))
    found.sort(key=lambda item: -(parse_time(item.image.created) or 0))
    return found


def parents(images: Sequence[Image]) -> dict[str, str]:
    """Image id -> id of the image it was made from, where that is there."""
    return {child: nearest for child, (nearest, *_) in origins(images).items()}


def origins(images: Sequence[Image]) -> dict[str, tuple[str, ...]]:
    """Image id -> ids of all images it may have been made from, its parent first.

    There are several when images differ in their configs only; each of them has the child, and
    the child has but one parent.
    """
    if not images:
        return {}
    below = {layer.id: layer.parent for layer in images[0].store.layers()}
    made = {image.id: made for image in images if (made := _made(image)) is not None}
    complete: dict[tuple[str, int], list[str]] = {}
    for image, how in made.items():
        complete.setdefault((how.top_layer, len(how.history)), []).append(image)
    found: dict[str, tuple[str, ...]] = {}
    for child, how in made.items():
        before = len(how.history) - 1
        near = complete.get((how.top_layer, before), [])
        if parent_layer := below.get(how.top_layer):
            near = near + complete.get((parent_layer, before), [])
        if earlier := tuple(image for image in near if made[image].is_before(how)):
            found[child] = earlier
    return found


def local_name(text: str) -> str:
    """The full name that ``podman tag IMAGE text`` gives; raises ``InvalidReference``.

    A name without a registry is one of this machine: ``localhost/...``; without a tag it gets
    ``latest``.  What begins with ``sha256:`` looks like a digest and is none, as for Podman.
    """
    if text.startswith("sha256:"):
        raise InvalidReference("tag by digest not supported", subject=text)
    first, slash, _ = text.partition("/")
    has_registry = slash and ("." in first or ":" in first or first == "localhost")
    reference = Reference.parse(text if has_registry else f"localhost/{text}")
    if reference.digest is not None:
        raise InvalidReference("tag by digest not supported", subject=text)
    return str(reference)


def reference_matches(name: str, pattern: str) -> bool:
    """Whether ``pattern`` (``*``, ``?``, ``[...]``; none of them matches a slash) is ``name``.

    It may be the whole name, or be without the registry, without the whole path, or without the
    tag.
    """
    try:
        reference = Reference.parse(name)
    except InvalidReference:
        return name == pattern
    tail = name.removeprefix(reference.name)
    path = reference.path
    last = path.rpartition("/")[2]
    candidates = (name, path + tail, last + tail, reference.name, path, last)
    matcher = _glob(pattern)
    return any(matcher.fullmatch(candidate) for candidate in candidates)


@dataclass(frozen=True, slots=True)
class _Made:
    """How an image came about: its layers and the steps of its history, the oldest first."""

    top_layer: str
    diff_ids: tuple[str, ...]
    history: tuple[tuple[object, ...], ...]

    def is_before(self, other: _Made) -> bool:
        """Whether ``other``, which has one step more, continues this."""
        return (
            other.diff_ids[: len(self.diff_ids)] == self.diff_ids
            and other.history[:-1] == self.history
        )


def _made(image: Image) -> _Made | None:
    try:
        document: Any = json.loads(image.config())
        diff_ids = tuple((document.get("rootfs") or {}).get("diff_ids") or ())
        history = tuple(_step(step or {}) for step in document.get("history") or ())
    except (LayerstoreError, ValueError, TypeError, AttributeError):
        return None
    return _Made(image.top_layer, diff_ids, history)


def _step(step: dict[str, Any]) -> tuple[object, ...]:
    created = step.get("created")
    moment = None if created is None else parse_time(created)
    texts = (step.get(key) or "" for key in ("created_by", "author", "comment"))
    return (moment, *texts, bool(step.get("empty_layer")))


def _lookup(store: Store, pattern: str) -> str:
    try:
        return store.image(pattern).id
    except LayerstoreError:
        return ""


class _ChainSizes:
    """Bytes of layers with all below them; each layer is looked at once for all images."""

    def __init__(self, store: Store) -> None:
        self._layers = {layer.id: layer for layer in store.layers()}
        self._known = {"": 0}

    def of(self, top: str) -> int:
        """0 for what is missing."""
        above: dict[str, Layer] = {}
        while top not in self._known and top in self._layers and top not in above:
            above[top] = self._layers[top]
            top = above[top].parent
        size = self._known.get(top, 0)
        for layer in reversed(above.values()):
            with contextlib.suppress(LayerstoreError):
                size += layer.size()
            self._known[layer.id] = size
        return size


def _glob(pattern: str) -> re.Pattern[str]:
    out = []
    position = 0
    while position < len(pattern):
        char = pattern[position]
        position += 1
        if char == "*":
            out.append("[^/]*")
        elif char == "?":
            out.append("[^/]")
        elif char == "[" and (end := pattern.find("]", position + 1)) > 0:
            members = pattern[position:end].replace("\\", "\\\\").replace("[", "\\[")
            out.append(f"[{members}]")
            position = end + 1
        else:
            out.append(re.escape(char))
    try:
        return re.compile("".join(out))
    except re.error:
        return re.compile(re.escape(pattern))
