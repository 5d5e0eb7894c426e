"""Ids of layers and images against those that real tools gave."""

import hashlib

import pytest

from layerstore.errors import UsageError
from layerstore.graphroot.identity import image_id, layer_id, released_image_id
from layerstore.image import Digest

# Observed with Podman 4.3.1 and 5.4.2.
BASE = Digest.parse("sha256:d5c0a8a6152d9e59c914788fe4033abdce63bd09b9dd39b5510b1b079f9709b0")
CHILD = Digest.parse("sha256:7ab711899c5db24cc9457355e9dc5db9eb9bc9d4f6fbf173e158645e3821c172")
GRANDCHILD = Digest.parse("sha256:518f5c15dda83839bf2aa7ce9f61658d690d0e2c4865739285335a1adbbdba84")
CHILD_ID = "ba53b6f39276cbbdb32249067217f0a99ce888f855082b9cbbffc8edfbd4b7d4"
GRANDCHILD_ID = "2e4cf1ff062eaef336042294f3f1bd56ed080990d6ead3ad00c07bfd1dd15b40"
TOC = Digest.of(b"a table of contents")
CONFIG = Digest.of(b"a config")


def test_layers_known_by_their_diff_id() -> None:
    assert layer_id("", diff_id=BASE) == BASE.hex
    assert layer_id(BASE.hex, diff_id=CHILD) == CHILD_ID
    assert layer_id(CHILD_ID, diff_id=GRANDCHILD) == GRANDCHILD_ID


@pytest.mark.parametrize("parent", ["", CHILD_ID])
def test_layers_known_by_their_toc(parent: str) -> None:
    expected = hashlib.sha256(f"{parent}+@TOC={TOC.hex}".encode()).hexdigest()
    assert layer_id(parent, toc_digest=TOC) == expected


@pytest.mark.parametrize("parent", ["", CHILD_ID])
def test_a_toc_never_answers_for_a_diff_id(parent: str) -> None:
    assert layer_id(parent, toc_digest=TOC) != layer_id(parent, diff_id=TOC)


def test_a_layer_is_known_by_one_of_both() -> None:
    with pytest.raises(UsageError):
        layer_id("")
    with pytest.raises(UsageError):
        layer_id("", diff_id=BASE, toc_digest=TOC)


def test_an_image_is_named_after_its_config() -> None:
    assert image_id(CONFIG) == CONFIG.hex
    assert image_id(CONFIG, [None, None]) == CONFIG.hex


def test_an_image_with_a_toc_layer_is_named_after_config_and_tables() -> None:
    text = f"@With TOC:{CONFIG.hex}||{TOC}|"
    assert image_id(CONFIG, [None, TOC]) == hashlib.sha256(text.encode()).hexdigest()
    # what released versions get wrong: another config, the same image
    assert image_id(Digest.of(b"another"), [None, TOC]) != image_id(CONFIG, [None, TOC])


def test_the_formula_of_released_versions_is_recognised() -> None:
    expected = hashlib.sha256(f"@With TOC:|{TOC}|".encode()).hexdigest()
    assert released_image_id([None, TOC]) == expected
    with pytest.raises(UsageError):
        released_image_id([None])
