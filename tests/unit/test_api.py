"""What `import layerstore` offers, and what it does not load."""

from __future__ import annotations

import subprocess
import sys

import pytest

import layerstore


def loaded_after(statement: str) -> set[str]:
    """The modules of ours and the parts of others that a fresh interpreter then has."""
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("name", layerstore.__all__)
def test_every_name_is_there_and_explained(name: str) -> None:
    found = getattr(layerstore, name)
    assert found.__name__ == name
    assert found.__doc__
    assert name in dir(layerstore)


def test_every_home_is_named() -> None:
    assert sorted(layerstore.__all__) == list(layerstore.__all__) == sorted(layerstore._HOMES)


def test_other_names_are_errors() -> None:
    with pytest.raises(AttributeError, match="pulll"):
        getattr(layerstore, "pulll")  # noqa: B009 - mypy knows that it is not there


def test_importing_the_package_loads_nothing_else() -> None:
    modules = loaded_after("import layerstore")
    assert {name for name in modules if name.startswith("layerstore")} == {"layerstore"}
    assert "msgspec" not in modules


def test_a_verb_loads_what_it_needs() -> None:
    modules = loaded_after(
        "from layerstore.cli import main\ntry: main(['--version'])\nexcept SystemExit: pass"
    )
    assert "layerstore.cli" in modules
    rooms = ("image", "registry", "graphroot", "copy", "fuse", "service")
    assert not modules & {f"layerstore.{room}" for room in rooms}
    assert "msgspec" not in modules
    modules = loaded_after("import layerstore.cli.serve")
    assert "layerstore.fuse" in modules
    assert "layerstore.copy" not in modules
    modules = loaded_after("import layerstore.cli.images")
    assert "layerstore.graphroot" in modules
    assert not modules & {"layerstore.copy", "layerstore.fuse", "layerstore.service", "urllib3"}
