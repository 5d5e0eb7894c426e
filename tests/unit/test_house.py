"""The house rules that a reader cannot see at a glance: who imports whom, and how long a file is."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "layerstore"

# From the ground up. A room imports itself and rooms on lower floors.
FLOORS = (
    ("errors", "lazy", "limits", "turns"),
    ("image",),
    ("formats",),
    ("registry",),
    ("content",),
    ("layertree",),
    ("provider",),
    ("fuse",),
    ("graphroot",),
    ("service",),
    ("copy",),
    ("cli",),
    ("__init__", "__main__"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Provider and consumer meet in service and cli only.
STRANGERS = {
    "provider": {"graphroot", "copy"},
    "graphroot": {"provider", "fuse"},
    "copy": {"provider", "fuse", "service"},
}
LONGEST = 500
# Path from the checkout: why it is one piece.
LONG_FOR_A_REASON = {
    "lab/simregistry.py": "one simulator of one remote: its handlers share one state and one log",
    "src/layerstore/fuse/session.py": "one request loop: the opcodes are one protocol",
}


def room_of(module: str) -> str | None:
    """ "layerstore.image.digest" -> "image"; None for modules of others."""
    names = module.split(".")
    if names[0] != "layerstore":
        return None
    return names[1] if len(names) > 1 else "__init__"


def imported_modules(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute module name) of every import, wherever in the file it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                kept = len(parts) - node.level + (1 if is_package else 0)
                base = ".".join([*parts[:kept], *([node.module] if node.module else [])])
            if base == "layerstore":  # from layerstore import limits
                for alias in node.names:
                    yield node.lineno, f"{base}.{alias.name}"
            else:
                yield node.lineno, base


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What a module of ours imports against the rules, as sentences with line numbers."""
    room = room_of(module)
    assert room is not None
    if room not in FLOOR:
        return [f"{module}: the room {room!r} has no floor in FLOORS"]
    found = []
    for line, name in imported_modules(source, module, is_package):
        other = room_of(name)
        if other is None or other == room:
            continue
        if name.split(".")[0] == "layerstore" and other not in FLOOR:
            if other.startswith("_"):  # from layerstore import __version__
                continue
            found.append(f"{module}:{line}: imports {name}, a room without a floor")
        elif other == "__init__":
            found.append(f"{module}:{line}: imports the package itself")
        elif FLOOR[other] > FLOOR[room]:
            found.append(f"{module}:{line}: imports {name} from a floor above")
        elif other in STRANGERS.get(room, ()):
            found.append(f"{module}:{line}: imports {name}: provider and consumer do not meet here")
    return found


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        names = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found.append((".".join(names).removesuffix(".__init__"), path))
    return found


def too_long(lines: dict[str, int], allowed: dict[str, str]) -> list[str]:
    """Files over the limit without a reason, and reasons no longer needed."""
    long = {path for path, count in lines.items() if count > LONGEST}
    return [f"{path}: over {LONGEST} lines" for path in sorted(long - set(allowed))] + [
        f"{path}: listed as long, but is not" for path in sorted(set(allowed) - long)
    ]


def test_rooms_import_only_from_floors_below() -> None:
    found = [
        problem
        for module, path in modules()
        for problem in violations(path.read_text(), module, is_package=path.name == "__init__.py")
    ]
    assert found == []


def test_no_module_is_long_without_a_reason() -> None:
    paths = [path for top in ("src", "lab", "benchmarks") for path in (ROOT / top).rglob("*.py")]
    assert paths
    lines = {str(path.relative_to(ROOT)): len(path.read_bytes().splitlines()) for path in paths}
    assert too_long(lines, LONG_FOR_A_REASON) == []


def test_every_package_of_the_house_stands_on_a_floor() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms <= set(FLOOR)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("layerstore.image.digest", "from layerstore.formats import toc"),
        ("layerstore.image.digest", "from layerstore import registry"),
        ("layerstore.image.digest", "import layerstore.cli.main"),
        ("layerstore.image.digest", "from ..registry.client import RegistryClient"),
        ("layerstore.image.digest", "def late() -> None:\n    from layerstore import service"),
        (
            "layerstore.image.digest",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import layerstore.copy",
        ),
        ("layerstore.provider.names", "from layerstore.graphroot import layers"),
        ("layerstore.provider.names", "from layerstore.copy.pull import pull"),
        ("layerstore.graphroot.layers", "from layerstore.provider import names"),
        ("layerstore.copy.pull", "from layerstore.provider.names import parse"),
        ("layerstore.errors", "from layerstore.image import Digest"),
        ("layerstore.attic.box", "import json"),
        ("layerstore.cli.main", "from layerstore.attic import box"),
        ("layerstore.image.digest", "import layerstore"),
    ],
)
def test_the_checker_finds_a_forbidden_import(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source", "is_package"),
    [
        ("layerstore.formats.toc", "from layerstore.image import Digest", False),
        ("layerstore.formats.toc", "from layerstore import limits, errors", False),
        ("layerstore.formats.toc", "from .footer import Footer", False),
        ("layerstore.formats", "from .footer import Footer", True),
        ("layerstore.formats.toc", "import json, urllib3.util", False),
        ("layerstore.service.daemon", "from layerstore.graphroot import layers", False),
        ("layerstore.service.daemon", "from layerstore.provider import names", False),
        ("layerstore.cli.main", "from layerstore import __version__", False),
    ],
)
def test_the_checker_lets_a_lawful_import_pass(module: str, source: str, is_package: bool) -> None:
    assert violations(source, module, is_package=is_package) == []


def test_the_checker_of_lengths_finds_both_kinds_of_fault() -> None:
    assert too_long({"a.py": 501, "b.py": 500}, {}) == ["a.py: over 500 lines"]
    assert too_long({"a.py": 501}, {"a.py": "one grammar"}) == []
    assert too_long({"b.py": 10}, {"b.py": "was long"}) == ["b.py: listed as long, but is not"]
