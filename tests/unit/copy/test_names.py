"""Names of images with their transports."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from layerstore.copy.context import CopyContext
from layerstore.copy.names import (
    ImageName,
    open_destination,
    open_source,
    open_storage,
    parse_image_name,
)
from layerstore.errors import InvalidReference, UsageError
from layerstore.image import Digest

DIGEST = f"sha256:{'0' * 64}"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("docker://busybox", ImageName("docker", "busybox")),
        ("oci:/a:b:c", ImageName("oci", "/a:b:c")),
        ("containers-storage:[/r]x", ImageName("containers-storage", "[/r]x")),
    ],
)
def test_names(text: str, name: ImageName) -> None:
    assert parse_image_name(text) == name
    assert str(name) == text


@pytest.mark.parametrize(
    "text", ["", "busybox", "busybox:1", "docker:busybox", "docker://", "dir:", "zip:x"]
)
def test_names_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        parse_image_name(text)


def test_a_digest_in_a_source_says_all(accepting: CopyContext) -> None:
    with closing(open_source(f"docker://x/y:1@{DIGEST}", accepting)) as source:
        assert (
            str(source.reference)
            == str(source.identity)
            == f"x/y@{DIGEST}".replace("x/y", "docker.io/x/y")
        )
    with closing(open_destination(f"docker://x/y@{DIGEST}", accepting)) as destination:
        assert destination.digest == Digest(DIGEST)


@pytest.mark.parametrize(
    "text",
    [
        f"docker://x/y:1@{DIGEST}",
        "oci:d:@0",
        "oci-archive:d:@0",
        f"docker-archive:d:x@{DIGEST}",
        "containers-storage:x",
    ],
)
def test_destinations_that_are_none(text: str, accepting: CopyContext, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        open_destination(text, accepting)


@pytest.mark.parametrize("rest", ["[", "[relative]x", "[@/r]x"])
def test_storages_that_are_none(rest: str, accepting: CopyContext) -> None:
    with pytest.raises(InvalidReference):
        open_storage(rest, accepting)
