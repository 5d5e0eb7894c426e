"""`layerstore check cache` where no service runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from layerstore.cli import main

FILES = [{"a": b"a" * 5000, "b": b"b" * 300}]


@pytest.fixture
def root(asker, publisher, registry, tmp_path: Path) -> Path:
    image = publisher.push("app", "1", FILES)
    view = asker.view(f"{registry.host}/app:1", image.layers[0].toc_digest)
    assert asker.read(view, "a") == FILES[0]["a"]
    assert asker.read(view, "b") == FILES[0]["b"]
    asker.store.close()
    (tmp_path / "empty.toml").write_text("")
    return Path(asker.root)


def run(root: Path, capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = 0
    config = str(root.parent / "empty.toml")
    try:
        main(["check", "cache", "--root", str(root), "--config", config, *arguments])
    except SystemExit as ended:
        status = int(ended.code or 0)
    out, err = capfd.readouterr()
    return status, out, err


def test_damage_is_told_and_repaired(root: Path, capfd):
    status, out, _ = run(root, capfd)
    assert status == 0
    assert out.startswith("1 layers, 2 objects, ")
    assert out.endswith(" bytes: 0 to repair, 0 repaired\n")
    damaged = sorted(root.glob("content/objects/*/*"))[0]
    size = damaged.stat().st_size
    damaged.write_bytes(b"x" * size)
    name = damaged.parent.name + damaged.name
    status, out, err = run(root, capfd)
    assert status == 1
    assert out.splitlines()[0] == (
        f"object: {name}: its bytes do not have the digest that is its name"
    )
    assert "1 to repair, 0 repaired" in out
    status, out, err = run(root, capfd, "--repair", "--json")
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert document["clean"]
    assert document["findings"] == [
        {
            "kind": "object",
            "subject": name,
            "detail": "its bytes do not have the digest that is its name",
            "repaired": "removed, to be made anew",
        }
    ]
    assert not damaged.exists()
    assert run(root, capfd, "--quiet") == (0, "", "")


def test_a_directory_that_is_no_store_is_an_error(tmp_path: Path, capfd):
    (tmp_path / "empty.toml").write_text("")
    status, _, err = run(tmp_path / "absent", capfd)
    assert status == 1
    assert "no store is here" in err
    assert not (tmp_path / "absent").exists()
