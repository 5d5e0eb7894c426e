"""What `import layerstore` offers, and what it does not load."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import layerstore
from lab import oci, tars

DOCS = Path(__file__).resolve().parents[2] / "docs"


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
    found = {name for name in modules if name.startswith("layerstore")}
    assert found == {"layerstore", "layerstore.lazy"}
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
    assert not modules & {"layerstore.provider", "layerstore.copy", "msgspec"}
    modules = loaded_after("import layerstore.cli.images")
    assert "layerstore.graphroot" in modules
    assert not modules & {"layerstore.copy", "layerstore.fuse", "layerstore.service", "urllib3"}
    modules = loaded_after("import layerstore.cli.pull")  # a lazy pull is over before it needs them
    assert "layerstore.registry" in modules
    assert not modules & {
        *(f"layerstore.copy.{name}" for name in ("dockerarchive", "ocilayout", "gpg", "signedby")),
        *(f"layerstore.graphroot.{name}" for name in ("stage", "extract", "export", "deletion")),
        *("layerstore.formats.tarstream", "tarfile", "rich.progress"),
    }
    modules = loaded_after(
        "import layerstore.cli.fetch"
    )  # where a service runs, that does the work
    assert "layerstore.service.fetching" in modules
    assert not modules & {"layerstore.provider.store", "layerstore.content.objects", "urllib3"}


def test_the_keeper_stays_small_and_the_server_has_all() -> None:
    modules = loaded_after("import layerstore.service.keeper")
    assert "layerstore.fuse.mount" in modules
    rooms = ("provider", "content", "registry", "graphroot", "layertree", "formats", "copy", "cli")
    assert not modules & {f"layerstore.{room}" for room in rooms}
    assert not modules & {"msgspec", "urllib3", "sqlite3", "ssl", "rich", "asyncio"}
    modules = loaded_after("import layerstore.service.server")
    assert "layerstore.provider" in modules
    assert not modules & {"layerstore.copy", "layerstore.cli"}


def test_the_examples_of_the_documents_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = io.BytesIO()
    tars.write_tar(out, [tars.directory(b"etc"), tars.regular(b"etc/hosts", b"localhost\n")])
    layer = oci.LayerSource(out.getvalue())
    image = oci.write_image(tmp_path / "alpine", "3", [layer], oci.RunConfig())
    policy = tmp_path / ".config/containers/policy.json"
    policy.parent.mkdir(parents=True)
    policy.write_text(json.dumps({"default": [{"type": "insecureAcceptAnything"}]}))
    conf = tmp_path / "storage.conf"
    conf.write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{tmp_path}/graph"\nrunroot = "{tmp_path}/run"\n'
    )
    monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(conf))
    monkeypatch.setenv("HOME", str(tmp_path))
    places = {
        "docker.io/library/alpine:3": f"oci:{image.layout}:3",  # no network in unit tests
        "oci:/srv/layout:mine": f"oci:{tmp_path}/layout:mine",
        "/srv/root": f"{tmp_path}/private",
        "/run/mine": f"{tmp_path}/private-run",
    }
    for document in (DOCS / "python-api.md", DOCS.parent / "README.md"):
        text = document.read_text()
        for place, ours in places.items():
            text = text.replace(place, ours)
        examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert examples
        names: dict[str, object] = {}
        for example in examples:
            exec(compile(example, document.name, "exec"), names)
    said = capsys.readouterr().out
    assert f"{image.layers[0].digest} {image.layers[0].size} pulled" in said
    assert "('localhost/mine:1',)" in said
    assert oci.read_image(tmp_path / "layout", "mine").layers[0].diff_id == image.layers[0].diff_id
