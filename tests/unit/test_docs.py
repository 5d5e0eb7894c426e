"""The documents against the code: a code, key, event or option that is not explained fails here."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from cyclopts import App

from layerstore import errors
from layerstore.cli import app
from layerstore.provider import refusal
from layerstore.service import Config
from layerstore.service.config import (
    DiskConfig,
    OrdinaryConfig,
    OutageConfig,
    RegistryConfig,
    RepairConfig,
)

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]


def text(name: str) -> str:
    return (DOCS / name).read_text()


def error_codes(base: type[errors.LayerstoreError]) -> set[str]:
    return {base.code}.union(*(error_codes(each) for each in base.__subclasses__()))


def refusal_codes() -> set[str]:
    return {value for name, value in vars(refusal).items() if name.isupper()}


def events() -> set[str]:
    sources = (ROOT / "src/layerstore").rglob("*.py")
    return {event for path in sources for event in re.findall(r"event=([a-z-]+)", path.read_text())}


def keys() -> list[str]:
    top = [field.encode_name for field in msgspec.structs.fields(Config)]
    tables: dict[str, type[msgspec.Struct]] = {
        "disk": DiskConfig,
        "ordinary": OrdinaryConfig,
        "outage": OutageConfig,
        "registry": RegistryConfig,
        "repair": RepairConfig,
    }
    inner = [
        f"{name}.{field.encode_name}"
        for name, table in tables.items()
        for field in msgspec.structs.fields(table)
    ]
    return [key for key in top if key not in tables] + inner


def test_every_reason_code_is_explained() -> None:
    codes = error_codes(errors.LayerstoreError) | refusal_codes() | {"internal"}
    assert len(codes) > 20
    assert {code for code in codes if f"`{code}`" not in text("troubleshooting.md")} == set()


def test_no_reason_code_is_explained_that_does_not_exist() -> None:
    part = text("troubleshooting.md").partition("## Reason codes")[2].partition("## Read errors")[0]
    cells = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
    explained = {code for cell in cells for code in re.findall(r"`([a-z-]+)`", cell)}
    codes = error_codes(errors.LayerstoreError) | refusal_codes() | {"internal"}
    assert len(explained) > 15
    assert explained - codes == set()


def test_every_event_is_explained() -> None:
    found = events()
    assert "serving" in found
    assert {event for event in found if f"| `{event}` |" not in text("operations.md")} == set()


def test_every_configuration_key_is_explained() -> None:
    assert {key for key in keys() if f"| `{key}` |" not in text("configuration.md")} == set()


def commands(group: App = app, name: str = "") -> dict[str, App]:
    """Every verb with what it is called: "pull", "check storage"."""
    found: dict[str, App] = {}
    for each in group:
        if each.startswith("-"):
            continue
        called = f"{name} {each}".strip()
        inner = commands(group[each], called)
        found |= inner or {called: group[each]}
    return found


def options(verb: App) -> set[str]:
    arguments = verb.assemble_argument_collection()
    return {name for each in arguments for name in each.names if name.startswith("-")}


def section(document: str, title: str) -> str:
    """What stands under a heading of any level, up to the next one that is not below it."""
    found = re.search(rf"^(##+) {re.escape(title)}$", document, re.MULTILINE)
    assert found is not None, title
    rest = document[found.end() :]
    end = re.search(rf"^#{{2,{len(found[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


IN_CONFIGURATION = ("serve", "status", "convert", "unpack")


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_option_is_explained(name: str) -> None:
    verb = name.partition(" ")[0]
    cli = text("cli.md")
    if verb in IN_CONFIGURATION:
        explained = text("configuration.md")
    else:
        explained = section(cli, verb) + section(cli, "Common options")
    assert re.search(rf"^\|.*`{verb}`.*\|", cli, re.MULTILINE)
    found = options(commands()[name])
    assert "--json" in found or verb in ("serve", "save")  # these print no results
    assert {one for one in found if not re.search(rf"`{one}[ `\[]", explained)} == set()


def test_no_option_is_explained_that_does_not_exist() -> None:
    cli = text("cli.md")
    for name, verb in commands().items():
        if name.partition(" ")[0] in IN_CONFIGURATION:
            continue
        alone = f"### {name}\n" in cli
        own = section(cli, name if alone else name.partition(" ")[0])
        cells = [line.split("|")[1] for line in own.splitlines() if line.startswith("| `-")]
        explained = {one for cell in cells for one in re.findall(r"`(--?[a-z][a-z-]*)", cell)}
        assert explained - options(verb) == set(), name


def anchors(path: Path) -> set[str]:
    """The names that headings get on the usual forges."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        file, _, anchor = target.partition("#")
        if "://" in file:
            continue
        other = path if not file else (path.parent / file)
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_prose_fits_the_line(path: Path) -> None:
    long = [
        line
        for line in path.read_text().splitlines()
        if len(line) > 105 and not line.startswith("|")
    ]
    assert long == []
