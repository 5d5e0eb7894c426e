"""What short names stand for, and the keys of registries.conf that say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerstore.errors import ConfigError, InvalidReference, UsageError
from layerstore.image import Reference
from layerstore.registry import RegistriesConf
from layerstore.registry.registriesconf import load, parse
from layerstore.registry.shortnames import alias_file, candidates, is_short

DIGEST = "sha256:" + "a" * 64


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "registries.conf").write_text(
        'unqualified-search-registries = ["docker.io", "quay.example:5000"]\n'
        '[aliases]\n"alpine" = "first.example/alpine"\n"hub" = "docker.io/hub"\n'
        '"a/b" = "first.example/x"\n'
    )
    (tmp_path / "d").mkdir()
    (tmp_path / "d/1.conf").write_text('[aliases]\n"alpine" = "second.example/alpine"\n')
    (tmp_path / "d/2.conf").write_text('[aliases]\n"a/b" = ""\n')
    return tmp_path


def conf(files: Path) -> RegistriesConf:
    return load(files / "registries.conf", [files / "d"])


def names(text: str, files: Path, *alias_files: Path) -> list[str]:
    return [str(each) for each in candidates(text, conf(files), alias_files)]


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("alpine", True),
        ("alpine:3", True),
        (f"alpine@{DIGEST}", True),
        ("library/alpine", True),
        ("HOST/alpine", True),
        ("docker.io/alpine", False),
        ("localhost/alpine", False),
        ("localhost", True),
        ("host:5000/alpine", False),
    ],
)
def test_short_means_without_a_registry(text: str, short: bool) -> None:
    assert is_short(text) is short


def test_aliases_beat_the_search_and_later_files_win(files: Path) -> None:
    assert names("alpine", files) == ["second.example/alpine:latest"]
    assert names("alpine:3", files) == ["second.example/alpine:3"]
    assert names(f"alpine@{DIGEST}", files) == [f"second.example/alpine@{DIGEST}"]
    assert names("hub", files) == ["docker.io/library/hub:latest"]


def test_an_alias_taken_away_leaves_the_search(files: Path) -> None:
    assert names("a/b", files) == ["docker.io/a/b:latest", "quay.example:5000/a/b:latest"]


def test_the_users_own_aliases_come_first(files: Path) -> None:
    own = files / "short-name-aliases.conf"
    own.write_text('[aliases]\n"alpine" = "own.example/alpine"\n"hub" = ""\n')
    assert names("alpine", files, files / "missing", own) == ["own.example/alpine:latest"]
    assert names("hub", files, own)[0] == "docker.io/library/hub:latest"
    assert len(names("hub", files, own)) == 2


def test_a_full_name_stands_for_itself(files: Path) -> None:
    assert names("docker.io/alpine", files) == ["docker.io/library/alpine:latest"]
    assert names("localhost/x:1", files) == ["localhost/x:1"]
    assert names(f"h.example/x:1@{DIGEST}", files) == [f"h.example/x@{DIGEST}"]


def test_without_alias_and_search_the_name_means_nothing(tmp_path: Path) -> None:
    main = tmp_path / "registries.conf"
    main.write_text("unqualified-search-registries = []\n")
    with pytest.raises(UsageError, match=f"defined in {main}"):
        candidates("alpine", load(main))


def test_enforcing_refuses_to_choose_and_says_between_what(files: Path) -> None:
    (files / "d/3.conf").write_text('short-name-mode = "enforcing"\n')
    with pytest.raises(UsageError, match=r"docker\.io/library/x:latest, quay\.example"):
        candidates("x", conf(files))
    assert names("alpine", files) == ["second.example/alpine:latest"]
    (files / "d/4.conf").write_text('unqualified-search-registries = ["one.example"]\n')
    assert names("x", files) == ["one.example/x:latest"]
    (files / "d/5.conf").write_text('short-name-mode = "disabled"\n')
    assert conf(files).short_name_mode == "disabled"


@pytest.mark.parametrize("text", ["UPPER", "", "a b", "x:", "x@sha256:1"])
def test_no_reference_at_all(files: Path, text: str) -> None:
    with pytest.raises(InvalidReference):
        candidates(text, conf(files))


def test_a_search_host_that_is_none(tmp_path: Path) -> None:
    main = tmp_path / "registries.conf"
    main.write_text('unqualified-search-registries = ["hub"]\n')
    with pytest.raises(ConfigError, match="'hub' is no registry"):
        candidates("alpine", load(main))


@pytest.mark.parametrize(
    "text",
    [
        'short-name-mode = "strict"',
        '[aliases]\n"a.b/c" = "h.example/c"',
        '[aliases]\n"c:1" = "h.example/c"',
        '[aliases]\n"c" = "h.example/c:1"',
        f'[aliases]\n"c" = "h.example/c@{DIGEST}"',
        '[aliases]\n"c" = "d/c"',
        '[aliases]\n"c" = "h.example/C"',
        "[aliases]\nc = 1",
        'credential-helpers = "one"',
    ],
)
def test_broken_keys(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(text)


def test_helpers_are_replaced_as_a_whole(files: Path) -> None:
    assert conf(files).credential_helpers == ("containers-auth.json",)
    (files / "d/3.conf").write_text(
        'credential-helpers = ["one", "two"]\nadditional-layer-store-auth-helper = "/h"\n'
    )
    (files / "d/4.conf").write_text('additional-layer-store-auth-helper = ""\n')
    assert conf(files).credential_helpers == ("one", "two")
    assert conf(files).auth_helper == "/h"
    (files / "d/5.conf").write_text("credential-helpers = []\n")
    assert conf(files).credential_helpers == ("containers-auth.json",)


def test_where_podman_keeps_chosen_aliases() -> None:
    name = "containers/short-name-aliases.conf"
    assert alias_file({"XDG_CACHE_HOME": "/c"}, Path("/h"), 0) == Path("/var/cache") / name
    assert alias_file({"XDG_CACHE_HOME": "/c"}, Path("/h"), 7) == Path("/c") / name
    assert alias_file({}, Path("/h"), 7) == Path("/h/.cache") / name
    assert alias_file({}, None, 7) is None


def test_the_references_are_values_to_pull(files: Path) -> None:
    assert candidates("alpine", conf(files)) == (Reference.parse("second.example/alpine"),)
