from pathlib import Path

import pytest

from layerstore.errors import InvalidReference
from layerstore.graphroot.location import StorageLocation, parse_storage_name
from layerstore.graphroot.storageconf import LayerStoreSpec


@pytest.mark.parametrize("name", ["", "alpine", "localhost/a:1", "@abc", "a[b]"])
def test_without_brackets_all_is_the_name(name: str) -> None:
    assert parse_storage_name(name) == (None, name)


@pytest.mark.parametrize(
    ("text", "location", "name"),
    [
        (
            "[overlay@/g+/r:overlay.mountopt=nodev,a=/x:ref]quay.io/a@sha256:b",
            StorageLocation(
                "overlay", Path("/g"), Path("/r"), ("overlay.mountopt=nodev", "a=/x:ref")
            ),
            "quay.io/a@sha256:b",
        ),
        ("[/g]a", StorageLocation("", Path("/g")), "a"),
        ("[/g+/r]", StorageLocation("", Path("/g"), Path("/r")), ""),
        ("[+/r]a", StorageLocation("", None, Path("/r")), "a"),
        ("[overlay@/g:]@abc", StorageLocation("overlay", Path("/g")), "@abc"),
        ("[overlay@:x=y]a", StorageLocation("overlay", options=("x=y",)), "a"),
    ],
)
def test_brackets(text: str, location: StorageLocation, name: str) -> None:
    assert parse_storage_name(text) == (location, name)
    assert parse_storage_name(f"{location}{name}") == (location, name)


@pytest.mark.parametrize("text", ["[", "[]a", "[/g", "[@/g]a", "[overlay@]a", "[g]a", "[/g+r]a"])
def test_broken_brackets(text: str) -> None:
    with pytest.raises(InvalidReference):
        parse_storage_name(text)


def test_the_rest_comes_from_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = tmp_path / "storage.conf"
    conf.write_text(
        '[storage]\ndriver="overlay"\ngraphroot="/g"\nrunroot="/r"\n'
        '[storage.options]\nadditionallayerstores=["/conf:ref"]\n'
    )
    monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(conf))
    for name in ("STORAGE_OPTS", "STORAGE_DRIVER", "CONTAINERS_STORAGE_CONF_OVERRIDE"):
        monkeypatch.delenv(name, raising=False)
    location, _ = parse_storage_name("[overlay@/other:overlay.additionallayerstore=/x:ref]a")
    assert location is not None
    config = location.config()
    assert (config.graph_root, config.run_root) == (Path("/other"), Path("/r"))
    assert config.additional_layer_stores == (LayerStoreSpec(Path("/x"), True),)
    assert StorageLocation("", None, Path("/z")).config().additional_layer_stores == (
        LayerStoreSpec(Path("/conf"), True),
    )
