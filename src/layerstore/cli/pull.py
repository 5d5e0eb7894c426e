"""``layerstore pull``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from layerstore import limits
from layerstore.cli.common import (
    REGISTRY,
    STORAGE,
    Json,
    Quiet,
    RegistryFlags,
    StorageFlags,
    finish,
    option,
    print_json,
    switch,
)
from layerstore.copy.policy import Policy
from layerstore.copy.progress import listener
from layerstore.copy.pull import PullOptions, When, registry_host
from layerstore.copy.pull import pull as pull_image
from layerstore.copy.storage_destination import PullResult
from layerstore.errors import LayerstoreError, UsageError
from layerstore.graphroot.published import Published, client_roots
from layerstore.image import Platform


def pull(
    name: str,
    /,
    *more: str,
    policy: Annotated[
        When, option("What an image of that name in the storage changes.", "--policy")
    ] = When.ALWAYS,
    platform: Annotated[str | None, option("os/architecture[/variant] [this machine's].")] = None,
    signature_policy: Annotated[Path | None, option("policy.json to judge images by.")] = None,
    no_layer_stores: Annotated[bool, switch("Ask no additional layer stores.")] = False,
    toc_layers: Annotated[
        bool | None,
        Parameter(help="Allow layers known by their TOC only [if Podman is 5.0 or newer]."),
    ] = None,
    dialect_l: Annotated[
        bool, switch("Ask layer stores by blob digest too, and believe them unchecked.")
    ] = False,
    parallel: Annotated[
        int, option("Layers on their way at once.", "--parallel")
    ] = limits.PULL_PARALLEL,
    client: Annotated[
        tuple[Path, ...],
        option("With --store: a graph root whose containers use the store; may be repeated."),
    ] = (),
    quiet: Quiet = False,
    json: Json = False,
    registry: RegistryFlags = REGISTRY,
    storage: StorageFlags = STORAGE,
) -> None:
    """Pull images into local storage, as far as their layers are not there already.

    NAME is a name such as docker.io/library/alpine:3, or TRANSPORT:NAME.  Prints the IDs.
    """
    if storage.store is not None:
        directory = storage.store.absolute()
        Published.publish(directory, (*client_roots(directory), *client))
    elif client:
        raise UsageError("--client goes with --store")
    store = storage.open()
    wanted = None if platform is None else Platform.parse(platform)
    judged_by = None if signature_policy is None else Policy.load(signature_policy)
    errors: list[LayerstoreError] = []
    reports: list[dict[str, Any]] = []
    for text in (name, *more):
        try:
            with listener(quiet=quiet) as shown:
                options = PullOptions(
                    when=policy,
                    platform=wanted,
                    registry=registry.settings(host=registry_host(text)),
                    policy=judged_by,
                    layer_stores=not no_layer_stores,
                    toc_layers=toc_layers,
                    dialect_l=dialect_l,
                    parallel=parallel,
                    listener=shown,
                )
                result = pull_image(text, store, options)
        except LayerstoreError as error:
            errors.append(error)
            continue
        if json:
            reports.append(_report(text, result))
        else:
            print(result.image_id, flush=True)
    if store.published is not None:
        from layerstore.graphroot import deletion  # noqa: PLC0415

        deletion.retire(store)
    if json:
        print_json(reports)
    finish(errors)


def _report(text: str, result: PullResult) -> dict[str, Any]:
    return {
        "name": text,
        "id": result.image_id,
        "digest": result.digest,
        "manifestDigest": result.manifest_digest,
        "names": result.names,
        "layers": [
            {
                "digest": layer.digest,
                "diffId": layer.diff_id,
                "size": layer.size,
                "how": layer.how,
                "id": layer.layer_id,
            }
            for layer in result.layers
        ],
        "layerStoreMisses": result.misses,
    }
