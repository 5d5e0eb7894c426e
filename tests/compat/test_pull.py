"""A pull through the store: what is fetched, by whom, and what is left in the graph root."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import rig as lab
from lab.podman import CommandError, Flavour
from lab.registry import DebianRegistry
from lab.rig import MakeRig, PlainTree, Pushed, Rig, blob_requests

HELLO = "hello from small amd64: 199 files\n"


def test_a_pull_fetches_no_layer_and_a_run_only_what_it_reads(
    flavour: Flavour,
    make_rig: MakeRig,
    small: Pushed,
    record_property: Callable[..., None],
) -> None:
    rig = make_rig(flavour, config="background_fetch = false\n")
    image = rig.image(small.name)
    rig.env.podman("pull", image)
    assert blob_requests(rig.client, small.image) == []
    full = lab.sizes(small.image)
    for request in blob_requests(rig.provider, small.image):
        digest = request.path.rpartition("/")[2]
        # a layer smaller than the first guess for its table of contents comes whole
        assert request.status == 206
        assert request.bytes < full[digest] or full[digest] <= 65536
    pulled = rig.share(small.image)
    assert pulled < 0.05
    assert len(lab.store_layers(rig.env, rig.store)) == len(small.image.layers)

    assert rig.env.podman("run", "--rm", image).stdout == HELLO
    started = rig.share(small.image)
    # busybox is one of 14 megabytes; the 12 of big.bin are not touched
    assert started < 0.2
    assert blob_requests(rig.client, small.image) == []
    record_property("share_at_pull", round(pulled, 4))
    record_property("share_at_start", round(started, 4))
    print(f"share of the blobs fetched: {pulled:.1%} after the pull, {started:.1%} after the run")


def test_a_complete_image_needs_no_registry(
    flavour: Flavour, make_rig: MakeRig, workspace: Path, small: Pushed, plain_tree: PlainTree
) -> None:
    with DebianRegistry(workspace / f"own-{flavour}") as own:
        rig = make_rig(flavour, own.host)
        rig.env.skopeo("copy", "-q", small.image.source, f"docker://{own.host}/{small.name}")
        image = rig.image(small.name)
        rig.env.podman("pull", image)
        rig.service.wait_complete()
        fetched = blob_requests(rig.provider, small.image)
        own.stop()
        rig.provider.clear()
        assert lab.differing(plain_tree(small), lab.image_tree(rig.env, image), seconds=True) == []
        assert rig.env.podman("run", "--rm", image).stdout == HELLO
        saved = workspace / f"saved-{flavour}.tar"
        rig.env.podman("save", "-o", saved, image)
        assert saved.stat().st_size > 12 << 20
        saved.unlink()
        assert rig.provider.requests() == []
        # every byte came once, but for what the first guess at the TOC took twice
        assert sum(request.bytes for request in fetched) <= small.image.compressed_size * 1.05


def test_the_store_logs_and_counts_what_it_served(rig: Rig, small: Pushed) -> None:
    rig.env.podman("pull", rig.image(small.name))
    resolved = re.findall(r"event=lookup-resolved .*dialect=(.)", rig.service.log())
    assert resolved == ["L" if rig.flavour == "debian12" else "T"] * len(small.image.layers)
    status = rig.service.status()
    assert status["lookups"]["resolved"] == len(small.image.layers)
    assert {layer["digest"] for layer in status["layers"]} == set(lab.sizes(small.image))
    assert status["read_errors"] == 0


def test_an_image_that_is_gone_fails_as_ever(rig: Rig) -> None:
    with pytest.raises(CommandError, match=r"manifest unknown|name unknown|not found"):
        rig.env.podman("pull", rig.image("no/such:1"))
