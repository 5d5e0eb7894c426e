"""Which layers an overlay mount stands on."""

import os
from pathlib import Path

import pytest

from layerstore.graphroot.lowers import layer_ids, layer_ids_in

LAYER = "a" * 64


@pytest.mark.parametrize(
    ("parent", "here"),
    [
        ("{ours}", True),
        ("{link}", True),
        ("{other}", False),
        ("/not/to/be/seen/from/here", True),  # of another mount namespace, perhaps
        ("..", True),
    ],
)
def test_only_a_directory_that_is_seen_to_be_another_is_elsewhere(
    tmp_path: Path, parent: str, here: bool
) -> None:
    ours, other, link = (tmp_path / name for name in ("ours", "other", "link"))
    ours.mkdir()
    other.mkdir()
    link.symlink_to(ours)
    place = parent.format(ours=ours, other=other, link=link)
    line = os.fsencode(f"overlay rw,lowerdir={place}/{LAYER}/diff:l/{'A' * 26},workdir=w")
    assert layer_ids(line) == [LAYER.encode()]
    assert layer_ids_in(line, ours) == ([LAYER.encode()] if here else [])
