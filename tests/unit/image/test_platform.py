"""Platforms and what runs where."""

from __future__ import annotations

import pytest

from layerstore.errors import UsageError
from layerstore.image import Platform


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ("x86_64", "linux/amd64"),
        ("aarch64", "linux/arm64/v8"),
        ("armv7l", "linux/arm/v7"),
        ("armv6l", "linux/arm/v6"),
        ("i686", "linux/386"),
        ("riscv64", "linux/riscv64"),
        ("ppc64le", "linux/ppc64le"),
    ],
)
def test_host(machine: str, expected: str) -> None:
    assert str(Platform.host(machine)) == expected


def test_this_machine_runs_its_own_images() -> None:
    assert Platform.host().matches(Platform.host())


@pytest.mark.parametrize(
    ("machine", "image", "runs"),
    [
        ("linux/arm64/v8", "linux/arm64", True),
        ("linux/arm64", "linux/arm64/v8", True),
        ("linux/arm/v7", "linux/arm/v6", True),
        ("linux/arm/v7", "linux/arm", True),
        ("linux/arm/v6", "linux/arm", False),  # without a variant it means v7
        ("linux/arm/v6", "linux/arm/v7", False),
        ("linux/arm64", "linux/arm/v7", False),
        ("linux/amd64", "linux/amd64/v1", True),
        ("linux/amd64/v3", "linux/amd64/v2", True),
        ("linux/amd64", "linux/amd64/v2", False),
        ("linux/amd64", "windows/amd64", False),
        ("linux/arm/v7", "linux/arm/strange", False),
    ],
)
def test_matching(machine: str, image: str, runs: bool) -> None:
    assert Platform.parse(machine).matches(Platform.parse(image)) is runs


def test_the_closest_variant_is_best() -> None:
    host = Platform.parse("linux/arm/v7")
    ranks = [host.rank(Platform.parse(f"linux/arm/{v}")) for v in ("v7", "v6", "v5")]
    assert ranks == [0, 1, 2]


@pytest.mark.parametrize("text", ["", "linux", "linux/", "/amd64", "a/b/c/d", "linux/arm/"])
def test_no_platform(text: str) -> None:
    with pytest.raises(UsageError):
        Platform.parse(text)
