"""``layerstore images``, ``inspect``, ``history``, ``tag``, ``untag``, ``rmi``: images in storage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from layerstore.cli.common import (
    STORAGE,
    Json,
    NoHeading,
    NoTrunc,
    Quiet,
    StorageFlags,
    finish,
    human_age,
    human_size,
    option,
    print_json,
    print_table,
    short_id,
    switch,
)
from layerstore.errors import LayerstoreError, UnknownObject, UsageError
from layerstore.graphroot import describe, usage
from layerstore.graphroot.cleanup import ImageRemoval
from layerstore.graphroot.images import Image
from layerstore.graphroot.store import Store

_NONE = "<none>"
_CREATED_BY = 45  # characters that Podman's table has for it


def images(
    name: str | None = None,
    /,
    *,
    all_images: Annotated[bool, switch("List intermediate images too.", "--all", "-a")] = False,
    digests: Annotated[bool, switch("Show digests.")] = False,
    filter: Annotated[  # noqa: A002
        tuple[str, ...],
        option("reference=PATTERN or dangling=true|false; may be repeated.", "--filter", "-f"),
    ] = (),
    no_trunc: NoTrunc = False,
    noheading: NoHeading = False,
    quiet: Annotated[bool, switch("Print only image IDs.", "--quiet", "-q")] = False,
    json: Json = False,
    storage: StorageFlags = STORAGE,
) -> None:
    """List images in local storage.

    With NAME, those whose name it is; NAME may have wildcards.
    """
    texts = filter if name is None else (*filter, f"reference={name}")
    wanted = usage.ImageFilter.parse(texts)
    store = storage.open(read_only=True)
    found = usage.summaries(store, wanted, all_images=all_images, with_parents=json)
    if json:
        print_json([describe.summary_document(summary) for summary in found])
    elif quiet:
        for identity in dict.fromkeys(summary.image.id for summary in found):
            print(f"sha256:{identity}" if no_trunc else short_id(identity))
    else:
        _print_images(found, digests=digests, no_trunc=no_trunc, heading=not noheading)


def _print_images(
    found: list[usage.ImageSummary], *, digests: bool, no_trunc: bool, heading: bool
) -> None:
    read_only = any(summary.image.read_only for summary in found)
    headings = ["REPOSITORY", "TAG", "DIGEST", "IMAGE ID", "CREATED", "SIZE", "R/O"]
    rows = []
    for summary in found:
        image = summary.image
        for name in _shown_names(image.names):
            rows.append(
                [
                    *_repository_and_tag(name),
                    str(image.digest or _NONE),
                    f"sha256:{image.id}" if no_trunc else short_id(image.id),
                    human_age(image.created),
                    human_size(summary.size),
                    "true" if image.read_only else "false",
                ]
            )
    unwanted = [2] * (not digests) + [6] * (not read_only)
    for line in (headings, *rows):
        for column in reversed(unwanted):
            del line[column]
    print_table(headings, rows, heading=heading)


def _shown_names(names: Sequence[str]) -> Sequence[str]:
    """One row for each: those with a tag, else one with a digest, as Podman shows them."""
    tagged = [name for name in names if "@" not in name]
    return tagged or [*names[:1]] or [f"{_NONE}:{_NONE}"]


def _repository_and_tag(name: str) -> tuple[str, str]:
    repository, separator, _ = name.partition("@")
    if separator:
        return repository, _NONE
    repository, _, tag = name.rpartition(":")
    return repository, tag


def inspect(
    *names: str,
    kind: Annotated[
        Literal["image", "container", "layer", "all"],
        option("What NAME is.", "--type", "-t"),
    ] = "all",
    json: Annotated[bool, switch("Print JSON, as always.")] = False,
    storage: StorageFlags = STORAGE,
) -> None:
    """Print what is known of images, containers or layers, as a JSON array.

    The document of an image is Podman's, and has `Layers` besides: where the content of
    each layer comes from.
    """
    if not names:
        raise UsageError("image, container or layer must be specified")
    store = storage.open(read_only=True)
    found: list[dict[str, Any]] = []
    errors: list[LayerstoreError] = []
    for name in names:
        try:
            found.append(_document(store, name, kind))
        except LayerstoreError as error:
            errors.append(error)
    print_json(found)
    finish(errors)


def _document(store: Store, name: str, kind: str) -> dict[str, Any]:
    if kind in ("image", "all"):
        try:
            return describe.image_document(store.image(name))
        except UnknownObject:
            if kind == "image":
                raise
    if kind in ("container", "all"):
        try:
            return describe.container_document(store, store.container(name))
        except UnknownObject:
            if kind == "container":
                raise
    if kind == "layer":
        return describe.layer_document(store.layer(name))
    raise UnknownObject(f'no such object: "{name}"')


def history(
    image: str,
    /,
    *,
    no_trunc: NoTrunc = False,
    noheading: NoHeading = False,
    quiet: Annotated[bool, switch("Print only IDs.", "--quiet", "-q")] = False,
    json: Json = False,
    storage: StorageFlags = STORAGE,
) -> None:
    """Show how an image was made, the newest step first."""
    steps = describe.history(storage.open(read_only=True).image(image))
    if json:
        print_json(
            [
                {
                    "id": step.id,
                    "created": step.created,
                    "CreatedBy": step.created_by,
                    "size": step.size,
                    "comment": step.comment,
                    "tags": step.tags,
                }
                for step in steps
            ]
        )
        return
    rows = []
    for step in steps:
        created_by = step.created_by
        if not no_trunc and len(created_by) > _CREATED_BY:
            created_by = f"{created_by[: _CREATED_BY - 3]}..."
        identity = step.id if no_trunc or step.id == describe.MISSING else short_id(step.id)
        age = human_age(step.created)
        rows.append((identity, age, created_by, human_size(step.size), step.comment))
    if quiet:
        for row in rows:
            print(row[0])
        return
    print_table(("ID", "CREATED", "CREATED BY", "SIZE", "COMMENT"), rows, heading=not noheading)


def tag(
    image: str,
    name: str,
    /,
    *names: str,
    json: Json = False,
    storage: StorageFlags = STORAGE,
) -> None:
    """Give an image further names.

    A NAME that another image has leaves that one.
    """
    wanted = [usage.local_name(one) for one in (name, *names)]
    store = storage.open()
    found = store.image(image)
    store.add_names(found.id, wanted)
    if json:
        _print_names(store.image(found.id))


def untag(image: str, /, *names: str, json: Json = False, storage: StorageFlags = STORAGE) -> None:
    """Take names from an image: all of them, unless NAMES are given.

    The image stays, even without a name.
    """
    store = storage.open()
    found = store.image(image)
    # A name as it is stands first: one that no tool would give any more can be taken away.
    unwanted = [one if one in found.names else usage.local_name(one) for one in names]
    for one, given in zip(unwanted, names, strict=True):
        if one not in found.names:
            raise UnknownObject("the image has no such name", subject=given)
    store.remove_names(found.id, unwanted or found.names)
    if json:
        _print_names(store.image(found.id))


def _print_names(image: Image) -> None:
    print_json({"Id": image.id, "Names": list(image.names)})


def rmi(
    *images: str,
    all_images: Annotated[bool, switch("Remove all images.", "--all", "-a")] = False,
    force: Annotated[
        bool, switch("Remove an image by its ID even if it has several names.", "--force", "-f")
    ] = False,
    ignore: Annotated[
        bool, switch("An image that does not exist is no error.", "--ignore", "-i")
    ] = False,
    quiet: Quiet = False,
    json: Json = False,
    storage: StorageFlags = STORAGE,
) -> None:
    """Remove images, or names of images that have several.

    With an image go the dangling images that only this one was made from.  An image that a
    container uses stays: `podman rm` removes containers.
    """
    if bool(images) == all_images:
        said = "image name or ID must be specified" if not images else "either images or --all"
        raise UsageError(said)
    removal = ImageRemoval(storage.open())
    if all_images:
        removal.remove_all()
    else:
        for image in images:
            removal.remove(image, force=force, ignore=ignore)
    if json:
        print_json({"Untagged": removal.untagged, "Deleted": removal.deleted})
    elif not quiet:
        for name in removal.untagged:
            print(f"Untagged: {name}")
        for identity in removal.deleted:
            print(f"Deleted: {identity}")
    finish(removal.errors)
